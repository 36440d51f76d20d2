"""The Hopper kernel that adds and norms, in Pallas's interpreter, watched for races, against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import mosaic_gpu as plgpu

from jpaged.models import fuse_norms
from jpaged.models.layers import common as layers
from jpaged.models.layers.common import FUSED_NORM_FROM, Branch, RMSNorm, ShiftedRMSNorm, WideRMSNorm
from pallas_kernels.norm import NormSpec, add_rms_norm, why_not_add_norm
from pallas_kernels.norm.hopper import add_rms_norm_hopper

pytestmark = pytest.mark.usefixtures("no_races")

WATCHED = plgpu.InterpretGPUParams(detect_races=True)
EPSILON = 0.25  # large enough to be missed
PLAIN, WIDE, SHIFTED = NormSpec(EPSILON), NormSpec(EPSILON, is_wide=True), NormSpec(EPSILON, is_wide=True, offset=1)


def random_rows(num_tokens: int, num_features: int, dtype, num_scales: int = 1) -> list:
    rng = np.random.default_rng(0)
    shapes = (num_tokens, num_features), (num_tokens, num_features), *[(num_features,)] * num_scales
    return [jnp.asarray(rng.standard_normal(shape, np.float32)).astype(dtype) for shape in shapes]


def exact_norm(x, scale, spec) -> np.ndarray:
    wide = np.asarray(x, np.float64)
    return (
        wide
        / np.sqrt(np.mean(wide**2, axis=-1, keepdims=True) + EPSILON)
        * (np.asarray(scale, np.float64) + spec.offset)
    )


@pytest.mark.parametrize(
    ("num_tokens", "num_features", "dtype", "spec"),
    [
        (1, 1024, jnp.bfloat16, PLAIN),
        (5, 2048, jnp.float16, PLAIN),
        (3, 5120, jnp.bfloat16, PLAIN),
        (3, 1536, jnp.bfloat16, WIDE),  # vectors of 8 bytes
        (2, 5376, jnp.bfloat16, SHIFTED),  # of 4 bytes
    ],
)
def test_sum_and_norm_of_every_row(num_tokens, num_features, dtype, spec):
    x, branch, scale = random_rows(num_tokens, num_features, dtype)
    total, normed = add_rms_norm_hopper(x, branch, scale, spec, interpret=WATCHED)
    assert total.dtype == normed.dtype == dtype
    np.testing.assert_array_equal(np.asarray(total), np.asarray(x + branch))
    # Rounded twice, before and after the scale, or only after it. The interpreter may norm the sum unrounded.
    rtol = (1 if spec.is_wide else 1.5) * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(normed, np.float64), exact_norm(total, scale, spec), rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("spec", [PLAIN, SHIFTED])
def test_a_branch_is_multiplied_then_normed_then_added(spec):
    x, branch, scale, branch_scale = random_rows(3, 1536, jnp.bfloat16, num_scales=2)
    total, normed = add_rms_norm_hopper(
        x, branch, scale, spec, branch_scale=branch_scale, multiplier=0.22, interpret=WATCHED
    )
    own, addend = np.asarray(x, np.float64), exact_norm(np.asarray(branch, np.float64) * 0.22, branch_scale, spec)
    eps = float(jnp.finfo(jnp.bfloat16).eps)
    bound = eps * (0.5 * np.abs(own + addend) + 2 * np.abs(addend))  # the sum is rounded once, the addend three times
    assert (np.abs(np.asarray(total, np.float64) - own - addend) <= bound).all()
    normed = np.asarray(normed, np.float64)
    expected = exact_norm(own + addend, scale, spec)
    np.testing.assert_allclose(normed, expected, rtol=2 * eps, atol=0.04)


def test_a_multiplied_branch_is_rounded_before_the_sum():
    x, branch, scale = random_rows(3, 1024, jnp.bfloat16)
    total, _ = add_rms_norm_hopper(x, branch, scale, PLAIN, multiplier=0.22, interpret=WATCHED)
    np.testing.assert_array_equal(np.asarray(total), np.asarray(x + layers.scaled(branch, 0.22)))


@pytest.mark.parametrize(
    ("num_features", "dtype", "reason"),
    [(1024, jnp.float32, "float32"), (1000, jnp.bfloat16, "multiple of 256"), (16384, jnp.bfloat16, "at most 8192")],
)
def test_rows_it_cannot_take_are_refused_with_the_reason(num_features, dtype, reason):
    assert reason in why_not_add_norm(num_features, jnp.dtype(dtype))
    with pytest.raises(NotImplementedError, match=reason):
        add_rms_norm_hopper(*random_rows(1, num_features, dtype), PLAIN, interpret=WATCHED)


def test_without_the_device_it_says_so():
    with pytest.raises(NotImplementedError, match="plain JAX"):
        add_rms_norm_hopper(*random_rows(1, 1024, jnp.bfloat16), PLAIN)


def test_scales_of_another_size_are_refused():
    x, branch, scale = random_rows(1, 1024, jnp.bfloat16)
    for given in ({"scale": scale[:512]}, {"scale": scale, "branch_scale": scale.astype(jnp.float32)}):
        with pytest.raises(ValueError, match="expected one shape and type"):
            add_rms_norm(x, branch, spec=PLAIN, interpret=True, **given)


@pytest.mark.parametrize("num_features", [2304, 2560, 3584, 5376, 8192])
def test_it_is_lowered_for_gpus(num_features, monkeypatch):
    monkeypatch.setattr("pallas_kernels.chips.here.why_no_hopper", lambda: None)
    x, branch, scale, branch_scale = random_rows(4, num_features, jnp.bfloat16, num_scales=2)

    def run(*arrays):
        return add_rms_norm(*arrays[:3], SHIFTED, branch_scale=arrays[3], multiplier=0.5)

    lowered = jax.jit(run).trace(x, branch, scale, branch_scale).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("custom_call @mosaic_gpu") == 1


def random_scale(norm, seed: int):
    norm.scale[...] = jax.random.normal(jax.random.key(seed), norm.scale.shape, norm.scale.dtype)
    return norm


@pytest.mark.parametrize("norm_class", [RMSNorm, WideRMSNorm, ShiftedRMSNorm])
def test_a_model_uses_it_for_large_steps_of_rows_that_it_takes(norm_class, monkeypatch):
    calls = []

    def watched(x, branch, scale, spec, **options):
        calls.append((x.shape, options["branch_scale"] is not None, options["multiplier"]))
        return add_rms_norm_hopper(x, branch, scale, spec, **options, interpret=plgpu.InterpretGPUParams())

    monkeypatch.setattr(layers, "add_rms_norm", watched)
    make = {"dtype": jnp.bfloat16, "rngs": nnx.Rngs(0)}
    model = nnx.List([random_scale(norm_class(size, EPSILON, **make), size) for size in (256, 250)])
    plain = nnx.clone(model)
    fuse_norms(model)
    for norm, same in zip(model, plain, strict=True):
        size = norm.scale.shape[0]
        post = random_scale(norm_class(size, EPSILON, **make), 1)
        other = random_scale(norm_class(size, 2 * EPSILON, **make), 2)  # the kernel knows one epsilon
        for num_tokens in (FUSED_NORM_FROM - 1, FUSED_NORM_FROM):
            x, out, _ = random_rows(num_tokens, size, jnp.bfloat16)
            for branch in (out, Branch(out, multiplier=0.5), post.before_add(out), other.before_add(out)):
                (total, normed), (expected_total, expected) = norm.add(x, branch), same.add(x, branch)
                for got, wanted in ((total, expected_total), (normed, expected)):
                    got, wanted = (np.asarray(a, np.float32) for a in (got, wanted))
                    np.testing.assert_allclose(got, wanted, rtol=0.02, atol=0.04)
    shape = FUSED_NORM_FROM, 256
    assert calls == [(shape, False, 1.0), (shape, False, 0.5), (shape, True, 1.0), (shape, False, 1.0)]
