"""Sizes of the Hopper kernels: tuned sizes and default sizes fit, and saved sizes are chosen."""

import json
import tomllib
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.paged_attention.hopper import tuning, why_not
from pallas_kernels.paged_attention.hopper.decode_memory import DecodeSizes, columns_that_fit, decode_smem_bytes
from pallas_kernels.paged_attention.hopper.prefill_plan import PrefillSizes
from pallas_kernels.paged_attention.hopper.tuning import (
    MOST_SLOTS,
    SMEM_BYTES,
    TUNED,
    Sizes,
    decode_candidates,
    save,
    shape_class,
    sizes_for,
)

MOST_GROUP = 96
"""More query heads of a KV head than any head_dim takes."""

POOL_DTYPES = [jnp.dtype(dtype) for dtype in (jnp.bfloat16, jnp.float16, jnp.int8, jnp.float8_e4m3fn)]
LLAMA: dict[str, Any] = {"group": 4, "head_dim": 128, "block_size": 16, "pool_dtype": jnp.dtype(jnp.bfloat16)}


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """An empty file in tuned.json's place."""
    path = tmp_path / "tuned.json"
    path.write_text("{}")
    monkeypatch.setattr(tuning, "TUNED", path)
    tuning.load.cache_clear()
    yield path
    tuning.load.cache_clear()


def assert_fits(sizes: DecodeSizes, group: int, head_dim: int, pool_dtype: jnp.dtype) -> None:
    assert sizes.tile_tokens in (64, 128)
    assert sizes.slots >= 3
    assert sizes.workers_per_sm >= 1
    assert group <= columns_that_fit(head_dim, pool_dtype, sizes.workers_per_sm)
    assert sizes.workers_per_sm * decode_smem_bytes(sizes, group, head_dim, pool_dtype) <= SMEM_BYTES


@pytest.mark.parametrize("pool_dtype", POOL_DTYPES, ids=str)
def test_whatever_the_kernels_take_has_sizes_that_fit(tuned, pool_dtype):
    q_dtype = pool_dtype if pool_dtype.itemsize == 2 else jnp.dtype(jnp.bfloat16)
    num_taken = 0
    for head_dim in range(16, 272, 16):
        for group in range(1, MOST_GROUP + 1):
            if why_not((1, group, head_dim), q_dtype, (1, 1, 2, 1, 16, head_dim), pool_dtype) is None:
                num_taken += 1
                for candidate in decode_candidates(group, head_dim, pool_dtype):
                    assert_fits(candidate, group, head_dim, pool_dtype)
                sizes = sizes_for(group=group, head_dim=head_dim, block_size=16, pool_dtype=pool_dtype)
                assert sizes.decode in decode_candidates(group, head_dim, pool_dtype)
    assert num_taken > 200


@pytest.mark.parametrize(
    ("pool_dtype", "head_dim", "most"),
    [
        (jnp.bfloat16, 64, 80),
        (jnp.bfloat16, 80, 56),
        (jnp.float16, 128, 56),
        (jnp.bfloat16, 192, 40),
        (jnp.bfloat16, 256, 32),
        (jnp.int8, 32, 64),
        (jnp.float8_e4m3fn, 128, 48),
        (jnp.int8, 160, 32),
        (jnp.float8_e4m3fn, 256, 24),
    ],
)
def test_groups_are_taken_up_to_what_registers_hold(pool_dtype, head_dim, most):
    pool_dtype = jnp.dtype(pool_dtype)
    q_dtype = pool_dtype if pool_dtype.itemsize == 2 else jnp.dtype(jnp.bfloat16)
    of_most, of_one_more = (
        why_not((1, group, head_dim), q_dtype, (1, 1, 2, 1, 16, head_dim), pool_dtype) for group in (most, most + 1)
    )
    assert of_most is None
    assert "more than registers and shared memory hold" in (of_one_more or "")


@pytest.mark.parametrize(
    ("group", "head_dim", "workers"), [(4, 128, 2), (16, 128, 2), (17, 128, 1), (8, 192, 2), (16, 192, 1), (1, 256, 1)]
)
def test_workers_share_a_multiprocessor_only_where_its_registers_suffice(tuned, group, head_dim, workers):
    for pool_dtype in (jnp.dtype(jnp.int8), jnp.dtype(jnp.float8_e4m3fn)):
        sizes = sizes_for(group=group, head_dim=head_dim, block_size=16, pool_dtype=pool_dtype).decode
        assert sizes.workers_per_sm == workers
        one_slot_more = replace(sizes, slots=sizes.slots + 1)
        fits = workers * decode_smem_bytes(one_slot_more, group, head_dim, pool_dtype) <= SMEM_BYTES
        assert sizes.slots == MOST_SLOTS or not fits


def test_tuned_sizes_are_of_cases_that_the_kernels_take_and_fit():
    classes = {}
    for head_dim, block_size, pool_dtype in product(range(16, 272, 16), (8, 16, 32, 64, 128, 256), POOL_DTYPES):
        for group in range(1, MOST_GROUP + 1):
            key = shape_class(group=group, head_dim=head_dim, block_size=block_size, pool_dtype=pool_dtype)
            classes[key] = group, head_dim, pool_dtype
    for of_device in json.loads(TUNED.read_text()).values():
        for key, sizes in of_device.items():
            assert sizes.keys() <= {"decode", "prefill"}
            PrefillSizes(**sizes.get("prefill", {}))
            if "decode" in sizes:
                assert_fits(DecodeSizes(**sizes["decode"]), *classes[key])


def test_saved_sizes_are_chosen_on_their_device_for_their_shapes_alone(tuned):
    here = jax.devices()[0].device_kind
    fallback = sizes_for(**LLAMA)
    decode, prefill = DecodeSizes(128, 3, 1), PrefillSizes(kv_tile=64, stages=3)
    assert decode != fallback.decode
    assert save("another GPU", {shape_class(**LLAMA): {"decode": decode}}) == tuned
    assert sizes_for(**LLAMA) == fallback

    save(here, {shape_class(**LLAMA): {"decode": decode}})
    assert sizes_for(**LLAMA) == Sizes(decode, fallback.prefill)
    assert sizes_for(**LLAMA | {"block_size": 32}) == fallback

    save(here, {shape_class(**LLAMA): {"prefill": prefill}})
    tuning.load.cache_clear()
    assert sizes_for(**LLAMA) == Sizes(decode, prefill)
    assert json.loads(tuned.read_text()).keys() == {"another GPU", here}


def test_installed_package_has_the_tuned_sizes():
    root = Path(__file__).parents[2]
    data = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    packaged = ((root / package.replace(".", "/"), pattern) for package in data for pattern in data[package])
    assert any(TUNED in folder.glob(pattern) for folder, pattern in packaged)
