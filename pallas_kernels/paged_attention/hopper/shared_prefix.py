"""Decodes that share a prefix on Hopper: the prefill kernel reads it once, and the decode kernel goes on from there.

The queries of all rows attend the shared tokens as if they were one row without a causal mask. The decode kernel starts
each row's softmax with the result, in place of an empty softmax, and reads the row's other blocks (Hydragen,
arXiv:2402.05099). Few queries make few items of work. The shared tokens are then divided into parts, so that all
multiprocessors have an item.
"""

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.paged_attention.call import Call
from pallas_kernels.paged_attention.hopper.decode_memory import Begun, DecodeShape
from pallas_kernels.paged_attention.hopper.prefill import attend_whole, prefill_case
from pallas_kernels.paged_attention.hopper.prefill_memory import Parts
from pallas_kernels.paged_attention.hopper.prefill_plan import Case, PrefillSizes
from pallas_kernels.paged_attention.hopper.schedule import Queries
from pallas_kernels.paged_attention.hopper.tile import LEAST

MOST_PARTS = 8


def attend_shared(
    call: Call,
    shared_lens: Int[Array, " num_seqs"],
    queries: Queries,
    shape: DecodeShape,
    *,
    sizes: PrefillSizes,
    num_sms: int,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Queries, Begun]:
    """Attend the tokens that rows share.

    Args:
        call: queries and layer; the layer is on the device.
        shared_lens: as for ``paged_attention``.
        queries: the query of each token, over all of its row's context.
        shape: the launch of the decode kernel.
        sizes: sizes of the prefill kernel.
        num_sms: multiprocessors to fill.
        interpret: settings of Pallas's interpreter for Mosaic GPU; None runs on a GPU.

    Returns:
        The queries over the rest of their contexts, and the softmaxes that go on there.
    """
    case = prefill_case(call, sizes)
    num_items = -(-call.num_tokens // case.item_tokens) * case.num_units
    num_parts = min(max(num_sms // num_items, 1), MOST_PARTS)
    table = call.batch.block_tables[jnp.argmax(shared_lens)]
    tables, part_lens = _divide(table, jnp.max(shared_lens), num_parts, case)
    launch = {"sizes": sizes, "num_sms": num_sms, "interpret": interpret}
    case, parts = attend_whole(call, tables, part_lens, **launch)
    begin = jnp.where(queries.kv_end > 0, shared_lens[queries.row], 0)
    return queries._replace(kv_begin=begin), _by_item(_merged(parts, part_lens > 0), begin > 0, case, shape)


def _divide(
    table: Int[Array, " max_blocks"], kv_len: Int[Array, ""], num_parts: int, case: Case
) -> tuple[Int[Array, "parts max_blocks"], Int[Array, " parts"]]:
    """The blocks and the tokens of each part: as many whole tiles for each, but for the last part with tokens."""
    unit = max(case.kv_tile, case.block_size)
    part_len = -(-kv_len // (num_parts * unit)) * unit
    start = jnp.arange(num_parts, dtype=jnp.int32) * part_len
    block = start[:, None] // case.block_size + jnp.arange(table.size, dtype=jnp.int32)[None, :]
    # A new array, by an operation that XLA cannot drop, as in ``attend_hopper``.
    return jnp.maximum(table.at[block].get(mode="clip"), 0), jnp.clip(kv_len - start, 0, part_len)


def _merged(parts: Parts, has_tokens: Bool[Array, " parts"]) -> Parts:
    """The softmaxes over all parts, of which the first has tokens."""
    has_tokens = has_tokens[:, None, None, None, None]
    sums = jnp.where(has_tokens, parts.sums[..., :1], LEAST)
    top = sums.max(axis=0)
    weights = jnp.exp2(sums - top[None])
    total = weights.sum(axis=0)
    outputs = (jnp.where(has_tokens, parts.outputs, 0) * weights).sum(axis=0) / total
    return Parts(outputs, top + jnp.log2(total))


def _by_item(parts: Parts, is_shared: Bool[Array, " tokens"], case: Case, shape: DecodeShape) -> Begun:
    """The softmaxes of tokens as the decode kernel holds them, a column for each head; empty if nothing is shared."""
    num_tokens = is_shared.size

    def by_item(x: Float[Array, "tiles units tile_rows width"]) -> Float[Array, "tokens num_kv_heads width group"]:
        split = x.reshape(len(x), shape.num_kv_heads, -1, case.tile_tokens, case.tile_heads, x.shape[3])
        by_token = split.transpose(0, 3, 1, 5, 2, 4)
        return by_token.reshape(-1, shape.num_kv_heads, x.shape[3], shape.group)[:num_tokens]

    def padded(x: Float[Array, "tokens num_kv_heads width group"], empty: float, rows: int) -> Array:
        x = jnp.where(is_shared[:, None, None, None], x, empty)
        widths = (0, 1), (0, 0), (0, rows - x.shape[2]), (0, shape.columns - shape.group)
        return jnp.pad(x, widths, constant_values=empty)

    outputs = padded(by_item(parts.outputs), 0, shape.rows)
    sums = padded(by_item(parts.sums), LEAST, 1)
    return Begun(outputs, sums[:, :, 0])
