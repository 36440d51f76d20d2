"""The roster: every unfinished request, its sequence group and its sequences, by id."""

from collections.abc import Collection

from jpaged.host.blocks.hashed_tokens import HashedTokens
from jpaged.host.sequence import Sequence, SequenceGroup
from jpaged.request import Request, derive_seed


class Roster:
    """Unfinished groups by request id, and their unfinished sequences by sequence id.

    Also numbers groups and sequences in the order in which they are made. Written by the scheduler and its rooms.

    Args:
        block_size: tokens in a block, by which the tokens of sequences are hashed.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self.sequences: dict[int, tuple[SequenceGroup, Sequence]] = {}
        """Every unfinished sequence with its group, by sequence id; written here alone."""
        self.requests: dict[str, SequenceGroup] = {}
        """Every unfinished group, by request id; written here alone."""
        self._num_groups = 0
        self._num_sequences = 0

    @property
    def groups(self) -> Collection[SequenceGroup]:
        """The unfinished groups."""
        return self.requests.values()

    def new_group(self, request: Request, max_tokens: int, stop_token_ids: frozenset[int]) -> SequenceGroup:
        """Make the group of a request, without sequences; ``enter`` registers it."""
        assert request.seed is not None
        self._num_groups += 1
        return SequenceGroup(
            request=request,
            arrival=self._num_groups - 1,
            sequences=[],
            max_tokens=max_tokens,
            stop_token_ids=stop_token_ids,
        )

    def new_sequence(self, group: SequenceGroup, index: int, token_ids: list[int]) -> Sequence:
        """Append a sequence to a group; ``enter`` or ``enter_sequence`` registers it.

        Args:
            group: the group.
            index: completion of the request; it decides the seed.
            token_ids: the prompt and the output so far; the sequence owns the list from now on.
        """
        assert group.request.seed is not None
        seed = derive_seed(group.request.seed, index)
        seq = Sequence(self._num_sequences, index, seed, token_ids, prompt_len=group.prompt_len)
        seq.hashed = HashedTokens(token_ids, self._block_size, group.request.prefix_salt)
        self._num_sequences += 1
        group.sequences.append(seq)
        return seq

    def fork_sequence(self, group: SequenceGroup, parent: Sequence) -> Sequence:
        """Append and register a sequence that continues the computed tokens of another one."""
        child = self.new_sequence(group, 0, list(group.request.prompt_token_ids))
        child.follow(parent)
        self.enter_sequence(group, child)
        return child

    def enter(self, group: SequenceGroup) -> None:
        """Register a group and its sequences, which have nothing in a pool."""
        for seq in group.sequences:
            self.sequences[seq.seq_id] = group, seq
        self.requests[group.request.request_id] = group

    def enter_sequence(self, group: SequenceGroup, seq: Sequence) -> None:
        """Register one more sequence of a registered group."""
        self.sequences[seq.seq_id] = group, seq

    def remove_sequence(self, seq: Sequence) -> None:
        """Forget a sequence that has ended."""
        del self.sequences[seq.seq_id]

    def remove(self, group: SequenceGroup) -> None:
        """Forget a group whose sequences were all removed."""
        del self.requests[group.request.request_id]
