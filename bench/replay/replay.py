"""One workload through the real scheduler and block manager, with one step in flight as in serving."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

from bench.replay.step_time import H200, H200_PROFILE
from bench.workloads import Workload, made_up_result
from jpaged.contract.plan import StepPlan
from jpaged.device.step.inputs import Bucket, bucket_for
from jpaged.engine.bursts import Bursts
from jpaged.host.blocks.manager import BlockManager
from jpaged.host.scheduler import Scheduler
from jpaged.host.sequence import SequenceGroup
from jpaged.request import FinishReason, Request, SamplingParams

BLOCK_SIZE, MAX_MODEL_LEN, MAX_BURST, NUM_HOST_BLOCKS = 16, 2048, 4, 8192
EOS = 2


@dataclass(frozen=True)
class Setting:
    """An engine's settings, as the scheduler sees them.

    Args:
        num_blocks: blocks of the pool, besides block 0.
        buckets: sizes of steps.
        max_num_seqs, max_num_batched_tokens: limits of a step.
        horizon: tokens ahead for which the scheduler expects growth; None is its own number.
        knows_ends: whether requests end at ``max_tokens``; if not, they stop there without the scheduler's knowledge.
    """

    num_blocks: int
    buckets: tuple[Bucket, ...]
    max_num_seqs: int
    max_num_batched_tokens: int
    horizon: int | None = None
    knows_ends: bool = True


@dataclass(frozen=True)
class Replay:
    """Plans of a replay, in order.

    Args:
        num_steps: steps of each plan: more than one is a multi-step decode.
        num_rows, num_tokens: rows and tokens of a step of each.
        fill: part of the pool that sequences hold in each.
        is_pressed: whether requests wait.
        is_late: whether each was made once the results of the step before were known.
        seconds: modelled time of each.
        num_preemptions, num_swaps: counters at the end.
        num_output_tokens: tokens that the requests asked for.
        first_token_steps, first_token_s: steps that ended between a request and its first token, for each request,
            and the seconds. A multi-step decode counts once.
    """

    num_steps: Int64[np.ndarray, " plans"]
    num_rows: Int64[np.ndarray, " plans"]
    num_tokens: Int64[np.ndarray, " plans"]
    fill: Float64[np.ndarray, " plans"]
    is_pressed: Int64[np.ndarray, " plans"]
    is_late: Int64[np.ndarray, " plans"]
    seconds: Float64[np.ndarray, " plans"]
    num_preemptions: int
    num_swaps: int
    num_output_tokens: int
    first_token_steps: Int64[np.ndarray, " requests"]
    first_token_s: Float64[np.ndarray, " requests"]

    def figures(self) -> dict[str, float]:
        """The sums and means for the report."""
        steps, pressed = self.num_steps, self.num_steps * self.is_pressed
        return {
            "num_steps": int(steps.sum()),
            "num_plans": len(steps),
            "num_late_plans": int(self.is_late.sum()),
            "mean_rows": float((steps * self.num_rows).sum() / steps.sum()),
            "fill_percent": float(100 * (pressed * self.fill).sum() / max(pressed.sum(), 1)),
            "num_preemptions": self.num_preemptions,
            "num_swaps": self.num_swaps,
            "seconds": float(self.seconds.sum()),
            "tokens_per_s": float(self.num_output_tokens / self.seconds.sum()),
        }


def replay(work: Workload, setting: Setting, arrivals: Float64[np.ndarray, " requests"] | None = None) -> Replay:
    """Serve a workload.

    Args:
        work: the requests.
        setting: the engine's.
        arrivals: seconds at which the requests arrive, rising; None if all are there at the start. Multi-step decodes
            are bounded as in a server, where requests arrive.
    """
    blocks = BlockManager(
        1 + setting.num_blocks, BLOCK_SIZE, enable_prefix_caching=True, num_host_blocks=NUM_HOST_BLOCKS
    )
    scheduler = Scheduler(
        blocks,
        max_num_seqs=setting.max_num_seqs,
        max_num_batched_tokens=setting.max_num_batched_tokens,
        max_model_len=MAX_MODEL_LEN,
        eos_token_ids=(EOS,),
        max_burst=MAX_BURST,
        step_sizes=[(size.num_tokens, size.num_rows) for size in setting.buckets if not size.is_decode],
        profile=H200_PROFILE,
    )
    if setting.horizon is not None:
        scheduler.growth.horizon = setting.horizon
    bursts = None if arrivals is None else Bursts(scheduler)
    arrivals = np.zeros(len(work.prompts)) if arrivals is None else arrivals
    requests, num_arrived, now = _requests(work, setting), 0, 0.0
    in_flight: list[tuple[StepPlan, bool]] = []
    rows, ends, first_at = [], [], np.full(len(requests), np.inf)
    while scheduler.has_unfinished or num_arrived < len(requests):
        if not scheduler.has_unfinished:
            now = max(now, float(arrivals[num_arrived]))
        while num_arrived < len(requests) and arrivals[num_arrived] <= now:
            scheduler.add(requests[num_arrived])
            num_arrived += 1
        if not in_flight:
            in_flight.append((scheduler.schedule(), True))
        if (ahead := scheduler.schedule_ahead()) is not None:
            in_flight.append((ahead, False))
        plan, is_late = in_flight.pop(0)
        seconds = 0.0
        if len(plan.chunks):
            seconds = H200.plan_s(plan, bucket_for(plan, setting.buckets), is_late=is_late)
        now += seconds
        ends.append(now)
        fill = blocks.num_used_blocks / setting.num_blocks
        is_pressed = bool(scheduler.line.waiting)
        rows.append((plan.num_steps, len(plan.chunks), plan.num_tokens, fill, is_pressed, is_late, seconds))
        for group in scheduler.update(plan, made_up_result(len(plan.draws), plan.num_steps)):
            index = int(group.request.request_id)
            if group.sequences[0].num_outputs:
                first_at[index] = min(first_at[index], now)
            if not setting.knows_ends:
                _stop_if_due(scheduler, group, work)
        if bursts is not None and len(plan.chunks):
            bursts.note_step(seconds / plan.num_steps)
    names = "num_steps", "num_rows", "num_tokens", "fill", "is_pressed", "is_late", "seconds"
    columns = {name: np.array(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
    stats = scheduler.stats()
    return Replay(
        **columns,
        num_preemptions=stats.num_preemptions,
        num_swaps=stats.num_swaps_out,
        num_output_tokens=work.num_output_tokens,
        first_token_steps=np.searchsorted(ends, first_at, "right") - np.searchsorted(ends, arrivals, "right"),
        first_token_s=first_at - arrivals,
    )


def _requests(work: Workload, setting: Setting) -> list[Request]:
    requests = []
    for index, (prompt, length) in enumerate(zip(work.prompts, work.output_lens, strict=True)):
        max_tokens = length if setting.knows_ends else None
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=setting.knows_ends)
        requests.append(Request(str(index), None, prompt, params, seed=index))
    return requests


def _stop_if_due(scheduler: Scheduler, group: SequenceGroup, work: Workload) -> None:
    """End a request as a stop string does, once it has its tokens."""
    [seq] = group.sequences
    if not seq.is_finished and seq.num_outputs >= work.output_lens[int(group.request.request_id)]:
        scheduler.finish(group, seq, FinishReason.STOP)
