"""StepPlan -> one padded int32 array: what a step's forward pass reads besides weights and cache."""

import dataclasses
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jpaged.contract.plan import Chunk, Decoder, Decodes, StepPlan


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


def all_buckets(
    max_num_seqs: int, max_num_batched_tokens: int, least_rows: int = 1, halfway_from: int | None = None
) -> list[Bucket]:
    """Every bucket a plan can need: as many tokens as rows for decodes, more when prompts are among them.

    A mixed step has fewer rows than tokens, so half as many rows do, and the next bucket where they don't.

    Args:
        max_num_seqs: rows at most.
        max_num_batched_tokens: tokens at most.
        least_rows: of a decode, if there can be so many; mixed steps begin with eight tokens for each, or 32.
        halfway_from: tokens from which there is another size about halfway between two that are far enough apart.
    """

    def sizes(low: int, high: int) -> list[int]:
        powers = powers_of_two(low, high)
        if halfway_from is None:
            return powers
        far_apart = [(a, b) for a, b in pairwise(powers) if a >= halfway_from and 2 * (b - a) > a]
        return [*powers, *(-(-(a + b) // 32) * 16 for a, b in far_apart)]  # multiples of 16, as matrix units like them

    decode = [Bucket(rows, rows) for rows in sizes(least_rows, max_num_seqs)]
    mixed = [
        Bucket(tokens, min(tokens // 2, max_num_seqs))
        for tokens in sizes(max(32, 8 * least_rows), max_num_batched_tokens)
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
        num_draws: of each row of a burst: tokens it has still to draw, this step's counted. 0 outside of bursts.
    """

    token_ids: Int[Array, " tokens"]
    positions: Int[Array, " tokens"]
    prompt_lens: Int[Array, " tokens"]
    slots: Int[Array, " tokens"]
    block_tables: Int[Array, "rows max_blocks"]
    kv_lens: Int[Array, " rows"]
    cu_q_lens: Int[Array, " rows_plus_1"]
    sample_tokens: Int[Array, " rows"]
    num_draws: Int[Array, " rows"]


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
        "num_draws": (rows,),
    }


def packed_size(bucket: Bucket, max_blocks: int) -> int:
    """Length of the packed array."""
    return sum(prod(shape) for shape in _layout(bucket, max_blocks).values())


def _split(packed, bucket: Bucket, max_blocks: int) -> dict:
    """Views of ``packed`` (numpy or jax) by field name."""
    fields, start = {}, 0
    for name, shape in _layout(bucket, max_blocks).items():
        stop = start + prod(shape)
        fields[name] = packed[start:stop].reshape(shape)
        start = stop
    return fields


class _Decoding(NamedTuple):
    """What a packed plan of decodes leaves for the next one.

    Args:
        decoders: the sequences, row by row.
        prompt_lens: theirs.
        tables: their block tables, padded with zeros; written to by the next plan.
    """

    decoders: Sequence[Decoder]
    prompt_lens: Int[np.ndarray, " rows"]
    tables: Int[np.ndarray, "rows max_blocks"]


class StepPacker:
    """Packs every plan, one after the other. Of a block table, what was packed with the plan before is kept.

    Args:
        max_blocks: width of a block table.
        block_size: tokens a block.
    """

    def __init__(self, max_blocks: int, block_size: int):
        self._max_blocks = max_blocks
        self._block_size = block_size
        self._rows: dict[int, tuple[list[int], bytes]] = {}  # of the last chunks: table and its row, by sequence id
        self._last: _Decoding | None = None  # if that is what the last plan did

    def pack(self, plan: StepPlan, bucket: Bucket) -> np.ndarray:
        """The inputs of ``plan`` in one int32 array, a new one: one transfer a step."""
        packed = np.zeros(packed_size(bucket, self._max_blocks), np.int32)
        fields = _split(packed, bucket, self._max_blocks)
        if plan.decodes is not None:
            self._pack_decodes(plan.decodes, plan.num_steps, fields)
        else:
            self._last = None
            self._pack_chunks(plan, fields)
        return packed

    def _pack_decodes(self, decodes: Decodes, num_steps: int, fields: dict[str, np.ndarray]) -> None:
        num_rows, starts = len(decodes.decoders), decodes.positions - 1
        rows = np.arange(num_rows, dtype=np.int32)
        self._last = last = self._go_on(decodes)
        self._extend_tables(last.tables, decodes)
        fields["token_ids"][:num_rows] = ~decodes.rows
        fields["positions"][:num_rows] = starts
        fields["prompt_lens"][:num_rows] = last.prompt_lens
        logical, offsets = np.divmod(starts, np.int32(self._block_size))
        fields["slots"][:num_rows] = last.tables[rows, logical] * self._block_size + offsets
        fields["block_tables"][:num_rows] = last.tables
        fields["kv_lens"][:num_rows] = decodes.positions
        fields["cu_q_lens"][1 : num_rows + 1] = rows + 1
        fields["cu_q_lens"][num_rows + 1 :] = num_rows
        fields["sample_tokens"][:num_rows] = rows
        if num_steps > 1:
            fields["num_draws"][:num_rows] = decodes.num_draws

    def _go_on(self, decodes: Decodes) -> _Decoding:
        """What was kept of the plan before, in the order of this one."""
        decoders, last = decodes.decoders, self._last
        if last is None:
            prompt_lens = np.array([decoder.prompt_len for decoder in decoders], np.int32)
            return _Decoding(decoders, prompt_lens, self._rows_of(decoders).copy())
        if decoders is last.decoders:
            return last
        return _Decoding(decoders, last.prompt_lens[decodes.rows], last.tables[decodes.rows])

    def _extend_tables(self, tables: np.ndarray, decodes: Decodes) -> None:
        """Enter the blocks that this plan is the first to write to."""
        starts, ends = decodes.positions - 1, decodes.positions - 1 + decodes.num_draws
        first = -(-starts // self._block_size)
        num_new = -(-ends // self._block_size) - first
        for offset in range(num_new.max()):
            rows = np.flatnonzero(num_new > offset)
            logical = first[rows] + offset
            new = zip(rows.tolist(), logical.tolist(), strict=True)
            tables[rows, logical] = [decodes.decoders[row].block_table[index] for row, index in new]

    def _pack_chunks(self, plan: StepPlan, fields: dict[str, np.ndarray]) -> None:
        num_chunks = len(plan.chunks)
        columns = zip(*plan.chunks, strict=True) if plan.chunks else [()] * len(Chunk._fields)
        _, token_ids, starts, prompt_lens, _ = columns
        lens = np.fromiter(map(len, token_ids), np.int32, num_chunks)
        ends = np.cumsum(lens, dtype=np.int32)
        total = int(lens.sum())
        kv_lens = np.fromiter(starts, np.int32, num_chunks) + lens
        rows = np.repeat(np.arange(num_chunks), lens)  # of each token
        positions = np.arange(total, dtype=np.int32) + (kv_lens - ends)[rows]
        logical, offsets = np.divmod(positions, self._block_size)

        block_tables = fields["block_tables"][:num_chunks]
        fed_lens = kv_lens
        if plan.num_steps > 1:  # a burst goes on from the tables it began with
            num_draws = np.array([sample.num_tokens for sample in plan.samples], np.int32)
            fields["num_draws"][:num_chunks] = num_draws
            fed_lens = kv_lens + num_draws - 1
        is_held = np.arange(self._max_blocks, dtype=np.int32) * self._block_size < fed_lens[:, None]
        np.multiply(self._rows_of(plan.chunks), is_held, out=block_tables)
        fields["token_ids"][:total] = np.fromiter(chain.from_iterable(token_ids), np.int32, total)
        fields["positions"][:total] = positions
        fields["prompt_lens"][:total] = np.fromiter(prompt_lens, np.int32, num_chunks)[rows]
        fields["slots"][:total] = block_tables[rows, logical] * self._block_size + offsets
        fields["kv_lens"][:num_chunks] = kv_lens
        fields["cu_q_lens"][1 : num_chunks + 1] = ends
        fields["cu_q_lens"][num_chunks + 1 :] = total
        read = [sample.chunk for sample in plan.samples]
        for beam in plan.beams:
            read += beam.chunks
        fields["sample_tokens"][: len(read)] = ends[read] - 1

    def _rows_of(self, chunks: Sequence[Chunk] | Sequence[Decoder]) -> Int[np.ndarray, "chunks max_blocks"]:
        """Block tables, whole, padded with zeros."""
        before, width = self._rows, self._max_blocks
        rows, packed = {}, []
        for chunk in chunks:
            seq_id, table = chunk.seq_id, chunk.block_table
            row = before.get(seq_id)
            # Mostly the same int objects, which lists compare without a look at the numbers.
            if row is None or row[0] != table:
                fitting = table[:width]
                row = list(table), struct.pack(f"{len(fitting)}i{4 * (width - len(fitting))}x", *fitting)
            rows[seq_id] = row
            packed.append(row[1])
        self._rows = rows
        return np.frombuffer(b"".join(packed), np.int32).reshape(-1, width)


def unpack(packed: Int[Array, " size"], bucket: Bucket, max_blocks: int) -> StepInputs:
    """On the device: the fields of a packed array."""
    return StepInputs(**_split(packed, bucket, max_blocks))


def pack_next(packed: Int[Array, " size"], bucket: Bucket, max_blocks: int, block_size: int) -> Int[Array, " size"]:
    """On the device: the inputs of the step after this one in a burst of decodes.

    Every row that draws on feeds what it has just drawn; those that are done write to block 0, and read nothing else.
    """
    assert bucket.is_decode
    inputs = unpack(packed, bucket, max_blocks)
    goes_on = inputs.num_draws > 1
    moved = goes_on.astype(jnp.int32)
    rows = jnp.arange(bucket.num_rows, dtype=jnp.int32)
    positions = inputs.positions + moved
    slots = inputs.block_tables[rows, positions // block_size] * block_size + positions % block_size
    fields = dataclasses.replace(
        inputs,
        token_ids=jnp.where(goes_on, ~rows, 0),
        positions=positions,
        slots=jnp.where(goes_on, slots, 0),
        block_tables=jnp.where(goes_on[:, None], inputs.block_tables, 0),
        kv_lens=inputs.kv_lens + moved,
        num_draws=jnp.maximum(inputs.num_draws - 1, 0),
    )
    return jnp.concatenate([getattr(fields, name).reshape(-1) for name in _layout(bucket, max_blocks)])
