"""Copies between slots in host memory and the pool by the TPU kernels, in Pallas's interpreter, watched for races."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import block_pool_shape
from pallas_kernels.block_pool.layout import as_layers
from pallas_kernels.block_pool.tpu import (
    load_blocks_tpu,
    slots_for,
    start_layer_tpu,
    store_blocks_tpu,
    wait_layer_tpu,
    why_no_slots,
)
from tests.support.tpu_interpret import EAGER, WATCHED, no_tpu_races  # noqa: F401

pytestmark = pytest.mark.usefixtures("no_tpu_races")

NUM_LAYERS = 3
POOL_SHAPE = block_pool_shape(7, NUM_LAYERS, 2, 16, 128)
INTERPRETED = pytest.mark.parametrize("interpret", [WATCHED, EAGER], ids=["lazy", "eager"])


def random(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32).astype(jnp.bfloat16)


def arrays() -> tuple[jnp.ndarray, jnp.ndarray]:
    """A pool, and slots for nine of its blocks."""
    pool = jnp.asarray(random(POOL_SHAPE, 0))
    return pool, jnp.asarray(random(slots_for(pool, 9, is_interpreted=True).shape, 1))


def ids(*numbers: int) -> jnp.ndarray:
    return jnp.asarray(numbers, jnp.int32)


@INTERPRETED
def test_stored_blocks_land_in_their_slots_and_padding_in_none(interpret):
    pool, slots = arrays()
    blocks, into = [5, 0, 1, *range(2, 5)] * 3, [8, 0, 3, 4, 5, 6] * 3  # more than are in flight at a time
    got = store_blocks_tpu(slots, pool, ids(*blocks, -1, -1), ids(*into, 1, 1), interpret=interpret)
    right = np.asarray(slots).copy()
    right[into] = np.asarray(pool)[blocks]
    np.testing.assert_array_equal(got, right)


@INTERPRETED
def test_loaded_slots_land_in_their_blocks_and_padding_in_none(interpret):
    pool, slots = arrays()
    got = load_blocks_tpu(pool, slots, ids(6, -1, 2, 0), ids(1, 4, 8, 3), interpret=interpret)
    right = np.asarray(pool).copy()
    right[[6, 2, 0]] = np.asarray(slots)[[1, 8, 3]]
    np.testing.assert_array_equal(got, right)


@INTERPRETED
@pytest.mark.parametrize("named", [[3, 7, 0, 8, 2, 2], [1, 4, 6, 6, 6, 6], [0, 5, 5, 5, 5, 5]])
def test_the_named_slots_of_a_layer_fill_neighbouring_blocks_in_order(named, interpret):
    """What comes after the count is padding."""
    pool, slots = arrays()
    layers, layer, first = as_layers(pool), 1, 4
    filled, semaphore = start_layer_tpu(layers, slots, ids(*named), layer, first, interpret=interpret)
    got = wait_layer_tpu(filled, ids(*named), semaphore, jnp.zeros(4), interpret=interpret)
    right, count = np.asarray(layers).copy(), named[0]
    right[first : first + count, 0] = np.asarray(slots)[named[1 : 1 + count], layer]
    np.testing.assert_array_equal(got, right)


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        (POOL_SHAPE, jnp.bfloat16, None),
        (block_pool_shape(7, 2, 1, 8, 128), jnp.float32, None),
        (block_pool_shape(7, 2, 1, 8, 128), jnp.bfloat16, "block_size 8: expected a multiple of 16 for bfloat16"),
        (block_pool_shape(7, 2, 1, 16, 256), jnp.bfloat16, "head_dim 256: slots hold rows of 128 numbers"),
        (POOL_SHAPE, jnp.float8_e4m3fn, "a pool of float8_e4m3fn: slots hold blocks without scales"),
    ],
)
def test_pools_whose_blocks_are_no_whole_tiles_of_host_memory_have_no_slots(shape, dtype, reason):
    assert why_no_slots(shape, dtype) == reason


def test_slots_hold_the_bytes_of_a_block_in_tiles_of_32_rows():
    slots = slots_for(jnp.zeros(POOL_SHAPE, jnp.bfloat16), 9)
    assert slots.shape == (9, NUM_LAYERS, 2, 2, 32, 128)
    assert slots.dtype == jnp.int8


def test_a_device_that_is_no_tpu_is_refused():
    pool, slots = arrays()
    with pytest.raises(NotImplementedError, match="need a TPU"):
        store_blocks_tpu(slots, pool, ids(1), ids(1))
    with pytest.raises(NotImplementedError, match="need a TPU"):
        start_layer_tpu(as_layers(pool), slots, ids(1, 1), 0, 3)
