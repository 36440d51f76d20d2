"""Sizes of tiles and rings: measured per device in tuned.json, or else sizes that fit."""

import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from pallas_kernels.chips import here
from pallas_kernels.chips.hopper import SMEM_BYTES
from pallas_kernels.paged_attention.hopper.decode_memory import DecodeSizes, columns_that_fit, decode_smem_bytes
from pallas_kernels.paged_attention.hopper.prefill_plan import PrefillSizes

TUNED = Path(__file__).parent / "tuned.json"
"""Device kind -> shape class -> sizes."""

MOST_SLOTS = 16
"""Slots worth trying for 8-bit tiles; half as many 16-bit tiles take as many bytes."""

MOST_WORKERS = {1: 3, 2: 4}
"""Bytes of a number -> workers worth trying. Four leave 64 registers, too few to widen 8-bit tiles."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of both kernels."""

    decode: DecodeSizes
    prefill: PrefillSizes


def shape_class(*, group: int, head_dim: int, block_size: int, pool_dtype: jnp.dtype) -> str:
    """The key of a case in tuned.json, of properties known at compile time."""
    return f"group {group}, head_dim {head_dim}, block {block_size}, {jnp.dtype(pool_dtype).name}"


def sizes_for(*, group: int, head_dim: int, block_size: int, pool_dtype: jnp.dtype) -> Sizes:
    """The tuned sizes of a shape class on the default device, or else sizes that fit."""
    key = shape_class(group=group, head_dim=head_dim, block_size=block_size, pool_dtype=pool_dtype)
    tuned = load().get(here.device_kind(), {}).get(key, {})
    decode = DecodeSizes(**tuned["decode"]) if "decode" in tuned else _fitting_decode(group, head_dim, pool_dtype)
    prefill = PrefillSizes(**tuned.get("prefill", {}))
    return Sizes(decode, prefill)


def decode_candidates(group: int, head_dim: int, pool_dtype: jnp.dtype) -> list[DecodeSizes]:
    """Decode sizes worth timing: they fit registers and shared memory, with as many slots as fit."""
    candidates = []
    for tile_tokens in (64, 128):
        for workers in range(1, MOST_WORKERS[pool_dtype.itemsize] + 1):
            if group > columns_that_fit(head_dim, pool_dtype, workers):
                continue
            for slots in range(MOST_SLOTS // pool_dtype.itemsize, 2, -1):
                sizes = DecodeSizes(tile_tokens, slots, workers)
                if workers * decode_smem_bytes(sizes, group, head_dim, pool_dtype) <= SMEM_BYTES:
                    candidates.append(sizes)
                    break
    return candidates


def _fitting_decode(group: int, head_dim: int, pool_dtype: jnp.dtype) -> DecodeSizes:
    fitting = [sizes for sizes in decode_candidates(group, head_dim, pool_dtype) if sizes.tile_tokens == 64]
    return min(fitting, key=lambda sizes: abs(sizes.workers_per_sm - 2))


@cache
def load() -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """The content of tuned.json."""
    return json.loads(TUNED.read_text())


def save(device_kind: str, chosen: dict[str, dict[str, DecodeSizes | PrefillSizes]]) -> Path:
    """Replace the sizes of some shape classes of a device.

    Args:
        chosen: shape class -> "decode", "prefill" or both -> sizes.

    Returns:
        The file written.
    """
    tuned = json.loads(TUNED.read_text())
    of_device = tuned.setdefault(device_kind, {})
    for key, sizes in chosen.items():
        of_device[key] = of_device.get(key, {}) | {name: asdict(value) for name, value in sizes.items()}
    TUNED.write_text(json.dumps(tuned, indent=2, sort_keys=True) + "\n")
    load.cache_clear()
    return TUNED
