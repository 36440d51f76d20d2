"""How the Hopper prefill kernel widens 8-bit tiles, run on a warpgroup of numpy arrays: the interpreter passes it by.

Shared memory is an array of bytes here. The code's PTX is executed byte by byte.
"""

import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.paged_attention.call import Scoring
from pallas_kernels.paged_attention.hopper import prefill_widener
from pallas_kernels.paged_attention.hopper.prefill_plan import DEFAULT_SIZES, Case
from pallas_kernels.paged_attention.hopper.tile import swizzle_of
from tests.support.ptx import STORED, WARPS
from tests.support.warpgroup import STAND_INS, Memory

SWIZZLED_BY = {128: lambda row: row % 8, 64: lambda row: row // 2 % 4, 32: lambda row: row // 4 % 2}
"""Bytes of a swizzled row -> the number with which its row swaps chunks of 16 bytes, as PTX defines the swizzles."""


def image_of(tile: np.ndarray) -> np.ndarray:
    """The bytes of a tile in shared memory: matrices of eight swizzled rows, row after row of matrices."""
    swizzle, columns = swizzle_of(tile.shape[1], tile.dtype.itemsize)
    matrices = tile.reshape(len(tile) // 8, 8, -1, columns).swapaxes(1, 2)
    chunks = np.ascontiguousarray(matrices).view(np.uint8).reshape(*matrices.shape[:3], swizzle // 16, 16)
    image = np.empty_like(chunks)
    for row in range(8):
        for chunk in range(swizzle // 16):
            image[:, :, row, chunk ^ SWIZZLED_BY[swizzle](row)] = chunks[:, :, row, chunk]
    return image.reshape(-1)


@pytest.fixture(autouse=True)
def warpgroup(monkeypatch):
    """Stands in for the compiler in prefill_widener.py."""
    for name, stand_in in STAND_INS.items():
        monkeypatch.setattr(prefill_widener, name, stand_in)


def make_case(stored: str, head_dim: int, block_size: int) -> Case:
    return Case(
        scoring=Scoring(1.0, None, None),
        sizes=DEFAULT_SIZES,
        dtype=jnp.dtype(jnp.bfloat16),
        pool_dtype=jnp.dtype(stored),
        num_heads=4,
        num_kv_heads=1,
        head_dim=head_dim,
        num_layers=1,
        block_size=block_size,
        is_interpreted=False,
    )


def widen(case: Case, tile: np.ndarray, scales: np.ndarray) -> tuple[Memory, Memory]:
    """The 8-bit tile and the other tile in shared memory, which holds nonsense at first."""
    stored, target = Memory(image_of(tile)), Memory(np.full(2 * tile.size, 0xA5, np.uint8))
    prefill_widener._widen_chunks(case, stored, Memory(scales.view(np.uint8)), target)
    return stored, target


def random_tile(case: Case, stored: str) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of any bits, NaN too, and scales of all pieces."""
    rng = np.random.default_rng(0)
    tile = rng.integers(0, 256, (case.kv_tile, case.head_dim), np.uint8).view(STORED[stored])
    return tile, rng.uniform(0.01, 2, case.kv_tile // case.piece).astype(np.float32)


@pytest.mark.parametrize("stored", STORED)
def test_only_queries_in_the_type_that_tiles_are_widened_to_are_taken(stored):
    with pytest.raises(NotImplementedError, match="queries in float16 over a quantised pool: expected bfloat16"):
        dataclasses.replace(make_case(stored, 64, 16), dtype=jnp.dtype(jnp.float16))


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize(
    ("head_dim", "block_size"),
    [(32, 8), (64, 16), (96, 64), (128, 8), (128, 16), (128, 256), (160, 16), (192, 32)],
)
def test_a_tile_is_widened_times_its_scales_to_where_the_tensor_cores_read_it(stored, head_dim, block_size):
    case = make_case(stored, head_dim, block_size)
    tile, scales = random_tile(case, stored)
    right = (tile.astype(np.float32) * np.repeat(scales, case.piece)[:, None]).astype(ml_dtypes.bfloat16)
    _, target = widen(case, tile, scales)
    got, expected = (image.view(ml_dtypes.bfloat16).astype(np.float32) for image in (target.image, image_of(right)))
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("head_dim", [64, 128, 192])
def test_eight_threads_access_all_banks_at_a_time(head_dim):
    case = make_case("int8", head_dim, 16)
    for memory in widen(case, *random_tile(case, "int8")):
        for offsets in memory.accesses:
            banks = offsets.reshape(WARPS, -1, 8) // 16 % 8
            np.testing.assert_array_equal(np.sort(banks), np.broadcast_to(np.arange(8), banks.shape))
