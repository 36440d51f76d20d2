"""Packed step inputs say of every token and row what the plan says, and every plan has a bucket."""

import dataclasses
from collections import Counter

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jpaged.contract.plan import BeamSelect, Chunk, Sample, StepPlan
from jpaged.device.sampling.sampler import SamplePacker, num_top_of
from jpaged.device.step.inputs import (
    Bucket,
    StepInputs,
    StepPacker,
    all_buckets,
    bucket_for,
    pack_next,
    packed_size,
    powers_of_two,
    unpack,
)
from jpaged.host.blocks.manager import BlockManager
from jpaged.host.scheduler import Scheduler
from jpaged.request import Request, SamplingParams
from tests.support.fake_device import EOS, FakeDevice

MAX_BLOCKS = 5
NUM_PHYSICAL_BLOCKS = 64


def make_sample(chunk, position):
    return Sample(0, chunk, position, 0, SamplingParams(), (), (), ())


@st.composite
def plans(draw, max_seqs, max_tokens, block_size):
    """Any plan the scheduler may make: the budgets kept, tables longer than needed, forks that share a chunk, beams."""
    chunks, samples, beams, budget = [], [], [], max_tokens
    for seq_id in range(draw(st.integers(0, max_seqs))):
        if budget == 0:
            break
        capacity = MAX_BLOCKS * block_size
        start = draw(st.integers(0, capacity - 1))
        num_tokens = draw(st.integers(1, min(budget, capacity - start)))
        budget -= num_tokens
        table = draw(st.lists(st.integers(1, NUM_PHYSICAL_BLOCKS), min_size=MAX_BLOCKS, max_size=MAX_BLOCKS))
        num_needed = -(-(start + num_tokens) // block_size)
        table = table[: draw(st.integers(num_needed, MAX_BLOCKS))]
        token_ids = draw(st.lists(st.integers(0, 999), min_size=num_tokens, max_size=num_tokens))
        chunks.append(Chunk(seq_id, token_ids, start, draw(st.integers(1, capacity)), table))
    for row, chunk in enumerate(chunks):
        num_beam_rows = sum(len(beam.chunks) for beam in beams)
        room = max_seqs - len(samples) - num_beam_rows - (len(chunks) - row)
        if draw(st.booleans()):  # this row belongs to a search, and the last one's beams may be this search's too
            others = beams.pop().chunks if beams and draw(st.booleans()) else []
            beams.append(BeamSelect([*others, row], [0.0] * (len(others) + 1), 2))
            continue
        for _ in range(draw(st.integers(0, 1 + room))):
            samples.append(make_sample(row, chunk.start + len(chunk.token_ids)))
    return StepPlan(chunks=tuple(chunks), samples=tuple(samples), beams=tuple(beams))


def naive_inputs(plan, bucket, block_size):
    """What each field must hold, one token at a time."""
    tokens = {name: [0] * bucket.num_tokens for name in ("token_ids", "positions", "prompt_lens", "slots")}
    rows = {name: [0] * bucket.num_rows for name in ("kv_lens", "sample_tokens", "num_draws")}
    tables = [[0] * MAX_BLOCKS for _ in range(bucket.num_rows)]
    cu_q_lens, last_token = [0], {}
    index = 0
    for row, chunk in enumerate(plan.chunks):
        for offset, token_id in enumerate(chunk.token_ids):
            position = chunk.start + offset
            tokens["token_ids"][index] = token_id
            tokens["positions"][index] = position
            tokens["prompt_lens"][index] = chunk.prompt_len
            tokens["slots"][index] = chunk.block_table[position // block_size] * block_size + position % block_size
            tables[row][position // block_size] = chunk.block_table[position // block_size]
            last_token[row] = index
            index += 1
        for logical in range(chunk.start // block_size):
            tables[row][logical] = chunk.block_table[logical]
        rows["kv_lens"][row] = chunk.start + len(chunk.token_ids)
        cu_q_lens.append(index)
    cu_q_lens += [index] * (bucket.num_rows + 1 - len(cu_q_lens))
    for row, sample in enumerate(plan.samples):
        rows["sample_tokens"][row] = last_token[sample.chunk]
    row = len(plan.samples)
    for beam in plan.beams:
        for chunk in beam.chunks:
            rows["sample_tokens"][row] = last_token[chunk]
            row += 1
    return StepInputs(**tokens, **rows, block_tables=tables, cu_q_lens=cu_q_lens)


@settings(max_examples=150)
@given(data=st.data(), block_size=st.sampled_from([1, 4, 16]), max_seqs=st.integers(1, 6), extra=st.integers(0, 40))
def test_packed_plan_equals_the_naive_loop(data, block_size, max_seqs, extra):
    max_tokens = max_seqs + extra
    plan = data.draw(plans(max_seqs, max_tokens, block_size))
    bucket = bucket_for(plan, all_buckets(max_seqs, max_tokens))
    assert_packed_is_naive(StepPacker(MAX_BLOCKS, block_size), plan, bucket, block_size)


def assert_packed_is_naive(packer, plan, bucket, block_size):
    packed = packer.pack(plan, bucket)
    assert packed.dtype == np.int32
    assert packed.shape == (packed_size(bucket, MAX_BLOCKS),)
    actual, expected = unpack(packed, bucket, MAX_BLOCKS), naive_inputs(plan, bucket, block_size)
    for name in StepInputs.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name), err_msg=name)


@settings(max_examples=50)
@given(data=st.data(), block_size=st.sampled_from([1, 4]), max_seqs=st.integers(1, 6))
def test_plans_packed_one_after_the_other_do_not_depend_on_those_before(data, block_size, max_seqs):
    """Sequences come, go, swap rows and return with other blocks; the scheduler changes its tables in place."""
    packer, tables = StepPacker(MAX_BLOCKS, block_size), {}
    for _ in range(4):
        plan = data.draw(plans(max_seqs, max_seqs + 20, block_size))
        chunks = []
        for chunk, seq_id in zip(plan.chunks, data.draw(st.permutations(range(max_seqs))), strict=False):
            table = tables.setdefault(seq_id, [])
            if len(table) < len(chunk.block_table) or data.draw(st.booleans()):
                table[:] = chunk.block_table
            chunks.append(Chunk(seq_id, chunk.token_ids, chunk.start, chunk.prompt_len, table))
        plan = StepPlan(chunks=tuple(chunks), samples=plan.samples, beams=plan.beams)
        assert_packed_is_naive(packer, plan, bucket_for(plan, all_buckets(max_seqs, max_seqs + 20)), block_size)


def test_a_packed_plan_is_left_alone_by_the_next():
    packer, plan = StepPacker(MAX_BLOCKS, 4), StepPlan(chunks=(Chunk(0, [7], 5, 6, [3, 2]),))
    first = packer.pack(plan, Bucket(1, 1))
    before = first.copy()
    packer.pack(StepPlan(chunks=(Chunk(0, [8], 6, 6, [4, 2]),)), Bucket(1, 1))
    np.testing.assert_array_equal(first, before)


def test_unpack_traces_under_jit():
    bucket = Bucket(4, 2)
    plan = StepPlan(chunks=(Chunk(0, [7, 8, 9], 5, 6, [3, 2]),), samples=(make_sample(0, 8),))
    packed = StepPacker(MAX_BLOCKS, 4).pack(plan, bucket)
    inputs = jax.jit(lambda packed: unpack(packed, bucket, MAX_BLOCKS))(packed)
    assert inputs.token_ids.tolist() == [7, 8, 9, 0]
    assert inputs.positions.tolist() == [5, 6, 7, 0]
    assert inputs.prompt_lens.tolist() == [6, 6, 6, 0]
    assert inputs.slots.tolist() == [2 * 4 + 1, 2 * 4 + 2, 2 * 4 + 3, 0]
    assert inputs.block_tables.tolist() == [[3, 2, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert inputs.kv_lens.tolist() == [8, 0]
    assert inputs.cu_q_lens.tolist() == [0, 3, 3]
    assert inputs.sample_tokens.tolist() == [2, 0]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(1, 1, [1]), (1, 8, [1, 2, 4, 8]), (1, 6, [1, 2, 4, 6]), (16, 40, [16, 32, 40]), (16, 3, [3])],
)
def test_powers_of_two_end_at_the_limit(low, high, expected):
    assert powers_of_two(low, high) == expected


def test_buckets_of_the_default_engine():
    buckets = all_buckets(256, 2048)
    decode = [Bucket(n, n) for n in (1, 2, 4, 8, 16, 32, 64, 128, 256)]
    half = [Bucket(n, n // 2) for n in (32, 64, 128, 256, 512)]
    full = [Bucket(n, 256) for n in (1024, 2048)]
    assert buckets == sorted([*decode, *half, *full])


def test_an_accelerator_has_fewer_small_buckets():
    decode = [Bucket(n, n) for n in (16, 32, 64, 128, 256)]
    mixed = [Bucket(n, min(n // 2, 256)) for n in (128, 256, 512, 1024, 2048)]
    assert all_buckets(256, 2048, 16) == sorted([*decode, *mixed])
    assert all_buckets(6, 20, 16) == [Bucket(6, 6), Bucket(20, 6)]


def test_sizes_halfway_begin_where_they_are_said_to():
    decode, mixed = [(96, 96), (192, 192)], [(192, 96), (384, 192), (768, 256), (1536, 256)]
    plain = set(all_buckets(256, 2048, 16))
    assert set(all_buckets(256, 2048, 16, 64)) - plain == {Bucket(*each) for each in [*decode, *mixed]}
    assert set(all_buckets(256, 2048, 16, 256)) - plain == {Bucket(*each) for each in mixed[1:]}
    assert set(all_buckets(250, 2100, 16, 64)) - set(all_buckets(250, 2100, 16)) == {
        *(Bucket(*each) for each in [*decode, *mixed[:2]]), Bucket(768, 250), Bucket(1536, 250)
    }, "and none between 2048 and 2100"  # fmt: skip
    assert all_buckets(6, 20, 16, 64) == all_buckets(6, 20, 16)


@given(max_seqs=st.integers(1, 300), extra=st.integers(0, 5000))
def test_buckets_are_few_distinct_and_within_the_limits(max_seqs, extra):
    max_tokens = max_seqs + extra
    buckets = all_buckets(max_seqs, max_tokens)
    assert buckets == sorted(set(buckets))
    assert len(buckets) <= (max_seqs.bit_length() + 1) + 2 * (max_tokens.bit_length() + 1)
    for bucket in buckets:
        assert 1 <= bucket.num_rows <= min(bucket.num_tokens, max_seqs)
        assert bucket.num_tokens <= max_tokens
    assert buckets[-1] == Bucket(max_tokens, max_seqs)


def test_smallest_bucket_that_holds_a_plan_is_chosen():
    buckets = all_buckets(32, 64)
    chunk = Chunk(0, [1], 0, 1, [1])
    decodes = [StepPlan(chunks=(chunk,) * n) for n in (1, 3, 32)]
    assert [bucket_for(plan, buckets) for plan in decodes] == [Bucket(1, 1), Bucket(4, 4), Bucket(32, 32)]
    prompt = StepPlan(chunks=(Chunk(0, [1] * 40, 0, 40, [1, 2, 3]),))
    assert bucket_for(prompt, buckets) == Bucket(64, 32)
    crowded = StepPlan(chunks=(*(chunk,) * 29, Chunk(0, [1, 1], 0, 2, [1])))
    assert bucket_for(crowded, buckets) == Bucket(64, 32), "31 tokens would do, but not 16 rows"
    forking = StepPlan(chunks=(chunk,), samples=(make_sample(0, 1),) * 10)  # one chunk read by ten completions
    assert bucket_for(forking, buckets) == Bucket(16, 16)
    searching = StepPlan(
        chunks=(chunk,) * 3, samples=(make_sample(0, 1),), beams=(BeamSelect([0, 1, 2, 1], [0] * 4, 8),)
    )
    assert bucket_for(searching, buckets) == Bucket(8, 8), "five rows of logits"


@pytest.mark.parametrize("block_size", [1, 4])
def test_each_step_of_a_burst_feeds_what_the_one_before_drew_where_it_belongs(block_size):
    lens, starts, tables = (3, 1, 2), (3, 0, 7), ([4, 9, 2, 7, 5, 8], [3], [1, 6, 11, 12, 13, 14, 15, 16, 17])
    max_blocks = 10
    bucket, packer = Bucket(4, 4), StepPacker(max_blocks, block_size)
    params = SamplingParams()

    def plan(step):
        rows = [row for row, num_draws in enumerate(lens) if step < num_draws]
        chunks = [Chunk(row, [~row if step else 5 + row], starts[row] + step, 1, tables[row]) for row in rows]
        draws = [lens[row] - step for row in rows]
        samples = [
            Sample(row, i, 0, 0, params, (), (), (), n) for i, (row, n) in enumerate(zip(rows, draws, strict=True))
        ]
        return StepPlan(chunks=tuple(chunks), samples=tuple(samples), num_steps=max(draws)), rows

    packed = packer.pack(plan(0)[0], bucket)
    for step in range(1, max(lens)):
        packed = jax.jit(lambda packed: pack_next(packed, bucket, max_blocks, block_size))(packed)
        expected, rows = plan(step)
        actual = unpack(np.asarray(packed), bucket, max_blocks)
        alone = unpack(packer.pack(expected, bucket), bucket, max_blocks)
        for name in ("token_ids", "positions", "slots", "kv_lens", "block_tables"):
            np.testing.assert_array_equal(getattr(actual, name)[rows], getattr(alone, name)[: len(rows)], err_msg=name)
        done = [row for row in range(4) if row not in rows]
        assert not actual.slots[done].any(), "who is done writes to block 0"
        assert not actual.block_tables[done].any(), "and so does a kernel that finds slots by the block tables"
        assert actual.cu_q_lens.tolist() == [0, 1, 2, 3, 3]


@pytest.mark.parametrize("max_burst", [1, 3])
@pytest.mark.parametrize("block_size", [1, 4])
def test_decodes_are_packed_like_the_chunks_and_samples_they_stand_for(block_size, max_burst):
    """Sequences come, fork, and end by a token, their length or an abort, while others decode on."""
    random = np.random.default_rng(0)
    blocks = BlockManager(200, block_size, enable_prefix_caching=True)
    scheduler = Scheduler(
        blocks, max_num_seqs=8, max_num_batched_tokens=40, max_model_len=48, eos_token_ids=[EOS], max_burst=max_burst
    )
    max_blocks = 48 // block_size
    device, buckets = FakeDevice(scheduler), all_buckets(8, 40)
    packer, sample_packer = StepPacker(max_blocks, block_size), SamplePacker()
    under_way, seen = [], Counter()

    def enqueue(plan):
        bucket = bucket_for(plan, buckets)
        same = dataclasses.replace(plan, chunks=tuple(plan.chunks), samples=tuple(plan.samples))
        assert bucket_for(same, buckets) == bucket
        assert (same.num_tokens, same.num_logit_rows) == (plan.num_tokens, plan.num_logit_rows)
        assert same.draws == plan.draws
        assert same.can_be_followed == plan.can_be_followed
        assert num_top_of(same.samples) == num_top_of(plan.samples)
        expected = StepPacker(max_blocks, block_size).pack(same, bucket)
        np.testing.assert_array_equal(packer.pack(plan, bucket), expected)
        expected, sizes = SamplePacker().pack(same.samples, bucket.num_rows)
        packed = sample_packer.pack(plan.samples, bucket.num_rows)
        np.testing.assert_array_equal(packed[0], expected)
        assert packed[1] == sizes
        seen["decodes"] += plan.decodes is not None
        if plan.decodes is not None:
            seen["of fewer than before"] += len(plan.samples) < len(under_way[0][0].samples)
            seen["with biases"] += sizes.num_biases > 0
        under_way.append((plan, device.execute(plan)))

    for i in range(400):
        if random.random() < 0.1:
            params = SamplingParams(
                n=int(random.integers(1, 4)),
                max_tokens=int(random.integers(1, 30)),
                temperature=random.random(),
                logprobs=2 if random.random() < 0.1 else None,
                logit_bias={1: -1.0} if random.random() < 0.1 else None,
            )
            prompt = random.integers(0, 2, random.integers(1, 16)).tolist()
            scheduler.add(Request(str(i), None, prompt, params, seed=i))
        if scheduler.has_unfinished and random.random() < 0.02:
            scheduler.abort(random.choice([group.request.request_id for group in scheduler.roster.groups]))
        if not under_way:
            if not scheduler.has_unfinished:
                continue
            enqueue(scheduler.schedule())
        if (plan := scheduler.schedule_ahead()) is not None:
            enqueue(plan)
        scheduler.update(*under_way.pop(0))
    assert seen["decodes"] > 50
    assert min(seen["of fewer than before"], seen["with biases"]) > 0
