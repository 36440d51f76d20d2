"""A warpgroup of numpy arrays, on which code that is inlined in Mosaic GPU kernels runs where there is no GPU."""

from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from tests.support.ptx import LANES, WARPS, run_ptx


class Kind(NamedTuple):
    """A type of the compiler's: a number, or a vector of so many."""

    dtype: Any
    count: int | None = None


class Memory:
    """Bytes of memory, and the accesses to it: the offsets of each thread."""

    def __init__(self, image: np.ndarray):
        self.image = image
        self.accesses: list[np.ndarray] = []

    def at(self, offsets: np.ndarray, num_bytes: int) -> np.ndarray:
        assert not (offsets % num_bytes).any(), "aligned"
        self.accesses.append(offsets)
        return offsets[..., None] + np.arange(num_bytes)


def load(kind: Kind, pointer: tuple[Memory, np.ndarray]) -> np.ndarray:
    memory, offsets = pointer
    dtype = np.dtype(kind.dtype)
    loaded = memory.image[memory.at(offsets, (kind.count or 1) * dtype.itemsize)].view(dtype)
    return loaded[..., 0] if kind.count is None else loaded


def store(value: np.ndarray, pointer: tuple[Memory, np.ndarray]) -> None:
    memory, offsets = pointer
    memory.image[memory.at(offsets, 4 * value.shape[-1])] = np.ascontiguousarray(value).view(np.uint8)


STAND_INS = {
    "mgpu": SimpleNamespace(
        utils=SimpleNamespace(
            inline_ptx=run_ptx,
            c=lambda value, kind: np.full((WARPS, LANES), value, np.uint32),
            # Not the first warpgroup of its thread block.
            thread_idx=lambda: 384 + np.arange(WARPS * LANES, dtype=np.uint32).reshape(WARPS, LANES),
            memref_ptr=lambda memory: memory,
            getelementptr=lambda memory, at, kind: (memory, at[0].astype(np.int64)),
        )
    ),
    "ir": SimpleNamespace(
        IntegerType=SimpleNamespace(get_signless=lambda bits: np.dtype(f"u{bits // 8}")),
        VectorType=SimpleNamespace(get=lambda shape, element: Kind(element, *shape)),
        F32Type=SimpleNamespace(get=lambda: Kind(np.float32)),
    ),
    "arith": SimpleNamespace(
        addi=np.add,
        muli=np.multiply,
        divui=np.floor_divide,
        remui=np.remainder,
        xori=np.bitwise_xor,
        andi=np.bitwise_and,
    ),
    "llvm": SimpleNamespace(load=load, store=store),
    "vector": SimpleNamespace(
        extract=lambda words, _, at: words[..., at[0]], from_elements=lambda _, words: np.stack(words, axis=-1)
    ),
}
"""In place of the compiler's modules. A pointer is a memory and each thread's offset."""
