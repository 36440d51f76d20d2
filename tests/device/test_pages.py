"""Pages: blocks of layer inputs, and K and V computed from them, as the cache stores both."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged.device.backends import Rows
from jpaged.device.kv import pages
from jpaged.device.kv.layout import PoolLayout, kv_dtype
from jpaged.device.kv.pages import PageCapacity, locate_pages, read_inputs
from jpaged.device.kv.pool import KVCache

BLOCK_SIZE, NUM_HEADS, HEAD_DIM = 4, 2, 8
HIDDEN = NUM_HEADS * HEAD_DIM
ERRORS = {"auto": 0, "int8": 1 / 127, "fp8": 1 / 16}
"""Largest error of one write, in largest magnitudes of the head's numbers that share a scale."""


write_inputs = jax.jit(pages.write_inputs)
write_computed = jax.jit(pages.write_computed, static_argnums=1)


def layers(setting: str, num_blocks: int = 12) -> KVCache:
    return PoolLayout(1, NUM_HEADS, HEAD_DIM, BLOCK_SIZE, kv_dtype(setting, jnp.float32)).allocate(num_blocks)


def random(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def largest_of_sides(values: np.ndarray) -> np.ndarray:
    """The largest magnitude of each head in each half of a page, for every number."""
    sides = np.abs(values).reshape(-1, BLOCK_SIZE, NUM_HEADS, HEAD_DIM)
    return np.broadcast_to(sides.max(axis=(1, 3), keepdims=True), sides.shape).reshape(values.shape)


@pytest.mark.parametrize("setting", ERRORS)
@pytest.mark.parametrize("cuts", [[0, 16], [0, 8, 9, 10, 11, 12, 13, 14, 15, 16], [0, 3, 10, 16]])
def test_inputs_are_read_as_they_were_written_within_the_pools_rounding(setting, cuts):
    """Two pages, written in one piece or token by token, with scales that grow."""
    inputs = random(16, HIDDEN) * np.linspace(0.1, 3, 16)[:, None]
    slots = jnp.concatenate([2 * BLOCK_SIZE * page + jnp.arange(8) for page in (5, 3)])
    cache = layers(setting)
    for start, stop in pairwise(cuts):
        cache = write_inputs(cache, slots[start:stop], inputs[start:stop])
    found = np.asarray(read_inputs(cache, jnp.array([5, 3]), jnp.float32))
    bound = ERRORS[setting] * largest_of_sides(np.asarray(inputs))
    # A number that is rounded for each scale in turn is off by a whole step at most, in place of half a step.
    assert (np.abs(found - inputs) <= 2 * bound).all()
    np.testing.assert_array_equal(found[:8], read_inputs(cache, jnp.array([5]), jnp.float32))
    others = np.delete(np.asarray(cache.pool.astype(jnp.float32)), [3, 5], axis=0)
    assert not others.any()


@pytest.mark.parametrize("setting", ["int8", "fp8"])
def test_k_and_v_of_pages_are_stored_as_ordinary_writes_store_them(setting):
    """Three pages, one in part and one of padding: only tokens count, whatever lies behind them."""
    num_tokens = np.array([8, 5, 0])
    k, v = random(24, NUM_HEADS, HEAD_DIM), random(24, NUM_HEADS, HEAD_DIM, seed=1)
    is_token = np.arange(8)[None] < num_tokens[:, None]
    garbage = jnp.where(is_token.reshape(-1, 1, 1), 0, jnp.nan)
    found = write_computed(layers(setting), 4, k + garbage, v + garbage, jnp.asarray(num_tokens))
    slots = 4 * BLOCK_SIZE + np.flatnonzero(is_token)
    expected = layers(setting).write(0, k[is_token.reshape(-1)], v[is_token.reshape(-1)], jnp.asarray(slots))
    for array, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(array[4:8]).view(np.uint8), np.asarray(other[4:8]).view(np.uint8))
    assert np.isfinite(found.kv_scales[8:10]).all()
    assert not np.asarray(found.pool[8:10].astype(jnp.float32)).any()


@pytest.mark.parametrize("setting", ["int8", "fp8"])
def test_k_and_v_from_quantised_inputs_are_those_of_the_inputs_within_the_bound(setting):
    """The bound of ``docs/offload.md``: both roundings, each in largest magnitudes of what shares its scale."""
    inputs, weights = random(16, HIDDEN), random(HIDDEN, HIDDEN, seed=3)
    cache = write_inputs(layers(setting), 2 * BLOCK_SIZE + jnp.arange(16), inputs)
    with jax.default_matmul_precision("highest"):
        exact, k = inputs @ weights, read_inputs(cache, jnp.arange(1, 3), jnp.float32) @ weights
    by_head = k.reshape(-1, NUM_HEADS, HEAD_DIM)
    cache = write_computed(cache, 6, by_head, by_head, jnp.array([8, 8]))
    stored, scales = cache.pool[6:10, 0, 0], cache.kv_scales[6:10, 0, 0]
    found = (stored.astype(jnp.float32) * scales[..., None, None]).swapaxes(1, 2).reshape(16, HIDDEN)
    error = ERRORS[setting]
    from_inputs = error * largest_of_sides(np.asarray(inputs)) @ np.abs(weights)
    from_k = error * largest_of_sides(np.asarray(k).reshape(16, HIDDEN))
    assert (np.abs(found - exact) <= 1.01 * (from_inputs + from_k)).all()


@pytest.mark.parametrize("is_whole_pool", [False, True])
def test_each_page_is_located_with_its_position_and_its_tokens(is_whole_pool):
    """Rows, the first with a page on the host; the window is blocks 1 to 4. A third shares the pages of the second."""
    tables = jnp.array([[-1, 7, 0], [6, 5, 0], [6, 5, 0]][: 3 if is_whole_pool else 2], jnp.int32)
    lens = jnp.array([13, 16, 16][: len(tables)], jnp.int32)
    rows = Rows(None, tables, lens, jnp.arange(len(tables) + 1, dtype=jnp.int32))
    most = PageCapacity(2, 4 if is_whole_pool else 5)
    found = locate_pages(most, rows, jnp.zeros(len(tables), jnp.int32), 8, 4, 100)
    assert found.num_pages == (5 if is_whole_pool else 4)
    places = zip(found.positions.tolist(), found.num_tokens.tolist(), strict=True)
    by_block = dict(zip(found.pages.tolist(), places, strict=True))
    assert [by_block[block] for block in (-1, 7, 6, 5, 0)] == [(0, 8), (8, 5), (0, 8), (8, 8), (0, 0)]
    ranks = {block: found.pages.tolist().index(block) for block in (-1, 7, 6, 5)}
    computed = [[100 + 2 * ranks[block] + half for block in row for half in (0, 1)] for row in ((-1, 7), (6, 5))]
    assert found.tables[:2, :4].tolist() == computed
