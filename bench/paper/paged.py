"""The real Scheduler and BlockManager replay a trace; only the device is modelled."""

from dataclasses import dataclass

from bench.paper.beams import DEFAULT_CANDIDATES, CandidateModel, CandidateSource
from bench.paper.step_time import A100, MAX_MODEL_LEN, NUM_SLOTS
from bench.paper.traces import Tally, Trace, Usage
from bench.workloads import made_up_result
from jpaged.contract.plan import StepPlan
from jpaged.contract.profile import Link, MachineProfile
from jpaged.host.blocks.manager import BlockManager, BlockStats
from jpaged.host.policies.growth import HORIZON
from jpaged.host.scheduler import Scheduler
from jpaged.request import Request, SamplingParams

MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS = 512, 2048
"""Limits of a step: rows enough that memory is the limit, as for the baselines."""

STEPS_PER_SAMPLE = 16
"""Steps between samples of the pool, since counting walks all its blocks."""


@dataclass(frozen=True)
class Paged:
    """jpaged: blocks on demand, shared by reference count; continuous batching with prompts in chunks.

    Args:
        block_size: tokens in a block. Block 0, padding, is within the pool's 12 GB.
        enable_prefix_caching: whether equal prompt prefixes are shared; off where the paper has none.
        preemption: "recompute" or "swap", or "auto" by the profile of the modelled machine.
        num_host_slots: tokens that the host pool holds.
        pieces_per_block: contiguous pieces of a block in a transfer. Ours is one; the paper's system keeps keys and
            values of each layer apart.
        horizon: tokens ahead for which growth counts at an admission; with 0 a group starts if it fits now.
        candidates: model of the continuations in beam searches.
    """

    block_size: int = 16
    enable_prefix_caching: bool = False
    preemption: str = "recompute"
    num_host_slots: int = 0
    pieces_per_block: int = 1
    horizon: int = HORIZON
    candidates: CandidateModel = DEFAULT_CANDIDATES
    name: str = "jpaged"

    def serve(self, trace: Trace, tally: Tally) -> None:
        """Replay ``trace``."""
        blocks = BlockManager(
            NUM_SLOTS // self.block_size,
            self.block_size,
            enable_prefix_caching=self.enable_prefix_caching,
            num_host_blocks=self.num_host_slots // self.block_size,
        )
        scheduler = Scheduler(
            blocks,
            max_num_seqs=MAX_NUM_SEQS,
            max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
            max_model_len=MAX_MODEL_LEN,
            preemption=self.preemption,
            profile=self._profile(),
        )
        scheduler.growth.horizon = self.horizon
        candidates = CandidateSource(self.candidates)
        clock, num_arrived, num_steps = 0.0, 0, 0
        while not tally.is_over(clock):
            if not scheduler.has_unfinished:
                clock = max(clock, trace.arrivals_s[num_arrived])
            while num_arrived < len(trace) and trace.arrivals_s[num_arrived] <= clock:
                scheduler.add(_request(trace, num_arrived))
                num_arrived += 1
            plan = scheduler.schedule()
            if tally.is_steady(clock):
                tally.batches.append(scheduler.stats().num_running)
                if num_steps % STEPS_PER_SAMPLE == 0:
                    tally.usages.append(_usage(scheduler.block_stats(), blocks.block_size))
            clock += self._step_s(plan)
            for group in scheduler.update(plan, made_up_result(len(plan.draws), beams=candidates.choose(plan.beams))):
                if group.is_finished:
                    tally.finish(int(group.request.request_id), clock)
            num_steps += 1
        stats = scheduler.stats()
        tally.num_preemptions, tally.num_swaps = stats.num_preemptions, stats.num_swaps_out
        tally.saved = 1 - stats.num_physical_blocks / stats.num_logical_blocks

    def _step_s(self, plan: StepPlan) -> float:
        """The step's time on the modelled machine."""
        stops = plan.chunks.stops
        num_context_blocks = int((-(-stops // self.block_size)).sum())
        compute_s = A100.copy_s(len(plan.copies) * self.block_size)
        if plan.chunks:
            compute_s += A100.compute_s(plan.num_tokens, int(stops.sum()), num_context_blocks)
        # The link is full duplex, and transfers hide behind the step.
        return max(compute_s, *(self._transfer_s(len(moves)) for moves in (plan.to_host, plan.from_host)))

    def _transfer_s(self, num_blocks: int) -> float:
        return A100.transfer_s(num_blocks * self.block_size, num_blocks * self.pieces_per_block)

    def _profile(self) -> MachineProfile:
        """Rates of the modelled machine, in blocks for bytes."""
        block_s, prefill_s = self._transfer_s(1), A100.compute_s(MAX_NUM_BATCHED_TOKENS, 0)
        link, token_s = Link(0.0, 1 / block_s, 1 / block_s), prefill_s / MAX_NUM_BATCHED_TOKENS
        return MachineProfile(1, link, link, (), 0.0, token_s, 0.0, 0.0, 0.0)


def _request(trace: Trace, index: int) -> Request:
    params = SamplingParams(
        n=trace.decoding.width,
        use_beam_search=trace.decoding.is_beam_search,
        temperature=0,
        ignore_eos=True,
        max_tokens=trace.work.output_lens[index],
    )
    return Request(str(index), None, trace.work.prompts[index], params, seed=index)


def _usage(stats: BlockStats, block_size: int) -> Usage:
    """Paged KV reserves less than a block ahead: the empty slots of a sequence's last block count as reserved."""
    used = stats.num_used * block_size
    return Usage(stats.tokens_held, used - stats.tokens_held, 0, NUM_SLOTS - used)
