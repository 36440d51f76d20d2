"""Capacity: the blocks that a request needs at most, and the errors for those that need too many."""

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass

from jpaged.contract.layer_groups import LayerGroups
from jpaged.host.offload.placement import can_stream
from jpaged.request import Request, SamplingParams

SINGLE = LayerGroups.single()


@dataclass(frozen=True, slots=True)
class Capacity:
    """A pool as one request sees it.

    Args:
        num_blocks: blocks that it may take at most, when it runs alone: all but block 0, the window and those kept by
            pins. Pinned blocks that hold the beginning of its prompt count.
        num_pinned: blocks that pins keep from it.
        block_size: tokens in a block.
        max_model_len: tokens of prompt and output that a sequence may reach.
        num_on_host: blocks on the host that are among ``num_blocks``: those of a streamed request.
        groups: the layer groups.
        max_chunk: tokens that a step adds to a sequence at most: it needs their blocks beside those of its windows.
    """

    num_blocks: int
    num_pinned: int
    block_size: int
    max_model_len: int
    num_on_host: int = 0
    groups: LayerGroups = SINGLE
    max_chunk: int = 1

    def check(self, request: Request) -> None:
        """Raise ValueError, with the arithmetic, if the request could never run to its end here."""
        prompt_len, params = len(request.prompt_token_ids), request.params
        room = self.max_model_len - prompt_len
        if room < 1:
            raise ValueError(
                f"the prompt has {prompt_len} tokens, but max_model_len={self.max_model_len} leaves room for at most "
                f"{self.max_model_len - 1} and one to generate: shorten the prompt"
            )
        for name in ("max_tokens", "min_tokens"):
            value = getattr(params, name)
            if value is not None and value > self.max_model_len:
                raise ValueError(f"{name}={value} is more than max_model_len={self.max_model_len}: lower it")
        wanted = 1 if params.max_tokens is None else min(params.max_tokens, room)
        if self.most_blocks(prompt_len, wanted, params.num_sequences) > self.num_blocks:
            raise ValueError(self._never_fits(prompt_len, wanted, params))

    def check_pin(self, prompt_len: int, others: Iterable[int]) -> None:
        """Raise ValueError if pinning so many tokens leaves too little for requests of so many blocks each."""
        if prompt_len > self.max_model_len:
            raise ValueError(f"the prefix has {prompt_len} tokens, max_model_len is {self.max_model_len}: shorten it")
        num_blocks = self.groups.num_blocks(prompt_len, self.block_size, self.max_chunk)
        most = max(others, default=1)
        if num_blocks + most > self.num_blocks:
            raise ValueError(
                f"the prefix cannot be pinned: it takes {num_blocks} blocks of {self.block_size}, requests under way "
                f"may need {most}, and {self.num_blocks} are not pinned yet. Unpin another, shorten it, wait for the "
                "requests, or raise num_blocks or memory_fraction"
            )

    def most_blocks(self, prompt_len: int, max_tokens: int, num_sequences: int) -> int:
        """Count the blocks of a group whose sequences all reach ``max_tokens``; the last token is never fed back."""
        lens = [prompt_len + max_tokens - 1] * num_sequences
        return self.groups.num_forked_blocks(prompt_len, lens, self.block_size, self.max_chunk)

    def most_blocks_on_device(self, prompt_len: int, max_tokens: int, num_sequences: int) -> int:
        """Count the blocks that a group takes from the device when it runs alone."""
        return max(self.most_blocks(prompt_len, max_tokens, num_sequences) - self.num_on_host, 1)

    def most_tokens(self, prompt_len: int, num_sequences: int) -> int:
        """Count the output tokens that each sequence of a group can reach alone in the pool, within the context."""
        room = self.max_model_len - prompt_len
        if not self.groups.is_plain:
            tokens = range(1, room + 1)  # more tokens never take fewer blocks
            return bisect_right(
                tokens, self.num_blocks, key=lambda max_tokens: self.most_blocks(prompt_len, max_tokens, num_sequences)
            )
        shared = prompt_len // self.block_size
        blocks_each = shared + (self.num_blocks - shared) // num_sequences
        return min(room, blocks_each * self.block_size - prompt_len + 1)

    def _never_fits(self, prompt_len: int, max_tokens: int, params: SamplingParams) -> str:
        name, num_sequences = width_name(params), params.num_sequences
        shared = prompt_len // self.block_size
        last = prompt_len + max_tokens - 1
        own = num_blocks_covering(last, self.block_size) - shared
        pinned = f" ({self.num_pinned} more are pinned)" if self.num_pinned else ""
        on_host, remedy = "", f"Lower max_tokens or {name}, or raise num_blocks or memory_fraction"
        if self.num_on_host:
            on_host = f", {self.num_on_host} of them on the host, as many as the host pool and the window hold"
            remedy = (
                "Lower max_tokens, or raise num_blocks (the window is a part of the device's pool), num_host_blocks or "
                "host_memory_bytes"
            )
        elif can_stream(params):
            remedy += ", or keep KV on the host with kv_placement='auto'"
        if not self.groups.is_plain:
            num_blocks = self.most_blocks(prompt_len, max_tokens, num_sequences)
            return (
                f"the request can never fit: a prompt of {prompt_len} and max_tokens={max_tokens} put {last} tokens in "
                f"the pool; with {name}={num_sequences} that is {num_blocks} blocks of {self.block_size} in "
                f"{len(self.groups)} layer groups, in steps of {self.max_chunk} tokens, and the pool has "
                f"{self.num_blocks}{pinned}. {remedy}, or lower max_num_batched_tokens"
            )
        return (
            f"the request can never fit: a prompt of {prompt_len} and max_tokens={max_tokens} put {last} tokens in the "
            f"pool; in blocks of {self.block_size} that is {shared} full prompt blocks + {name}={num_sequences} x "
            f"{own} more = {shared + num_sequences * own} blocks, and the pool has {self.num_blocks}{pinned}{on_host}. "
            f"{remedy}"
        )


def num_blocks_covering(num_tokens: int, block_size: int) -> int:
    """Count the blocks that hold so many tokens."""
    return -(-num_tokens // block_size)


def width_name(params: SamplingParams) -> str:
    """The parameter by which the caller set the number of sequences."""
    if params.use_beam_search:
        return "beam width"
    return "n" if params.best_of is None else "best_of"
