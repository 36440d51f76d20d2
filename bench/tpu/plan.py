"""Bytes and operations of the TPU attention kernel: computed from compiled programs, not measured, without a TPU.

    python -m bench tpu-plan                     # every generation, several minutes
    python -m bench tpu-plan --generation v5e

A row is one layer's attention of one batch on one device, compiled ahead of time by the real TPU compiler. The bytes
come from the kernel's plan of copies, which the tests compare with the counts of Pallas's interpreter. The operations
are the matrix products. "Least" is the minimum of any kernel. The time is the longer of the two at the chip's published
rates. This lower bound leaves out the start of copies, all arithmetic but the products, and XLA's work around the
kernel. A decode over a bfloat16 pool writes its K and V too, as in the engine; other kernels' writes do not count.

Prints a table for each generation, writes ``tpu_plan.json`` and ``tpu_plan.png``.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import jax.numpy as jnp
from tqdm import tqdm

from bench import UsageError
from bench.paper.experiment import Plot, save_plot
from bench.report import RESULTS, Table, environment, save
from bench.tpu.compiler import TOPOLOGIES, Case, kernel_vmem_bytes, launch_of, trace_attention, why_no_compiler
from pallas_kernels.block_pool import is_quantized
from pallas_kernels.chips.tpu import chip_of
from pallas_kernels.paged_attention.tpu.launch import vmem_bytes
from pallas_kernels.paged_attention.tpu.traffic import count_traffic, least_bytes, least_flops

ABOUT = "computed, not measured"

HEAD_DIM = 128
"""Head size of all the models."""

LEAST_POOL_BYTES = 2**30
"""The compiler may move a small pool on chip, but no real pool. So the pool gets layers up to this size."""

POOL_DTYPES = ("bfloat16", "int8")
BLOCK_SIZES = (16, 128)


@dataclass(frozen=True, slots=True)
class Model:
    """The attention of a model, or of a device's share of it."""

    name: str
    num_heads: int
    num_kv_heads: int
    max_model_len: int


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's rows."""

    name: str
    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]


MODELS = (
    Model("llama3-8b", 32, 8, 8192),
    Model("qwen3-0.6b", 16, 8, 40960),
    Model("opt-13b", 40, 40, 2048),
    Model("llama3-70b / 8", 8, 1, 8192),
)
BATCHES = (
    Batch("decode 128 at 1k", (1,) * 128, (1024,) * 128),
    Batch("decode 128 at 8k", (1,) * 128, (8192,) * 128),
    Batch("prefill 2048", (2048,), (2048,)),
    Batch("mixed 128 + 384 at 1k", (1,) * 128 + (384,), (1024,) * 129),
)


@dataclass(frozen=True, slots=True)
class Row:
    """One layer's attention.

    Args:
        moved_bytes, least_bytes: bytes between HBM and VMEM, of the kernel's plan and of any kernel.
        flops, least_flops: FLOPs of the matrix products, with the kernel's padding and without.
        planned_vmem_bytes, vmem_bytes: bytes of one core, as planned for the sizes and as the compiler gave the kernel.
        temporary_bytes: bytes in HBM beside arguments and results; a v4 keeps many of them in its CMEM.
        bytes_us, flops_us: times at the device's published rates.
    """

    generation: str
    model: str
    num_heads: int
    num_kv_heads: int
    batch: str
    pool_dtype: str
    block_size: int
    tile_rows: int
    chunk_tokens: int
    buffers: int
    moved_bytes: int
    least_bytes: int
    flops: int
    least_flops: int
    planned_vmem_bytes: int
    vmem_bytes: int
    temporary_bytes: int
    bytes_us: float
    flops_us: float

    @property
    def us(self) -> float:
        return max(self.bytes_us, self.flops_us)

    @property
    def bound(self) -> str:
        return "bytes" if self.bytes_us >= self.flops_us else "flops"


def plan(generation: str, model: Model, batch: Batch, pool_dtype: str, block_size: int) -> Row:
    """Compile one layer's attention, and compute its bytes and FLOPs."""
    case = _case_of(generation, model, batch, jnp.dtype(pool_dtype), block_size)
    compiled, launch, chip = trace_attention(case).compile(), launch_of(case), chip_of(generation)
    traffic = count_traffic(launch, batch.q_lens, batch.kv_lens, case.num_tokens)
    return Row(
        generation=generation,
        model=model.name,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        batch=batch.name,
        pool_dtype=pool_dtype,
        block_size=block_size,
        tile_rows=launch.tile_rows,
        chunk_tokens=launch.chunk_tokens,
        buffers=launch.sizes.buffers,
        moved_bytes=traffic.total_bytes,
        least_bytes=least_bytes(launch, case.group, batch.q_lens, batch.kv_lens),
        flops=traffic.flops,
        least_flops=least_flops(launch, case.group, batch.q_lens, batch.kv_lens),
        planned_vmem_bytes=vmem_bytes(launch),
        vmem_bytes=kernel_vmem_bytes(compiled),
        temporary_bytes=compiled.memory_analysis().temp_size_in_bytes,
        bytes_us=1e6 * traffic.total_bytes / (chip.hbm_bytes_per_s * chip.num_cores),
        flops_us=1e6 * traffic.flops / (chip.bf16_flops_per_s * chip.num_cores),
    )


def _case_of(generation: str, model: Model, batch: Batch, pool_dtype: jnp.dtype, block_size: int) -> Case:
    num_blocks = [-(-kv_len // block_size) for kv_len in batch.kv_lens]
    pool_tokens = (1 + sum(num_blocks)) * block_size
    layer_bytes = pool_tokens * 2 * model.num_kv_heads * HEAD_DIM * pool_dtype.itemsize
    return Case(
        generation,
        HEAD_DIM,
        model.num_heads // model.num_kv_heads,
        block_size,
        pool_dtype,
        num_tokens=sum(batch.q_lens),
        num_seqs=len(batch.q_lens),
        max_blocks=max(num_blocks),
        num_kv_heads=model.num_kv_heads,
        num_layers=max(2, -(-LEAST_POOL_BYTES // layer_bytes)),
        pool_tokens=pool_tokens,
        is_fused=max(batch.q_lens) == 1 and not is_quantized(pool_dtype),
    )


COLUMNS = {
    "model": lambda row: row.model,
    "batch": lambda row: row.batch,
    "pool": lambda row: row.pool_dtype,
    "block": lambda row: f"{row.block_size}",
    "MB": lambda row: f"{row.moved_bytes / 1e6:,.1f}",
    "MB / least": lambda row: f"{row.moved_bytes / row.least_bytes:.3f}",
    "GFLOP": lambda row: f"{row.flops / 1e9:,.1f}",
    "GFLOP / least": lambda row: f"{row.flops / row.least_flops:.2f}",
    "VMEM MiB": lambda row: f"{row.vmem_bytes / 2**20:.1f}",
    "planned": lambda row: f"{row.planned_vmem_bytes / 2**20:.1f}",
    "temporary MiB": lambda row: f"{row.temporary_bytes / 2**20:.1f}",
    "us": lambda row: f"{row.us:,.0f}",
    "bound": lambda row: row.bound,
}


def table(generation: str, rows: Sequence[Row]) -> str:
    """A generation's rows, under the properties of the chip that they depend on."""
    chip = chip_of(generation)
    rates = chip.hbm_bytes_per_s * chip.num_cores / 1e12, chip.bf16_flops_per_s * chip.num_cores / 1e12
    title = (
        f"TPU {generation}, {ABOUT}: {rates[0]:.2f} TB/s, {rates[1]:,.0f} TFLOP/s, "
        f"{chip.vmem_bytes >> 20} MiB of VMEM a core, cores: {chip.num_cores}"
    )
    columns = Table("model", *list(COLUMNS)[1:], first=16)
    lines = [columns.row(*(show(row) for show in COLUMNS.values())) for row in rows]
    return "\n".join([title, "", columns.header(), *lines, ""])


def save_plots(rows: Sequence[Row], path: Path) -> str:
    """Draw one model's rows. Returns where; without matplotlib, how to install it."""
    model, pool_dtype, block_size = MODELS[0].name, POOL_DTYPES[0], BLOCK_SIZES[0]
    us: dict[str, dict[str, float]] = {}
    ratios: dict[str, dict[str, float]] = {}
    for row in rows:
        if (row.model, row.pool_dtype, row.block_size) == (model, pool_dtype, block_size):
            us.setdefault(row.generation, {})[row.batch] = row.us
            ratios.setdefault(row.generation, {})[row.batch] = row.moved_bytes / row.least_bytes
    plots = (
        Plot("the longer of bytes and operations, at published rates", "us a layer", bars=us),
        Plot("bytes moved, over the least possible", "ratio", bars=ratios),
    )
    title = f"{ABOUT}: attention of one layer of {model}, {pool_dtype} pool, block {block_size}"
    is_drawn = save_plot(plots, path, title=title, has_log_y=True)
    return f"plot in {path}" if is_drawn else "no plot: pip install '.[bench]' brings matplotlib"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--generation", choices=TOPOLOGIES, help="only this one; its name is part of the files' names")


def run(args: argparse.Namespace) -> int:
    """Compute, print, save and plot."""
    if (reason := why_no_compiler()) is not None:
        raise UsageError(reason)
    made_in = environment(args.commit) | {"libtpu": version("libtpu")}
    rows = _plan_all([args.generation] if args.generation else list(TOPOLOGIES))
    name = "tpu_plan" + (f"_{args.generation}" if args.generation else "")
    records = [asdict(row) | {"us": row.us, "bound": row.bound} for row in rows]
    path = save(name, {"about": ABOUT, "environment": made_in, "rows": records}, args.out)
    print(f"written to {path}; {save_plots(rows, (args.out or RESULTS) / f'{name}.png')}")
    return 0


def _plan_all(generations: Sequence[str]) -> list[Row]:
    """Compute every row, and print them generation by generation."""
    wanted = [
        (model, batch, pool_dtype, block_size)
        for model in MODELS
        for batch in BATCHES
        for pool_dtype in POOL_DTYPES
        for block_size in BLOCK_SIZES
        if max(batch.kv_lens) <= model.max_model_len
    ]
    rows = []
    with tqdm(total=len(generations) * len(wanted), desc="Compiling", unit="program") as bar:
        for generation in generations:
            for shape in wanted:
                rows.append(plan(generation, *shape))
                bar.update()
            bar.write(table(generation, rows[-len(wanted) :]))
    return rows
