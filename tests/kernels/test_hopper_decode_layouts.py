"""How the Hopper decode kernel widens 8-bit tiles, run on a warpgroup of numpy arrays: the interpreter passes it by.

Every register that the kernel's code handles is an array [warps, lanes] here, or [warps, lanes, elements]; its PTX is
executed byte by byte; and which element of a matrix is in which register is told by the layout's definition.
"""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.mosaic.gpu.fragmented_array import Replicated

from pallas_kernels.chips.hopper_ptx import EVEN_FIRST, IN_PLACE
from pallas_kernels.paged_attention.call import Scoring
from pallas_kernels.paged_attention.hopper import decode_quantized
from pallas_kernels.paged_attention.hopper.decode_memory import DecodeShape, DecodeSizes
from pallas_kernels.paged_attention.hopper.decode_quantized import with_stored_order
from tests.support.ptx import LANES, STORED, WARPS, as_register, elements, run_ptx

# Layouts


def tiled(x: np.ndarray, tiles: tuple[tuple[int, ...], ...]) -> np.ndarray:
    """Each tile in turn divides the last dims into (outer, inner), with the inner ones last."""
    for tile in tiles:
        rest = x.ndim - len(tile)
        divided = [part for dim, inner in zip(x.shape[rest:], tile, strict=True) for part in (dim // inner, inner)]
        outer, inner = range(rest, rest + 2 * len(tile), 2), range(rest + 1, rest + 2 * len(tile), 2)
        x = x.reshape(*x.shape[:rest], *divided).transpose(*range(rest), *outer, *inner)
    return x


def to_registers(x: np.ndarray, layout: Any) -> np.ndarray:
    """[warps, lanes, *registers, elements] of a matrix or column: every thread's, in the order of the kernel's code."""
    layout = layout.to_mgpu()
    x = tiled(x, layout.tiling.tiles)
    front = []
    for dims in (layout.warp_dims, layout.lane_dims):
        for dim in dims:
            if isinstance(dim, Replicated):
                x = np.repeat(x[None], dim.times, axis=0)
                front.append(-x.ndim)
            else:
                front.append(dim)
    front = [dim % x.ndim for dim in front]
    last = layout.vector_dim % x.ndim
    registers = [dim for dim in range(x.ndim) if dim not in (*front, last)]
    x = x.transpose(*front, *registers, last)
    return x.reshape(WARPS, LANES, -1, x.shape[-1])


def from_registers(registers: np.ndarray, layout: Any, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse. Threads that have the same element agree on it."""
    at = to_registers(np.arange(np.prod(shape)).reshape(shape), layout)
    assert at.shape == registers.shape
    out = np.zeros(np.prod(shape), registers.dtype)
    out[at.ravel()] = registers.ravel()
    np.testing.assert_array_equal(out[at], registers)
    return out.reshape(shape)


# The warpgroup


class Fragments(NamedTuple):
    """A matrix in registers: an array of objects, one for each register of a thread."""

    registers: np.ndarray
    layout: Any


def make_fragments(_registers: np.ndarray, _layout: Any, _is_signed: None) -> Fragments:
    return Fragments(_registers, _layout)


def inline(*, arg_types: tuple[Any, ...], return_type: Any):
    """``inline_mgpu``: arrays are laid out among the threads, and put together again from them."""

    def split(x: np.ndarray, layout: Any) -> Any:
        if not hasattr(layout, "to_mgpu"):
            return x  # a reference
        registers = np.moveaxis(to_registers(np.asarray(x), layout), 2, 0)
        objects = np.empty(len(registers), object)
        objects[:] = list(registers)
        layout = layout.to_mgpu()
        return Fragments(objects.reshape(layout.registers_shape(x.shape)), layout)

    def join(fragments: Fragments, result: Any) -> np.ndarray:
        assert fragments.layout == result.layout.to_mgpu()
        assert fragments.registers.shape == fragments.layout.registers_shape(result.shape)
        registers = np.stack(list(fragments.registers.flat), axis=2)
        out = from_registers(registers, result.layout, result.shape)
        assert out.dtype == result.dtype
        return out

    def wrap(body):
        def run(*args):
            results = body(None, *map(split, args, arg_types))
            if isinstance(return_type, tuple):
                return tuple(map(join, results, return_type))
            return join(results, return_type)

        return run

    return wrap


def bitcast(x: np.ndarray, to: str) -> np.ndarray:
    return as_register(x) if to == "i32" else elements(x, np.float16)


class SharedMemory:
    """A reference to a matrix: stored bytes in pairs, or scales."""

    def __init__(self, array: np.ndarray):
        self.array = array

    @property
    def at(self) -> "SharedMemory":
        return self

    def __getitem__(self, at: tuple[Any, ...]) -> "SharedMemory":
        return SharedMemory(
            self.array[tuple(a if isinstance(a, slice) else slice(a.start, a.start + a.size) for a in at)]
        )

    @property
    def T(self) -> "SharedMemory":
        return SharedMemory(self.array.T)


@pytest.fixture(autouse=True)
def warpgroup(monkeypatch):
    """Stands in for the compiler in decode_quantized.py."""
    plgpu = decode_quantized.plgpu
    stand_ins = {
        "plgpu": SimpleNamespace(
            load=lambda ref, layout: ref.array,
            inline_mgpu=inline,
            ShapeDtypeStruct=plgpu.ShapeDtypeStruct,
            RefType=plgpu.RefType,
        ),
        "mgpu": SimpleNamespace(
            FragmentedArray=make_fragments,
            LaunchContext=None,
            utils=SimpleNamespace(
                inline_ptx=run_ptx,
                bitcast=bitcast,
                c=lambda value, kind: value,
                thread_idx=lambda: np.arange(WARPS * LANES).reshape(WARPS, LANES),
                memref_ptr=lambda ref: ref.array,
                getelementptr=lambda base, at, kind: (base, at[0]),
            ),
        ),
        "ir": SimpleNamespace(
            IntegerType=SimpleNamespace(get_signless=lambda bits: f"i{bits}"),
            VectorType=SimpleNamespace(get=lambda shape, element: (shape, element)),
            F16Type=SimpleNamespace(get=lambda: "f16"),
            F32Type=SimpleNamespace(get=lambda: "f32"),
            Value=Any,
        ),
        "arith": SimpleNamespace(addi=np.add, muli=np.multiply, divui=np.floor_divide, remui=np.remainder),
        "llvm": SimpleNamespace(load=lambda kind, address: address[0][address[1]]),
        "vector": SimpleNamespace(
            shuffle=lambda a, b, order: np.concatenate([a, b], axis=-1)[..., order],
            extract_strided_slice=lambda kind, x, start, sizes, strides: x[..., start[0] : start[0] + sizes[0]],
        ),
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(decode_quantized, name, stand_in)


# Tests

SHAPES = [
    (stored, head_dim, tile) for stored in STORED for head_dim, tile in ((32, 64), (96, 64), (128, 128), (256, 64))
]
of_shapes = pytest.mark.parametrize(("stored", "head_dim", "tile"), SHAPES)


def make_shape(stored: str, head_dim: int, tile: int, block_size: int = 16) -> DecodeShape:
    return DecodeShape(
        num_layers=1,
        num_kv_heads=1,
        group=16,
        head_dim=head_dim,
        block_size=block_size,
        dtype=jnp.dtype(jnp.bfloat16),
        pool_dtype=jnp.dtype(stored),
        scoring=Scoring(1.0, None, None),
        sizes=DecodeSizes(tile, 4, 1),
        num_workers=1,
        is_interpreted=False,
    )


def random_bytes(tokens: int, dims: int) -> np.ndarray:
    """Numbers of any bits, NaN too, each byte told from its neighbours."""
    return np.random.default_rng(0).integers(0, 256, (tokens, dims), np.uint8)


def in_pairs(stored: np.ndarray) -> SharedMemory:
    return SharedMemory(stored.view(np.uint16))


def values_of(stored: np.ndarray, name: str) -> np.ndarray:
    return stored.view(STORED[name]).astype(np.float16)


def widen_keys(stored: np.ndarray, shape: DecodeShape) -> np.ndarray:
    """All slabs of float16 keys, as the queries' slabs follow each other."""
    half = shape.num_slabs // 2
    parts = [decode_quantized.widened_keys(in_pairs(stored), slab, shape) for slab in range(half)]
    return np.concatenate([part[nth] for nth in range(2) for part in parts], axis=1)


def widen_values_in_order(stored: np.ndarray, shape: DecodeShape) -> np.ndarray:
    """V^T in the order in which outputs come to be stored: each token's as if it were a head."""
    return np.asarray(decode_quantized.in_order(decode_quantized.widened_values(in_pairs(stored), shape), shape))


@of_shapes
def test_widened_keys_have_their_dims_in_the_order_of_the_queries(stored, head_dim, tile):
    shape, bits = make_shape(stored, head_dim, tile), random_bytes(tile, head_dim)
    right = with_stored_order(jnp.asarray(values_of(bits, stored))[:, None])[:, 0]
    np.testing.assert_array_equal(widen_keys(bits, shape), right)


@of_shapes
def test_outputs_of_widened_values_have_their_dims_in_order(stored, head_dim, tile):
    shape = make_shape(stored, head_dim, tile)
    bits = random_bytes(tile, shape.rows)
    np.testing.assert_array_equal(widen_values_in_order(bits, shape), values_of(bits, stored).T)


def test_a_ring_of_one_slot_is_refused():
    """V arrives while K waits in its slot. With one slot, a GPU would wait forever."""
    shape = make_shape("int8", 128, 64)
    assert replace(shape, sizes=DecodeSizes(64, 2, 1)).sizes.slots == 2
    with pytest.raises(AssertionError, match="wait for V forever"):
        replace(shape, sizes=DecodeSizes(64, 1, 1))


def test_stored_order_leaves_products_of_queries_and_keys_as_they_are():
    q, k = np.random.default_rng(0).integers(-8, 8, (2, 3, 1, 96)).astype(np.float32)
    stored_q, stored_k = (np.asarray(with_stored_order(jnp.asarray(x))) for x in (q, k))
    assert (stored_q != q).any()
    np.testing.assert_array_equal(np.sum(stored_q * stored_k, axis=2), np.sum(q * k, axis=2))


@pytest.mark.parametrize("stored", STORED)
def test_every_stored_number_is_exact_in_float16(stored):
    shape, bits = make_shape(stored, 64, 64), np.resize(np.arange(256, dtype=np.uint8), (64, 64))
    np.testing.assert_array_equal(np.sort(widen_keys(bits, shape)), np.sort(values_of(bits, stored)))


@pytest.mark.parametrize("block_size", [8, 16, 64])
@pytest.mark.parametrize("tile", [64, 128])
def test_each_row_of_a_tile_has_the_scales_of_its_tokens(tile, block_size):
    shape = make_shape("int8", 128, tile, block_size)
    scales = np.random.default_rng(0).uniform(0.5, 2, (tile // shape.scaled_alike, 2)).astype(np.float32)
    loaded = decode_quantized.load_scales(SharedMemory(scales), shape)
    k, v = np.repeat(scales, shape.scaled_alike, axis=0).T
    np.testing.assert_array_equal(loaded.k, k)
    np.testing.assert_allclose(1 / loaded.v_inverse, v, rtol=1e-6)
    np.testing.assert_allclose(jnp.exp2(loaded.v_log), v, rtol=1e-6)


def swap_byte_orders(monkeypatch):
    widen, other = decode_quantized._widen, {IN_PLACE: EVEN_FIRST, EVEN_FIRST: IN_PLACE}
    monkeypatch.setattr(
        decode_quantized, "_widen", lambda registers, order, shape: widen(registers, other[order], shape)
    )


def swap_even_and_odd(monkeypatch):
    widen = decode_quantized._widen
    monkeypatch.setattr(decode_quantized, "_widen", lambda *args: widen(*args)[::-1])


@pytest.mark.parametrize("mistake", [swap_byte_orders, swap_even_and_odd])
@pytest.mark.parametrize("stored", STORED)
def test_a_mistake_in_the_order_of_bytes_shows(stored, mistake, monkeypatch):
    mistake(monkeypatch)
    shape, bits = make_shape(stored, 64, 64), random_bytes(64, 64)
    right = values_of(bits, stored)
    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(widen_values_in_order(bits, shape), right.T)
    keys = np.asarray(with_stored_order(jnp.asarray(right)[:, None])[:, 0])
    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(widen_keys(bits, shape), keys)
