"""Writes into a pool that fills the device: the K and V of a step, and copies of whole blocks."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bench.kernels.timing import Timing, time_program
from pallas_kernels import block_pool_shape, copy_blocks, write_kv
from pallas_kernels.chips.here import why_no_hopper

POOL_BYTES, CPU_POOL_BYTES = 60 * 10**9, 2**26
LARGEST_SHARE = 0.8
"""Largest share of the free memory that a pool takes."""

POOL_LAYERS, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM = 32, 8, 16, 128
"""Sizes of Llama-3-8B, whose block is 2 MiB in bfloat16."""

NUM_LAYERS = 8
"""Layers that a program writes. Times are per layer."""

NUM_TOKENS, NUM_COPIED = 256, 64


@dataclass(frozen=True, slots=True)
class Copy:
    """Cost of a write into the pool.

    Args:
        name: name of the write.
        timing: time of one layer's write, or of one call that copies.
        num_bytes: least number of bytes read and written.
        temporary_bytes: bytes that the program allocates beside its arguments.
        pool_bytes: size of the pool.
    """

    name: str
    timing: Timing
    num_bytes: int
    temporary_bytes: int
    pool_bytes: int


def pool_bytes_that_fit(wanted: int | None) -> int:
    """``wanted`` or the default, but no more than fits into the free memory."""
    if jax.default_backend() == "cpu":
        return wanted or CPU_POOL_BYTES
    memory = jax.devices()[0].memory_stats()
    free = memory["bytes_limit"] - memory["bytes_in_use"]
    return min(wanted or POOL_BYTES, int(LARGEST_SHARE * free))


def measure_copies(pool_bytes: int, num_samples: int) -> list[Copy]:
    """Time writes of K and V of decodes and of a prompt, and copies of blocks."""
    block_bytes = 2 * POOL_LAYERS * NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM * 2
    num_blocks = pool_bytes // block_bytes
    blocks = np.random.default_rng(0).permutation(np.arange(1, num_blocks))
    pool = jnp.zeros(block_pool_shape(num_blocks, POOL_LAYERS, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM), jnp.bfloat16)

    def measure(name: str, program: Callable[..., Array], args: tuple[Any, ...], parts: int, num_bytes: int) -> Copy:
        nonlocal pool
        compiled = jax.jit(program, donate_argnums=0).lower(pool, *args).compile()
        timing, pool = time_program(compiled, pool, args, num_samples)
        memory = compiled.memory_analysis()
        temporary = 0 if memory is None else memory.temp_size_in_bytes
        return Copy(name, timing.divided(parts), num_bytes, temporary, pool.nbytes)

    num_tokens, num_copied = min(NUM_TOKENS, num_blocks - 1), min(NUM_COPIED, (num_blocks - 1) // 2)
    decode_slots = blocks[:num_tokens] * BLOCK_SIZE + np.arange(num_tokens) % BLOCK_SIZE
    prompt_slots = (blocks[: -(-num_tokens // BLOCK_SIZE), None] * BLOCK_SIZE + np.arange(BLOCK_SIZE)).reshape(-1)
    axes = (NUM_LAYERS, num_tokens, NUM_KV_HEADS, HEAD_DIM)
    k, v = (jax.random.normal(jax.random.key(i), axes, jnp.bfloat16) for i in range(2))
    token_bytes = 2 * (k.nbytes + v.nbytes) // NUM_LAYERS
    implementations = (None,) if why_no_hopper() else (None, "hopper")
    copies = [
        measure(
            _name(f"write_kv_{num_tokens}_{name}", implementation),
            partial(_write_layers, implementation=implementation),
            (k, v, jnp.asarray(slots[:num_tokens], jnp.int32)),
            NUM_LAYERS,
            token_bytes,
        )
        for name, slots in (("decodes", decode_slots), ("of_a_prompt", prompt_slots))
        for implementation in implementations
    ]
    ends = tuple(jnp.asarray(ids, jnp.int32) for ids in np.split(blocks[: 2 * num_copied], 2))
    for implementation in implementations:
        name, program = f"copy_blocks_{num_copied}", partial(copy_blocks, implementation=implementation)
        copies.append(measure(_name(name, implementation), program, ends, 1, 2 * num_copied * block_bytes))
    pool.delete()
    return copies


def _name(name: str, implementation: str | None) -> str:
    return name if implementation is None else f"{name}_{implementation}"


def _write_layers(pool: Array, k: Array, v: Array, slots: Array, *, implementation: str | None) -> Array:
    for layer in range(NUM_LAYERS):
        pool = write_kv(pool, layer, k[layer], v[layer], slots, implementation=implementation)
    return pool
