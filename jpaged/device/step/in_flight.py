"""An enqueued step: the plan, the results that it will have, and the circumstances of its start."""

import time
from typing import NamedTuple

from jaxtyping import Array, Int

from jpaged.contract.plan import StepPlan
from jpaged.contract.profile import Prefilled
from jpaged.device.sampling.beams import Candidates
from jpaged.device.sampling.draw import SampledTokens
from jpaged.device.sampling.scores import Scores


class Results(NamedTuple):
    """The results that an enqueued step will have; None or empty where the plan asks for none.

    Args:
        drawn: draws of a decode's own program, as ``StepState.drawn``.
        sampled: draws of a program of its own, one for each step.
        candidates: continuations of the searches.
        prompt_scores: scores of each piece of a prompt, in parts.
    """

    drawn: Int[Array, "2 steps rows"] | None = None
    sampled: tuple[SampledTokens, ...] = ()
    candidates: Candidates | None = None
    prompt_scores: tuple[list[Scores], ...] = ()


class Timing(NamedTuple):
    """The circumstances of a step, from which the cost of a prefill is learnt.

    Args:
        number: number of the step, from 1.
        started_s: time of the call, by ``time.perf_counter``.
        num_programs: programs compiled before the call.
        was_idle: whether no step was in flight before the call.
        is_settled: whether no program was being compiled beside the step, nor still to be. Else the step may be padded
            to a larger size for now, and compilation may slow it down.
    """

    number: int
    started_s: float
    num_programs: int
    was_idle: bool
    is_settled: bool


class StepInFlight(NamedTuple):
    """A plan that was enqueued.

    Args:
        plan: the plan.
        results: results that the step will have.
        timing: its circumstances.
    """

    plan: StepPlan
    results: Results
    timing: Timing


class StepTimes:
    """Observes the times of large prefills that run alone.

    Args:
        most_tokens: tokens of the largest step.
    """

    def __init__(self, most_tokens: int) -> None:
        self._most_tokens = most_tokens
        self._num_started = 0
        self._newest_waited_for = 0  # the number of a step: it has run
        self._prefills: list[Prefilled] = []

    def start(self, num_programs: int, *, is_settled: bool) -> Timing:
        """Note the start of the next step, with the programs compiled so far; see ``Timing``."""
        was_idle = self._newest_waited_for == self._num_started
        self._num_started += 1
        return Timing(self._num_started, time.perf_counter(), num_programs, was_idle, is_settled)

    def learn(self, plan: StepPlan, timing: Timing, num_programs: int) -> None:
        """Note a step whose results are there: its time, if it was a large prefill that ran alone."""
        if plan.num_logit_rows > 0:
            self._newest_waited_for = timing.number
        num_prompt_tokens = int(plan.chunks.lens[plan.chunks.lens > 1].sum())
        is_large = 4 * num_prompt_tokens >= max(self._most_tokens, 2 * plan.num_tokens) and plan.streamed is None
        is_alone = timing.was_idle and timing.is_settled and self._newest_waited_for == timing.number
        if is_large and is_alone and num_programs == timing.num_programs and not plan.prompt_scores:
            num_before = int(plan.chunks.starts @ plan.chunks.lens) // plan.num_tokens
            seconds = time.perf_counter() - timing.started_s
            self._prefills.append(Prefilled(plan.num_tokens, seconds, num_before))

    def take_prefills(self) -> list[Prefilled]:
        """The prefills observed since the last call."""
        prefills, self._prefills = self._prefills, []
        return prefills
