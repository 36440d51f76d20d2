"""MXFP4: blocks of 32 numbers of 4 bits, with one scale of 8 bits a block. The reader of weights decodes them.

Source: OCP Microscaling Formats (MX) Specification 1.0, sections 5.3.3 (E2M1) and 5.4.1 (E8M0).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped, UInt8

from jpaged.models.layers.spelling import Index, Piece

BLOCK = 32
"""Numbers that share a scale."""

_BYTES = BLOCK // 2
_SCALE_BIAS, _SCALE_NAN = 127, 255


def decode_mxfp4(
    blocks: UInt8[Array, "*rows num_blocks bytes"], scales: UInt8[Array, "*rows num_blocks"], dtype: Any
) -> Float[Array, "*rows features"]:
    """Decode the numbers of blocks.

    Args:
        blocks: 16 bytes a block. The low half of a byte is the earlier number: a sign, two exponent bits, one mantissa
            bit.
        scales: exponents of 2, with a bias of 127; 255 stands for NaN.
        dtype: dtype of the result. bfloat16 holds all results exactly, apart from subnormal numbers.
    """
    codes = jnp.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*scales.shape, BLOCK).astype(jnp.int32)
    exponent, mantissa = (codes >> 1) & 3, codes & 1
    quarters = jnp.where(exponent == 0, 2 * mantissa, (2 + mantissa) << exponent)  # 0, 2, 4, 6, 8, 12, 16, 24
    magnitude = quarters.astype(jnp.float32) / 4
    values = jnp.where(codes >= 8, -magnitude, magnitude)
    scale = jnp.where(scales == _SCALE_NAN, jnp.nan, _power_of_two(scales.astype(jnp.int32) - _SCALE_BIAS))
    decoded = values * scale[..., None]
    return decoded.reshape(*scales.shape[:-1], -1).astype(dtype)


def _power_of_two(exponent: Shaped[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Compute powers of two exactly: their bits in float32 are the exponent alone. 2 to the -127 is subnormal."""
    bits = jnp.where(exponent > -127, (exponent + 127) << 23, 1 << 22)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


@dataclass(frozen=True)
class Mxfp4:
    """Matrices [out, in] of all experts in MXFP4: the tensors ``NAME_blocks`` and ``NAME_scales``.

    The assembled array has 17 bytes a block, of which the first is the scale.

    Args:
        name: start of the names of the tensors.
        axes: the parameter is the array of numbers transposed by these axes.
        num_parts: projections whose outputs alternate. If there are several, they are the third axis of the numbers.
    """

    name: str
    axes: tuple[int, ...]
    num_parts: int = 1

    @property
    def decode(self) -> Callable[[jax.Array, Any], jax.Array]:
        return self._decode

    def _decode(self, array: jax.Array, dtype: Any) -> jax.Array:
        numbers = decode_mxfp4(array[..., 1:], array[..., 0], dtype)
        if self.num_parts == 1:
            return numbers
        return numbers.reshape(len(numbers), -1, self.num_parts, numbers.shape[-1])

    def assembled_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        num_experts, *outer, features = (shape[axis] for axis in self.axes)
        return num_experts, int(np.prod(outer)), features // BLOCK, 1 + _BYTES

    def shapes(self, module: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        blocks, scales = self._names(module)
        *rows, size = self.assembled_shape(shape)
        return {blocks: (*rows, size - 1), scales: tuple(rows)}

    def read(self, module: str, shape: tuple[int, ...], piece: Piece, index: Index) -> np.ndarray:
        del shape
        blocks, scales = (piece(name) for name in self._names(module))
        return np.concatenate([scales[index[:-1]][..., None], blocks[index[:-1]]], axis=-1)

    def write(self, module: str, param: Shaped[np.ndarray, "..."]) -> dict[str, np.ndarray]:
        raise NotImplementedError(f"{module}.{self.name}: experts are written as bfloat16, and not in MXFP4")

    def _names(self, module: str) -> tuple[str, str]:
        return f"{module}.{self.name}_blocks", f"{module}.{self.name}_scales"
