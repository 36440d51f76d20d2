"""The sampler on the current device: time a call beside one read of the logits.

    python -m bench.sampling
    python -m bench.sampling --device cpu --rows 1,8 --vocab 32000

A program draws from the same logits several times, each draw after the one before. "flat" logits are normal, as a model
of random weights has them: top-p keeps tens of thousands of tokens. "peaked" ones fall with the logarithm of the rank,
as a trained model's do. "of floor" is the time of reading all logits once, at the bandwidth measured in the same run,
over the time taken.

Prints a table, writes ``bench/results/sampling_DEVICE.json``.
"""

import argparse
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax
    from jaxtyping import Array, Float

    from jpaged.device.sampling.sampler import SampleInputs

TURNS = 16
"""Draws in one program, so that dispatching it is a small part of what is timed."""

NUM_TOP = 20
KINDS = ("flat", "peaked")


@dataclass(frozen=True)
class Case:
    """What every row asks for.

    Args:
        name: what the table says.
        params: of ``SamplingParams``.
        num_top: of ``sample``.
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


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    if args.device == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import jax.numpy as jnp

    from bench.machine import measure_limits
    from bench.results import environment, save

    limits = measure_limits(jnp.dtype(jnp.bfloat16))
    print(f"limit of this device: {limits.read_bytes_per_s / 1e12:.2f} TB/s read\n")
    print(f"{'logits':<8}{'rows':>5}  {'case':<18}{'us a call':>11}{'floor us':>10}{'of floor':>10}", flush=True)
    rows = []
    for kind in args.logits.split(","):
        for num_rows in map(int, args.rows.split(",")):
            logits = _make_logits(kind, num_rows, args.vocab)
            floor_s = logits.nbytes / limits.read_bytes_per_s
            for case in CASES:
                median_s = _time_s(case, logits, args.samples)
                rows.append(asdict(case) | {"logits": kind, "rows": num_rows, "median_s": median_s, "floor_s": floor_s})
                times = f"{median_s * 1e6:>11.1f}{floor_s * 1e6:>10.1f}{floor_s / median_s:>10.0%}"
                print(f"{kind:<8}{num_rows:>5}  {case.name:<18}{times}", flush=True)
    backend = jax.default_backend()
    name = "cpu" if backend == "cpu" else jax.devices()[0].device_kind.lower().replace(" ", "-")
    report = {"environment": environment(args.commit), "limits": asdict(limits), "vocab": args.vocab, "rows": rows}
    print(f"\nwritten to {save(f'sampling_{name}', report, args.out)}")
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.sampling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=("auto", "cpu"), default="auto", help="cpu keeps JAX off any accelerator")
    add("--rows", default="1,32,256", metavar="N,...", help="rows of logits (default: %(default)s)")
    add("--vocab", type=int, default=128256, metavar="N", help="logits in a row (default: %(default)s)")
    add("--logits", default=",".join(KINDS), metavar="KINDS", help="of %(default)s (default: all)")
    add("--samples", type=int, default=7, metavar="N", help="timings a case, of which the median counts")
    add("--out", type=Path, default=Path(__file__).parent / "results", help="directory of the result file")
    add("--commit", help="commit to record, where there is no git")
    args = parser.parse_args(argv)
    if unknown := set(args.logits.split(",")) - set(KINDS):
        parser.error(f"--logits {','.join(sorted(unknown))}: expected some of {','.join(KINDS)}")
    return args


def _make_logits(kind: str, num_rows: int, vocab_size: int) -> "Float[Array, 'rows vocab']":
    import jax
    import jax.numpy as jnp

    noise = jax.random.normal(jax.random.key(0), (num_rows, vocab_size), jnp.float32)
    if kind == "flat":
        return noise
    ranks = jax.random.permutation(jax.random.key(1), jnp.arange(1, vocab_size + 1, dtype=jnp.float32))
    return noise - 1.5 * jnp.log(ranks)[None, :]


def _time_s(case: Case, logits: "Float[Array, 'rows vocab']", num_samples: int) -> float:
    """Seconds a call, in a chain of them within one program."""
    import jax.numpy as jnp

    from bench.attention.timing import time_program
    from jpaged.contract.plan import Sample
    from jpaged.device.sampling.sampler import make_sample_inputs
    from jpaged.request import SamplingParams

    num_rows = logits.shape[0]
    params = SamplingParams(**case.params)
    inputs = make_sample_inputs([Sample(0, 0, 0, row, params, [], [], []) for row in range(num_rows)], num_rows)
    tokens = jnp.zeros(num_rows, jnp.int32)
    program = _compile(case.num_top, tokens, logits, inputs)
    timing, _ = time_program(program, tokens, (logits, inputs), num_samples)
    return timing.divided(TURNS).median_s


def _compile(num_top: int | None, *args: "Array | SampleInputs") -> "jax.stages.Compiled":
    import jax
    import jax.numpy as jnp
    from jax import Array, lax

    from jpaged.device.sampling.sampler import SampleInputs, sample
    from jpaged.device.target import TARGETS

    def run(tokens: Array, logits: Array, inputs: SampleInputs) -> Array:
        def turn(i: Array, tokens: Array) -> Array:
            # Without the barrier the loop would be left with what does not depend on the draw before.
            same_logits, tokens = lax.optimization_barrier((logits, tokens))
            drawn = sample(same_logits, _at(inputs, i), num_top=num_top)
            checksum = jnp.sum(drawn.scores.logprobs) + jnp.sum(drawn.scores.top_logprobs)
            used = jnp.where(jnp.isfinite(checksum), drawn.token_ids + jnp.sum(drawn.scores.ranks), tokens)
            return used + jnp.sum(drawn.scores.top_ids)

        return lax.fori_loop(0, TURNS, turn, tokens)

    options = TARGETS[jax.default_backend()].compiler_options
    return jax.jit(run).lower(*args).compile(compiler_options=dict(options))


def _at(inputs: "SampleInputs", position: "Array") -> "SampleInputs":
    from dataclasses import replace

    return replace(inputs, positions=inputs.positions + position)


if __name__ == "__main__":
    sys.exit(main())
