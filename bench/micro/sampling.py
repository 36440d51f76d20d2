"""The sampler on the current device: the time of a call beside one read of the logits.

    python -m bench sampling
    python -m bench sampling --device cpu --rows 1,8 --vocab 32000

A program draws from the same logits several times, each draw after the one before. "flat" logits are normal, as a
model of random weights has them: top-p keeps tens of thousands of tokens. "peaked" logits fall with the logarithm of
the rank, as a trained model's do. "of floor" is the time of reading all logits once, at the bandwidth measured in the
same run, over the time taken.

Prints a table, writes ``bench/results/sampling_DEVICE.json``.
"""

import argparse
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from bench import UsageError, machine
from bench.kernels.timing import time_program
from bench.report import Table, device_name, save, start_report
from jpaged.device.sampling.columns import SampleInputs, make_sample_inputs
from jpaged.device.sampling.draw import sample
from jpaged.device.target import TARGETS
from jpaged.request import SamplingParams

NUM_DRAWS = 16
"""Draws in one program, so that dispatching it is a small part of what is timed."""

NUM_TOP = 20
KINDS = ("flat", "peaked")


@dataclass(frozen=True)
class Case:
    """The request of every row.

    Args:
        name: title in the table.
        params: fields of ``SamplingParams``.
        num_top: the argument of ``sample``.
    """

    name: str
    params: dict[str, Any] = field(default_factory=dict)
    num_top: int | None = None


CASES = (
    Case("plain"),
    Case("greedy", {"temperature": 0.0}),
    Case("temperature 0.7", {"temperature": 0.7}),
    Case("top-p 0.9", {"top_p": 0.9}),
    Case("top-k 50", {"top_k": 50}),
    Case("min-p 0.05", {"min_p": 0.05}),
    Case("all three", {"top_k": 50, "top_p": 0.9, "min_p": 0.05}),
    Case("logprobs", {}, NUM_TOP),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add = parser.add_argument
    add("--rows", default="1,32,256", metavar="N,...", help="rows of logits (default: %(default)s)")
    add("--vocab", type=int, default=128256, metavar="N", help="logits in a row (default: %(default)s)")
    add("--logits", default=",".join(KINDS), metavar="KINDS", help="some of %(default)s (default: all)")
    add("--samples", type=int, default=7, metavar="N", help="timings of a case, of which the median counts")


def run(args: argparse.Namespace) -> int:
    """Measure, print and save."""
    if unknown := set(args.logits.split(",")) - set(KINDS):
        raise UsageError(f"--logits {','.join(sorted(unknown))}: expected some of {','.join(KINDS)}")
    limits = machine.measure_limits(jnp.dtype(jnp.bfloat16))
    table, rows = Table("logits", "rows", "case", "us a call", "floor us", "of floor", first=8, width=16), []
    print(f"{limits}\n\n{table.header()}", flush=True)
    for kind in args.logits.split(","):
        for num_rows in map(int, args.rows.split(",")):
            logits = _make_logits(kind, num_rows, args.vocab)
            floor_s = logits.nbytes / limits.read_bytes_per_s
            for case in CASES:
                median_s = _time_s(case, logits, args.samples)
                rows.append(asdict(case) | {"logits": kind, "rows": num_rows, "median_s": median_s, "floor_s": floor_s})
                cells = median_s * 1e6, floor_s * 1e6, f"{floor_s / median_s:.0%}"
                print(table.row(kind, num_rows, case.name, *cells), flush=True)
    report = start_report(args, limits=asdict(limits), vocab=args.vocab, rows=rows)
    print(f"\nwritten to {save(f'sampling_{device_name()}', report, args.out)}")
    return 0


def _make_logits(kind: str, num_rows: int, vocab_size: int) -> Float[Array, "rows vocab"]:
    noise = jax.random.normal(jax.random.key(0), (num_rows, vocab_size), jnp.float32)
    if kind == "flat":
        return noise
    ranks = jax.random.permutation(jax.random.key(1), jnp.arange(1, vocab_size + 1, dtype=jnp.float32))
    return noise - 1.5 * jnp.log(ranks)[None, :]


def _time_s(case: Case, logits: Float[Array, "rows vocab"], num_samples: int) -> float:
    """Seconds a call, in a chain of them within one program."""
    num_rows = logits.shape[0]
    params = SamplingParams(**case.params)
    inputs = make_sample_inputs([params] * num_rows, range(num_rows), [0] * num_rows, num_rows)
    tokens = jnp.zeros(num_rows, jnp.int32)
    program = _compile(case.num_top, tokens, logits, inputs)
    timing, _ = time_program(program, tokens, (logits, inputs), num_samples)
    return timing.divided(NUM_DRAWS).median_s


def _compile(num_top: int | None, *args: Array | SampleInputs) -> jax.stages.Compiled:
    def run(tokens: Array, logits: Array, inputs: SampleInputs) -> Array:
        def draw(i: Array, tokens: Array) -> Array:
            # Without the barrier everything that does not depend on the previous draw would leave the loop.
            same_logits, tokens = lax.optimization_barrier((logits, tokens))
            drawn = sample(same_logits, _at(inputs, i), num_top=num_top)
            checksum = jnp.sum(drawn.scores.logprobs) + jnp.sum(drawn.scores.top_logprobs)
            used = jnp.where(jnp.isfinite(checksum), drawn.token_ids + jnp.sum(drawn.scores.ranks), tokens)
            return used + jnp.sum(drawn.scores.top_ids)

        return lax.fori_loop(0, NUM_DRAWS, draw, tokens)

    options = TARGETS[jax.default_backend()].compiler_options
    return jax.jit(run).lower(*args).compile(compiler_options=dict(options))


def _at(inputs: SampleInputs, position: Array) -> SampleInputs:
    return replace(inputs, positions=inputs.positions + position)
