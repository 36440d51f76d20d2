"""Compiles the TPU kernel with the real TPU compiler, for chips that are not there: a grid of cases.

``python -m tests.support.tpu_aot`` compiles the whole grid, about a case a second, and prints how many of each
generation compiled. It needs libtpu (``pip install 'jpaged[tpu-aot]'``), and no TPU.
"""

import argparse
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from bench.report import environment
from bench.tpu.compiler import TOPOLOGIES, Case, kernel_vmem_bytes, launch_of, trace_attention
from pallas_kernels.paged_attention.tpu.launch import vmem_bytes

BATCHES = {
    "decode": {"num_tokens": 128, "num_seqs": 128},
    "prefill": {"num_tokens": 1024, "num_seqs": 1},
    "mixed": {"num_tokens": 512, "num_seqs": 128},
}
AXES = {
    "head_dim": (64, 128, 256),
    "group": (1, 4, 8),
    "block_size": (16, 32, 64, 128),
    "pool_dtype": ("bfloat16", "int8", "float8_e4m3fn"),
}


def grid() -> Iterator[Case]:
    """Every generation, head_dim, group, block size, type of pool, and kind of batch."""
    for generation, head_dim, group, block_size, dtype, batch in product(TOPOLOGIES, *AXES.values(), BATCHES.values()):
        yield Case(generation, head_dim, group, block_size, jnp.dtype(dtype), **batch)


def compile_case(case: Case) -> Any:
    """The compiled attention of a case, which copies nothing of the pool's size and takes no more VMEM than planned.

    Raises:
        NotImplementedError: the kernel says that it cannot, before anything is compiled.
    """
    compiled = trace_attention(case).compile()
    shape, dtype = case.pool
    temporaries, pool_bytes = compiled.memory_analysis().temp_size_in_bytes, math.prod(shape) * dtype.itemsize
    assert temporaries < pool_bytes / 2, f"{temporaries} bytes of temporaries beside a pool of {pool_bytes}"
    used, planned = kernel_vmem_bytes(compiled), vmem_bytes(launch_of(case))
    assert used <= planned, f"{used} bytes of VMEM: {planned} are planned"
    return compiled


def main(argv: list[str] | None = None) -> int:
    """Compile the grid; the exit status is 0 if every case compiled or was refused beforehand."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generation", choices=TOPOLOGIES, help="only this one")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only each N-th case")
    parser.add_argument("--save", type=Path, metavar="PATH", help="write the counts there, as JSON")
    parser.add_argument("--commit", help="commit to record, where there is no git")
    arguments = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    made_in = environment(arguments.commit) | {"libtpu": version("libtpu")} if arguments.save else {}
    cases = [case for case in grid() if arguments.generation in (None, case.generation)][:: arguments.every]
    started = time.monotonic()
    counts, reasons = _compile_all(cases)
    seconds = time.monotonic() - started
    for generation, outcomes in counts.items():
        print(f"{generation}: " + ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items() if count))
    print(f"{len(cases)} cases in {seconds:.0f} s")
    if arguments.save:
        content = {
            "about": "compiled ahead of time by the TPU compiler; nothing was run",
            "environment": made_in,
            "axes": {"generation": list(counts)} | AXES | {"batch": BATCHES},
            "num_cases": len(cases),
            "seconds": round(seconds),
            "generations": {name: dict(counts[name]) | {"reasons": dict(reasons[name])} for name in counts},
        }
        arguments.save.write_text(json.dumps(content, indent=2) + "\n")
        print(f"written to {arguments.save}")
    return 1 if any(outcomes["failed"] for outcomes in counts.values()) else 0


def _compile_all(cases: list[Case]) -> tuple[dict[str, Counter[str]], dict[str, Counter[str]]]:
    """By generation: how many cases had each outcome; and for what reasons not all compiled."""
    counts = {case.generation: Counter(compiled=0, refused=0, failed=0) for case in cases}
    reasons = {case.generation: Counter() for case in cases}
    for case in tqdm(cases, desc="Compiling", unit="case"):
        try:
            compile_case(case)
            outcome, reason = "compiled", None
        except NotImplementedError as error:
            outcome, reason = "refused", str(error)
        except Exception as error:  # the compiler's own, of any type
            outcome, reason = "failed", f"{type(error).__name__}: {str(error)[:600]}"
        counts[case.generation][outcome] += 1
        if reason is not None:
            reasons[case.generation][reason] += 1
            tqdm.write(f"{case}: {outcome}: {reason}")
    return counts, reasons


if __name__ == "__main__":
    sys.exit(main())
