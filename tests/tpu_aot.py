"""Compiles the TPU kernels with the real TPU compiler, for chips that are not there.

``PYTHONPATH=. python tests/tpu_aot.py`` compiles the whole grid, several cases a second, and prints how many of each
generation compiled. It needs libtpu (``pip install 'jpaged[tpu-aot]'``), and no TPU.
"""

import argparse
import importlib.util
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import block_pool_shape, kv_scales_shape
from pallas_kernels.block_pool import is_quantized
from pallas_kernels.paged_attention.tpu import attend_tpu, lane_layout

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "7x": "tpu7x:2x2x1"}
"""Generation -> the smallest topology that the compiler describes."""

NO_MACHINE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
"""What libtpu otherwise asks the cloud's metadata server for, and waits for where there is none; and that processes
which only compile may be several.
"""

NUM_KV_HEADS, NUM_LAYERS, POOL_TOKENS, MAX_BLOCKS = 8, 8, 16 * 1024, 512


def why_no_compiler() -> str | None:
    """Why nothing can be compiled for TPUs here; None if it can."""
    if importlib.util.find_spec("libtpu") is None:
        return "no libtpu: pip install 'jpaged[tpu-aot]'"
    return None


@cache
def mesh_of(generation: str) -> Mesh:
    """One device of a generation."""
    for name, value in NO_MACHINE.items():
        os.environ.setdefault(name, value)
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[generation])
    return Mesh(np.array(topology.devices[:1]), ("chip",))


def compile_for(
    generation: str, function: Callable[..., Any], *shapes: tuple[tuple[int, ...], Any] | None, donate: tuple = ()
) -> Any:
    """Compile a function of arrays of these shapes and types for one device of a generation."""
    mesh = mesh_of(generation)
    sharding = NamedSharding(mesh, PartitionSpec())
    arguments = [None if x is None else jax.ShapeDtypeStruct(x[0], x[1], sharding=sharding) for x in shapes]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(function, donate_argnums=donate).lower(*arguments).compile()


@dataclass(frozen=True)
class Case:
    """One kernel to compile."""

    generation: str
    head_dim: int
    group: int
    block_size: int
    pool_dtype: jnp.dtype
    num_tokens: int
    num_seqs: int
    q_dtype: Any = jnp.bfloat16
    max_blocks: int = MAX_BLOCKS
    num_kv_heads: int = NUM_KV_HEADS
    has_options: bool = False

    def __str__(self) -> str:
        return (
            f"{self.generation}-d{self.head_dim}-g{self.group}-b{self.block_size}-{self.pool_dtype.name}"
            f"-{self.num_tokens}x{self.num_seqs}" + ("-options" if self.has_options else "")
        )


BATCHES = {"decode": (128, 128), "prefill": (1024, 1), "mixed": (512, 128)}
"""Tokens and sequences."""


def grid() -> Iterator[Case]:
    """Every generation, head_dim, group, block size, type of pool, and kind of batch."""
    for generation, head_dim, group, block_size, dtype, batch in product(
        TOPOLOGIES,
        (64, 128, 256),
        (1, 4, 8),
        (16, 32, 64, 128),
        (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.int8), jnp.dtype(jnp.float8_e4m3fn)),
        BATCHES.values(),
    ):
        yield Case(generation, head_dim, group, block_size, dtype, *batch)


def compile_case(case: Case) -> Any:
    """The compiled attention of a case, without what leads to it.

    Raises:
        NotImplementedError: the kernel says that it cannot, before anything is compiled.
    """
    num_heads = case.num_kv_heads * case.group
    layout = lane_layout(case.num_kv_heads, case.head_dim)
    num_blocks = POOL_TOKENS // case.block_size
    pool = block_pool_shape(num_blocks, NUM_LAYERS, layout.num_kv_heads, case.block_size, layout.head_dim)
    scales = kv_scales_shape(num_blocks, NUM_LAYERS, layout.num_kv_heads)

    def attend(q, pool, block_tables, kv_lens, cu_q_lens, alibi_slopes, sinks, kv_scales):
        return attend_tpu(
            q,
            pool,
            1,
            block_tables,
            kv_lens,
            cu_q_lens,
            sm_scale=case.head_dim**-0.5,
            sliding_window=1000 if case.has_options else None,
            soft_cap=30.0 if case.has_options else None,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            kv_scales=kv_scales,
            num_kv_heads=case.num_kv_heads,
        )

    per_head = ((num_heads,), jnp.float32) if case.has_options else None
    compiled = compile_for(
        case.generation,
        attend,
        ((case.num_tokens, num_heads, case.head_dim), case.q_dtype),
        (pool, case.pool_dtype),
        ((case.num_seqs, case.max_blocks), jnp.int32),
        ((case.num_seqs,), jnp.int32),
        ((case.num_seqs + 1,), jnp.int32),
        per_head,
        per_head,
        (scales, jnp.float32) if is_quantized(case.pool_dtype) else None,
    )
    temporaries, pool_bytes = compiled.memory_analysis().temp_size_in_bytes, math.prod(pool) * case.pool_dtype.itemsize
    assert temporaries < pool_bytes / 2, f"{temporaries} bytes of temporaries beside a pool of {pool_bytes}"
    return compiled


def main() -> int:
    """Compile the grid; the exit status says whether every case compiled or was refused beforehand."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--generation", choices=TOPOLOGIES, help="only this one")
    parser.add_argument("--every", type=int, default=1, help="only each n-th case")
    arguments = parser.parse_args()
    counts: Counter[tuple[str, str]] = Counter()
    cases = [case for case in grid() if arguments.generation in (None, case.generation)][:: arguments.every]
    started = time.monotonic()
    for case in cases:
        try:
            compile_case(case)
            outcome = "compiled"
        except NotImplementedError as error:
            outcome = "refused"
            print(f"{case}: {error}")
        except Exception as error:  # the compiler's own, of any type
            outcome = "failed"
            print(f"{case}: {type(error).__name__}: {str(error)[:600]}", flush=True)
        counts[case.generation, outcome] += 1
    for (generation, outcome), count in sorted(counts.items()):
        print(f"{generation}: {count} {outcome}")
    print(f"{len(cases)} cases in {time.monotonic() - started:.0f} s")
    return 1 if any(outcome == "failed" for _, outcome in counts) else 0


if __name__ == "__main__":
    sys.exit(main())
