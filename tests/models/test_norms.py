"""Families whose norms run in the kernel that adds and norms: how often it runs, and the numbers of XLA's path."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import mosaic_gpu as plgpu

from jpaged.models import fuse_norms, load_config, random_model
from jpaged.models.layers import common
from jpaged.models.layers.common import RMSNorm
from jpaged.sharding import make_mesh
from pallas_kernels.norm.hopper import add_rms_norm_hopper
from tests.support.oracles import HF_REFERENCE, dense_attend

NUM_TOKENS, NUM_LAYERS = 5, 2


def model_of(case: str) -> nnx.Module:
    """A model of a family, whose rows the kernel takes and whose norms differ from feature to feature."""
    config = load_config(HF_REFERENCE / case)
    windows = {"sliding_windows": given[:NUM_LAYERS]} if (given := getattr(config, "sliding_windows", ())) else {}
    config = replace(config, hidden_size=256, num_layers=NUM_LAYERS, **windows)
    model = random_model(config, "bfloat16", make_mesh(), 0)
    for index, (_, module) in enumerate(nnx.iter_modules(model)):
        if isinstance(module, RMSNorm):
            noise = jax.random.normal(jax.random.key(index), module.scale.shape)
            module.scale[...] += (0.5 * noise).astype(jnp.bfloat16)
    return model


def hidden_states(model: nnx.Module) -> np.ndarray:
    tokens = jnp.arange(1, NUM_TOKENS + 1, dtype=jnp.int32)
    positions = jnp.arange(NUM_TOKENS, dtype=jnp.int32)
    return np.asarray(model(tokens, positions, jnp.full_like(tokens, NUM_TOKENS), dense_attend()), np.float32)


@pytest.mark.parametrize(
    ("case", "num_calls", "is_normed", "multiplier"),
    [
        ("llama_gqa", 2 * NUM_LAYERS, False, 1.0),
        ("gemma2", 2 * NUM_LAYERS, True, 1.0),
        ("gemma3", 2 * NUM_LAYERS, True, 1.0),
        ("granite", 2 * NUM_LAYERS, False, load_config(HF_REFERENCE / "granite").residual_multiplier),
        ("olmo2", 1, True, 1.0),  # before the logits; its layers norm no sums
    ],
)
def test_the_kernel_does_what_a_family_does_between_two_parts(case, num_calls, is_normed, multiplier, monkeypatch):
    calls = []

    def watched(x, branch, scale, spec, **options):
        calls.append((options["branch_scale"] is not None, options["multiplier"]))
        return add_rms_norm_hopper(x, branch, scale, spec, **options, interpret=plgpu.InterpretGPUParams())

    monkeypatch.setattr(common, "FUSED_NORM_FROM", NUM_TOKENS)
    model = model_of(case)
    expected = hidden_states(model)
    fuse_norms(model, watched)
    found = hidden_states(model)
    assert calls == [(is_normed, multiplier)] * num_calls
    assert np.abs(found - expected).max() < 0.03 * np.abs(expected).max()
