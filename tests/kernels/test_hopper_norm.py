"""The Hopper kernel that adds and norms, in Pallas's interpreter, watched for races, against numpy."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import mosaic_gpu as plgpu

from jpaged.models import fuse_norms
from jpaged.models.layers import common as layers
from jpaged.models.layers.common import FUSED_NORM_FROM, RMSNorm
from pallas_kernels.norm import why_not_add_norm
from pallas_kernels.norm.hopper import add_rms_norm_hopper

pytestmark = pytest.mark.usefixtures("no_races")

WATCHED = plgpu.InterpretGPUParams(detect_races=True)
EPSILON = 0.25  # large enough to be missed


def random_rows(num_tokens: int, num_features: int, dtype) -> list:
    rng = np.random.default_rng(0)
    shapes = (num_tokens, num_features), (num_tokens, num_features), (num_features,)
    return [jnp.asarray(rng.standard_normal(shape, np.float32)).astype(dtype) for shape in shapes]


@pytest.mark.parametrize(
    ("num_tokens", "num_features", "dtype"), [(1, 1024, jnp.bfloat16), (5, 2048, jnp.float16), (3, 5120, jnp.bfloat16)]
)
def test_sum_and_norm_of_every_row(num_tokens, num_features, dtype):
    x, branch, scale = random_rows(num_tokens, num_features, dtype)
    total, normed = add_rms_norm_hopper(x, branch, scale, EPSILON, interpret=WATCHED)
    assert total.dtype == normed.dtype == dtype
    np.testing.assert_array_equal(np.asarray(total), np.asarray(x + branch))
    wide = np.asarray(total, np.float64)
    expected = wide / np.sqrt(np.mean(wide**2, axis=-1, keepdims=True) + EPSILON) * np.asarray(scale, np.float64)
    # Rounded twice, before and after the scale.
    np.testing.assert_allclose(np.asarray(normed, np.float64), expected, rtol=1.5 * float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize(
    ("num_features", "dtype", "reason"),
    [(1024, jnp.float32, "float32"), (1000, jnp.bfloat16, "multiple of 1024"), (16384, jnp.bfloat16, "at most 8192")],
)
def test_rows_it_cannot_take_are_refused_with_the_reason(num_features, dtype, reason):
    assert reason in why_not_add_norm(num_features, jnp.dtype(dtype))
    with pytest.raises(NotImplementedError, match=reason):
        add_rms_norm_hopper(*random_rows(1, num_features, dtype), EPSILON, interpret=WATCHED)


def test_without_the_device_it_says_so():
    with pytest.raises(NotImplementedError, match="plain JAX"):
        add_rms_norm_hopper(*random_rows(1, 1024, jnp.bfloat16), EPSILON)


def test_a_model_uses_it_for_large_steps_of_rows_that_it_takes(monkeypatch):
    calls = []

    def watched(x, branch, scale, epsilon):
        calls.append(x.shape)
        return add_rms_norm_hopper(x, branch, scale, epsilon, interpret=plgpu.InterpretGPUParams())

    monkeypatch.setattr(layers, "add_rms_norm", watched)
    model = nnx.List([RMSNorm(size, EPSILON, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)) for size in (1024, 1000)])
    plain = nnx.clone(model)
    fuse_norms(model)
    for norm, same in zip(model, plain, strict=True):
        for num_tokens in (FUSED_NORM_FROM - 1, FUSED_NORM_FROM):
            x, branch, scale = random_rows(num_tokens, norm.scale.shape[0], jnp.bfloat16)
            norm.scale[...] = same.scale[...] = scale
            (total, normed), (expected_total, expected) = norm.add(x, branch), same.add(x, branch)
            np.testing.assert_array_equal(np.asarray(total), np.asarray(expected_total))
            np.testing.assert_allclose(*(np.asarray(a, np.float32) for a in (normed, expected)), rtol=0.02)
    assert calls == [(FUSED_NORM_FROM, 1024)]
