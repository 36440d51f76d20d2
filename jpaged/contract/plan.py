"""The contract between the halves: a StepPlan crosses to the device, a StepResult comes back.

Nothing here decides and nothing executes; lists inside a plan are read, never changed, by its receiver. What a step has
hundreds of is a named tuple: the cheapest to make.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from jpaged.request import SamplingParams


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """Block ``dst`` becomes a copy of block ``src``; which pools the two number is said where the copy is listed."""

    src: int
    dst: int


class Chunk(NamedTuple):
    """Consecutive tokens of one sequence to compute this step: a decode (one token) or a piece of a prompt.

    Args:
        seq_id: the sequence.
        token_ids: the tokens fed to the model; the first sits at position ``start``. One below 0 is not known yet:
            ``~row``, the token that sample ``row`` of the plan before brings.
        start: tokens of the sequence whose KV is already in the pool.
        prompt_len: length of the sequence's prompt (some rope scalings depend on it).
        block_table: physical blocks of logical blocks 0, 1, ...; covers at least ``start + len(token_ids)`` tokens.
    """

    seq_id: int
    token_ids: Sequence[int]
    start: int
    prompt_len: int
    block_table: Sequence[int]

    @property
    def stop(self) -> int:
        """Tokens of the sequence whose KV is in the pool once this has run."""
        return self.start + len(self.token_ids)


class Sample(NamedTuple):
    """Draw one token from the logits of the last token of ``chunks[chunk]``.

    Args:
        seq_id: the sequence that will own the token. Several samples may read one chunk (a prompt about to fork).
        chunk: index into ``StepPlan.chunks``.
        position: where the new token will sit in its sequence; with ``seed`` it fixes the randomness.
        seed: this sequence's own 32-bit seed.
        params: the request's sampling parameters.
        banned_token_ids: tokens that may not be drawn now (end-of-sequence before ``min_tokens``).
        prompt_token_ids, output_token_ids: what penalties count; a view of the sequence's lists.
        num_tokens: how many to draw, one in each of the plan's first steps, feeding each to the next.
    """

    seq_id: int
    chunk: int
    position: int
    seed: int
    params: SamplingParams
    banned_token_ids: Sequence[int]
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    num_tokens: int = 1


class Decoder(NamedTuple):
    """What stays the same of a sequence while it decodes: see ``Chunk`` and ``Sample``."""

    seq_id: int
    prompt_len: int
    seed: int
    params: SamplingParams
    block_table: Sequence[int]


@dataclass(frozen=True, slots=True, eq=False)
class Decodes:
    """The chunks and samples of a plan that does nothing but go on with sequences of the plan before, as columns.

    Each feeds the last token that it drew there, and draws again, with nothing banned and nothing penalised. Its block
    table is what it was, but for new blocks at the end.

    Args:
        decoders: the sequences, in the order of the plan; the same object as before if they are the same.
        rows: [sequences] int32, the row of each among the samples (and chunks) of the plan before.
        positions: [sequences] int32, where the first token that each draws now will sit; it feeds the one before.
        num_draws: [sequences] int32, as ``Sample.num_tokens``.
    """

    decoders: Sequence[Decoder]
    rows: Int32[np.ndarray, " sequences"]
    positions: Int32[np.ndarray, " sequences"]
    num_draws: Int32[np.ndarray, " sequences"]


@dataclass(frozen=True, slots=True)
class DecodeChunks(Sequence[Chunk]):
    """The chunks of ``Decodes``, made for whoever asks for one."""

    decodes: Decodes

    def __len__(self) -> int:
        return len(self.decodes.decoders)

    def __getitem__(self, index: int) -> Chunk:
        decoder, row = self.decodes.decoders[index], int(self.decodes.rows[index])
        start = int(self.decodes.positions[index]) - 1
        return Chunk(decoder.seq_id, [~row], start, decoder.prompt_len, decoder.block_table)


@dataclass(frozen=True, slots=True)
class DecodeSamples(Sequence[Sample]):
    """The samples of ``Decodes``, made for whoever asks for one."""

    decodes: Decodes

    def __len__(self) -> int:
        return len(self.decodes.decoders)

    def __getitem__(self, index: int) -> Sample:
        decoder, position = self.decodes.decoders[index], int(self.decodes.positions[index])
        num_tokens = int(self.decodes.num_draws[index])
        return Sample(decoder.seq_id, index, position, decoder.seed, decoder.params, (), (), (), num_tokens)


@dataclass(frozen=True, slots=True)
class BeamSelect:
    """Find the best continuations of one beam search: the top ``num_candidates`` of its beams x vocabulary.

    Args:
        chunks: indices into ``StepPlan.chunks``, one per live beam: the last token's logits are read.
        scores: cumulative log-probability of each of these beams.
        num_candidates: how many continuations to return; 2 x width or more, so that enough of them go on.
        banned_token_ids: tokens that may not be chosen now (end-of-sequence before ``min_tokens``).
    """

    chunks: Sequence[int]
    scores: Sequence[float]
    num_candidates: int
    banned_token_ids: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class PromptScore:
    """Score the prompt tokens that follow each of the first ``len(target_ids)`` tokens of ``chunks[chunk]``."""

    chunk: int
    target_ids: Sequence[int]
    num_logprobs: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step of the device half, complete.

    Args:
        to_host: device block ``src`` to host block ``dst``, as it is before this step writes anything.
        from_host: host block ``src`` to device block ``dst``. Started before the forward pass and in the pool after it:
            nothing else in this plan reads or writes these device blocks. Sees what ``to_host`` of this plan stores;
            no host block is both read here and written there.
        copies: device to device (copy-on-write), after ``to_host`` and before the forward pass. All sources are read
            before any destination is written.
        chunks: all in one ragged batch. May be empty when blocks move.
        samples, beams, prompt_scores: what to make of the logits.
        num_steps: more than one is a burst: steps in a row without the host. All chunks are decodes then, sample i
            reads chunk i, nothing else is made of the logits, and block tables cover what the samples will feed.
    """

    copies: tuple[BlockCopy, ...] = ()
    chunks: Sequence[Chunk] = ()
    samples: Sequence[Sample] = ()
    prompt_scores: tuple[PromptScore, ...] = ()
    beams: tuple[BeamSelect, ...] = ()
    to_host: tuple[BlockCopy, ...] = ()
    from_host: tuple[BlockCopy, ...] = ()
    num_steps: int = 1

    @property
    def decodes(self) -> Decodes | None:
        """All chunks and samples in one, where they are of that kind: the same, cheaper to read."""
        return self.chunks.decodes if isinstance(self.chunks, DecodeChunks) else None

    @property
    def draws(self) -> tuple[list[int], list[int]]:
        """Of each sample, the sequence, by id, and how many tokens it draws."""
        if self.decodes is None:
            return [sample.seq_id for sample in self.samples], [sample.num_tokens for sample in self.samples]
        return [decoder.seq_id for decoder in self.decodes.decoders], self.decodes.num_draws.tolist()

    @property
    def num_tokens(self) -> int:
        return sum(len(chunk.token_ids) for chunk in self.chunks) if self.decodes is None else len(self.chunks)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.chunks or self.copies or self.to_host or self.from_host)

    @property
    def can_be_followed(self) -> bool:
        """Whether the next step can be planned before this one's results are known.

        Who penalises tokens must have seen them, a search chooses among its results, and what comes from the host can
        be used when the host says so. (To leave those sequences out of the next plan would split the batch in two that
        take turns.)
        """
        if self.decodes is not None:
            return True
        return not (self.beams or self.from_host or any(sample.params.has_penalties for sample in self.samples))

    @property
    def num_logit_rows(self) -> int:
        """Rows of logits the step reads: one per sample, then one per live beam of each search, in plan order."""
        return len(self.samples) + sum(len(beam.chunks) for beam in self.beams)


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Log-probabilities of chosen tokens, from the model's own logits (before penalties, temperature, filters).

    Args:
        logprobs: [rows] float32, of the chosen token.
        ranks: [rows] int32, 1 for the most probable token; 0 when nobody asked.
        top_ids: [rows, alternatives] int32, most probable first; zero alternatives when nobody asked.
        top_logprobs: [rows, alternatives] float32.
    """

    logprobs: np.ndarray
    ranks: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray


@dataclass(frozen=True, slots=True)
class BeamCandidates:
    """The continuations of one ``BeamSelect``, best first.

    Args:
        beams: [candidates] int32, index into ``BeamSelect.chunks`` of the beam each continues.
        token_ids: [candidates] int32, by which token.
        scores: [candidates] float32, cumulative log-probability. -inf where the vocabulary had no more to offer.
    """

    beams: np.ndarray
    token_ids: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step produced, on the host.

    Args:
        token_ids: [samples] int32, one per ``StepPlan.samples``.
        scores: one row per sample.
        prompt_scores: one per ``StepPlan.prompt_scores``.
        beams: one per ``StepPlan.beams``.
        later: (token_ids, scores) of each further step of a burst.
    """

    token_ids: np.ndarray
    scores: TokenScores
    prompt_scores: tuple[TokenScores, ...] = ()
    beams: tuple[BeamCandidates, ...] = ()
    later: tuple[tuple[np.ndarray, TokenScores], ...] = ()


@dataclass(frozen=True, slots=True)
class Costs:
    """What bringing KV back costs on this machine: measured by the device half, weighed by the host half.

    Args:
        transfer_s: fixed seconds of one batch of block transfers, either way.
        to_host_block_s, from_host_block_s: seconds each block adds.
        prefill_token_s: seconds to compute one token in a large prefill.
    """

    transfer_s: float
    to_host_block_s: float
    from_host_block_s: float
    prefill_token_s: float
