"""A step as devices take it: a plan, packed into a few arrays. It is all that processes need of each other."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32

from jpaged.contract.plan import BeamSelect, BlockCopy, PromptScore, StepPlan
from jpaged.device.sampling.beams import make_beam_inputs, num_candidates_of, pack_beam_inputs
from jpaged.device.sampling.sampler import SamplePacker, SampleSizes, num_top_of
from jpaged.device.step.inputs import Bucket, StepPacker, bucket_for
from jpaged.device.step.state import pack_decode_inputs
from jpaged.request import MAX_LOGPROBS

SCORE_ROWS = 64
"""Prompt tokens scored per call, so that prompt_logprobs never holds [prompt, vocab] logits."""


@dataclass(frozen=True, slots=True)
class PackedSamples:
    """What a program that samples takes: see ``SamplePacker`` and ``num_top_of``."""

    inputs: Int32[np.ndarray, " size"]
    sizes: SampleSizes
    num_top: int | None


@dataclass(frozen=True, slots=True)
class PackedBeams:
    """What a program that finds the continuations of beams takes: see ``pack_beam_inputs``."""

    inputs: Int32[np.ndarray, " size"]
    num_candidates: int
    num_biases: int


@dataclass(frozen=True, slots=True)
class PackedScores:
    """What scoring a piece of a prompt takes: rows of the hidden states and tokens, ``SCORE_ROWS`` at a time."""

    rows: Int32[np.ndarray, "parts score_rows"]
    targets: Int32[np.ndarray, "parts score_rows"]
    num_top: int


@dataclass(frozen=True, slots=True)
class PackedStep:
    """One ``StepPlan``.

    Args:
        to_host, from_host, copies: as the plan says.
        bucket: the program of the forward pass; None if there is nothing to compute.
        inputs: what that program loads.
        num_steps: of a burst.
        draws: whether that program draws too: a decode's, with nothing but what all rows ask for.
        samples: what is drawn by a program of its own; None if nothing is, or a decode's own program does it.
        beams, scores: what else is made of the logits.
    """

    to_host: tuple[BlockCopy, ...]
    from_host: tuple[BlockCopy, ...]
    copies: tuple[BlockCopy, ...]
    bucket: Bucket | None = None
    inputs: Int32[np.ndarray, " size"] | None = None
    num_steps: int = 1
    draws: bool = False
    samples: PackedSamples | None = None
    beams: PackedBeams | None = None
    scores: tuple[PackedScores, ...] = ()


class Packer:
    """Packs every plan, one after the other; of what sequences that go on had before, much is kept.

    Args:
        buckets: sizes of steps, smallest first.
        max_blocks: width of a block table.
        block_size: tokens a block.
        vocab_size: the model's.
    """

    def __init__(self, buckets: list[Bucket], *, max_blocks: int, block_size: int, vocab_size: int):
        self._buckets = buckets
        self._steps = StepPacker(max_blocks, block_size)
        self._samples = SamplePacker()
        self._num_logprobs = min(MAX_LOGPROBS, vocab_size)

    def pack(self, plan: StepPlan) -> PackedStep:
        """All of a plan."""
        moves = plan.to_host, plan.from_host, plan.copies
        if not plan.chunks:
            return PackedStep(*moves)
        bucket = bucket_for(plan, self._buckets)
        inputs = self._steps.pack(plan, bucket)
        samples, sizes = self._samples.pack(plan.samples, self._num_sample_rows(plan, bucket))
        num_top = num_top_of(plan.samples)
        draws = bucket.is_decode and num_top is None and sizes == SampleSizes(bucket.num_rows)
        if bucket.is_decode:
            in_program = samples if draws else np.zeros(SampleSizes(bucket.num_rows).packed_size, np.int32)
            inputs = pack_decode_inputs(inputs, in_program, plan.num_steps if draws else 0)
        return PackedStep(
            *moves,
            bucket,
            inputs,
            plan.num_steps,
            draws,
            PackedSamples(samples, sizes, num_top) if plan.samples and not draws else None,
            _pack_beams(plan.beams, len(plan.samples), bucket) if plan.beams else None,
            tuple(self._pack_scores(plan, piece) for piece in plan.prompt_scores),
        )

    def _num_sample_rows(self, plan: StepPlan, bucket: Bucket) -> int:
        """Rows of logits: as few as compiled for, where a chunk of a prompt brings one or none."""
        if bucket.is_decode:
            return bucket.num_rows
        return min(bucket.num_rows for bucket in self._buckets if bucket.num_rows >= len(plan.samples))

    def _pack_scores(self, plan: StepPlan, piece: PromptScore) -> PackedScores:
        first = sum(len(chunk.token_ids) for chunk in plan.chunks[: piece.chunk])
        num_targets = len(piece.target_ids)
        shape = -(-num_targets // SCORE_ROWS), SCORE_ROWS
        rows, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        rows.reshape(-1)[:num_targets] = first + np.arange(num_targets)
        targets.reshape(-1)[:num_targets] = piece.target_ids
        return PackedScores(rows, targets, self._num_logprobs if piece.num_logprobs else 0)


def _pack_beams(beams: tuple[BeamSelect, ...], first_row: int, bucket: Bucket) -> PackedBeams:
    inputs = make_beam_inputs(beams, first_row=first_row, num_rows=bucket.num_rows)
    return PackedBeams(pack_beam_inputs(inputs), num_candidates_of(beams), len(inputs.bias_rows))
