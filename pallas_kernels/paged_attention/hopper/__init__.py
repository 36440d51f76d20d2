"""Paged attention on Hopper GPUs by Pallas Mosaic GPU kernels: which batches they take, and the launches of one."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float, Int

from pallas_kernels import dispatch
from pallas_kernels.block_pool.layout import BlockPool, KvScales, is_quantized, shape_of
from pallas_kernels.chips import here
from pallas_kernels.paged_attention.hopper.decode import attend_decode
from pallas_kernels.paged_attention.hopper.prefill import attend_prefill
from pallas_kernels.paged_attention.hopper.schedule import queries_of_rows, queries_of_tokens
from pallas_kernels.paged_attention.hopper.tile import Scoring
from pallas_kernels.paged_attention.hopper.tuning import Sizes, decode_candidates, sizes_for


def why_not(
    q_shape: tuple[int, ...], q_dtype: jnp.dtype, pool_shape: tuple[int, ...], pool_dtype: jnp.dtype
) -> str | None:
    """Why the kernels cannot take a case, whatever the device; None if they can."""
    _, num_heads, head_dim = q_shape
    _, _, num_kv_heads, block_size, _ = shape_of(pool_shape)
    if q_dtype not in (jnp.bfloat16, jnp.float16):
        return f"queries in {jnp.dtype(q_dtype).name}: the tensor cores take bfloat16 and float16"
    if is_quantized(pool_dtype) and q_dtype != jnp.bfloat16:
        return f"a quantised pool under queries in {jnp.dtype(q_dtype).name}: only bfloat16"
    multiple = 32 if is_quantized(pool_dtype) else 16
    if head_dim % multiple or not 32 <= head_dim <= 256:
        return f"head_dim={head_dim}: expected a multiple of {multiple} from 32 to 256"
    if block_size < 8 or block_size & (block_size - 1):
        return f"block_size={block_size}: expected a power of two from 8"
    group = num_heads // num_kv_heads
    if not decode_candidates(group, head_dim, pool_dtype):
        return (
            f"{group} query heads of head_dim {head_dim} for each KV head: more than registers and shared memory hold"
        )
    if head_dim % 32 and group % 2:
        return f"head_dim={head_dim} with {group} query heads for each KV head: only an even number of them"
    return None


def attend_hopper(
    q: Float[Array, "tokens num_heads head_dim"],
    pool: BlockPool,
    layer: int,
    block_tables: Int[Array, "num_seqs max_blocks"],
    kv_lens: Int[Array, " num_seqs"],
    cu_q_lens: Int[Array, " num_seqs_plus_1"],
    *,
    sm_scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    alibi_slopes: Float[Array, " num_heads"] | None,
    sinks: Float[Array, " num_heads"] | None,
    kv_scales: KvScales | None,
    into: Float[Array, "tokens num_heads head_dim"] | None = None,
    sizes: Sizes | None = None,
    num_sms: int | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Float[Array, "tokens num_heads head_dim"]:
    """Attention of every query over its sequence's blocks; arguments and result as for ``paged_attention``.

    Args:
        sizes: of tiles and rings; the tuned ones if None.
        num_sms: multiprocessors to fill; the device's if None.
        interpret: run in Pallas's interpreter for Mosaic GPU instead of on a GPU.

    Raises:
        NotImplementedError: a case, or a device, that the kernels do not take.
    """
    reason = why_not(q.shape, q.dtype, pool.shape, pool.dtype) or (None if interpret else here.why_no_hopper())
    dispatch.refuse(reason, "implementation='xla' takes it")
    if 0 in q.shape or 0 in block_tables.shape:
        return jnp.zeros_like(q)
    return _attend(
        q,
        pool,
        jnp.int32(layer),
        block_tables,
        kv_lens,
        cu_q_lens,
        alibi_slopes,
        sinks,
        kv_scales,
        jnp.zeros_like(q) if into is None else into,  # padding is to come back as zeros
        scoring=Scoring(sm_scale, sliding_window, soft_cap),
        sizes=sizes or _tuned_sizes(q, pool),
        num_sms=num_sms or here.num_sms(),
        interpret=interpret,
    )


def _tuned_sizes(q: Array, pool: Array) -> Sizes:
    shape = shape_of(pool)
    group = q.shape[1] // shape.num_kv_heads
    return sizes_for(group=group, head_dim=q.shape[2], block_size=shape.block_size, pool_dtype=pool.dtype)


@partial(jax.jit, static_argnames=("scoring", "sizes", "num_sms", "interpret"))
def _attend(
    q: Float[Array, "tokens num_heads head_dim"],
    pool: BlockPool,
    layer: Int[Array, ""],
    block_tables: Int[Array, "num_seqs max_blocks"],
    kv_lens: Int[Array, " num_seqs"],
    cu_q_lens: Int[Array, " num_seqs_plus_1"],
    alibi_slopes: Float[Array, " num_heads"] | None,
    sinks: Float[Array, " num_heads"] | None,
    kv_scales: KvScales | None,
    into: Float[Array, "tokens num_heads head_dim"],
    *,
    scoring: Scoring,
    sizes: Sizes,
    num_sms: int,
    interpret: plgpu.InterpretGPUParams | None,
) -> Float[Array, "tokens num_heads head_dim"]:
    num_tokens, num_seqs = q.shape[0], kv_lens.size
    # A part of a larger array, which XLA passes on by its address, need not be aligned as a kernel's operand has to be.
    # This makes a copy of its own, and by an operation that XLA cannot drop: entries below 0 there may be, for all it
    # knows.
    block_tables = jnp.maximum(block_tables, 0)
    # A decode step, most likely. Single queries serve a prefill among them too, only less quickly; the prefill kernel
    # does not read quantised pools.
    has_prefill = num_tokens > num_seqs and not is_quantized(pool.dtype)
    if not has_prefill:
        queries = queries_of_tokens(num_tokens, kv_lens, cu_q_lens, scoring.sliding_window)
    else:
        queries = queries_of_rows(kv_lens, cu_q_lens, scoring.sliding_window)
    out = jax.new_ref(into)
    attend_decode(
        out,
        queries,
        q,
        pool,
        layer,
        block_tables,
        scoring=scoring,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        kv_scales=kv_scales,
        sizes=sizes.decode,
        num_sms=num_sms,
        interpret=interpret,
    )
    if has_prefill:
        attend_prefill(
            out,
            q,
            pool,
            layer,
            block_tables,
            kv_lens,
            cu_q_lens,
            scoring=scoring,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            sizes=sizes.prefill,
            num_sms=num_sms,
            interpret=interpret,
        )
    return out[...]
