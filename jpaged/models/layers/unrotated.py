"""Attention without a rotary embedding: the embeddings of tokens have the positions."""

from flax import nnx
from jaxtyping import Array, Float, Int32

from jpaged.models.layers.common import split_heads
from jpaged.models.layers.fused import QKV
from jpaged.models.spec import Attend, LayerSpec, Source, attend_from


class UnrotatedAttention(nnx.Module):
    """Multi-head attention up to its output projection. A family adds ``q_proj``, ``k_proj`` and ``v_proj``.

    Args:
        spec: the layer.
    """

    fusible = QKV

    def __init__(self, spec: LayerSpec) -> None:
        self.spec = spec

    def attended(self, x: Float[Array, "tokens hidden_size"], attend: Attend) -> Float[Array, "tokens hidden_size"]:
        """Return the outputs of all heads, which the output projection takes."""
        q, k, v = (split_heads(projected, self.spec.head_dim) for projected in QKV.project(self, x))
        return attend_from(self._source(x), attend, self.spec, q, k, v).reshape(x.shape)

    def _source(self, x: Float[Array, "tokens hidden_size"]) -> Source:
        project = QKV.select(self, ("k_proj", "v_proj"))

        def project_kv(
            inputs: Float[Array, "others hidden_size"], positions: Int32[Array, " others"]
        ) -> tuple[Array, Array]:
            del positions  # the embeddings have them
            k, v = (split_heads(projected, self.spec.head_dim) for projected in project(inputs))
            return k, v

        return Source(x, project_kv)
