"""One layer of experts on the current device: the ways to compute it, their time beside the floor, and their errors.

    python -m bench experts                               # Qwen3-30B-A3B, Mixtral-8x7B and gpt-oss-20b
    python -m bench experts --shapes mixtral-8x7b --tokens 1 32 256

The ways are the chosen experts of each token, all experts for all tokens, and grouped products; "used" marks the one
that the engine takes. The floor is the larger of two times: the bytes of the distinct experts of random tokens over the
read bandwidth, and two FLOPs for each weight of a token's experts over the matmul rate. The error is the largest
difference from a product in float32 of some tokens, over the largest output; a way is computed several times, and the
largest error counts. Biases are left out.

Prints a table, writes ``bench/results/experts_DEVICE.json``; the exit status is 1 if an error is above 2%.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from bench import machine
from bench.report import CONFIGS, Table, device_name, save, start_report
from bench.serving.figures import ExpertBytes
from jpaged.config import EngineConfig
from jpaged.device.target import choose_backend, target_of
from jpaged.models import load_config
from jpaged.models.families.gpt_oss import GptOssConfig
from jpaged.models.families.mixtral import MixtralConfig
from jpaged.models.families.qwen_moe import QwenMoeConfig
from jpaged.models.layers import moe
from jpaged.models.layers.moe import ActivatedGate, ClampedSwiglu, Gated, Routes, Weights
from jpaged.sharding import make_mesh
from pallas_kernels.grouped_matmul import grouped_matmul

SHAPES = ("qwen3-30b-a3b", "mixtral-8x7b", "gpt-oss-20b")
TOKENS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 2048, 8192)
NUM_LAYERS = 8
"""Calls of one program, each with other routes, so that the experts of a call are not in a cache."""

NUM_CHECKED = 64
"""Tokens whose outputs are computed in float32, evenly among all."""

NUM_COMPARED = 10
"""Times that a result is compared: a race in a kernel shows now and then."""

MOST_ERROR = 0.02
MOST_TOKENS_OF_ALL = 512
MOST_SHARE_OF_CHOSEN = 4
"""Pairs for each expert up to which the chosen experts are measured: they read weights once a pair."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add = parser.add_argument
    add("--shapes", nargs="+", metavar="NAME", default=SHAPES, help="configs (default: %(default)s)")
    add("--tokens", nargs="+", type=int, metavar="T", default=TOKENS, help="tokens (default: %(default)s)")
    add("--shrink", type=int, default=1, metavar="N", help="divide the widths, for a slow device")


def run(args: argparse.Namespace) -> int:
    """Measure and print; 1 if a result is wrong."""
    limits = machine.measure_limits(jnp.dtype(jnp.bfloat16))
    print(f"{limits}\n\n{_TABLE.header()}")
    rows = []
    for name in args.shapes:
        config = load_config(CONFIGS / name)
        assert isinstance(config, MixtralConfig | QwenMoeConfig | GptOssConfig)
        weights, gated = _layer(config, args.shrink)
        for tokens in args.tokens:
            for row in _measure(config, weights, gated, tokens, limits):
                rows.append({"shapes": name, **row})
                cells = (row["us"], row["floor_us"], f"{row['of_floor']:.0%}", f"{row['error']:.2%}")
                print(_TABLE.row(f"{name} {tokens} {row['way']}{' used' * row['is_used']}", *cells), flush=True)
    report = start_report(args, limits=asdict(limits), shrunk_by=args.shrink, rows=rows)
    print(f"\nwritten to {save(f'experts_{device_name()}', report, args.out)}")
    return int(any(not row["error"] <= MOST_ERROR for row in rows))


_TABLE = Table("one layer", "us", "floor", "of it", "error", first=40)


def _layer(config: MixtralConfig | QwenMoeConfig | GptOssConfig, shrink: int) -> tuple[Weights, Gated]:
    width = config.expert_size if isinstance(config, QwenMoeConfig) else config.intermediate_size
    hidden, ffn, keys = config.hidden_size // shrink, width // shrink, jax.random.split(jax.random.key(0), 2)
    draw = jax.jit(lambda key, shape: 0.02 * jax.random.normal(key, shape, jnp.bfloat16), static_argnums=1)
    weights = Weights(
        draw(keys[0], (config.num_experts, 2, ffn, hidden)), draw(keys[1], (config.num_experts, ffn, hidden))
    )
    if isinstance(config, GptOssConfig):
        return weights, ClampedSwiglu(config.swiglu_alpha, config.swiglu_limit)
    return weights, ActivatedGate(config.hidden_act)


def _measure(
    config: MixtralConfig | QwenMoeConfig | GptOssConfig,
    weights: Weights,
    gated: Gated,
    tokens: int,
    limits: machine.MachineLimits,
) -> list[dict[str, Any]]:
    """Time every way that is not hopeless."""
    mesh = make_mesh()
    target, backend = target_of(mesh), choose_backend(config, EngineConfig(), jnp.bfloat16, mesh)
    product = backend.grouped_product(weights) or partial(grouped_matmul, implementation="xla")
    ways: dict[str, Callable[..., Array]] = {}
    if tokens * config.top_k <= MOST_SHARE_OF_CHOSEN * config.num_experts:
        ways["chosen"] = moe.chosen_experts
    if tokens <= MOST_TOKENS_OF_ALL:
        ways["all"] = moe.all_experts
    ways["grouped"] = partial(moe.grouped_experts, product=product, has_all=True)

    keys = jax.random.split(jax.random.key(1), 2)
    x = jax.random.normal(keys[0], (tokens, weights.down.shape[2]), jnp.bfloat16)
    logits = jax.random.normal(keys[1], (NUM_LAYERS, tokens, config.num_experts))
    routes = [moe.route(layer, config.top_k, is_normalized=True) for layer in logits]

    checked = jnp.unique(jnp.linspace(0, tokens - 1, NUM_CHECKED).astype(int))
    expected = _checked(x[checked], Routes(*(part[checked] for part in routes[0])), weights, gated)
    experts = ExpertBytes(2 * sum(w.size for w in jax.tree.leaves(weights)), config.num_experts, config.top_k)
    read_s = experts.of_step(tokens) / limits.read_bytes_per_s
    floor_us = 1e6 * max(read_s, tokens * experts.of_step(1) / limits.matmul_flops_per_s)
    used = _used(weights, tokens * config.top_k, has_product=backend.grouped_product(weights) is not None)

    rows = []
    for way, compute in ways.items():
        options = dict(target.compiler_options)
        one = jax.jit(compute, static_argnums=3, compiler_options=options)
        outs = (one(x, routes[0], weights, gated)[checked].astype(jnp.float32) for _ in range(NUM_COMPARED))
        error = max(float(jnp.max(jnp.abs(out - expected)) / jnp.max(jnp.abs(expected))) for out in outs)
        us = 1e6 * _time_s(compute, x, routes, weights, gated, options)
        row = {"tokens": tokens, "way": way, "is_used": way == used, "us": us, "floor_us": floor_us, "error": error}
        rows.append(row | {"of_floor": floor_us / us})
    return rows


def _used(weights: Weights, num_pairs: int, *, has_product: bool) -> str:
    """The way that ``compute_experts`` takes."""
    if has_product:
        return "grouped"
    return "chosen" if 2 * num_pairs <= len(weights.down) else "all"


@partial(jax.jit, static_argnums=3)
def _checked(x: Array, routes: Routes, weights: Weights, gated: Gated) -> Array:
    """Outputs in float32, token by token."""

    def of_token(inputs: tuple[Array, Array, Array]) -> Array:
        token, experts, factors = inputs
        gate_up, down = (w[experts].astype(jnp.float32) for w in (weights.gate_up, weights.down))
        gate, up = jnp.moveaxis(jnp.einsum("h,kpfh->kpf", token.astype(jnp.float32), gate_up), 1, 0)
        return jnp.einsum("k,kf,kfh->h", factors, gated(gate, up), down)

    with jax.default_matmul_precision("highest"):
        return jax.lax.map(of_token, (x, routes.experts, routes.weights))


def _time_s(
    compute: Callable[..., Array],
    x: Array,
    routes: list[Routes],
    weights: Weights,
    gated: Gated,
    options: dict[str, Any],
) -> float:
    """Seconds of one layer, the best of several programs."""

    def layers(x: Array, routes: list[Routes], weights: Weights) -> Array:
        for route in routes:  # each layer depends on the one before
            x = x + compute(x, route, weights, gated) * 1e-3
        return x

    program = jax.jit(layers, compiler_options=options)
    program(x, routes, weights).block_until_ready()
    return _best_s(lambda: program(x, routes, weights).block_until_ready()) / len(routes)


def _best_s(call: Callable[[], object]) -> float:
    times = []
    for _ in range(10):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
