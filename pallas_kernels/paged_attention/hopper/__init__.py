"""Paged attention on Hopper GPUs by Pallas Mosaic GPU kernels: the cases they take, and their launches."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.block_pool.layout import is_quantized, shape_of
from pallas_kernels.chips import here
from pallas_kernels.paged_attention.call import Call
from pallas_kernels.paged_attention.hopper.decode import attend_decode, decode_shape
from pallas_kernels.paged_attention.hopper.prefill import attend_prefill, takes_pool
from pallas_kernels.paged_attention.hopper.schedule import queries_of_rows, queries_of_tokens
from pallas_kernels.paged_attention.hopper.shared_prefix import attend_shared
from pallas_kernels.paged_attention.hopper.tuning import Sizes, decode_candidates, sizes_for


def why_not(
    q_shape: tuple[int, ...], q_dtype: jnp.dtype, pool_shape: tuple[int, ...], pool_dtype: jnp.dtype
) -> str | None:
    """The reason why the kernels cannot take a case, whatever the device; None if they can."""
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
    call: Call,
    *,
    sizes: Sizes | None = None,
    num_sms: int | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Float[Array, "tokens num_heads head_dim"]:
    """Attention of every query over its sequence's blocks.

    Args:
        sizes: sizes of tiles and rings; the tuned ones if None.
        num_sms: multiprocessors to fill; those of the device if None.
        interpret: settings of Pallas's interpreter for Mosaic GPU; None runs on a GPU.

    Raises:
        NotImplementedError: a case, or a device, that the kernels do not take.
    """
    reason = why_not(*call.case) or (None if interpret else here.why_no_hopper())
    dispatch.refuse(reason, "implementation='xla' takes it")
    if not call.has_work:
        return jnp.zeros_like(call.q)
    into = jnp.zeros_like(call.q) if call.into is None else call.into  # padding is to come back as zeros
    kv = call.kv._replace(layer=jnp.int32(call.kv.layer))
    return _attend(
        replace(call, kv=kv, into=into),
        sizes=sizes or _tuned_sizes(call),
        num_sms=num_sms or here.num_sms(),
        interpret=interpret,
    )


def _tuned_sizes(call: Call) -> Sizes:
    shape = shape_of(call.kv.pool)
    return sizes_for(
        group=call.num_heads // shape.num_kv_heads,
        head_dim=call.head_dim,
        block_size=shape.block_size,
        pool_dtype=call.kv.pool.dtype,
    )


@partial(jax.jit, static_argnames=("sizes", "num_sms", "interpret"))
def _attend(
    call: Call, *, sizes: Sizes, num_sms: int, interpret: plgpu.InterpretGPUParams | None
) -> Float[Array, "tokens num_heads head_dim"]:
    _, kv_lens, cu_q_lens = call.batch
    # XLA passes a part of a larger array on by its address, which may lack the alignment of a kernel's operand. So this
    # makes a new array, by an operation that XLA cannot drop. XLA does not know that no entry is below 0.
    batch = call.batch._replace(block_tables=jnp.maximum(call.batch.block_tables, 0))
    call = replace(call, batch=batch)
    window = call.scoring.sliding_window
    # Single queries serve a prefill among decodes too, only less quickly.
    has_prefill = call.may_have_prompts and takes_pool(call)
    if not has_prefill:
        queries = queries_of_tokens(call.num_tokens, kv_lens, cu_q_lens, window)
    else:
        queries = queries_of_rows(kv_lens, cu_q_lens, window)
    assert call.into is not None
    begun = None
    if call.reads_shared_once:
        assert call.shared_lens is not None
        num_workers = num_sms * sizes.decode.workers_per_sm
        shape = decode_shape(call, sizes.decode, num_workers=num_workers, is_interpreted=interpret is not None)
        launch = {"sizes": sizes.prefill, "num_sms": num_sms, "interpret": interpret}
        queries, begun = attend_shared(call, call.shared_lens, queries, shape, **launch)
    out = jax.new_ref(call.into)
    attend_decode(out, queries, call, sizes=sizes.decode, num_sms=num_sms, interpret=interpret, begun=begun)
    if has_prefill:
        attend_prefill(out, call, sizes=sizes.prefill, num_sms=num_sms, interpret=interpret)
    return out[...]
