"""The planner against event simulations of every division, the paper's linear program, and measured machines."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog

from jpaged.contract.profile import Link, MachineProfile
from jpaged.host.offload.split import (
    IDLE,
    BlockShape,
    LayerStream,
    Load,
    Span,
    decode_layer_s,
    fill_evenly,
    is_swap_cheaper,
    layer_stream,
    paper_tokens,
    pipelined_tokens,
    restore_s,
    split_decode,
    split_restore,
)

SCHEDULES = ("pipelined", "paper")
H200 = MachineProfile(
    block_bytes=1,
    to_host=Link(0.0, 53e9, 53e9),
    from_host=Link(0.0, 53e9, 53e9),
    projection_flops_per_s=((1, 650e12),),
    prefill_fixed_s=0.0,
    prefill_token_s=0.0,
    prefill_context_s=0.0,
    layer_fixed_s=0.0,
    layer_token_s=0.0,
)

rates = st.floats(0.1, 10.0)
costs = st.one_of(st.just(0.0), st.floats(0.01, 10.0))


# Restore ----------------------------------------------------------------------------------------------------------


@st.composite
def profiles(draw):
    link = Link(draw(costs), draw(rates), draw(rates))
    return replace(
        H200,
        to_host=link,
        from_host=link,
        prefill_fixed_s=draw(costs),
        prefill_token_s=draw(rates),
        prefill_context_s=draw(st.floats(0.0, 0.1)),
    )


@st.composite
def missing_spans(draw):
    spans = []
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, 20))
        spans.append(Span(start, start + draw(st.integers(1, 25))))
    return spans


shapes = st.builds(BlockShape, st.integers(1, 6), st.integers(1, 50))
loads = st.builds(Load, st.floats(0.05, 1.0), st.booleans(), st.integers(0, 100), st.booleans())
chunk_sizes = st.lists(st.integers(1, 12), max_size=3)


def blocks_of(spans, block_size):
    """The positions of the tokens in each missing block."""
    blocks = []
    for span in spans:
        by_block = {}
        for position in range(span.start, span.stop):
            by_block.setdefault(position // block_size, []).append(position)
        blocks += by_block.values()
    return blocks


def simulate_restore(profile, recomputed, num_transferred, shape, load, sizes):
    """Time at which the later of device and link ends: the device computes chunk by chunk, the link block by block."""
    device_s, tokens = 0.0, [position for block in recomputed for position in block]
    while tokens:
        size = max(sizes, default=len(tokens))
        chunk, tokens = tokens[:size], tokens[size:]
        size = min((size for size in sizes if size >= len(chunk)), default=len(chunk))
        step_s = 0.0 if load.is_step_due else profile.prefill_fixed_s
        step_s += size * profile.prefill_token_s
        step_s += sum((position + 0.5) * profile.prefill_context_s for position in chunk)
        device_s += step_s / load.device_free
    link = profile.from_host
    rate = link.shared_bytes_per_s if load.is_link_shared else link.bytes_per_s
    link_s = load.queued_bytes / rate + link.fixed_s if num_transferred else 0.0
    for _ in range(num_transferred):
        link_s += shape.block_bytes / rate
    return max(device_s, link_s)


@given(profiles(), missing_spans(), shapes, loads, chunk_sizes)
def test_restore_is_the_best_of_all_simulated_divisions(profile, spans, shape, load, sizes):
    blocks = blocks_of(spans, shape.block_size)
    simulated = [
        simulate_restore(profile, blocks[:num], len(blocks) - num, shape, load, sizes) for num in range(len(blocks) + 1)
    ]
    np.testing.assert_allclose(restore_s(profile, spans, shape, load, sizes), simulated, rtol=1e-9)
    split = split_restore(profile, spans, shape, load, sizes)
    num_recomputed = len(blocks) - split.num_transferred_blocks
    assert split.num_recomputed_tokens == sum(map(len, blocks[:num_recomputed]))
    assert split.seconds == pytest.approx(min(simulated))
    assert split.seconds == pytest.approx(simulated[num_recomputed])


@given(profiles(), missing_spans(), shapes, loads, chunk_sizes, st.floats(1.0, 10.0))
def test_a_faster_link_transfers_no_less_and_ends_no_later(profile, spans, shape, load, sizes, factor):
    link = profile.from_host
    faster = replace(link, bytes_per_s=link.bytes_per_s * factor, shared_bytes_per_s=link.shared_bytes_per_s * factor)
    before = split_restore(profile, spans, shape, load, sizes)
    after = split_restore(replace(profile, from_host=faster), spans, shape, load, sizes)
    assert after.num_transferred_blocks >= before.num_transferred_blocks
    assert after.seconds <= before.seconds


@given(st.floats(0.01, 100.0), st.integers(1, 400))
def test_without_other_costs_a_restore_has_the_share_of_the_closed_form(alpha_over_gamma, num_blocks):
    profile = replace(H200, from_host=Link(0.0, 1.0, 1.0), prefill_token_s=alpha_over_gamma)
    split = split_restore(profile, [Span(0, 4 * num_blocks)], BlockShape(4, 4))
    share = 1 / (1 + alpha_over_gamma)
    assert abs(split.num_recomputed_tokens / 4 - share * num_blocks) <= 1


@pytest.mark.parametrize(
    ("num_parameters", "kv_token_bytes", "flops_per_s", "speedup"),
    [
        pytest.param(6.74e9, 32 * 4 * 4096, 600e12, 1.44, id="llama-2-7b"),
        pytest.param(12.85e9, 40 * 4 * 5120, 600e12, 1.36, id="opt-13b"),
        pytest.param(8.03e9, 32 * 4 * 1024, 600e12, 1.10, id="llama-3-8b"),
        # Narrow matrices reach half of the rate.
        pytest.param(0.596e9, 28 * 4 * 1024, 320e12, 1.58, id="qwen3-0.6b"),
    ],
)
def test_restore_on_an_h200(num_parameters, kv_token_bytes, flops_per_s, speedup):
    profile = replace(H200, prefill_token_s=2 * num_parameters / flops_per_s)
    seconds = restore_s(profile, [Span(0, 32768)], BlockShape(16, 16 * kv_token_bytes))
    assert seconds[0] / seconds.min() == pytest.approx(speedup, abs=0.01)


LLAMA = replace(H200, from_host=Link(1e-4, 53e9, 40e9), prefill_token_s=27e-6, prefill_fixed_s=5e-3)
SHAPE = BlockShape(16, 2**21)
SPANS = [Span(0, 8192)]


def num_recomputed(load=IDLE, profile=LLAMA, shape=SHAPE):
    return split_restore(profile, SPANS, shape, load).num_recomputed_tokens


def test_a_saturated_device_recomputes_next_to_nothing():
    load = Load(device_free=0.0, is_step_due=True)
    assert num_recomputed(load) <= 16
    assert num_recomputed(Load(device_free=0.5, is_step_due=True)) < num_recomputed(Load(is_step_due=True))


def test_bytes_ahead_on_the_link_are_time_to_recompute():
    assert num_recomputed(Load(queued_bytes=2**30)) > num_recomputed() > 0


def test_steps_that_run_anyway_make_small_chunks_pay():
    short = [Span(0, 256)]
    assert split_restore(LLAMA, short, SHAPE).num_recomputed_tokens == 0
    assert split_restore(LLAMA, short, SHAPE, Load(is_step_due=True)).num_recomputed_tokens > 0


def test_8_bit_blocks_are_transferred_rather_than_recomputed():
    assert num_recomputed(shape=BlockShape(16, 2**20)) < num_recomputed()


def test_growing_context_makes_recomputation_dearer():
    assert num_recomputed(profile=replace(LLAMA, prefill_context_s=1e-8)) < num_recomputed()


def test_chunks_fill_compiled_sizes():
    sizes = (256, 2048)
    profile = replace(LLAMA, prefill_token_s=8e-6)
    split = split_restore(profile, [Span(0, 4096)], SHAPE, chunk_sizes=sizes)
    assert split.num_recomputed_tokens == 256
    assert split_restore(profile, [Span(0, 4096)], SHAPE).num_recomputed_tokens != 256


def test_blocks_on_the_device_cost_nothing():
    num_all = len(blocks_of(SPANS, 16))
    assert len(restore_s(LLAMA, [Span(4096, 8192)], SHAPE)) - 1 == num_all // 2
    assert split_restore(LLAMA, [], SHAPE).seconds == 0.0


def test_a_swap_pays_if_it_saves_more_than_it_takes():
    assert is_swap_cheaper(LLAMA, SPANS, SHAPE, num_blocks_out=512)
    slow = replace(LLAMA, to_host=Link(0.0, 1e9, 1e9))
    assert not is_swap_cheaper(slow, SPANS, SHAPE, num_blocks_out=512)
    assert is_swap_cheaper(slow, SPANS, SHAPE, num_blocks_out=0)


@given(profiles(), missing_spans(), shapes, loads, chunk_sizes)
def test_a_swap_never_pays_where_recomputation_is_the_fastest_restore(profile, spans, shape, load, sizes):
    if split_restore(profile, spans, shape, load, sizes).num_transferred_blocks == 0:
        assert not is_swap_cheaper(profile, spans, shape, load, sizes, num_blocks_out=0)


# Decode -----------------------------------------------------------------------------------------------------------


@st.composite
def streams(draw):
    return LayerStream(draw(rates), draw(rates), draw(rates), draw(costs), draw(costs))


@st.composite
def machines(draw):
    tokens = sorted(draw(st.sets(st.integers(1, 40), min_size=1, max_size=4)))
    points = tuple((num, draw(rates)) for num in tokens)
    return replace(H200, from_host=Link(0.0, draw(rates), 1.0), projection_flops_per_s=points)


def projection_time(profile, num_tokens, flops):
    tokens, seconds = zip(*((num, num * flops / rate) for num, rate in profile.projection_flops_per_s), strict=True)
    if num_tokens == 0:
        return 0.0
    return max(num_tokens / tokens[-1], 1.0) * float(np.interp(num_tokens, tokens, seconds))


def simulate_layers(profile, stream, num_tokens, num_recomputed, schedule, *, num_layers=400, num_chunks=8):
    """Seconds of a layer among many: a link and a device, in-order both, with two layers of buffers.

    Pipelined: the device projects chunks as they arrive, and the link runs ahead as far as the buffers allow. Paper:
    the device waits for all activations, and the link for the device's projection.
    """
    rate = profile.from_host.bytes_per_s
    if schedule == "paper":
        num_chunks = 1
    chunk_s = num_recomputed * stream.activation_bytes / rate / num_chunks
    kv_s = (stream.weight_bytes + (num_tokens - num_recomputed) * stream.kv_bytes) / rate
    project_s = projection_time(profile, num_recomputed, stream.recompute_flops) / num_chunks
    link = device = projected = 0.0
    ends = [0.0, 0.0]
    for _ in range(num_layers):
        link = max(link, projected if schedule == "paper" else ends[-2])
        for _ in range(num_chunks):
            link += chunk_s
            device = max(device, link) + project_s
        link += kv_s
        projected = device
        device = max(device, link) + stream.layer_s
        ends.append(device)
    half = num_layers // 2
    return (ends[-1] - ends[-1 - half]) / half


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(machines(), streams(), st.integers(0, 30), st.data())
def test_layers_take_the_simulated_time(schedule, profile, stream, num_tokens, data):
    num = data.draw(st.integers(0, num_tokens))
    simulated = simulate_layers(profile, stream, num_tokens, num, schedule)
    predicted = decode_layer_s(profile, stream, num_tokens, num, schedule)
    assert predicted == pytest.approx(simulated, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(machines(), streams(), st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(1, 4), st.data())
def test_decode_is_the_best_of_all_divisions(schedule, profile, stream, num_blocks, block_size, data):
    limits = [data.draw(st.integers(0, num)) for num in num_blocks]
    num_tokens = sum(num_blocks) * block_size
    times = [
        decode_layer_s(profile, stream, num_tokens, total * block_size, schedule) for total in range(sum(limits) + 1)
    ]
    split = split_decode(
        profile, stream, num_blocks, block_size=block_size, schedule=schedule, num_activation_blocks=limits
    )
    assert split.seconds == pytest.approx(min(times), rel=1e-9)
    assert split.seconds == times[sum(split.num_recomputed_blocks)]
    assert all(num <= limit for num, limit in zip(split.num_recomputed_blocks, limits, strict=True))


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(machines(), streams(), st.integers(0, 60), st.floats(1.0, 10.0))
def test_a_faster_link_makes_no_layer_slower(schedule, profile, stream, num_blocks, factor):
    link = replace(profile.from_host, bytes_per_s=profile.from_host.bytes_per_s * factor)
    before = split_decode(profile, stream, [num_blocks], block_size=1, schedule=schedule)
    after = split_decode(replace(profile, from_host=link), stream, [num_blocks], block_size=1, schedule=schedule)
    assert after.seconds <= before.seconds * (1 + 1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(machines(), streams(), st.integers(0, 60), st.floats(1.0, 4.0))
def test_activations_larger_than_kv_are_never_used(schedule, profile, stream, num_blocks, factor):
    stream = replace(stream, activation_bytes=stream.kv_bytes * factor)
    assert split_decode(profile, stream, [num_blocks], block_size=1, schedule=schedule).num_recomputed_blocks == (0,)


@given(st.integers(1, 1000), rates, st.floats(0.01, 0.99), rates)
def test_papers_schedule_is_the_optimum_of_the_papers_linear_program(num_tokens, kv_s, activation_share, recompute_s):
    """Minimise ``t`` with ``t >= l a + l c`` and ``t >= l a + (s - l) k``, both in seconds, over l and t."""
    activation_s = kv_s * activation_share
    program = linprog(
        [0.0, 1.0],
        A_ub=[[activation_s + recompute_s, -1.0], [activation_s - kv_s, -1.0]],
        b_ub=[0.0, -num_tokens * kv_s],
        bounds=[(0, num_tokens), (0, None)],
    )
    num = paper_tokens(num_tokens, kv_s, recompute_s)
    assert num == pytest.approx(program.x[0], rel=1e-5)
    stream = LayerStream(kv_s, activation_s, recompute_s, 0.0)
    unit = replace(H200, from_host=Link(0.0, 1.0, 1.0), projection_flops_per_s=((1, 1.0),))
    split = split_decode(unit, stream, [num_tokens], block_size=1, schedule="paper")
    assert abs(split.num_recomputed_blocks[0] - num) <= 1
    assert program.fun <= split.seconds * (1 + 1e-6)
    assert split.seconds <= program.fun + kv_s + activation_s + recompute_s


@given(st.integers(1, 1000), rates, st.floats(0.01, 0.99), rates, costs)
def test_pipelined_schedule_is_the_optimum_of_its_linear_program(num_tokens, kv_s, activation_share, recompute_s, g):
    """Minimise ``t`` with ``t >= g + l c`` and ``t >= l a + (s - l) k``, both in seconds, over l and t."""
    activation_s = kv_s * activation_share
    program = linprog(
        [0.0, 1.0],
        A_ub=[[recompute_s, -1.0], [activation_s - kv_s, -1.0]],
        b_ub=[-g, -num_tokens * kv_s],
        bounds=[(0, num_tokens), (0, None)],
    )
    num = pipelined_tokens(num_tokens, kv_s, activation_s, recompute_s, lead_s=-g)
    assert min(max(num, 0), num_tokens) == pytest.approx(program.x[0], rel=1e-5, abs=1e-5)


def opt(hidden_size, layer_s, **item_sizes):
    """A layer of OPT: multi-head attention with heads of 128."""
    num_heads = hidden_size // 128
    return layer_stream(hidden_size=hidden_size, num_kv_heads=num_heads, head_dim=128, layer_s=layer_s, **item_sizes)


OPT_13B = opt(5120, 0.42e-3)
BATCH = [64] * 32  # 1,024 tokens each


def speedup(stream, schedule):
    full_s = decode_layer_s(H200, stream, 32 * 1024, 0, schedule)
    return full_s / split_decode(H200, stream, BATCH, block_size=16, schedule=schedule).seconds


@pytest.mark.parametrize(
    ("hidden_size", "layer_s", "paper", "pipelined"),
    [
        pytest.param(4096, 0.3e-3, 1.60, 2.0, id="opt-6.7b"),
        pytest.param(5120, 0.42e-3, 1.54, 2.0, id="opt-13b"),
        pytest.param(7168, 0.6e-3, 1.46, 1.8, id="opt-30b"),
    ],
)
def test_decode_on_an_h200(hidden_size, layer_s, paper, pipelined):
    stream = opt(hidden_size, layer_s)
    assert speedup(stream, "paper") == pytest.approx(paper, abs=0.01)
    assert speedup(stream, "pipelined") == pytest.approx(pipelined, abs=0.01)


@pytest.mark.parametrize(("share", "faster"), [(0.25, 1.14), (0.5, 1.33), (0.75, 1.6), (1.0, 2.0)])
def test_a_given_share_of_activations_has_its_bound(share, faster):
    num_tokens = 32 * 1024
    full_s = decode_layer_s(H200, OPT_13B, num_tokens, 0, "pipelined")
    share_s = decode_layer_s(H200, OPT_13B, num_tokens, int(share * num_tokens), "pipelined")
    assert full_s / share_s == pytest.approx(faster, abs=0.01)


def test_grouped_queries_transfer_everything_and_lose_nothing():
    llama_3_8b = layer_stream(hidden_size=4096, num_kv_heads=8, head_dim=128, layer_s=1e-4)
    qwen3_600m = layer_stream(hidden_size=1024, num_kv_heads=8, head_dim=128, layer_s=1e-4)
    for schedule in SCHEDULES:
        assert sum(split_decode(H200, llama_3_8b, BATCH, block_size=16, schedule=schedule).num_recomputed_blocks) == 0
        assert sum(split_decode(H200, qwen3_600m, BATCH, block_size=16, schedule=schedule).num_recomputed_blocks) > 0


def test_8_bit_kv_and_activations_halve_the_transfers():
    full_s = decode_layer_s(H200, OPT_13B, 32 * 1024, 0, "pipelined")
    int8 = opt(5120, 0.42e-3, kv_itemsize=1.0)
    both = opt(5120, 0.42e-3, kv_itemsize=1.0, activation_itemsize=1.0)
    assert decode_layer_s(H200, int8, 32 * 1024, 0, "pipelined") == pytest.approx(full_s / 2)
    assert sum(split_decode(H200, int8, BATCH, block_size=16).num_recomputed_blocks) == 0
    assert full_s / split_decode(H200, both, BATCH, block_size=16).seconds > 2.6


def test_weights_on_the_link_are_time_to_recompute():
    stream = opt(7168, 0.6e-3)
    streamed = replace(stream, weight_bytes=12 * 7168**2 * 2)
    few = sum(split_decode(H200, stream, BATCH, block_size=16).num_recomputed_blocks)
    assert sum(split_decode(H200, streamed, BATCH, block_size=16).num_recomputed_blocks) > few


def test_few_tokens_are_not_worth_a_projection():
    slow = replace(H200, projection_flops_per_s=((4096, 10e12), (16384, 600e12)))
    assert split_decode(slow, OPT_13B, [4], block_size=16).num_recomputed_blocks == (0,)


def test_a_shared_link_recomputes_more():
    shared = replace(H200, from_host=Link(0.0, 53e9, 30e9))
    stream = opt(7168, 0.6e-3)
    alone, beside = (
        sum(split_decode(shared, replace(stream, is_link_shared=is_shared), BATCH, block_size=16).num_recomputed_blocks)
        for is_shared in (False, True)
    )
    assert alone < beside


def test_compiled_sizes_bound_the_choice():
    sizes = (1024, 8192, 65536)
    split = split_decode(H200, OPT_13B, BATCH, block_size=16, sizes=sizes)
    assert sum(split.num_recomputed_blocks) * 16 == 8192
    assert split_decode(H200, OPT_13B, [1], block_size=16, sizes=sizes).num_recomputed_blocks == (0,)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.data())
def test_rows_share_evenly_up_to_their_limits(limits, data):
    total = data.draw(st.integers(0, sum(limits)))
    shares = fill_evenly(total, limits)
    assert sum(shares) == total
    assert all(0 <= share <= limit for share, limit in zip(shares, limits, strict=True))
    below = [share for share, limit in zip(shares, limits, strict=True) if share < limit]
    assert max(shares) - min(below, default=math.inf) <= 1
