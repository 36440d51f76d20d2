"""Stories of the scheduler on a device made of numbers: how they begin, go on, and what must be true in the end."""

import random
from collections.abc import Callable, Collection

from jpaged.contract.layer_groups import LayerGroups
from jpaged.contract.profile import Link, MachineProfile
from jpaged.host.blocks.manager import BlockManager
from jpaged.host.offload.placement import KV_ON_DEVICE, Placement
from jpaged.host.scheduler import Scheduler
from jpaged.host.sequence import SequenceGroup
from jpaged.request import FinishReason, Request, SamplingParams
from tests.support.fake_device import (
    VOCAB_SIZE,
    FakeDevice,
    expected_hypotheses,
    expected_logprobs,
    expected_tokens,
    stops_of,
)
from tests.support.plans import SpelledPlan, spell


def make_profile(block_s: float, token_s: float, fixed_s: float = 0.0) -> MachineProfile:
    """A machine that moves a block in ``block_s`` and computes a token in ``token_s``."""
    link = Link(fixed_s, 1 / block_s, 1 / block_s)
    return MachineProfile(1, link, link, (), 0.0, token_s, 0.0, 0.0, 0.0)


def make_device(
    num_blocks: int = 65,
    *,
    block_size: int = 4,
    num_host_blocks: int = 0,
    rows: int = 8,
    budget: int = 64,
    model_len: int = 256,
    eos: tuple[int, ...] = (),
    preemption: str = "swap",
    caching: bool = True,
    max_burst: int = 1,
    step_sizes: tuple[tuple[int, int], ...] = (),
    is_quantized: bool = False,
    placement: Placement = KV_ON_DEVICE,
    groups: LayerGroups | None = None,
) -> FakeDevice:
    blocks = BlockManager(
        num_blocks,
        block_size,
        enable_prefix_caching=caching,
        num_host_blocks=num_host_blocks,
        placement=placement,
        groups=groups,
    )
    blocks.is_quantized = is_quantized
    scheduler = Scheduler(
        blocks,
        max_num_seqs=rows,
        max_num_batched_tokens=budget,
        max_model_len=model_len,
        eos_token_ids=eos,
        preemption=preemption,
        max_burst=max_burst,
        step_sizes=step_sizes,
    )
    if placement is KV_ON_DEVICE and not is_quantized:
        scheduler.shared_prefix.least_saved = 1  # as much is shared as can be, and the device checks it
    return FakeDevice(scheduler)


def step(device: FakeDevice) -> SpelledPlan:
    plan = spell(device.scheduler.schedule(), device.scheduler)
    device.scheduler.update(plan.plan, device.execute(plan.plan))
    device.scheduler.blocks.check_invariants()
    device.audit()
    return plan


def assert_is_what_was_asked_for(
    group: SequenceGroup, scheduler: Scheduler, cut_short: Collection[int] = frozenset()
) -> None:
    """Assert that a finished group's tokens and scores are those of a loop without scheduler and blocks.

    Args:
        group: a finished group. If it was aborted, it must have the first of the expected tokens.
        scheduler: whose it was.
        cut_short: ids of sequences ended from outside, as a stop string does: they too have the first tokens.
    """
    request, params, eos = group.request, group.request.params, scheduler.eos_token_ids
    if params.max_tokens is not None:
        assert group.max_tokens == min(params.max_tokens, scheduler.max_model_len - group.prompt_len)
    is_aborted = any(seq.finish_reason is FinishReason.ABORT for seq in group.sequences)
    if not is_aborted and params.prompt_logprobs is not None:
        scores = [float(logprob) for piece in group.prompt_scores for logprob in piece.logprobs]
        assert scores == expected_logprobs(request.prompt_token_ids, request.prefix_salt)
    for seq in group.sequences:
        assert seq.is_finished
        if seq.finish_reason is not FinishReason.ABORT and seq.seq_id not in cut_short:
            is_stop = seq.token_ids[-1] in stops_of(params, eos)
            assert seq.finish_reason is (FinishReason.STOP if is_stop else FinishReason.LENGTH)
    if group.beam is None:
        _assert_samples(group, eos, cut_short)
    elif not is_aborted:
        results = [(seq.output_token_ids, seq.score) for seq in group.sequences]
        assert results == expected_hypotheses(request, group.max_tokens, eos)


def _assert_samples(group: SequenceGroup, eos: Collection[int], cut_short: Collection[int]) -> None:
    assert [seq.index for seq in group.sequences] == list(range(group.request.params.num_sequences))
    for seq in group.sequences:
        tokens = seq.output_token_ids
        expected = expected_tokens(group.request, seq.index, group.max_tokens, eos)
        is_cut = seq.finish_reason is FinishReason.ABORT or seq.seq_id in cut_short
        assert tokens == (expected[: len(tokens)] if is_cut else expected)
        logprobs = [float(scores.logprobs[row]) for scores, row in seq.output_scores]
        assert logprobs == expected_logprobs(seq.token_ids, group.request.prefix_salt)[seq.prompt_len - 1 :]


def add(
    device: FakeDevice, name: str, prompt: list[int] | int, *, priority: int = 0, salt: bytes = b"", **params
) -> SequenceGroup:
    """Queue a request; a prompt given by its length is a text of its own."""
    if isinstance(prompt, int):
        prompt = random.Random(name).choices(range(VOCAB_SIZE), k=prompt)
    return device.scheduler.add(Request(name, None, prompt, SamplingParams(**params), 0, salt, priority))


def add_beams(device: FakeDevice, name: str, prompt: int, width: int, **params) -> SequenceGroup:
    return add(device, name, prompt, use_beam_search=True, n=width, temperature=0, **params)


def step_until(device: FakeDevice, is_done: Callable[[], bool]) -> SpelledPlan:
    for _ in range(200):
        plan = step(device)
        if is_done():
            return plan
    raise AssertionError("it never happened")


def finish_all(device: FakeDevice, *groups: SequenceGroup) -> list[SpelledPlan]:
    """Run to the end; the groups must be all that was asked for, and no block may be left behind."""
    plans = []
    while device.scheduler.has_unfinished:
        plans.append(step(device))
        assert len(plans) < 500
    for group in groups:
        assert_is_what_was_asked_for(group, device.scheduler)
    return plans
