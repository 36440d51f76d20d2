"""Packed step inputs say of every token and row what the plan says, and every plan has a bucket."""

import dataclasses
from collections import Counter
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jpaged.contract.plan import BeamSelect
from jpaged.device.sampling.columns import SampleInputs, inputs_of_rows, pack_draws
from jpaged.device.step.inputs import Bucket, StepInputs, all_buckets, bucket_for, powers_of_two
from jpaged.device.step.pack import Packer, loaded_size
from jpaged.device.step.table import StepState, with_latest
from jpaged.host.blocks.manager import BlockManager
from jpaged.host.scheduler import Scheduler
from jpaged.request import Request, SamplingParams
from tests.support.fake_device import EOS, FakeDevice
from tests.support.plans import Chunk, Sample, make_plan, make_sample_inputs, spell

MAX_BLOCKS = 5
NUM_PHYSICAL_BLOCKS = 64


def make_sample(chunk, position):
    return Sample(0, chunk, position, 0, SamplingParams(), (), (), ())


class Device:
    """The table and the inputs of a device, without a model.

    Args:
        buckets: sizes of steps.
        max_blocks: width of a block table.
        block_size: tokens of a block.
    """

    def __init__(self, buckets, max_blocks, block_size):
        self.max_blocks, self.block_size = max_blocks, block_size
        self.state = StepState.allocate(buckets, max_blocks=max_blocks, max_burst=3, hidden_size=1, dtype=jnp.float32)
        self.packer = Packer(buckets, len(self.state.latest), max_blocks, vocab_size=17)

    def load(self, plan, bucket):
        packed = self.packer.pack(plan)
        assert packed.bucket == bucket
        assert packed.inputs.dtype == np.int32
        assert packed.inputs.shape == (loaded_size(bucket),)
        for changes in packed.changes:
            self.state = jax.jit(StepState.enter)(self.state, changes)
        self.state = jax.jit(StepState.load, static_argnums=1)(self.state, bucket, packed.inputs)
        return packed

    def step_inputs(self, bucket):
        return jitted_inputs(bucket, self.block_size)(self.state)

    def draw(self, rows, token_ids):
        latest = with_latest(self.state.latest, jnp.asarray(rows), jnp.asarray(token_ids, jnp.int32))
        self.state = dataclasses.replace(self.state, latest=latest)


@cache
def jitted_inputs(bucket, block_size):
    return jax.jit(partial(StepState.step_inputs, bucket=bucket, block_size=block_size))


@cache
def jitted_samples(bucket):
    return jax.jit(partial(StepState.sample_inputs, bucket=bucket))


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
            beams.append(BeamSelect([*others, row], [0.0] * (len(others) + 1), 2 * len(others) + 2))
            continue
        for _ in range(draw(st.integers(0, 1 + room))):
            samples.append(make_sample(row, chunk.start + len(chunk.token_ids)))
    return chunks, samples, tuple(beams)


def naive_inputs(chunks, samples, beams, bucket, block_size, max_blocks=MAX_BLOCKS):
    """The content of each field, one token at a time."""
    tokens = {name: [0] * bucket.num_tokens for name in ("token_ids", "positions", "prompt_lens", "slots")}
    rows = {
        name: [0] * bucket.num_rows
        for name in ("kv_lens", "stream_starts", "sample_tokens", "num_draws", "shared_lens")
    }
    tables = [[0] * max_blocks for _ in range(bucket.num_rows)]
    cu_q_lens, last_token = [0], {}
    index = 0
    for row, chunk in enumerate(chunks):
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
    for row, sample in enumerate(samples):
        rows["sample_tokens"][row] = last_token[sample.chunk]
    row = len(samples)
    for beam in beams:
        for chunk in beam.chunks:
            rows["sample_tokens"][row] = last_token[chunk]
            row += 1
    return StepInputs(**tokens, **rows, block_tables=tables, cu_q_lens=cu_q_lens)


SIZES = [(1, 2, 6), (4, 6, 0), (4, 6, 20), (16, 5, 40)]
"""Block size, rows, and tokens beyond one for each row: few, as each bucket is compiled."""


@settings(max_examples=150, deadline=None)
@given(data=st.data(), sizes=st.sampled_from(SIZES))
def test_packed_plan_equals_the_naive_loop(data, sizes):
    block_size, max_seqs, extra = sizes
    device = Device(all_buckets(max_seqs, max_seqs + extra), MAX_BLOCKS, block_size)
    assert_packed_is_naive(device, *data.draw(plans(max_seqs, max_seqs + extra, block_size)))


def assert_packed_is_naive(device, chunks, samples, beams):
    if not chunks:
        return
    plan = make_plan(chunks, samples, beams=beams)
    bucket = bucket_for(plan, device.packer.buckets)
    device.load(plan, bucket)
    actual = device.step_inputs(bucket)
    expected = naive_inputs(chunks, samples, beams, bucket, device.block_size)
    for name in StepInputs.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name), err_msg=name)


@settings(max_examples=50, deadline=None)
@given(data=st.data(), sizes=st.sampled_from(SIZES))
def test_plans_packed_one_after_the_other_do_not_depend_on_those_before(data, sizes):
    """Sequences come, go, swap rows and return with other blocks."""
    block_size, max_seqs, extra = sizes
    device = Device(all_buckets(max_seqs, max_seqs + extra), MAX_BLOCKS, block_size)
    for _ in range(4):
        assert_packed_is_naive(device, *data.draw(plans(max_seqs, max_seqs + extra, block_size)))


def test_a_packed_plan_is_left_alone_by_the_next():
    packer, plan = Packer([Bucket(1, 1)], 2, MAX_BLOCKS, 17), make_plan([Chunk(0, [7], 5, 6, [3, 2])])
    first = packer.pack(plan).inputs
    before = first.copy()
    packer.pack(make_plan([Chunk(0, [8], 6, 6, [4, 2])]))
    np.testing.assert_array_equal(first, before)


def test_inputs_are_made_under_jit():
    bucket = Bucket(4, 2)
    device = Device([bucket], MAX_BLOCKS, 4)
    device.load(make_plan([Chunk(0, [7, 8, 9], 5, 6, [3, 2])], [make_sample(0, 8)]), bucket)
    inputs = device.step_inputs(bucket)
    assert inputs.token_ids.tolist() == [7, 8, 9, 0]
    assert inputs.positions.tolist() == [5, 6, 7, 0]
    assert inputs.prompt_lens.tolist() == [6, 6, 6, 0]
    assert inputs.slots.tolist() == [2 * 4 + 1, 2 * 4 + 2, 2 * 4 + 3, 0]
    assert inputs.block_tables.tolist() == [[3, 2, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert inputs.kv_lens.tolist() == [8, 0]
    assert inputs.cu_q_lens.tolist() == [0, 3, 3]
    assert inputs.sample_tokens.tolist() == [2, 0]


@pytest.mark.parametrize(("num_rows", "num_blocks"), [(2, 3), (70, 2), (5, 400), (130, 20)])
def test_changes_of_any_number_reach_the_table(num_rows, num_blocks):
    """Those beyond what a step's inputs have a place for are entered before."""
    random = np.random.default_rng(0)
    device = Device([Bucket(num_rows, num_rows)], num_blocks, 4)
    tables = random.integers(1, 1000, (num_rows, num_blocks))
    chunks = [Chunk(row, [0], row, 7 + row, table.tolist()) for row, table in enumerate(tables)]
    samples = [Sample(row, row, row + 1, 50 + row, SamplingParams(top_k=row)) for row in range(num_rows)]
    device.load(make_plan(chunks, samples), Bucket(num_rows, num_rows))
    np.testing.assert_array_equal(device.state.block_tables[:num_rows], tables)
    assert not device.state.block_tables[num_rows:].any(), "padding"
    inputs = jitted_samples(Bucket(num_rows, num_rows))(device.state)
    assert inputs.seeds.tolist() == [50 + row for row in range(num_rows)]
    assert inputs.top_k.tolist() == list(range(num_rows))


def test_row_with_a_new_owner_has_all_parameters_of_that_owner():
    num_rows, names = (
        4,
        ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    )
    device = Device([Bucket(num_rows, num_rows)], 2, 4)
    chunks = [Chunk(row, [0], row, 7, [1, 2]) for row in range(num_rows)]
    for owner in range(2):
        values = np.random.default_rng(owner).uniform(0.1, 0.9, (num_rows, len(names)))
        params = [SamplingParams(**dict(zip(names, row, strict=True))) for row in values.tolist()]
        samples = [Sample(row, row, row + 1, owner, one) for row, one in enumerate(params)]
        device.load(make_plan(chunks, samples), Bucket(num_rows, num_rows))
        inputs = jitted_samples(Bucket(num_rows, num_rows))(device.state)
        for i, name in enumerate(names):
            np.testing.assert_array_equal(getattr(inputs, name), values[:, i].astype(np.float32), err_msg=name)
        assert inputs.seeds.tolist() == [owner] * num_rows


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


def test_many_rows_have_a_size_for_every_tile_of_a_product():
    rows = [bucket.num_rows for bucket in all_buckets(1024, 8192, 16, 64) if bucket.is_decode]
    assert rows == [16, 32, 64, 96, 128, 192, *range(256, 1025, 64)]
    assert [bucket.num_rows for bucket in all_buckets(300, 2048, 16, 64) if bucket.is_decode][-2:] == [256, 300]
    assert [bucket.num_rows for bucket in all_buckets(1024, 8192) if bucket.is_decode][-2:] == [512, 1024]


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
        assert bucket.num_tokens <= max(max_tokens, max_seqs + 1)
    assert not buckets[-1].is_decode, "prompts never run in a bucket that kernels take for a decode"
    assert buckets[-1] == Bucket(max(max_tokens, max_seqs + 1), max_seqs)


def test_smallest_bucket_that_holds_a_plan_is_chosen():
    buckets = all_buckets(32, 64)
    chunk = Chunk(0, [1], 0, 1, [1])
    decodes = [make_plan([chunk] * n) for n in (1, 3, 32)]
    assert [bucket_for(plan, buckets) for plan in decodes] == [Bucket(1, 1), Bucket(4, 4), Bucket(32, 32)]
    prompt = make_plan([Chunk(0, [1] * 40, 0, 40, [1, 2, 3])])
    assert bucket_for(prompt, buckets) == Bucket(64, 32)
    crowded = make_plan([*[chunk] * 29, Chunk(0, [1, 1], 0, 2, [1])])
    assert bucket_for(crowded, buckets) == Bucket(64, 32), "31 tokens would do, but not 16 rows"
    forking = make_plan([chunk], [make_sample(0, 1)] * 10)  # one chunk read by ten completions
    assert bucket_for(forking, buckets) == Bucket(16, 16)
    searching = make_plan([chunk] * 3, [make_sample(0, 1)], beams=(BeamSelect([0, 1, 2, 1], [0] * 4, 8),))
    assert bucket_for(searching, buckets) == Bucket(8, 8), "five rows of logits"


@pytest.mark.parametrize("block_size", [1, 4])
def test_each_step_of_a_burst_feeds_what_the_one_before_drew_where_it_belongs(block_size):
    lens, starts, tables = (3, 1, 2), (3, 0, 7), ([4, 9, 2, 7, 5, 8], [3], [1, 6, 11, 12, 13, 14, 15, 16, 17])
    max_blocks, latest = 10, [40, 41, 42]
    bucket = Bucket(4, 4)
    device, single = (Device([bucket], max_blocks, block_size) for _ in range(2))
    params = SamplingParams()

    def plan(step):
        rows = [row for row, num_draws in enumerate(lens) if step < num_draws]
        chunks = [Chunk(row, [latest[row] if step else 5 + row], starts[row] + step, 1, tables[row]) for row in rows]
        draws = [lens[row] - step for row in rows]
        samples = [
            Sample(row, i, 0, 0, params, num_tokens=n) for i, (row, n) in enumerate(zip(rows, draws, strict=True))
        ]
        return make_plan(chunks, samples, num_steps=max(draws)), rows

    device.load(plan(0)[0], bucket)
    device.draw([0, 1, 2], latest)
    for step in range(1, max(lens)):
        device.state = dataclasses.replace(device.state, number=jnp.int32(step))
        expected, rows = plan(step)
        actual = device.step_inputs(bucket)
        single.load(expected, bucket)
        alone = single.step_inputs(bucket)
        for name in ("token_ids", "positions", "slots", "kv_lens", "block_tables"):
            own = np.asarray(getattr(actual, name))[rows]
            np.testing.assert_array_equal(own, np.asarray(getattr(alone, name))[: len(rows)], err_msg=name)
        done = np.array([row for row in range(4) if row not in rows])
        assert not actual.slots[done].any(), "who is done writes to block 0"
        assert not actual.block_tables[done].any(), "and so does a kernel that finds slots by the block tables"
        assert actual.kv_lens[done].max() <= 1, "and attends to no more than that"
        assert actual.cu_q_lens.tolist() == [0, 1, 2, 3, 3]


@pytest.mark.parametrize("max_burst", [1, 3])
@pytest.mark.parametrize("block_size", [1, 4])
def test_plans_of_changes_are_loaded_like_the_chunks_and_samples_they_stand_for(block_size, max_burst):
    """Sequences come, fork, and end by a token, their length or an abort, while others decode on."""
    random = np.random.default_rng(0)
    blocks = BlockManager(200, block_size, enable_prefix_caching=True)
    scheduler = Scheduler(
        blocks, max_num_seqs=8, max_num_batched_tokens=40, max_model_len=48, eos_token_ids=[EOS], max_burst=max_burst
    )
    max_blocks = 48 // block_size
    fake, buckets = FakeDevice(scheduler), all_buckets(8, 40)
    device = Device(buckets, max_blocks, block_size)
    in_flight, seen = [], Counter()

    def enqueue(plan):
        spelled = spell(plan, scheduler)
        latest = dict(fake._latest)
        in_flight.append((plan, fake.execute(plan)))
        if not plan.chunks:
            return
        bucket = bucket_for(plan, buckets)
        chunks = [
            chunk._replace(token_ids=[latest[chunk.row]] if min(chunk.token_ids) < 0 else chunk.token_ids)
            for chunk in spelled.chunks
        ]
        packed = device.load(plan, bucket)
        actual = device.step_inputs(bucket)
        expected = naive_inputs(chunks, spelled.samples, (), bucket, block_size, max_blocks)
        for name in set(StepInputs.__dataclass_fields__) - {"num_draws"}:
            np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name), err_msg=name)
        unpacked = inputs_of_rows(np.asarray(device.state.columns), *pack_draws(plan, bucket.num_rows, 8))
        expected = make_sample_inputs(spelled.samples, bucket.num_rows)
        loaded = jitted_samples(bucket)(device.state)
        for name in SampleInputs.__dataclass_fields__:
            np.testing.assert_array_equal(getattr(unpacked, name), getattr(expected, name), err_msg=name)
            if packed.draws:
                own = np.asarray(getattr(loaded, name))[: len(plan.draws)]
                np.testing.assert_array_equal(own, getattr(expected, name)[: len(plan.draws)], err_msg=name)
        device.draw(plan.draws.rows, [fake._latest[row] for row in plan.draws.rows.tolist()])
        is_decode = (plan.chunks.token_ids < 0).all()
        seen["decodes"] += is_decode
        seen["of fewer than before"] += is_decode and len(plan.draws) < len(in_flight[0][0].draws)
        seen["with biases"] += is_decode and plan.draws.is_adjusted
        seen["drawn by its own program"] += packed.draws

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
        if not in_flight:
            if not scheduler.has_unfinished:
                continue
            enqueue(scheduler.schedule())
        if (plan := scheduler.schedule_ahead()) is not None:
            enqueue(plan)
        scheduler.update(*in_flight.pop(0))
    assert seen["decodes"] > 50
    assert min(seen["of fewer than before"], seen["with biases"], seen["drawn by its own program"]) > 0
