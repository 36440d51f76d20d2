"""Admission: whether a request can ever run here, and whether a waiting group can start now."""

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

from jpaged.contract.plan import BlockCopy
from jpaged.host.blocks.manager import NO_MATCH, BlockManager
from jpaged.host.blocks.prefix_cache import PrefixMatch
from jpaged.host.blocks.streaming import StreamedMatch
from jpaged.host.blocks.ticket import Ticket
from jpaged.host.capacity import Capacity, num_blocks_covering, width_name
from jpaged.host.growth import Growth
from jpaged.host.line import Line
from jpaged.host.offload.placement import can_stream, end_of_chunk, has_room
from jpaged.host.pins import Pins
from jpaged.host.policies.eviction import LEAST_HIT_INSIDE
from jpaged.host.policies.growth import num_blocks_left_free
from jpaged.host.policies.sharing import is_worth_waiting
from jpaged.host.prompt_blocks import PromptBlocks
from jpaged.host.refusal import Refusal
from jpaged.host.roster import Roster
from jpaged.host.sequence import Sequence, SequenceGroup, SequenceState
from jpaged.request import MAX_BEAM_CANDIDATES, Request, Terms


@dataclass(frozen=True, slots=True)
class Start:
    """The way to start a waiting group.

    Args:
        match: the cached start of its leader's tokens.
        target: tokens that its leader computes.
        num_reserved: tokens that its leader takes blocks for now.
        ticket: reserves the leader's blocks, or swaps the group in.
        num_short: blocks missing, 0 or less if the group can start.
        is_ready: whether the blocks of the match can be read in this step: none is loaded, or computed by this step.
        num_cached: tokens that the leader need not compute, if it is not swapped in whole.
    """

    match: PrefixMatch
    target: int
    num_reserved: int
    ticket: Ticket[list[BlockCopy]] | Ticket[None]
    num_short: int
    is_ready: bool
    num_cached: int = 0


class Admission:
    """Decides whether a request may enter, and whether the first group of the line can start. Changes nothing else.

    Args:
        blocks: the bookkeeping of the pools.
        roster: the unfinished requests.
        line: the groups that wait and run.
        pins: the pinned prefixes.
        growth: expects the blocks that running groups will come to hold.
        max_num_seqs: rows of an iteration at most.
        max_num_batched_tokens: tokens of an iteration at most.
        max_model_len: tokens of prompt and output that a sequence may reach.
        eos_token_ids: the model's end-of-sequence ids.
    """

    def __init__(
        self,
        blocks: BlockManager,
        roster: Roster,
        line: Line,
        pins: Pins,
        growth: Growth,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        eos_token_ids: frozenset[int],
    ) -> None:
        self._blocks = blocks
        self._roster = roster
        self._line = line
        self._pins = pins
        self._growth = growth
        self._eos_token_ids = eos_token_ids
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
        self._max_chunk = max_num_batched_tokens
        self._prompts = PromptBlocks(blocks, line, max_num_batched_tokens)
        self._num_usable = len(blocks.tiers.device.blocks)
        self._whole = Capacity(
            self._num_usable, 0, blocks.block_size, max_model_len, groups=blocks.groups, max_chunk=self._max_chunk
        )
        self._most_on_host = min(blocks.num_host_blocks, blocks.placement.max_streamed_blocks)
        self._refusal: Refusal | None = None  # the last one
        self._found: tuple[SequenceGroup, Start] | None = None  # the last start without a refusal

    # Requests -----------------------------------------------------------------------------------------------------

    def check(self, request: Request) -> Terms:
        """Check a request, and settle how far its sequences may go.

        Raises:
            ValueError: with the arithmetic, if it could never run to its end here; its name is in use; no tokens.
        """
        self._check_new(request)
        params, prompt_len = request.params, len(request.prompt_token_ids)
        num_sequences = params.num_sequences
        if num_sequences > self.max_num_seqs:
            name = width_name(params)
            raise ValueError(
                f"{name}={num_sequences} is more than max_num_seqs={self.max_num_seqs}: "
                f"lower {name} or raise max_num_seqs"
            )
        capacity, is_streamed = self._place(request)
        capacity.check(request)
        stops = frozenset([*(params.stop_token_ids or ()), *request.special_stops])
        stops |= frozenset() if params.ignore_eos else self._eos_token_ids
        num_candidates = (1 + len(stops)) * num_sequences
        if params.use_beam_search and num_candidates > MAX_BEAM_CANDIDATES:
            raise ValueError(
                f"a beam of {num_sequences} with {len(stops)} stop tokens looks at {num_candidates} "
                f"continuations in a step: at most {MAX_BEAM_CANDIDATES} are taken; give a narrower beam or fewer "
                "stop_token_ids"
            )
        if params.max_tokens is None:
            max_tokens = capacity.most_tokens(prompt_len, num_sequences)
        else:
            max_tokens = min(params.max_tokens, self.max_model_len - prompt_len)
        return Terms(max_tokens, stops, self._pins.state, is_streamed)

    def settle(self, request: Request) -> Terms:
        """The terms of a request, checked now unless they were checked before and still hold. Raises as ``check``."""
        if request.terms is None or request.terms.pins is not self._pins.state:
            return self.check(request)
        self._check_new(request)
        return request.terms

    def check_pin(self, request: Request) -> None:
        """Raise ValueError if pinning a prompt leaves too little to the unfinished groups, or its name is in use."""
        self._check_new(request)
        pool, streamed = self._capacity(None), self._streamed_capacity()
        others = [
            (streamed if group.is_streamed else pool).most_blocks_on_device(
                group.prompt_len, group.max_tokens, group.request.params.num_sequences
            )
            for group in self._roster.groups
            if not group.is_pin
        ]
        self._capacity(request).check_pin(len(request.prompt_token_ids), others)

    def _check_new(self, request: Request) -> None:
        if request.request_id in self._roster.requests or request.request_id in self._pins.held:
            raise ValueError(f"request_id {request.request_id!r} is already in use by an unfinished request")
        if not request.prompt_token_ids:
            raise ValueError("the prompt has no tokens: give at least one")

    def _capacity(self, request: Request | None) -> Capacity:
        """The pool without pinned blocks, except those that ``request`` would share."""
        num_pinned = self._pins.num_blocks_kept_from(request)
        if num_pinned == 0:
            return self._whole
        return replace(self._whole, num_blocks=self._whole.num_blocks - num_pinned, num_pinned=num_pinned)

    def _streamed_capacity(self) -> Capacity:
        """Both pools as a streamed request sees them; it shares no pinned block."""
        device = self._capacity(None)
        return replace(device, num_blocks=device.num_blocks + self._most_on_host, num_on_host=self._most_on_host)

    def _place(self, request: Request) -> tuple[Capacity, bool]:
        """The pools that a request may use, and whether it is streamed."""
        device, params, prompt_len = self._capacity(request), request.params, len(request.prompt_token_ids)
        kind, streamed = self._blocks.placement.kind, self._streamed_capacity()
        num_on_device = streamed.num_blocks - streamed.num_on_host
        if kind == "device" or not can_stream(params) or 0 in (num_on_device, streamed.num_on_host):
            return device, False
        room = self.max_model_len - prompt_len
        wanted = max(min(params.max_tokens or room, room), 1)
        is_streamed = kind == "host" or device.most_blocks(prompt_len, wanted, 1) > device.num_blocks
        return (streamed, True) if is_streamed else (device, False)

    # Waiting groups -----------------------------------------------------------------------------------------------

    def can_admit_first(self) -> bool:
        """Whether the first waiting group could be admitted now."""
        group = self._line.waiting[0]
        return self.rows_short(group) <= 0 and self.find(group) is not None

    def find(self, group: SequenceGroup) -> Start | None:
        """Find the way to start the first waiting group; None if blocks are short."""
        if not self.has_room_on_host(group):
            return None
        if self._found is not None and self._found[0] is group and self._found[1].ticket.is_valid:
            return self._found[1]
        if self.num_known_short(group) > 0 or self._is_short_of_any_match(group):
            return None
        if self._refusal is not None and self._growth.is_short(group, self.num_known_taken(group)):
            return None
        start = self.start(group)
        if start.num_short > 0 or self._growth.is_short(group, start.ticket.num_blocks):
            self._refusal = self._refuse(group, start)
            return None
        self._refusal, self._found = None, (group, start)
        return start

    def _is_short_of_any_match(self, group: SequenceGroup) -> bool:
        """Whether a group cannot start, whatever it matches: blocks that windows pass are taken all the same."""
        if self._blocks.groups.num_full > 0 or group.is_swapped:
            return False
        _, target = _leader_of(group)
        left_free = num_blocks_left_free(self._num_usable, is_running=bool(self._line.running))
        num_taken = self._prompts.num_blocks(NO_MATCH, target) + self._prompts.num_promised()
        return num_taken > self._blocks.num_free_blocks - left_free

    def num_known_short(self, group: SequenceGroup) -> int:
        """Count the blocks that the first waiting group is known to lack at least, without another match."""
        if self._refusal is None:
            return 0
        return self._refusal.num_short_now(group, self._blocks.tiers, is_running=bool(self._line.running))

    def num_known_taken(self, group: SequenceGroup) -> int:
        """Count the blocks that the first waiting group is known to take at least, without another match."""
        return 0 if self._refusal is None else self._refusal.num_taken_at_least(group, self._blocks.tiers)

    def forget_refusal(self) -> None:
        """Match the first group again: the content of the pools is lost."""
        self._refusal = None

    def rows_short(self, group: SequenceGroup) -> int:
        """Count the rows missing to start a group: 0 or less if it can start."""
        return self._line.num_rows + group.num_rows - self.max_num_seqs

    def has_room_on_host(self, group: SequenceGroup, *, without: Collection[SequenceGroup] = ()) -> bool:
        """Whether a group, if it is streamed, can keep its blocks on the host beside those that run.

        Args:
            group: the group.
            without: running groups that are not counted.
        """
        if not group.is_streamed:
            return True
        block_size = self._blocks.block_size
        streamed = [other for other in self._line.running if other.is_streamed and other not in without]
        others = [other.sequences[0].num_tokens // block_size for other in streamed]
        return has_room(group.sequences[0].num_tokens // block_size, others, self._most_on_host)

    def start(self, group: SequenceGroup) -> Start:
        """Find the way to start the first waiting group, and the number of blocks that it lacks."""
        tiers, is_running = self._blocks.tiers, bool(self._line.running)
        num_left_free = num_blocks_left_free(self._num_usable, is_running=is_running)
        to_spare = len(tiers.device.free) - num_left_free
        if group.is_streamed:
            return self._start_streamed(group, to_spare)
        if group.is_swapped:
            held = [seq.seq_id for seq in group.sequences if seq.state is SequenceState.SWAPPED]
            ticket = self._blocks.to_swap_in(held)
            to_grow = len(held) * len(self._blocks.groups) if is_running else 0  # for the next token of each
            return Start(NO_MATCH, 0, 0, ticket, ticket.num_blocks + to_grow - to_spare, is_ready=False)
        leader, target = _leader_of(group)
        to_grow = self._num_blocks_forked(group, target) if group.num_rows > 1 else 0
        match = self._match(group, leader, target)
        num_reserved = target
        if self._blocks.groups.has_windows:
            num_reserved = min(target, self._prompts.end_of_chunk(match.num_tokens))
        ticket = self._blocks.to_reserve(leader.seq_id, num_reserved, match=match, num_queried=target)
        is_ready = tiers.num_hits_ready(match) == len(match.hits) and not match.is_on_host
        num_blocks = ticket.num_blocks
        if self._blocks.groups.has_windows:
            num_blocks = max(num_blocks, self._prompts.num_blocks(match, target)) + self._prompts.num_promised()
        return Start(match, target, num_reserved, ticket, num_blocks + to_grow - to_spare, is_ready, match.num_tokens)

    def _start_streamed(self, group: SequenceGroup, to_spare: int) -> Start:
        """Find the way to start a streamed group with the chunk that ``to_spare`` device blocks hold: one, or more."""
        blocks, block_size, seq = self._blocks, self._blocks.block_size, group.sequences[0]
        num_tokens, placement, found = len(seq.token_ids), self._blocks.placement, StreamedMatch()
        if blocks.enable_prefix_caching and not group.is_swapped:
            num_kept = to_spare - num_blocks_covering(min(num_tokens, self._max_chunk), block_size) - 1
            found = blocks.streamed.match(
                seq.hashed,
                num_tokens - 1,
                most_on_host=placement.max_streamed_blocks,
                num_to_spare=num_kept if placement.kind == "auto" else 0,
            )
        num_cached = seq.num_computed if group.is_swapped else found.match.num_tokens
        room = num_cached + max(to_spare - found.num_unheld, 1) * block_size
        target = min(num_tokens, room, end_of_chunk(num_cached, self._max_chunk, block_size))
        ticket = blocks.streamed.ticket_in(seq.seq_id, target, found, num_tokens)
        num_short = ticket.num_blocks - to_spare
        return Start(found.match, target, target, ticket, num_short, is_ready=True, num_cached=num_cached)

    def _num_blocks_forked(self, group: SequenceGroup, target: int) -> int:
        """Count the blocks that the members of a group take once they have forked, beyond those of their leader."""
        members, block_size = group.unfinished, self._blocks.block_size
        lens = [len(seq.token_ids) for seq in members] if len(members) > 1 else [target] * group.num_rows
        groups, chunk = self._blocks.groups, self._max_chunk
        alone = groups.num_blocks(target, block_size, chunk)
        return groups.num_forked_blocks(group.fork_len(), lens, block_size, chunk) - alone

    def _refuse(self, group: SequenceGroup, start: Start) -> Refusal:
        blocks, num_short = self._blocks, start.num_short
        is_on_host = not start.is_ready and (group.is_swapped or start.match.is_on_host)
        has_windows = blocks.groups.has_windows
        if has_windows:
            num_short -= self._prompts.num_promised()  # which shrinks without a block that becomes free
        if is_on_host:
            num_short -= 1 + blocks.tiers.num_copies_queued  # loads may avoid as many blocks in this plan
        lacking = None
        is_matched = not (group.is_swapped or group.is_streamed or group.needs_prompt_scores)
        if blocks.enable_prefix_caching and is_matched:
            leader, target = _leader_of(group)
            num_hits = start.match.num_full_blocks(blocks.block_size)
            if num_hits < (target - 1) // blocks.block_size:
                lacking = leader.hashed.full_blocks(target - 1)[num_hits][1]
        return Refusal(
            group=group,
            num_rows=group.num_rows,
            is_on_host=is_on_host,
            has_windows=has_windows,
            is_running=bool(self._line.running),
            num_short=num_short,
            num_taken=start.ticket.num_blocks,
            num_freed=blocks.tiers.device.num_freed,
            num_cached=blocks.tiers.device.cache.num_inserted,
            lacking=lacking,
        )

    def _match(self, group: SequenceGroup, leader: Sequence, target: int) -> PrefixMatch:
        """Match the tokens that the group's leader must compute; one token is always left to compute."""
        if group.needs_prompt_scores:
            return NO_MATCH
        # The copy of an 8-bit block would keep a scale that other tokens have set.
        least_inside = math.ceil((1 if self._blocks.is_quantized else LEAST_HIT_INSIDE) * self._blocks.block_size)
        match = self._blocks.match_prefix(leader.hashed, target - 1, least_inside=least_inside)
        ready = self._ready(match, leader)
        if ready is match:
            return match
        num_shared, num_left = match.num_tokens - ready.num_tokens, target - ready.num_tokens
        return match if is_worth_waiting(num_shared, num_left) else ready

    def _ready(self, match: PrefixMatch, leader: Sequence) -> PrefixMatch:
        """The part of a match that the plan under construction does not compute itself; all of it, or less."""
        blocks = self._blocks
        while (num_ready := blocks.tiers.num_hits_ready(match)) < len(match.hits):
            if blocks.groups.is_plain:
                return match.cut(num_ready)
            num_tokens = num_ready // len(blocks.groups) * blocks.block_size
            match = blocks.match_prefix(leader.hashed, num_tokens)  # windows need other blocks there
        return match


def _leader_of(group: SequenceGroup) -> tuple[Sequence, int]:
    """The sequence that computes the tokens that all members share, and the number of these tokens."""
    leader, *others = group.unfinished
    return leader, group.fork_len() if others else len(leader.token_ids)
