"""Kernel sizes: tries what the kernels offer on the measured shapes, and saves the best of each class."""

import math
import sys
from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from bench.attention.compiling import Source, compile_all, one_line
from bench.attention.contenders import NUM_LAYERS, NUM_OUR_LAYERS
from bench.attention.inputs import Inputs, make_inputs, make_queries
from bench.attention.shapes import AttentionShape
from bench.attention.timing import time_program
from pallas_kernels.paged_attention.hopper import attend_hopper, tuning
from pallas_kernels.paged_attention.hopper.prefill_plan import PrefillSizes
from pallas_kernels.paged_attention.hopper.tuning import Sizes


def attend_with(sizes: Sizes, q: Array, inputs: Inputs, layer: int, shape: AttentionShape) -> Array:
    """One layer by the Hopper kernels, of the sizes given."""
    return attend_hopper(
        q,
        inputs.pool,
        layer,
        inputs.block_tables,
        inputs.kv_lens,
        inputs.cu_q_lens,
        sm_scale=shape.head_dim**-0.5,
        sliding_window=None,
        soft_cap=None,
        alibi_slopes=None,
        sinks=None,
        kv_scales=inputs.kv_scales,
        sizes=sizes,
    )


def class_of(shape: AttentionShape) -> str:
    """What sizes are chosen by: known when a program is compiled, unlike lengths."""
    return tuning.shape_class(
        group=shape.group,
        head_dim=shape.head_dim,
        block_size=shape.block_size,
        pool_dtype=jnp.dtype(shape.kv_dtype),
    )


def candidates(shape: AttentionShape) -> list[Sizes]:
    """The sizes to try for one of the kernels; the other's do not matter."""
    pool_dtype = jnp.dtype(shape.kv_dtype)
    if shape.kind == "decode":
        decode = tuning.decode_candidates(shape.group, shape.head_dim, pool_dtype)
        return [Sizes(sizes, PrefillSizes()) for sizes in decode]
    fitting = tuning.decode_candidates(shape.group, shape.head_dim, pool_dtype)[0]
    return [Sizes(fitting, PrefillSizes(ping_pong=ping_pong)) for ping_pong in (True, False)]


def tune(shapes: list[AttentionShape], num_samples: int) -> dict[str, Any]:
    """Time every candidate; save each class's best; report all of them.

    A class's best is the least geometric mean over its shapes of microseconds a layer, among the candidates that ran on
    all of them. Mixed batches are left out: their rows are those of the other two kinds.
    """
    classes: dict[tuple[str, str], list[AttentionShape]] = defaultdict(list)
    for shape in shapes:
        if shape.kind in ("decode", "prefill"):
            classes[shape.kind, class_of(shape)].append(shape)
    programs = compile_all(
        {
            (shape.name, sizes): _source(shape, sizes)
            for of in classes.values()
            for shape in of
            for sizes in candidates(shape)
        }
    )
    chosen, report = defaultdict(dict), {}
    for (kind, name), members in classes.items():
        tried = candidates(members[0])
        times = [_time_candidates(shape, tried, programs, num_samples) for shape in members]
        means = [_geometric_mean(of_one) for of_one in zip(*times, strict=True)]
        best = min(range(len(tried)), key=means.__getitem__)
        named = [str(getattr(sizes, kind)) for sizes in tried]
        report[f"{kind}: {name}"] = {
            "shapes": [shape.name for shape in members],
            "best": named[best],
            "geometric_mean_us": dict(zip(named, means, strict=True)),
        }
        print(f"{kind}: {name}\n  {means[best]:.1f} us with {named[best]}", flush=True)
        if math.isfinite(means[best]):
            chosen[name][kind] = getattr(tried[best], kind)
    print(f"saved to {tuning.save(jax.devices()[0].device_kind, chosen)}")
    return report


def _source(shape: AttentionShape, sizes: Sizes) -> Source:
    """A program that attends ``NUM_OUR_LAYERS`` layers, which its pool's take turns to be."""

    def run(q: Array, inputs: Inputs) -> Array:
        for layer in range(NUM_OUR_LAYERS):
            q = attend_with(sizes, q, inputs, layer % NUM_LAYERS, shape)
        return q

    arguments = jax.eval_shape(lambda: (make_queries(shape), make_inputs(shape, NUM_LAYERS, grows=True)))
    return Source(jax.jit(run), arguments)


def _time_candidates(
    shape: AttentionShape, candidates: list[Sizes], programs: dict[tuple[str, Sizes], Any], num_samples: int
) -> list[float]:
    """Microseconds a layer of each candidate, infinite if it cannot run."""
    inputs, q, times = make_inputs(shape, NUM_LAYERS, grows=True), make_queries(shape), []
    for sizes in candidates:
        program = programs[shape.name, sizes]
        try:
            if isinstance(program, Exception):
                raise program
            timing, _ = time_program(program, q, (inputs,), num_samples)
        except Exception as error:  # too much shared memory, say: not a candidate on this device
            times.append(math.inf)
            print(f"{shape.name}, {sizes}: {one_line(error)}", file=sys.stderr)
        else:
            times.append(1e6 * timing.median_s / NUM_OUR_LAYERS)
            print(f"{shape.name}, {sizes}: {times[-1]:.1f} us", file=sys.stderr)
    return times


def _geometric_mean(times: tuple[float, ...]) -> float:
    return math.exp(sum(map(math.log, times)) / len(times))
