"""The backend of plain XLA, which runs everywhere."""

from typing import ClassVar

from jaxtyping import Array, Float

from jpaged.device.backends import Backend, HeadArrays, Rows
from jpaged.device.kv.pool import KVCache
from jpaged.models.spec import LayerSpec


class XlaBackend(Backend):
    """Gathers, scatters and matrix products, which the compiler itself splits over devices."""

    name: ClassVar[str] = "xla"

    def attend(
        self,
        cache: KVCache,
        spec: LayerSpec,
        q: Float[Array, "tokens num_heads head_dim"],
        k: Float[Array, "tokens num_kv_heads head_dim"],
        v: Float[Array, "tokens num_kv_heads head_dim"],
        rows: Rows,
        head_arrays: HeadArrays,
        into: Float[Array, "tokens num_heads head_dim"] | None,
    ) -> tuple[Float[Array, "tokens num_heads head_dim"], KVCache]:
        cache = cache.write(spec.layer, k, v, rows.slots)
        out = cache.attend(
            spec.layer,
            q,
            rows.block_tables,
            rows.kv_lens,
            rows.cu_q_lens,
            sm_scale=spec.sm_scale,
            sliding_window=spec.sliding_window,
            soft_cap=spec.soft_cap,
            sinks=head_arrays.sinks,
            alibi_slopes=head_arrays.alibi_slopes,
            into=into,
            implementation=self.name,
        )
        return out, cache
