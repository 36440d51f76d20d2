"""StepPlan -> one padded int32 array: what a step's forward pass reads besides weights and cache."""

from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Array, Int

from jpaged.host.step_plan import StepPlan


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """The static shapes of one compiled step.

    Args:
        num_tokens: tokens in the ragged batch, padding included.
        num_rows: sequences in the batch at most, and rows of logits read.
    """

    num_tokens: int
    num_rows: int

    @property
    def is_decode(self) -> bool:
        """One token a row: kernels need no tiles of queries."""
        return self.num_tokens == self.num_rows


def powers_of_two(low: int, high: int) -> list[int]:
    """low, 2 low, 4 low, ... below ``high``, then ``high`` itself."""
    sizes = []
    while low < high:
        sizes.append(low)
        low *= 2
    return [*sizes, high]


def all_buckets(max_num_seqs: int, max_num_batched_tokens: int) -> list[Bucket]:
    """Every bucket a plan can need: as many tokens as rows for decodes, more when prompts are among them.

    A mixed step has fewer rows than tokens, so half as many rows do, and the next bucket where they don't.
    """
    decode = [Bucket(rows, rows) for rows in powers_of_two(1, max_num_seqs)]
    mixed = [
        Bucket(tokens, min(tokens // 2, max_num_seqs))
        for tokens in powers_of_two(32, max_num_batched_tokens)
        if tokens < max_num_batched_tokens
    ]
    return sorted({*decode, *mixed, Bucket(max_num_batched_tokens, max_num_seqs)})


def bucket_for(plan: StepPlan, buckets: list[Bucket]) -> Bucket:
    """The smallest bucket of the plan's kind that holds it, or of the other kind if none does."""
    num_tokens, num_rows = plan.num_tokens, max(len(plan.chunks), plan.num_logit_rows)
    is_decode = num_tokens == len(plan.chunks)
    fitting = [b for b in buckets if b.num_tokens >= num_tokens and b.num_rows >= num_rows]
    return min(fitting, key=lambda b: (b.is_decode != is_decode, b))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepInputs:
    """The ragged batch of one step. Padding tokens write to block 0; padding rows are empty.

    Args:
        token_ids, positions: of each token in its sequence.
        prompt_lens: length of the prompt of each token's sequence.
        slots: where each token's K and V go in the pool.
        block_tables, kv_lens, cu_q_lens: as ``paged_attention`` takes them.
        sample_tokens: index of the token whose logits are read by each sample, then by each live beam; 0 for padding.
    """

    token_ids: Int[Array, " tokens"]
    positions: Int[Array, " tokens"]
    prompt_lens: Int[Array, " tokens"]
    slots: Int[Array, " tokens"]
    block_tables: Int[Array, "rows max_blocks"]
    kv_lens: Int[Array, " rows"]
    cu_q_lens: Int[Array, " rows_plus_1"]
    sample_tokens: Int[Array, " rows"]


def _layout(bucket: Bucket, max_blocks: int) -> dict[str, tuple[int, ...]]:
    tokens, rows = bucket.num_tokens, bucket.num_rows
    return {
        "token_ids": (tokens,),
        "positions": (tokens,),
        "prompt_lens": (tokens,),
        "slots": (tokens,),
        "block_tables": (rows, max_blocks),
        "kv_lens": (rows,),
        "cu_q_lens": (rows + 1,),
        "sample_tokens": (rows,),
    }


def packed_size(bucket: Bucket, max_blocks: int) -> int:
    """Length of the packed array."""
    return sum(int(np.prod(shape)) for shape in _layout(bucket, max_blocks).values())


def _split(packed, bucket: Bucket, max_blocks: int) -> dict:
    """Views of ``packed`` (numpy or jax) by field name."""
    fields, start = {}, 0
    for name, shape in _layout(bucket, max_blocks).items():
        stop = start + int(np.prod(shape))
        fields[name] = packed[start:stop].reshape(shape)
        start = stop
    return fields


def pack(plan: StepPlan, bucket: Bucket, max_blocks: int, block_size: int) -> np.ndarray:
    """The inputs of ``plan`` in one int32 array: one transfer a step."""
    packed = np.zeros(packed_size(bucket, max_blocks), np.int32)
    fields = _split(packed, bucket, max_blocks)
    lens = np.fromiter((len(c.token_ids) for c in plan.chunks), np.int32, len(plan.chunks))
    starts = np.fromiter((c.start for c in plan.chunks), np.int32, len(plan.chunks))
    ends = np.cumsum(lens, dtype=np.int32)
    total = int(lens.sum())
    for row, chunk in enumerate(plan.chunks):
        blocks = chunk.block_table[: -(-(chunk.start + len(chunk.token_ids)) // block_size)]
        fields["block_tables"][row, : len(blocks)] = blocks
        fields["token_ids"][ends[row] - lens[row] : ends[row]] = chunk.token_ids
    rows = np.repeat(np.arange(len(plan.chunks)), lens)
    positions = np.arange(total, dtype=np.int32) + np.repeat(starts - (ends - lens), lens)
    fields["positions"][:total] = positions
    fields["prompt_lens"][:total] = np.repeat([c.prompt_len for c in plan.chunks], lens)
    fields["slots"][:total] = (
        fields["block_tables"][rows, positions // block_size] * block_size + positions % block_size
    )
    fields["kv_lens"][: len(plan.chunks)] = starts + lens
    fields["cu_q_lens"][1 : len(plan.chunks) + 1] = ends
    fields["cu_q_lens"][len(plan.chunks) + 1 :] = total
    read = [sample.chunk for sample in plan.samples] + [chunk for beam in plan.beams for chunk in beam.chunks]
    fields["sample_tokens"][: len(read)] = ends[read] - 1
    return packed


def unpack(packed: Int[Array, " size"], bucket: Bucket, max_blocks: int) -> StepInputs:
    """On the device: the fields of a packed array."""
    return StepInputs(**_split(packed, bucket, max_blocks))
