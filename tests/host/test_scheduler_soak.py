"""The scheduler and the block manager under constant pressure, on a device that knows what every slot must hold."""

import random
from collections import Counter
from collections.abc import Callable
from unittest import mock

import pytest

from jpaged.contract.layer_groups import LayerGroup, LayerGroups
from jpaged.contract.plan import StepPlan
from jpaged.contract.result import StepResult
from jpaged.contract.rows import ON_DEVICE
from jpaged.host.blocks import tier as block_tier
from jpaged.host.offload.placement import KV_ON_DEVICE, Placement
from jpaged.host.policies.order import schedule_order
from jpaged.host.sequence import Sequence, SequenceGroup, SequenceState
from jpaged.request import FinishReason, Request, SamplingParams
from tests.support.fake_device import (
    EOS,
    VOCAB_SIZE,
    FakeDevice,
)
from tests.support.plans import SpelledPlan, spell
from tests.support.stories import (
    add,
    add_beams,
    assert_is_what_was_asked_for,
    finish_all,
    make_device,
    make_profile,
    step,
    step_until,
)

SWAP_IS_CHEAPER = make_profile(block_s=1e-9, token_s=1)
RECOMPUTE_IS_CHEAPER = make_profile(block_s=1, token_s=0, fixed_s=1)
BOTH_ARE_FASTEST = make_profile(block_s=1, token_s=0.3)


# A soak ---------------------------------------------------------------------------------------------------------------

FEATURES = {
    "sampling: swapped out",
    "sampling: dropped to recompute",
    "beams: swapped out",
    "beams: dropped to recompute",
    "dropped because the host pool was full",
    "swapped in",
    "restored by transfer and computation at once",
    "refused without another match",
    "shared blocks that the same plan computes",
    "shared blocks of a step in flight",
    "several recompute what they share once",
    "a lower priority made way",
    "copies on write",
    "spills",
    "hits in the host tier",
    "hits that end inside a block",
    "hits in both tiers at once",
    "refused request",
    "refused pin",
    "pinned",
    "unpinned",
    "unpinned before it was computed",
    "a step failed before it ran",
    "a step failed after it ran",
    "a step failed with a pin",
    "a step failed while a group was swapped out",
    "two steps failed at once",
    "planned ahead",
    "prompts cut to a size",
    "decoded on",
    "decoded on without those that ended",
    "decoded on after prompts",
    "bursts",
    "bursts that some end in",
    "ended while a token of theirs was under way",
    "aborted while waiting",
    "aborted while running",
    "aborted while swapped out",
    "ended by a stop string",
    "ended by a stop token",
    "ended by its length",
    "best_of",
    "beams: finished",
    "prompt_logprobs after a preemption",
    "chunked prompt",
    "streamed: read on the host",
    "streamed: beside a sequence on the device",
    "streamed: several in one step",
    "streamed: more blocks than the device has",
    "streamed: prompt longer than the device",
    "streamed: decoded ahead",
    "streamed: preempted",
    "streamed: resumed",
    "streamed: a lower priority made way",
    "streamed: aborted",
    "streamed: started from blocks on the host",
    "streamed: started from blocks on the device",
    "streamed: host blocks shared",
    "streamed: blocks of a swapped group dropped",
}
"""Features that a soak must have met: a soak that never swaps proves nothing of swapping."""

FEATURES_OF_WINDOWS = {
    *(feature for feature in FEATURES if not feature.startswith("streamed: ")),
    "windows: blocks freed by a decode",
    "windows: blocks freed by a chunk",
    "windows: a prompt longer than what its window holds",
    "windows: a hit without first blocks",
    "windows: forked sequences",
    "windows: alone",
    "windows: beside layers that see all tokens",
} - {"hits that end inside a block", "restored by transfer and computation at once"}
"""Features that a soak with layer groups must have met; a match ends with a block, and blocks are not split."""


class Episode:
    """Some hundred steps with one random setting, from an empty scheduler to an empty scheduler.

    Args:
        seed: decides everything.
        seen: counts the features met.
        has_windows: whether layers have windows of 1 to 3 blocks, and form groups.
    """

    def __init__(self, seed: int, seen: Counter[str], *, has_windows: bool = False) -> None:
        self.random = random.Random(seed)
        self.seen = seen
        draw = self.random
        block_size, rows = draw.choice([1, 2, 3, 4, 4, 4, 8]), draw.randint(2, 12)
        budget = draw.randint(rows, 48)
        num_blocks, num_host_blocks = max(draw.randint(16, 96) // block_size, 4), draw.choice([0, 2, 4, 8, 16, 128])
        placement, groups = KV_ON_DEVICE, None
        if has_windows:
            windows = [draw.randint(1, 3 * block_size) for _ in range(draw.choice([1, 1, 2]))]
            full = [None] * draw.choice([0, 1, 1])
            groups = LayerGroups(tuple([LayerGroup(draw.randint(1, 3), window) for window in [*full, *windows]]))
            num_blocks *= len(groups)
            num_blocks += budget // block_size * len(windows) * draw.choice([0, 1])
            seen["windows: beside layers that see all tokens" if full else "windows: alone"] += 1
        elif num_host_blocks and seed % 3 > 0:
            kind, num_window_blocks = draw.choice(["auto", "host"]), draw.randint(1, 6)
            num_blocks = max(num_blocks // draw.randint(1, 4), 1)
            placement = Placement(
                kind, num_window_blocks, num_window_blocks * draw.choice([1, 4, 16]), 1 + num_window_blocks % 2
            )
        self.device = make_device(
            1 + placement.num_window_blocks + num_blocks,
            block_size=block_size,
            num_host_blocks=num_host_blocks,
            rows=rows,
            budget=budget,
            model_len=draw.randint(16, 60),
            eos=draw.choice([(), (EOS,), (EOS, 4), (EOS, 4, 5)]),
            preemption=draw.choice(["auto", "auto", "swap", "recompute"]),
            caching=draw.random() < 0.85,
            max_burst=draw.choice([1, 2, 5]),
            step_sizes=draw.choice([(), ((8, 4), (16, rows), (32, rows), (budget, rows))]),
            is_quantized=seed % 4 == 0 and budget >= rows + block_size - 1,
            placement=placement,
            groups=groups,
        )
        self.scheduler = self.device.scheduler
        self.scheduler.growth.horizon = (0, 8, 0, 128, 0)[seed % 5]
        self.blocks = self.scheduler.blocks
        self.texts = [draw.choices(range(VOCAB_SIZE), k=64) for _ in range(3)]  # what prompts begin with
        self.salts = draw.choice([[b""], [b"", b"other"]])
        self.priorities = draw.choice([[0], [0, 0, 1], [-1, 0, 1, 2]])
        self.arrival_rate = draw.choice([0.2, 0.5, 0.9])
        self.num_requests = 0
        self.groups: list[SequenceGroup] = []
        self.cut_short: set[int] = set()
        self.pins: set[str] = set()
        self.num_steps = 0
        self.was_idle = False
        self.swapped: list[SequenceGroup] = []  # groups that waited so after the plan before
        self.in_flight: list[tuple[SpelledPlan, StepResult]] = []
        self.ahead_rate = draw.choice([0.0, 0.5, 1.0])

    def run(self) -> int:
        """Returns the number of steps."""
        for _ in range(self.random.randint(50, 300)):
            self._disturb()
            self._step()
        most = self.num_steps + 2000
        while self.scheduler.has_unfinished:
            self._step()
            assert self.num_steps < most, "it goes round in circles"
        while self.in_flight:  # of sequences that have ended
            self._update()
        self._check_end()
        return self.num_steps

    # Between steps ----------------------------------------------------------------------------------------------------

    def _disturb(self) -> None:
        draw = self.random
        if draw.random() < self.arrival_rate and self.scheduler.stats().num_waiting < 6:
            self._arrive()
        if draw.random() < 0.03:
            self._abort()
        if draw.random() < 0.05 and self.blocks.enable_prefix_caching:
            self._pin()
        if draw.random() < 0.06 and self.pins:
            self._unpin()
        if draw.random() < 0.02 and self.scheduler.has_unfinished:
            self._fail()
        if draw.random() < 0.1:
            self.scheduler.profile = draw.choice([None, SWAP_IS_CHEAPER, RECOMPUTE_IS_CHEAPER, BOTH_ARE_FASTEST])

    def _arrive(self) -> None:
        for _ in range(5):
            request = self._make_request()
            before = self.scheduler.stats(), self.blocks.stats()
            try:
                self.groups.append(self.scheduler.add(request))
                return
            except ValueError:
                self.seen["refused request"] += 1
                assert (self.scheduler.stats(), self.blocks.stats()) == before

    def _make_request(self) -> Request:
        draw = self.random
        self.num_requests += 1
        max_tokens = draw.choice([1, 2, 5, 8, 12, 16, 24, 32, None, 100])
        shared = {
            "max_tokens": max_tokens,
            "min_tokens": min(draw.choice([0, 0, 0, 1, 5]), max_tokens or 5),
            "stop_token_ids": draw.choice([None, None, (7,), (7, 8)]),
            "ignore_eos": draw.random() < 0.2,
            "prompt_logprobs": 0 if draw.random() < 0.15 else None,
        }
        if draw.random() < 0.4:
            width = draw.randint(1, 7)
            params = SamplingParams(
                use_beam_search=True,
                temperature=0,
                n=draw.randint(1, width),
                best_of=width,
                length_penalty=draw.choice([-1.0, 0.0, 0.5, 1.0, 2.0]),
                early_stopping=draw.choice([False, True, "never"]),
                **shared,
            )
        else:
            n = draw.choice([1, 1, 1, 2, 3, 5])
            best_of, temperature = draw.choice([None, None, n + 2]), draw.choice([0.0, 1.0, 1.0])
            params = SamplingParams(n=n, best_of=best_of, temperature=temperature, **shared)
        name, seed = f"request {self.num_requests}", draw.randrange(100)
        priority, salt = draw.choice(self.priorities), draw.choice(self.salts)
        return Request(name, None, self._make_prompt(), params, seed, salt, priority)

    def _make_prompt(self) -> list[int]:
        """The beginning of a text or of an earlier conversation, and a few tokens more."""
        draw = self.random
        known = draw.choice(self.texts)
        if self.groups and draw.random() < 0.3:
            known = draw.choice(draw.choice(self.groups).sequences or [Sequence(0, 0, 0, known, 0)]).token_ids
        length = draw.randint(0, min(len(known), self.scheduler.max_model_len))
        return known[:length] + draw.choices(range(VOCAB_SIZE), k=draw.randint(0 if length else 1, 6))

    def _abort(self) -> None:
        unfinished = [group for group in self.groups if not group.is_finished]
        swapped = [group for group in unfinished if group.is_swapped]
        if not unfinished:
            return
        group = self.random.choice(swapped or unfinished)
        is_running = group in self.scheduler.line.running
        where = "while swapped out" if group.is_swapped else "while running" if is_running else "while waiting"
        assert self.scheduler.abort(group.request.request_id) is group
        self.seen[f"aborted {where}"] += 1
        self.seen["streamed: aborted"] += group.is_streamed

    def _pin(self) -> None:
        name, prompt = f"pin {self.num_requests}", self._make_prompt()[: self.random.randint(1, 20)]
        self.num_requests += 1
        request = Request(name, None, prompt, SamplingParams(max_tokens=1), 0, self.random.choice(self.salts))
        before = self.scheduler.stats(), self.blocks.stats()
        try:
            self.scheduler.pin(request)
        except ValueError:
            self.seen["refused pin"] += 1
            assert (self.scheduler.stats(), self.blocks.stats()) == before
        else:
            self.pins.add(name)

    def _unpin(self) -> None:
        in_flight = self.pins & {group.request.request_id for group in self.scheduler.roster.groups}
        name = self.random.choice(sorted(in_flight or self.pins))
        self.seen["unpinned" if self.scheduler.is_pinned(name) else "unpinned before it was computed"] += 1
        self.scheduler.unpin(name)
        self.pins.remove(name)
        with pytest.raises(ValueError, match="not pinned"):
            self.scheduler.unpin(name)

    def _fail(self) -> None:
        """A step dies after it was planned: nothing may depend on what it wrote, or would have written."""
        when = self.random.choice(["before", "after"])
        self.seen[f"a step failed {when} it ran"] += 1
        self.seen["a step failed with a pin"] += any(map(self.scheduler.is_pinned, self.pins))
        self.seen["a step failed while a group was swapped out"] += any(group.is_swapped for group in self.groups)
        self.seen["two steps failed at once"] += bool(self.in_flight)
        plan = self.scheduler.schedule_ahead() if self.in_flight else self.scheduler.schedule()
        if when == "after" and plan is not None:
            self.device.execute(plan)
        self.in_flight.clear()
        self.device.lose()
        self.scheduler.forget_pool()
        self.blocks.check_invariants()

    # Steps ------------------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        scheduler = self.scheduler
        has_work = scheduler.has_unfinished
        if not self.in_flight:
            plan = self._plan(scheduler.schedule)
            is_idle = not (plan.chunks or plan.to_host or plan.from_host)
            assert not (is_idle and self.was_idle and has_work), "it stands still"
            assert has_work or is_idle
            self.was_idle = is_idle and has_work
        if self.random.random() < self.ahead_rate:
            plan = self._plan(scheduler.schedule_ahead)
            self.seen["planned ahead"] += plan is not None
            self.was_idle &= plan is None
        self._update()
        self.blocks.check_invariants()
        self.device.audit()
        for name in filter(scheduler.is_pinned, self.pins):
            request = scheduler.pins.held[name].request
            match = self.blocks.match_prefix(request.prompt_token_ids, salt=request.prefix_salt)
            num_tokens = len(request.prompt_token_ids)
            is_plain, block_size = self.blocks.groups.is_plain, self.blocks.block_size
            assert match.num_tokens == (num_tokens if is_plain else num_tokens // block_size * block_size)
            assert not match.is_on_host
        self.num_steps += 1

    def _plan(self, schedule: Callable[[], StepPlan | None]) -> SpelledPlan | None:
        """Plan a step and run it; its results wait."""
        running = list(self.scheduler.line.running)
        made = schedule()
        plan = None if made is None else spell(made, self.scheduler)
        self._check_order(running)
        self._check_refusal()
        if plan is not None:
            self._count(plan, running)
            is_cut = plan.num_tokens < self.scheduler.max_num_batched_tokens and plan.num_tokens in (8, 16, 32)
            self.seen["prompts cut to a size"] += is_cut and any(chunk.stop < chunk.prompt_len for chunk in plan.chunks)
            if self.in_flight and plan.chunks and self._is_decoding_on(plan):
                fed = {chunk.seq_id for chunk in plan.chunks}
                for group in self.scheduler.line.running:
                    assert all(seq.seq_id in fed or group.is_ending(seq) for seq in group.unfinished), (
                        "no sequence waits"
                    )
                before = self.in_flight[-1][0]
                self.seen["decoded on"] += 1
                self.seen["decoded on without those that ended"] += len(plan.samples) < len(before.samples)
                self.seen["decoded on after prompts"] += before.num_tokens > len(before.chunks)
            self.in_flight.append((plan, self.device.execute(plan.plan)))
        return plan

    def _is_decoding_on(self, plan: SpelledPlan) -> bool:
        """Whether all that runs decodes, each row with the token that the plan before brings."""
        is_plain = all(list(chunk.token_ids) == [ON_DEVICE] for chunk in plan.chunks)
        return is_plain and len(plan.samples) == len(plan.chunks) and self.scheduler.rows.num_restless == 0

    def _update(self) -> None:
        """Apply the results of the oldest step in flight."""
        sequences = self.scheduler.roster.sequences
        plan, result = self.in_flight.pop(0)
        gaining = [sample.seq_id for sample in plan.samples]
        gaining += [plan.chunks[select.chunks[0]].seq_id for select in plan.beams]
        self.seen["ended while a token of theirs was under way"] += not sequences.keys() >= set(gaining)
        gaining = [sequences[seq_id][0] for seq_id in gaining if seq_id in sequences]
        touched = self.scheduler.update(plan.plan, result)
        assert touched == list(dict.fromkeys(gaining))
        self._stop_some(touched)

    def _check_order(self, running_before: list[SequenceGroup]) -> None:
        running, waiting = self.scheduler.line.running, self.scheduler.line.waiting
        for queue in (running, waiting):
            assert queue == sorted(queue, key=schedule_order)
        for group in running:
            for other in waiting:
                is_admitted = group not in running_before
                if is_admitted or group.request.priority == other.request.priority:
                    assert schedule_order(group) < schedule_order(other), "no group overtakes"

    def _device_blocks(self, seq: Sequence) -> list[int]:
        return [] if self.blocks.is_swapped(seq.seq_id) else self.blocks.holdings.held_by(seq.seq_id).live_blocks

    def _check_refusal(self) -> None:
        """Assert that a group which is not matched again could not start."""
        admission, waiting = self.scheduler._admission, self.scheduler.line.waiting
        if waiting and (num_known_short := admission.num_known_short(waiting[0])) > 0:
            self.seen["refused without another match"] += 1
            assert admission.start(waiting[0]).num_short >= num_known_short

    def _count(self, plan: SpelledPlan, running_before: list[SequenceGroup]) -> None:
        scheduler, seen = self.scheduler, self.seen
        preempted = [group for group in running_before if group in scheduler.line.waiting]
        admitted = [group for group in scheduler.line.running if group not in running_before]
        self._count_streamed(plan, preempted, admitted)
        if not self.blocks.groups.is_plain:
            self._count_windows(plan, admitted)
        for group in preempted:
            if group.is_streamed:
                continue
            way = "swapped out" if group.is_swapped else "dropped to recompute"
            seen[f"{'sampling' if group.beam is None else 'beams'}: {way}"] += not group.is_pin
            must_swap = scheduler.preemption == "swap" or (scheduler.preemption == "auto" and scheduler.profile is None)
            is_short = must_swap and self.blocks.num_host_blocks > 0 and not group.is_swapped
            seen["dropped because the host pool was full"] += is_short
            is_for_another = any(schedule_order(other) < schedule_order(group) for other in admitted)
            seen["a lower priority made way"] += is_for_another
            seen["prompt_logprobs after a preemption"] += group.request.params.prompt_logprobs is not None
        for group in admitted:
            states = Counter(seq.state for seq in group.sequences)
            has_output = group.sequences[0].num_outputs > 0
            seen["several recompute what they share once"] += states[SequenceState.UNFORKED] > 0 and has_output
            is_loading = states[SequenceState.LOADING] > 0 and len(plan.from_host) > 0
            seen["swapped in"] += is_loading and not group.fork_at and has_output
            is_waiting = states[SequenceState.LOADING] > 0 and not plan.from_host and not has_output
            seen["shared blocks that the same plan computes"] += is_waiting
            seen["hits that end inside a block"] += (group.num_cached_tokens or 0) % self.blocks.block_size > 0
            leader = group.unfinished[0]
            is_loading = is_loading and leader.state is SequenceState.LOADING and leader.num_computed > 0
            num_loading = len(plan.from_host) * self.blocks.block_size
            seen["hits in both tiers at once"] += is_loading and num_loading < leader.num_computed
            for chunk in self.in_flight[-1][0].chunks if self.in_flight and leader.state.holds_blocks else ():
                written = chunk.block_table[chunk.start // self.blocks.block_size * len(self.blocks.groups) :]
                is_shared = not set(written).isdisjoint(self._device_blocks(leader))
                seen["shared blocks of a step in flight"] += is_shared
        seen["copies on write"] += len(plan.copies)
        seen["bursts"] += plan.num_steps > 1
        seen["bursts that some end in"] += len({sample.num_tokens for sample in plan.samples}) > 1
        for chunk in plan.chunks:
            group, _ = scheduler.roster.sequences[chunk.seq_id]
            seen["chunked prompt"] += 0 < chunk.start < group.prompt_len

    def _count_windows(self, plan: SpelledPlan, admitted: list[SequenceGroup]) -> None:
        blocks, seen, block_size = self.blocks, self.seen, self.blocks.block_size
        for chunk in plan.chunks:
            holding = blocks.holdings.held_by(chunk.seq_id)
            kind = "a decode" if len(chunk.token_ids) == 1 else "a chunk"
            seen[f"windows: blocks freed by {kind}"] += max(holding.starts) > 0
            group, seq = self.scheduler.roster.sequences[chunk.seq_id]
            num_held = len(holding.live_blocks) // len(blocks.groups)
            seen["windows: a prompt longer than what its window holds"] += seq.prompt_len > num_held * block_size
            seen["windows: forked sequences"] += max(holding.starts) > 0 and len(group.unfinished) > 1
        for group in admitted:
            if group.num_cached_tokens and not group.num_preemptions and group.unfinished[0].state.holds_blocks:
                [starts] = [blocks.holdings.held_by(group.unfinished[0].seq_id).starts]
                seen["windows: a hit without first blocks"] += max(starts) > 0

    def _count_streamed(self, plan: SpelledPlan, preempted: list[SequenceGroup], admitted: list[SequenceGroup]) -> None:
        blocks, seen, streamed = self.blocks, self.seen, plan.plan.streamed
        for group in preempted:
            seen["streamed: preempted"] += group.is_streamed and group.is_swapped
            is_for_another = any(schedule_order(other) < schedule_order(group) for other in admitted)
            seen["streamed: a lower priority made way"] += group.is_streamed and is_for_another
        for group in admitted:
            num_held = len(self._host_blocks(group.sequences[0]))
            seen["streamed: resumed"] += group.is_streamed and num_held > 0 and group in self.swapped
            seen["streamed: started from blocks on the host"] += group.is_streamed and num_held > 0
        running = [group.sequences[0] for group in self.scheduler.line.running if group.is_streamed]
        tables = [set(self._host_blocks(seq)) for seq in running]
        seen["streamed: host blocks shared"] += sum(map(len, tables)) > len(set().union(*tables))
        num_usable = len(blocks.tiers.device.blocks)
        for chunk in plan.chunks:
            group, seq = self.scheduler.roster.sequences[chunk.seq_id]
            num_blocks = len(self._host_blocks(seq))
            seen["streamed: more blocks than the device has"] += num_blocks > num_usable
            is_started = group.is_streamed and group in admitted
            seen["streamed: started from blocks on the device"] += (
                is_started and chunk.start > num_blocks * blocks.block_size
            )
            is_longer = seq.prompt_len > num_usable * blocks.block_size
            seen["streamed: prompt longer than the device"] += num_blocks > 0 and is_longer
        if streamed is not None:
            num_streamed = len(set(streamed.starts[[chunk.block_table[0] < 0 for chunk in plan.chunks]].tolist()))
            seen["streamed: read on the host"] += 1
            seen["streamed: several in one step"] += num_streamed > 1
            seen["streamed: beside a sequence on the device"] += len(plan.chunks) > num_streamed
            seen["streamed: decoded ahead"] += bool(self.in_flight) and self._is_decoding_on(plan)
        dropped = [group for group in self.swapped if group in self.scheduler.line.waiting and not group.is_swapped]
        seen["streamed: blocks of a swapped group dropped"] += len(dropped)
        self.swapped = [group for group in self.scheduler.line.waiting if group.is_swapped]

    def _host_blocks(self, seq: Sequence) -> list[int]:
        return list(self.blocks.holdings.held_by(seq.seq_id).host_blocks) if seq.row is not None else []

    def _stop_some(self, touched: list[SequenceGroup]) -> None:
        """End some of the sequences that gained a token, as a stop string does."""
        for group in touched:
            for seq in group.unfinished if group.beam is None else ():
                if self.random.random() < 0.02:
                    self.seen["ended by a stop string"] += 1
                    self.cut_short.add(seq.seq_id)
                    self.scheduler.finish(group, seq, FinishReason.STOP)

    def _check_end(self) -> None:
        scheduler, blocks, seen = self.scheduler, self.blocks, self.seen
        for group in self.groups:
            assert_is_what_was_asked_for(group, scheduler, self.cut_short)
            for seq in group.sequences:
                is_stop = seq.finish_reason is FinishReason.STOP and seq.seq_id not in self.cut_short
                seen["ended by a stop token"] += is_stop
                seen["ended by its length"] += seq.finish_reason is FinishReason.LENGTH
            seen["best_of"] += group.beam is None and group.request.params.num_sequences > group.request.params.n
            seen["beams: finished"] += group.beam is not None
        queues = scheduler.line.running, scheduler.line.waiting, scheduler._entry.loading
        assert not any([scheduler.roster.groups, scheduler.roster.sequences, *queues])
        assert scheduler.pins.held.keys() == self.pins
        stats = blocks.stats()
        seen["spills"] += stats.num_blocks_spilled
        seen["restored by transfer and computation at once"] += scheduler.stats().num_tokens_recomputed
        seen["hits in the host tier"] += stats.host_hit_tokens
        seen["pinned"] += len(self.pins)
        holdings = [blocks.holdings.held_by(seq_id) for seq_id in scheduler.pins.held_seq_ids]
        pinned = {block for holding in holdings for block in holding.live_blocks}
        num_usable = blocks.num_blocks - 1 - blocks.placement.num_window_blocks
        assert blocks.num_free_blocks + len(pinned) == num_usable, "a block leaked"
        assert stats.num_host_used == 0, "a host block leaked"
        for name in self.pins:
            scheduler.unpin(name)
        assert blocks.num_free_blocks == num_usable
        blocks.check_invariants()


def run_episode(seed: int, seen: Counter[str], *, has_windows: bool = False) -> int:
    """Run one episode; returns its number of steps. A failure names the seed that replays it."""
    with mock.patch.object(block_tier, "MAX_SPILLS_PER_STEP", (32, 2)[seed % 2]):
        try:
            return Episode(seed, seen, has_windows=has_windows).run()
        except Exception as error:
            error.add_note(f"replay: run_episode({seed}, Counter(), has_windows={has_windows})")
            raise


def test_tokens_never_change_and_no_block_leaks_or_holds_anything_wrong(request):
    num_steps, seed, seen = 0, 14, Counter()
    while num_steps < request.config.getoption("--soak-steps"):
        num_steps += run_episode(seed, seen)
        seed += 1
    assert {feature for feature in FEATURES if not seen[feature]} == set()


def test_windows_free_their_blocks_and_no_block_of_any_group_leaks_or_is_read_after(request):
    num_steps, seed, seen = 0, 1000, Counter()
    while num_steps < request.config.getoption("--soak-steps"):
        num_steps += run_episode(seed, seen, has_windows=True)
        seed += 1
    assert {feature for feature in FEATURES_OF_WINDOWS if not seen[feature]} == set()


# Single features, each as one story -----------------------------------------------------------------------------------


def held(device: FakeDevice, group: SequenceGroup) -> list[list[int]]:
    """The content of the device's pool for each sequence of a group."""
    tables = [device.scheduler.blocks.block_table(seq.seq_id) for seq in group.sequences]
    slots = [device.pool[table].ravel().tolist() for table in tables]
    return [own[: seq.num_computed] for own, seq in zip(slots, group.sequences, strict=True)]


def num_distinct_blocks(device: FakeDevice, group: SequenceGroup) -> int:
    return len({block for seq in group.sequences for block in device.scheduler.blocks.block_table(seq.seq_id)})


@pytest.mark.usefixtures("no_growth")
def test_a_swapped_group_comes_back_bit_equal_and_as_shared_as_it_was():
    device = make_device(11, num_host_blocks=10, caching=False)
    first = add(device, "first", 8, max_tokens=30)
    second = add(device, "second", 9, n=3, max_tokens=8)
    step(device)
    before, num_blocks = [], 0
    while not second.is_swapped:
        before, num_blocks = held(device, second), num_distinct_blocks(device, second)
        plan = step(device)
    assert len(plan.to_host) == num_blocks, "a shared block is moved once"
    assert [chunk.seq_id for chunk in plan.chunks] == [first.sequences[0].seq_id]
    back = step_until(device, lambda: not second.is_swapped)
    assert len(back.from_host) == num_blocks == num_distinct_blocks(device, second)
    assert held(device, second) == before
    num_computed = len(before[0])
    later = [chunk for plan in finish_all(device, first, second) for chunk in plan.chunks if chunk.seq_id > 0]
    assert min(chunk.start for chunk in later) == num_computed, "nothing is computed again"


@pytest.mark.usefixtures("no_growth")
def test_a_full_host_pool_falls_back_to_recompute():
    device = make_device(7, num_host_blocks=1, caching=False)
    groups = [add(device, name, 8, max_tokens=9) for name in "ab"]
    plans = finish_all(device, *groups)
    stats = device.scheduler.stats()
    assert stats.num_preemptions == 1
    assert stats.num_swaps_out == 0
    starts = [chunk.start for plan in plans for chunk in plan.chunks if chunk.seq_id == groups[1].sequences[0].seq_id]
    assert starts.count(0) == 2


@pytest.mark.usefixtures("no_growth")
@pytest.mark.parametrize(("profile", "is_swap"), [(SWAP_IS_CHEAPER, True), (RECOMPUTE_IS_CHEAPER, False), (None, True)])
def test_auto_preempts_by_what_costs_less_and_swaps_until_rates_are_known(profile, is_swap):
    device = make_device(7, num_host_blocks=6, preemption="auto")
    device.scheduler.profile = profile
    finish_all(device, *[add(device, name, 8, max_tokens=9) for name in "ab"])
    stats = device.scheduler.stats()
    assert stats.num_preemptions == 1
    assert stats.num_swaps_out == stats.num_swaps_in == is_swap


@pytest.mark.usefixtures("no_growth")
@pytest.mark.parametrize(("token_s", "num_computed"), [(0.05, 20), (0.25, 12), (0.75, 4), (4.0, 0)])
def test_a_restore_computes_its_first_blocks_while_the_others_arrive(token_s, num_computed):
    """The step takes ``token_s`` for each token, and the link 1 s for each of 6 blocks of 4 tokens."""
    device = make_device(13, num_host_blocks=12, preemption="swap", caching=False)
    groups = [add(device, name, 19, max_tokens=9) for name in "ab"]
    step_until(device, lambda: groups[1].is_swapped)
    assert groups[1].sequences[0].num_computed == 24
    step_until(device, lambda: groups[0].is_finished)
    device.scheduler.profile = make_profile(block_s=1, token_s=token_s)
    plan = step_until(device, lambda: not groups[1].is_swapped)
    assert [(chunk.start, chunk.stop) for chunk in plan.chunks] == ([(0, num_computed)] if num_computed else [])
    assert len(plan.from_host) == 6 - num_computed // 4
    finish_all(device, *groups)
    assert device.scheduler.stats().num_tokens_recomputed == num_computed


def test_a_prompt_found_in_the_host_tier_is_restored_by_both_ways():
    device = make_device(13, num_host_blocks=20, preemption="swap")
    prompt = [7 * i % VOCAB_SIZE for i in range(24)]
    finish_all(device, add(device, "first", prompt, max_tokens=2))
    finish_all(device, add(device, "other", 44, max_tokens=2))  # evicts the first one to the host
    device.scheduler.profile = make_profile(block_s=1, token_s=0.25)
    again = add(device, "again", prompt, max_tokens=2)
    plan = step_until(device, lambda: again.num_cached_tokens is not None)
    [chunk] = plan.chunks
    assert chunk.start == 0
    assert chunk.stop // 4 + len(plan.from_host) == -(-again.num_cached_tokens // 4)
    assert chunk.stop == device.scheduler.stats().num_tokens_recomputed
    finish_all(device, again)


@pytest.mark.usefixtures("no_growth")
def test_sequences_that_share_tokens_and_8_bit_blocks_come_back_whole():
    for width, is_quantized in ((2, False), (1, True)):
        device = make_device(15, num_host_blocks=20, preemption="swap", is_quantized=is_quantized, budget=64)
        groups = [add(device, "a", 19, max_tokens=12), add(device, "b", 19, max_tokens=12, n=width)]
        device.scheduler.profile = make_profile(block_s=1, token_s=0.05)
        finish_all(device, *groups)
        stats = device.scheduler.stats()
        assert stats.num_swaps_in > 0
        assert stats.num_tokens_recomputed == 0


@pytest.mark.parametrize("preemption", ["swap", "recompute"])
def test_a_higher_priority_makes_a_lower_one_yield_and_is_not_overtaken(preemption):
    device = make_device(7, num_host_blocks=6, preemption=preemption)
    low = add(device, "low", 12, max_tokens=9, priority=1)
    waiting = add(device, "waiting", 12, max_tokens=2, priority=1)
    step(device)
    high = add(device, "high", 12, max_tokens=9, priority=0)
    plan = step(device)
    assert [chunk.seq_id for chunk in plan.chunks] == [high.sequences[0].seq_id], "it runs in the very next step"
    assert low.sequences[0].state is (SequenceState.SWAPPED if preemption == "swap" else SequenceState.WAITING)
    step_until(device, lambda: high.is_finished)
    assert waiting.sequences[0].num_outputs == 0
    step_until(device, lambda: low.is_finished)
    assert waiting.sequences[0].num_outputs == 0, "nor does a preempted group lose its place"
    finish_all(device, high, low, waiting)


@pytest.mark.usefixtures("no_growth")
@pytest.mark.parametrize("preemption", ["swap", "recompute"])
def test_nothing_of_equal_priority_is_admitted_before_a_preempted_group(preemption):
    device = make_device(9, num_host_blocks=8, preemption=preemption)
    first, second = (add(device, name, 9, max_tokens=14) for name in ("first", "second"))
    step_until(device, lambda: device.scheduler.stats().num_preemptions == 1)
    small = add(device, "small", 1, max_tokens=2)
    num_waiting_steps = 0
    while second in device.scheduler.line.waiting:
        assert small.sequences[0].num_computed == 0
        num_waiting_steps += device.scheduler.blocks.num_free_blocks > 2
        step(device)
    assert num_waiting_steps > 0, "there was room for the small one"
    finish_all(device, first, second, small)


@pytest.mark.usefixtures("no_growth")
@pytest.mark.parametrize("preemption", ["swap", "recompute"])
def test_a_beam_group_is_preempted_and_resumed_as_one(preemption):
    device = make_device(17, num_host_blocks=16, preemption=preemption)
    first = add(device, "first", 16, max_tokens=40)
    beams = add_beams(device, "beams", 8, 4, max_tokens=12)
    plans = []
    while device.scheduler.has_unfinished:
        plans.append(step(device))
        states = {seq.state for seq in beams.sequences}
        assert len(states) == 1 or states == {SequenceState.RUNNING, SequenceState.UNFORKED}, "all or none are there"
    assert device.scheduler.stats().num_preemptions > 0
    num_live = [len(select.chunks) for plan in plans for select in plan.beams]
    assert num_live == [1, *[4] * 11], "every step of the search reads the logits of all its beams at once"
    finish_all(device, first, beams)


@pytest.mark.parametrize("width", [2, 4, 7])
def test_at_most_one_block_is_copied_a_fork(width):
    device = make_device(129, caching=False)
    blocks, num_forks = device.scheduler.blocks, Counter()
    fork = blocks.fork

    def counted(*ids, **options) -> None:
        num_forks["n"] += 1
        fork(*ids, **options)

    with mock.patch.object(blocks, "fork", side_effect=counted):
        add_beams(device, "beams", 18, width, max_tokens=30)
        add(device, "samples", 18, n=8 - width, max_tokens=30)
        num_allowed = 0
        while device.scheduler.has_unfinished:
            assert len(step(device).copies) <= num_allowed
            num_allowed, num_forks["n"] = num_forks["n"], 0
    assert blocks.stats().num_copies > width


@pytest.mark.usefixtures("no_growth")
def test_a_pinned_prefix_survives_pool_pressure_and_a_failed_step():
    device = make_device(13, num_host_blocks=4)
    scheduler = device.scheduler
    prompt = list(range(10))
    scheduler.pin(Request("pin", None, prompt, SamplingParams(max_tokens=1), 0))
    step_until(device, lambda: scheduler.is_pinned("pin"))
    for is_after_failure in (False, True):
        if is_after_failure:
            scheduler.schedule()
            device.lose()
            scheduler.forget_pool()
            assert not scheduler.is_pinned("pin")
        pressure = [add(device, f"{is_after_failure} {i}", 12, max_tokens=20) for i in range(6)]
        finish_all(device, *pressure)
        assert scheduler.is_pinned("pin")
        shares = add(device, "shares", [*prompt, 1, 2], max_tokens=4)
        assert [chunk.start for chunk in step(device).chunks] == [10]
        assert shares.num_cached_tokens == 10
        finish_all(device, shares)
    assert scheduler.stats().num_preemptions > 2
    scheduler.unpin("pin")
    assert scheduler.blocks.num_free_blocks == 12


def test_a_pinned_block_that_a_prompt_ends_with_is_not_counted_as_shared():
    device = make_device(6, block_size=8)
    scheduler = device.scheduler
    scheduler.pin(Request("pin", None, list(range(9)), SamplingParams(max_tokens=1), 0))
    step_until(device, lambda: scheduler.is_pinned("pin"))
    # Of its 8 tokens one is computed, so that the pinned block is copied: 1 + 3 blocks, and 3 are not pinned.
    with pytest.raises(ValueError, match=r"1 full prompt blocks \+ n=3 x 1 more = 4 blocks, and the pool has 3"):
        add(device, "copies it", list(range(8)), n=3, max_tokens=4)
    finish_all(device, add(device, "shares it", list(range(9)), n=3, max_tokens=4))


def test_a_prefix_evicted_from_the_device_comes_back_from_the_host_uncomputed():
    device = make_device(7, num_host_blocks=6)
    prompt = list(range(11))
    finish_all(device, add(device, "first", prompt, max_tokens=2))
    finish_all(device, add(device, "evicts it", 20, max_tokens=4))
    again = add(device, "again", prompt, max_tokens=2)
    loads, computes, *_ = finish_all(device, again)
    assert len(loads.from_host) == 3
    assert not loads.chunks
    assert [(chunk.start, len(chunk.token_ids)) for chunk in computes.chunks] == [(10, 1)]
    assert again.num_cached_tokens == 10
    third = add(device, "third", prompt, max_tokens=2)
    assert not any(plan.from_host for plan in finish_all(device, third)), "what has landed is found on the device"
    assert third.num_cached_tokens == 10


def test_different_salts_share_nothing_in_either_tier():
    device = make_device(9, num_host_blocks=8)
    prompt = list(range(11))
    finish_all(device, add(device, "first", prompt, max_tokens=2))
    with_salt = add(device, "salted, after the device's", prompt, salt=b"other", max_tokens=2)
    finish_all(device, with_salt, add(device, "evicts it", 24, max_tokens=6))
    assert device.scheduler.blocks.stats().num_host_cached > 0
    with_third_salt = add(device, "salted, after the host's", prompt, salt=b"third", max_tokens=2)
    finish_all(device, with_third_salt)
    assert with_salt.num_cached_tokens == with_third_salt.num_cached_tokens == 0
    again = add(device, "same salt", prompt, salt=b"third", max_tokens=2)
    finish_all(device, again)
    assert again.num_cached_tokens == 10


def test_best_of_draws_all_from_one_computation_of_the_prompt():
    device = make_device()
    group = add(device, "a", 10, n=2, best_of=5, max_tokens=6)
    plans = finish_all(device, group)
    assert len(group.sequences) == 5
    assert len({tuple(seq.output_token_ids) for seq in group.sequences}) == 5
    assert [chunk.start for plan in plans for chunk in plan.chunks].count(0) == 1


def test_what_a_pin_borrows_is_not_counted_on_once_a_step_has_failed():
    device = make_device(7, block_size=8, rows=4, budget=64, model_len=48)
    scheduler = device.scheduler

    def pin(name: str, prompt: list[int]) -> None:
        scheduler.pin(Request(name, None, prompt, SamplingParams(max_tokens=1), 0))
        step_until(device, lambda: scheduler.is_pinned(name))

    finish_all(device, add(device, "before", list(range(8)), max_tokens=1))
    pin("short", [0, 1, 2])
    pin("long", list(range(9)))
    tables = [set(scheduler.blocks.block_table(seq_id)) for seq_id in scheduler.pins.held_seq_ids]
    assert len(set.union(*tables)) < sum(map(len, tables)), "one block serves both"
    prompt = [9] * 5
    with pytest.raises(ValueError, match="never fit"):
        add(device, "too long", prompt, max_tokens=27, ignore_eos=True)
    group = add(device, "fits", prompt, max_tokens=19, ignore_eos=True)
    step(device)
    scheduler.schedule()
    device.lose()
    scheduler.forget_pool()
    finish_all(device, group)


def test_no_group_is_preempted_for_a_request_that_shares_the_blocks_it_would_gain():
    device = make_device(8, block_size=4, rows=8, budget=64, preemption="recompute")
    first = add(device, "first", 12, max_tokens=4, ignore_eos=True)
    low = add(device, "low", 9, max_tokens=3, priority=1, ignore_eos=True)
    step(device)
    step(device)
    sharing = add(device, "sharing", [*low.request.prompt_token_ids[:8], 1, 2, 3, 4, 5], max_tokens=3)
    step(device)
    assert device.scheduler.stats().num_preemptions == 0
    finish_all(device, first, low, sharing)


@pytest.mark.usefixtures("no_growth")
def test_a_group_that_resumes_from_blocks_on_the_device_preempts_none_while_a_step_is_in_flight():
    device = make_device(12, block_size=1, num_host_blocks=32, rows=8, budget=64, model_len=60)
    scheduler = device.scheduler
    groups = [add(device, name, 2, max_tokens=6, ignore_eos=True) for name in "abcd"]
    in_flight: list[tuple[StepPlan, StepResult]] = []
    num_found = 0

    def plan_one(schedule: Callable[[], StepPlan | None]) -> None:
        nonlocal num_found
        num_swaps_in = scheduler.stats().num_swaps_in
        plan = schedule()
        if plan is not None:
            num_found += scheduler.stats().num_swaps_in > num_swaps_in and not plan.from_host
            in_flight.append((plan, device.execute(plan)))

    while scheduler.has_unfinished:
        if not in_flight:
            plan_one(scheduler.schedule)
        plan_one(scheduler.schedule_ahead)
        scheduler.update(*in_flight.pop(0))
        device.audit()
    for group in groups:
        assert_is_what_was_asked_for(group, scheduler)
    assert num_found > 0, "whose blocks were all still there"
