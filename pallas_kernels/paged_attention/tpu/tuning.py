"""Sizes measured per device, in tuned.json. The file has no entry yet: no TPU has run the kernel."""

import json
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

from pallas_kernels.chips.tpu import CORES_OF_DEVICE
from pallas_kernels.paged_attention.tpu.launch import TABLE_PIECE, Launch, Sizes, vmem_bytes

TUNED = Path(__file__).parent / "tuned.json"
"""Generation -> shape class -> sizes."""

LEAST_BUFFERS = 2
"""Chunks in VMEM at least: the kernel attends one while the next lands."""


def shape_class(launch: Launch, *, longest_q: int) -> str:
    """The key of a launch in tuned.json, of properties known at compile time. Heads and rows are the kernel's."""
    return (
        f"{'decode' if longest_q == 1 else 'ragged'}, {launch.num_kv_heads} KV heads, "
        f"{launch.rows.token_rows} rows a token, head_dim {launch.head_dim}, block {launch.block_size}, "
        f"{launch.pool_dtype.name}, queries {launch.q_dtype.name}"
    )


def tuned_sizes(generation: str, launch: Launch, *, longest_q: int) -> Sizes | None:
    """The sizes measured for a launch's shape class, with tiles that its queries fill; None if none were measured.

    Raises:
        ValueError: sizes that do not fit the VMEM that the launch may take.
    """
    key = shape_class(launch, longest_q=longest_q)
    sizes = load().get(generation, {}).get(key)
    if sizes is None:
        return None
    sizes = replace(sizes, tile_row_tiles=min(sizes.tile_row_tiles, -(-longest_q // launch.rows.tokens)))
    needed = vmem_bytes(replace(launch, sizes=sizes))
    if needed > launch.vmem_limit:
        raise ValueError(
            f"{TUNED}: {generation}: {key}: {sizes} take {needed / 2**20:.1f} MiB of VMEM, and a launch may take "
            f"{launch.vmem_limit / 2**20:.1f}: correct the entry, or remove it"
        )
    return sizes


@cache
def load() -> dict[str, dict[str, Sizes]]:
    """The content of tuned.json.

    Raises:
        ValueError: an unknown generation, or an entry with sizes that the kernel does not take.
    """
    content = json.loads(TUNED.read_text())
    unknown = content.keys() - CORES_OF_DEVICE.keys()
    if unknown:
        raise ValueError(f"{TUNED}: {', '.join(sorted(unknown))}: expected {', '.join(CORES_OF_DEVICE)}")
    return {
        generation: {key: _parse(entry, generation, key) for key, entry in entries.items()}
        for generation, entries in content.items()
    }


def _parse(entry: Any, generation: str, key: str) -> Sizes:
    try:
        sizes = Sizes(**entry)
        is_valid = (
            all(type(size) is int for size in asdict(sizes).values())
            and sizes.tile_row_tiles >= 1
            and sizes.chunk_blocks in [1 << n for n in range(TABLE_PIECE.bit_length())]
            and sizes.buffers >= LEAST_BUFFERS
        )
    except TypeError:
        is_valid = False
    if not is_valid:
        raise ValueError(
            f"{TUNED}: {generation}: {key}: {entry}: expected tile_row_tiles of 1 or more, chunk_blocks that are a "
            f"power of two up to {TABLE_PIECE}, and buffers of {LEAST_BUFFERS} or more"
        )
    return sizes
