"""PTX that converts four 8-bit numbers of a register, int8 or e4m3."""

import jax.numpy as jnp

IN_PLACE, EVEN_FIRST = 0x3210, 0x3120
"""Orders of a register's bytes: the number of each byte, in four bits, from the lowest byte."""


def widening_ptx(pool_dtype: jnp.dtype, order: int) -> str:
    """PTX that makes two registers of float16 of a register's four numbers, with the bytes in the order given."""
    return (_int8_to_float16 if pool_dtype == jnp.int8 else _float8_to_float16)(order)


def _float8_to_float16(order: int) -> str:
    reorder = "mov.b32 bytes, $2" if order == IN_PLACE else f"prmt.b32 bytes, $2, $2, {order:#x}"
    return f"""{{
        .reg .b32 bytes; .reg .b16 low, high;
        {reorder}; mov.b32 {{low, high}}, bytes;
        cvt.rn.f16x2.e4m3x2 $0, low; cvt.rn.f16x2.e4m3x2 $1, high;
    }}"""


def _int8_to_float16(order: int) -> str:
    """PTX that adds to 0x6400, 1024 in float16 with a last bit of 1. A flipped sign bit turns x into x + 128."""
    low, high = (0x4040 | order >> shift & 0xF | (order >> shift + 4 & 0xF) << 8 for shift in (0, 8))
    return f"""{{
        .reg .b32 bytes, offset;
        xor.b32 bytes, $2, 0x80808080; mov.b32 offset, 0x64806480;
        prmt.b32 $0, bytes, 0x64646464, {low:#x}; sub.rn.f16x2 $0, $0, offset;
        prmt.b32 $1, bytes, 0x64646464, {high:#x}; sub.rn.f16x2 $1, $1, offset;
    }}"""


def narrowing_ptx(dtype: jnp.dtype) -> str:
    """PTX that makes a register of stored numbers of four float32 numbers within the type's range."""
    if dtype == jnp.int8:
        return """{
            .reg .b32 a, b, c, d;
            cvt.rni.s32.f32 a, $1; cvt.rni.s32.f32 b, $2; cvt.rni.s32.f32 c, $3; cvt.rni.s32.f32 d, $4;
            prmt.b32 a, a, b, 0x40; prmt.b32 c, c, d, 0x40; prmt.b32 $0, a, c, 0x5410;
        }"""
    return """{
        .reg .b16 low, high;
        cvt.rn.satfinite.e4m3x2.f32 low, $2, $1; cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
        mov.b32 $0, {low, high};
    }"""


SCALING_PTX = """{
    .reg .b16 low, high;
    mov.b32 {low, high}, $2; cvt.f32.f16 $0, low; cvt.f32.f16 $1, high;
    mul.f32 $0, $0, $3; mul.f32 $1, $1, $3;
}"""
"""PTX that multiplies two float16 numbers of a register by a float32 number."""
