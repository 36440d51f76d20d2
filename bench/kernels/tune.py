"""Kernel sizes: tries all candidates on the measured shapes, and saves the best of each class."""

import math
import sys
from collections import defaultdict
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bench.kernels.check import TOLERANCE
from bench.kernels.compiling import Source, compile_all, one_line
from bench.kernels.contenders import NUM_LAYERS, NUM_OUR_LAYERS
from bench.kernels.inputs import Inputs, make_inputs, make_queries
from bench.kernels.shapes import AttentionShape
from bench.kernels.timing import time_program
from pallas_kernels.paged_attention.call import Batch, Call, KvLayer, Scoring
from pallas_kernels.paged_attention.hopper import attend_hopper, tuning
from pallas_kernels.paged_attention.hopper.prefill_plan import PrefillSizes
from pallas_kernels.paged_attention.hopper.tuning import Sizes


class State(NamedTuple):
    """State between two runs of a program: the queries, and the first layer's output, which is checked."""

    q: Array
    first: Array


def attend_with(sizes: Sizes, q: Array, inputs: Inputs, layer: int, shape: AttentionShape) -> Array:
    """Attend one layer by the Hopper kernels, with the given sizes."""
    call = Call(
        q=q,
        kv=KvLayer(inputs.pool, layer, inputs.kv_scales),
        batch=Batch(inputs.block_tables, inputs.kv_lens, inputs.cu_q_lens),
        scoring=Scoring(shape.head_dim**-0.5),
    )
    return attend_hopper(call, sizes=sizes)


def class_of(shape: AttentionShape) -> str:
    """The shape class under which the sizes tuned on a shape are saved."""
    return tuning.shape_class(
        group=shape.group,
        head_dim=shape.head_dim,
        block_size=shape.block_size,
        pool_dtype=jnp.dtype(shape.kv_dtype),
    )


def candidates(shape: AttentionShape) -> list[Sizes]:
    """Sizes to try for one of the two kernels; the other kernel's sizes do not matter."""
    pool_dtype = jnp.dtype(shape.kv_dtype)
    if shape.kind == "decode":
        decode = tuning.decode_candidates(shape.group, shape.head_dim, pool_dtype)
        return [Sizes(sizes, PrefillSizes()) for sizes in decode]
    fitting = tuning.decode_candidates(shape.group, shape.head_dim, pool_dtype)[0]
    prefill = [PrefillSizes(ping_pong=ping_pong) for ping_pong in (True, False)]
    if shape.is_quantized:  # smaller tiles leave memory for more tiles as the pool stores them
        prefill += [PrefillSizes(kv_tile=64, stages=stages) for stages in (3, 4)]
    return [Sizes(fitting, sizes) for sizes in prefill]


def tune(shapes: list[AttentionShape], num_samples: int) -> dict[str, Any]:
    """Time every candidate, save each class's best, and report all.

    The best candidate has the least geometric mean of microseconds a layer over the shapes of the class. It must run on
    all of them, with outputs like the first candidate's. Mixed batches are left out: they have rows of both other
    kinds.
    """
    classes: dict[tuple[str, str], list[AttentionShape]] = defaultdict(list)
    for shape in shapes:
        if shape.kind in ("decode", "prefill"):
            classes[shape.kind, class_of(shape)].append(shape)
    programs = compile_all(_sources([shape for members in classes.values() for shape in members]))
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


def _sources(shapes: list[AttentionShape]) -> dict[tuple[str, Sizes], Source]:
    """A program for every candidate of every shape."""
    sources = {}
    for shape in shapes:
        arguments = jax.eval_shape(lambda shape=shape: _arguments(shape))
        for sizes in candidates(shape):
            sources[shape.name, sizes] = Source(partial(_run, shape=shape, sizes=sizes), arguments)
    return sources


def _arguments(shape: AttentionShape) -> tuple[State, Inputs]:
    q = make_queries(shape)
    return State(q, q), make_inputs(shape, NUM_LAYERS, grows=True)


def _run(state: State, inputs: Inputs, *, shape: AttentionShape, sizes: Sizes) -> State:
    """Attend ``NUM_OUR_LAYERS`` layers, cycling through the pool's."""
    outputs = []
    for layer in range(NUM_OUR_LAYERS):
        outputs.append(attend_with(sizes, outputs[-1] if outputs else state.q, inputs, layer % NUM_LAYERS, shape))
    return State(outputs[-1], outputs[0])


def _time_candidates(
    shape: AttentionShape, candidates: list[Sizes], programs: dict[tuple[str, Sizes], Any], num_samples: int
) -> list[float]:
    """Microseconds a layer of each candidate; infinite if it fails or its output differs from the first one's."""
    state, inputs = _arguments(shape)
    right, times = None, []
    for sizes in candidates:
        program, seconds, problem = programs[shape.name, sizes], math.inf, None
        try:
            if isinstance(program, Exception):
                problem = one_line(program)
            else:
                out = program(state, inputs).first
                right = out if right is None and is_alike(out, out, shape) else right
                if right is None or not is_alike(out, right, shape):
                    problem = "its output is not finite, or not the first candidate's"
                else:
                    seconds = time_program(program, state, (inputs,), num_samples)[0].median_s
        except Exception as error:  # too much shared memory, say: not a candidate on this device
            problem = one_line(error)
        times.append(1e6 * seconds / NUM_OUR_LAYERS)
        print(f"{shape.name}, {sizes}: {problem or f'{times[-1]:.1f} us'}", file=sys.stderr)
    return times


def is_alike(out: Array, right: Array, shape: AttentionShape) -> bool:
    """Whether each query's and head's output is finite, and as near as two correct outputs are."""
    out, right = (x.astype(jnp.float32) for x in (out, right))
    error, size = jnp.linalg.norm(out - right, axis=-1), jnp.linalg.norm(right, axis=-1)
    return bool((error <= 2 * TOLERANCE[shape.dtype] * size).all())


def _geometric_mean(times: tuple[float, ...]) -> float:
    return math.exp(sum(map(math.log, times)) / len(times))
