"""Admission: whether a request can ever run here, and what starting a waiting group takes now."""

import math
from dataclasses import dataclass

from jpaged.host.blocks.manager import NO_MATCH, BlockManager, PrefixMatch
from jpaged.host.capacity import Capacity, num_blocks_covering, num_forked_blocks, width_name
from jpaged.host.line import Line
from jpaged.host.pins import Pins
from jpaged.host.policies.budget import num_blocks_left_free
from jpaged.host.policies.eviction import LEAST_HIT_INSIDE
from jpaged.host.roster import Roster
from jpaged.host.sequence import SequenceGroup, SequenceState
from jpaged.request import MAX_BEAM_CANDIDATES, Request


@dataclass(frozen=True, slots=True)
class Terms:
    """The limits of a request that was checked.

    Args:
        max_tokens: output tokens that each sequence may reach.
        stop_token_ids: tokens that end a sequence.
    """

    max_tokens: int
    stop_token_ids: frozenset[int]


class Admission:
    """Decides whether a request may enter, and whether the first group of the line can start. Changes nothing else.

    Args:
        blocks: the bookkeeping of the pools.
        roster: the unfinished requests.
        line: the groups that wait and run.
        pins: the pinned prefixes.
        max_num_seqs: rows of an iteration at most.
        max_model_len: tokens of prompt and output that a sequence may reach.
        eos_token_ids: the model's end-of-sequence ids.
    """

    def __init__(
        self,
        blocks: BlockManager,
        roster: Roster,
        line: Line,
        pins: Pins,
        *,
        max_num_seqs: int,
        max_model_len: int,
        eos_token_ids: frozenset[int],
    ) -> None:
        self._blocks = blocks
        self._roster = roster
        self._line = line
        self._pins = pins
        self._eos_token_ids = eos_token_ids
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
        # The last group refused, and the blocks then free and cached.
        self._refused: tuple[SequenceGroup, tuple[int, int]] | None = None

    # Requests -----------------------------------------------------------------------------------------------------

    def check(self, request: Request) -> Terms:
        """Check a request, and settle how far its sequences may go.

        Raises:
            ValueError: with the arithmetic, if it could never run to its end here; its name is in use; no tokens.
        """
        self._check_new(request)
        params, prompt_len = request.params, len(request.prompt_token_ids)
        if params.num_sequences > self.max_num_seqs:
            name = width_name(params)
            raise ValueError(
                f"{name}={params.num_sequences} is more than max_num_seqs={self.max_num_seqs}: "
                f"lower {name} or raise max_num_seqs"
            )
        capacity = self._capacity(request)
        capacity.check(request)
        stops = frozenset(params.stop_token_ids or ()) | (frozenset() if params.ignore_eos else self._eos_token_ids)
        num_candidates = (1 + len(stops)) * params.num_sequences
        if params.use_beam_search and num_candidates > MAX_BEAM_CANDIDATES:
            raise ValueError(
                f"a beam of {params.num_sequences} with {len(stops)} stop tokens looks at {num_candidates} "
                f"continuations in a step: at most {MAX_BEAM_CANDIDATES} are taken; give a narrower beam or fewer "
                "stop_token_ids"
            )
        if params.max_tokens is None:
            return Terms(capacity.most_tokens(prompt_len, params.num_sequences), stops)
        return Terms(min(params.max_tokens, self.max_model_len - prompt_len), stops)

    def check_pin(self, request: Request) -> None:
        """Raise ValueError if pinning a prompt leaves too little to the unfinished groups, or its name is in use."""
        self._check_new(request)
        pool = self._capacity(None)
        others = [
            pool.most_blocks(group.prompt_len, group.max_tokens, group.request.params.num_sequences)
            for group in self._roster.groups
            if not group.is_pin
        ]
        self._capacity(request).check_pin(len(request.prompt_token_ids), others)

    def _check_new(self, request: Request) -> None:
        if request.request_id in self._roster or request.request_id in self._pins:
            raise ValueError(f"request_id {request.request_id!r} is already in use by an unfinished request")
        if not request.prompt_token_ids:
            raise ValueError("the prompt has no tokens: give at least one")

    def _capacity(self, request: Request | None) -> Capacity:
        """The pool without pinned blocks, except those that ``request`` would share."""
        num_usable = self._blocks.num_blocks - 1  # block 0 is padding
        num_pinned = self._pins.num_blocks_kept_from(request)
        return Capacity(num_usable - num_pinned, num_pinned, self._blocks.block_size, self.max_model_len)

    # Waiting groups -----------------------------------------------------------------------------------------------

    def can_admit_first(self) -> bool:
        """Whether the first group of the line could be admitted now."""
        group = self._line.first
        return group is not None and self.rows_short(group) <= 0 and self.find(group) is not None

    def find(self, group: SequenceGroup) -> PrefixMatch | None:
        """Find the cached start of the first waiting group; None if blocks are short."""
        if self._refused == (group, self._pool):
            return None  # no block was freed or published since: another match would end the same way
        match = self.match(group)
        if self.blocks_short(group, match) > 0:
            self._refused = group, self._pool
            return None
        return match

    def forget_refusal(self) -> None:
        """The pool has changed: the first group may be admitted now."""
        self._refused = None

    def match(self, group: SequenceGroup) -> PrefixMatch:
        """Match the tokens that the group's leader must compute; one token is always left to compute."""
        if group.needs_prompt_scores or group.is_swapped:
            return NO_MATCH
        leader = group.unfinished[0]
        target = group.fork_len() if len(group.unfinished) > 1 else len(leader.token_ids)
        return self._blocks.match_prefix(
            leader.token_ids[: target - 1],
            salt=group.request.prefix_salt,
            least_inside=math.ceil(LEAST_HIT_INSIDE * self._blocks.block_size),
        )

    def rows_short(self, group: SequenceGroup) -> int:
        """Count the rows missing to start a group: 0 or less if it can start."""
        return self._line.num_rows + group.num_rows - self.max_num_seqs

    def blocks_short(self, group: SequenceGroup, match: PrefixMatch) -> int:
        """Count the blocks missing to start the first waiting group: 0 or less if it can start."""
        blocks = self._blocks
        num_left_free = num_blocks_left_free(blocks.num_blocks - 1, is_running=bool(self._line.running))
        members = group.unfinished
        if group.is_swapped:
            held = [seq.seq_id for seq in members if seq.state is SequenceState.SWAPPED]
            # One more for each, to write its next token.
            needed = blocks.num_blocks_to_swap_in(held) + (len(held) if self._line.running else 0)
        else:
            leader, shared = members[0], group.fork_len()
            target = shared if len(members) > 1 else len(leader.token_ids)
            lens = [len(seq.token_ids) for seq in members] if len(members) > 1 else [target] * group.num_rows
            block_size = blocks.block_size
            to_grow = num_forked_blocks(shared, lens, block_size) - num_blocks_covering(target, block_size)
            needed = blocks.num_fresh_blocks(target, match) + to_grow
        return needed + num_left_free - blocks.num_free_blocks

    @property
    def _pool(self) -> tuple[int, int]:
        """What an admission depends on, beside the rows: blocks free and cached."""
        return self._blocks.num_free_blocks, self._blocks.num_cached_blocks
