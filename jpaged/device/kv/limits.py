"""Limits of a step where the settings leave them open: rows and tokens, from the devices' memory and the pool."""

import dataclasses
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from jpaged.config import DEFAULT_NUM_ROWS, MOST_DEFAULT_ROWS, MOST_DEFAULT_TOKENS, EngineConfig
from jpaged.device.backends import Backend
from jpaged.device.kv.layout import grouping_of, pool_layout
from jpaged.device.kv.sizing import available_bytes
from jpaged.device.target import target_of
from jpaged.models import ModelConfig

BLOCKS_EACH = 8
"""Blocks of the pool for each row at least: rows that wait for blocks only make steps larger."""

LOGITS_SHARE = 1 / 64
"""Share of the devices' memory that the float32 logits of all rows may take at most."""

TOKEN_BYTES = 1 << 23
"""Memory of the devices for each token of a step at least: the activations of a step grow with its tokens."""


def default_rows(num_blocks: int, memory_bytes: int, vocab_size: int, most_tokens: int | None) -> int:
    """Choose the most rows of a step: a power of two, fewer where the pool or the memory is small.

    Args:
        num_blocks: blocks that the pool is going to have.
        memory_bytes: free memory of the devices once weights are loaded.
        vocab_size: logits of a row.
        most_tokens: tokens of a step at most, if they are given.
    """
    rows = MOST_DEFAULT_ROWS
    while rows > DEFAULT_NUM_ROWS and (
        num_blocks < BLOCKS_EACH * rows
        or 4 * vocab_size * rows > LOGITS_SHARE * memory_bytes
        or (most_tokens is not None and most_tokens < 2 * rows)
    ):
        rows //= 2
    return rows


def default_tokens(memory_bytes: int, least: int) -> int:
    """Choose the most tokens of a step: a power of two.

    Args:
        memory_bytes: free memory of the devices once weights are loaded.
        least: tokens of a step on any device.
    """
    tokens = MOST_DEFAULT_TOKENS
    while tokens > least and tokens * TOKEN_BYTES > memory_bytes:
        tokens //= 2
    return max(tokens, least)


def with_limits(
    model: ModelConfig,
    config: EngineConfig,
    dtype: jax.typing.DTypeLike,
    mesh: Mesh,
    backend: Backend,
    *,
    weight_bytes: int = 0,
    least: Callable[[int], int] = lambda number: number,
) -> EngineConfig:
    """Fill in ``max_num_seqs`` and ``max_num_batched_tokens`` where more than the least defaults are chosen.

    A device without memory of its own keeps the least defaults, since it compiles every size that it meets. So do
    models with windows, whose prompts hold the blocks of a whole chunk, and KV in host memory.

    Args:
        model: shape of the model.
        config: the engine's settings.
        dtype: type of the activations.
        mesh: the devices.
        backend: the backend.
        weight_bytes: bytes of weights that the devices do not hold yet.
        least: the least of a number over all processes.

    Raises:
        ValueError: a device does not report its memory.
    """
    rows, tokens = config.max_num_seqs, config.max_num_batched_tokens
    target, groups = target_of(mesh), grouping_of(model, config).groups
    is_least = not target.has_own_memory or config.kv_placement != "device" or groups.has_windows
    if is_least or (rows is not None and tokens is not None):
        return config
    memory_bytes = max(least(available_bytes(mesh, target, config.memory_fraction) - weight_bytes), 0)
    if rows is None:
        block_bytes = pool_layout(model, config, dtype, backend).block_bytes
        rows = default_rows(config.num_blocks or memory_bytes // block_bytes, memory_bytes, model.vocab_size, tokens)
        config = dataclasses.replace(config, max_num_seqs=rows)
    tokens = tokens or default_tokens(memory_bytes, config.token_budget)
    return dataclasses.replace(config, max_num_batched_tokens=tokens)
