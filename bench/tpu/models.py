"""Whole models on absent TPUs: do parameters, pool and temporaries fit, and what do the chips exchange?

``python -m bench tpu-models`` compiles the decode and the prefill step of each model with the real TPU compiler, all
layers of it, and saves what the compiler says. Computed, not measured. It needs libtpu
(``pip install 'jpaged[tpu-aot]'``), and no TPU.
"""

import argparse
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np
from flax import nnx
from jax.sharding import Mesh

from bench import UsageError
from bench.report import CONFIGS, Table, environment, save
from bench.tpu.compiler import mesh_in, why_no_compiler
from jpaged import EngineConfig
from jpaged.device.step.inputs import Bucket
from jpaged.device.step.programs import Programs
from jpaged.device.step.steps import SAMPLING_SCOPE
from jpaged.device.target import choose_backend
from jpaged.models import ModelConfig, fuse_projections, load_config
from jpaged.models.checkpoint.registry import abstract_model
from jpaged.sharding import TENSOR_AXIS
from pallas_kernels.chips.tpu import chip_of

TOPOLOGIES = {
    "v5e": {1: "v5e:2x2", 4: "v5e:2x2", 8: "v5e:2x4", 16: "v5e:4x4"},
    "v5p": {1: "v5p:2x2x1", 4: "v5p:2x2x1", 8: "v5p:2x2x2", 16: "v5p:2x2x4"},
    "v6e": {1: "v6e:2x2", 4: "v6e:2x2", 8: "v6e:2x4", 16: "v6e:4x4"},
}
"""Generation -> devices -> a topology that has as many, or the smallest there is."""

PLACES = (
    ("llama3-8b", (("v5e", 1), ("v5e", 4), ("v5p", 1), ("v6e", 1))),
    ("opt-13b", (("v5e", 4), ("v5p", 1), ("v6e", 1))),
    ("llama3-70b", (("v5e", 8), ("v5e", 16), ("v5p", 8), ("v5p", 16), ("v6e", 8), ("v6e", 16))),
    ("opt-175b", (("v5e", 16), ("v5p", 16), ("v6e", 16))),
)
"""Models, and the places of each: a generation and a number of chips."""

MAX_NUM_SEQS = 128
MAX_BATCHED_TOKENS = 2048
BLOCK_SIZE = 16

MEMORY_FRACTION = 0.95
"""Share of a chip's memory for parameters, pool and temporaries together."""

WORKSPACE = 1 / 32
"""Share of a chip's memory that the pool leaves to temporaries, as an engine guesses it."""

COLLECTIVE = re.compile(r"= .*? (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(")


@dataclass(frozen=True, slots=True)
class Step:
    """The compiler's figures of one program, on each chip.

    Args:
        temporary_bytes: bytes besides parameters, pool and the state of a step.
        aliased_bytes: bytes of arguments that results replace: above all the pool.
        collectives: kind -> number of collectives of the layers and the embedding.
        sampling_collectives: kind -> number of collectives of sampling.
    """

    num_tokens: int
    num_rows: int
    compile_s: float
    argument_bytes: int
    temporary_bytes: int
    aliased_bytes: int
    collectives: dict[str, int]
    sampling_collectives: dict[str, int]


@dataclass(frozen=True, slots=True)
class Fit:
    """A model on some chips; bytes are of each chip.

    Args:
        reason: why the model does not fit; None if it does.
        context_tokens: tokens that the pool holds, of all sequences together.
        most_seqs_at_max_len: sequences of the model's whole context that the pool holds.
    """

    model: str
    generation: str
    num_chips: int
    num_layers: int
    hbm_bytes: int
    parameter_bytes: int
    pool_bytes: int = 0
    num_blocks: int = 0
    context_tokens: int = 0
    max_model_len: int = 0
    most_seqs_at_max_len: int = 0
    reason: str | None = None
    steps: tuple[Step, ...] = ()

    @property
    def total_bytes(self) -> int:
        """Parameters, pool and the larger of the programs' temporaries."""
        return self.parameter_bytes + self.pool_bytes + max((step.temporary_bytes for step in self.steps), default=0)


def programs_of(config: ModelConfig, mesh: Mesh) -> Programs:
    """The programs of a model in bfloat16, for a pool of no blocks yet."""
    model = nnx.merge(*abstract_model(config, "bfloat16", mesh))
    fuse_projections(model)
    settings = EngineConfig(
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=MAX_BATCHED_TOKENS,
        block_size=BLOCK_SIZE,
        tensor_parallel_size=mesh.size,
        attention_implementation="pallas_tpu",
    )
    backend = choose_backend(config, settings, "bfloat16", mesh)
    return Programs(model, config, settings, mesh, backend, max_model_len=config.max_model_len)


def fit(name: str, generation: str, num_chips: int, *, num_layers: int | None = None) -> Fit:
    """Put a model on some chips: compile its steps over the largest pool that its parameters leave room for.

    Args:
        name: a directory of bench/configs.
        num_layers: number of layers, if fewer than the model has.
    """
    config = load_config(CONFIGS / name)
    config = replace(config, num_layers=num_layers or config.num_layers)
    mesh = mesh_in(TOPOLOGIES[generation][num_chips], num_chips, TENSOR_AXIS)
    programs = programs_of(config, mesh)
    chip = chip_of(generation)
    hbm_bytes = chip.hbm_bytes * chip.num_cores
    parameter_bytes = sum(_share_bytes(x) for x in programs.weights)
    found = Fit(name, generation, num_chips, config.num_layers, hbm_bytes, parameter_bytes)
    left = int(hbm_bytes * (MEMORY_FRACTION - WORKSPACE)) - parameter_bytes
    num_blocks = left // (programs.bytes_per_block // num_chips)
    if num_blocks * BLOCK_SIZE < config.max_model_len:
        return replace(found, reason=f"parameters of {_gib(parameter_bytes)} GiB leave no room for a sequence")
    programs.resize(num_blocks, config.max_model_len)
    context_tokens = (num_blocks - 1) * BLOCK_SIZE
    decode, prefill = Bucket(MAX_NUM_SEQS, MAX_NUM_SEQS), Bucket(MAX_BATCHED_TOKENS, MAX_NUM_SEQS)
    return replace(
        found,
        pool_bytes=_share_bytes(programs.abstract_cache().pool),
        num_blocks=num_blocks,
        context_tokens=context_tokens,
        max_model_len=config.max_model_len,
        most_seqs_at_max_len=context_tokens // config.max_model_len,
        steps=tuple(_compile(programs, bucket) for bucket in (decode, prefill)),
    )


def _share_bytes(array: Any) -> int:
    """Bytes of an array on each of its devices."""
    return int(np.prod(array.sharding.shard_shape(array.shape))) * array.dtype.itemsize


def _compile(programs: Programs, bucket: Bucket) -> Step:
    started = time.perf_counter()
    compiled = programs.lower(("forward", bucket)).compile()
    compile_s = time.perf_counter() - started
    memory, hlo = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None
    assert hlo is not None
    forward, sampling = count_collectives(hlo)
    return Step(
        bucket.num_tokens,
        bucket.num_rows,
        round(compile_s, 1),
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.alias_size_in_bytes,
        forward,
        sampling,
    )


def count_collectives(hlo: str) -> tuple[dict[str, int], dict[str, int]]:
    """Kind -> number of the collectives in a compiled program: of its forward pass, and of sampling."""
    counts: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
    for line in hlo.splitlines():
        if (found := COLLECTIVE.search(line)) is not None:
            counts[f"/{SAMPLING_SCOPE}/" in line][found[1]] += 1
    return dict(counts[0]), dict(counts[1])


def table(fits: Sequence[Fit]) -> str:
    """Rows of all models; sizes in GiB on each chip."""
    titles = "HBM", "parameters", "pool", "temporaries: decode, prefill", "in all", "tokens of context", "all-reduces"
    rows = {}
    for each in fits:
        cells = [_gib(each.hbm_bytes), _gib(each.parameter_bytes)]
        if each.reason is not None:
            cells.append("does not fit")
        else:
            temporaries = ", ".join(_gib(step.temporary_bytes) for step in each.steps)
            reduces = ", ".join(str(step.collectives.get("all-reduce", 0)) for step in each.steps)
            cells += [_gib(each.pool_bytes), temporaries, _gib(each.total_bytes), f"{each.context_tokens:,}", reduces]
        rows[f"{each.model} on {each.num_chips} x {each.generation}"] = cells
    return Table("GiB on each chip", *titles).text(rows)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.2f}"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--model", choices=[name for name, _ in PLACES], help="only this one")
    parser.add_argument("--generation", choices=TOPOLOGIES, help="only this one")
    parser.add_argument("--layers", type=int, help="layers of each model (default: all)")


def run(args: argparse.Namespace) -> int:
    """Compile the models asked for and save their sizes."""
    if (reason := why_no_compiler()) is not None:
        raise UsageError(reason)
    asked = [
        (name, generation, num_chips)
        for name, places in PLACES
        for generation, num_chips in places
        if args.model in (None, name) and args.generation in (None, generation)
    ]
    fits: list[Fit] = []
    for number, place in enumerate(asked, 1):
        print(f"{number} of {len(asked)}: {place[0]} on {place[2]} x {place[1]} ...", file=sys.stderr, flush=True)
        fits.append(fit(*place, num_layers=args.layers))
        content = {
            "what": "computed by the TPU compiler, not measured: bytes on each chip",
            **environment(args.commit),
            "device": "none: compiled ahead of time",
            "libtpu": version("libtpu"),
            "settings": {"dtype": "bfloat16", "block_size": BLOCK_SIZE, "memory_fraction": MEMORY_FRACTION},
            "fits": [asdict(each) | {"total_bytes": each.total_bytes} for each in fits],
        }
        save("tpu_models", content, args.out)
    print(table(fits))
    return 0
