"""Phi-3 and Phi-4: Llama whose checkpoints join projections, with a rope over a part of each head."""

from dataclasses import dataclass
from typing import Any, ClassVar

from jpaged.models.checkpoint.joined import Joined
from jpaged.models.families.llama import LlamaConfig, LlamaForCausalLM
from jpaged.models.families.llama_options import head_dim_of
from jpaged.models.layers.fused import GATE_UP, QKV
from jpaged.models.layers.rope import LongRope, Rope

MODEL_TYPES = {"Phi3ForCausalLM": "phi3"}


@dataclass(frozen=True, kw_only=True)
class Phi3Config(LlamaConfig):
    """A Phi-3 or Phi-4 model.

    With longrope, a key is rotated as ``Rope.cos_sin`` says. A sequence that grows beyond the original context keeps
    its earlier keys, whereas ``generate`` of transformers computes these again with the long factors.
    """

    model_types: ClassVar[dict[str, str]] = MODEL_TYPES

    @property
    def joined(self) -> tuple[Joined, ...]:
        q_size, kv_size = (heads * self.head_dim for heads in (self.num_heads, self.num_kv_heads))
        return (
            Joined(QKV.name, QKV.parts, (q_size, kv_size, kv_size)),
            Joined(GATE_UP.name, GATE_UP.parts, (self.intermediate_size,) * 2),
        )

    @classmethod
    def from_hf(cls, hf: Any, common: dict[str, Any]) -> "Phi3Config":
        rope = Rope.from_hf(hf.rope_parameters, head_dim_of(hf), hf.max_position_embeddings, is_partial=True)
        return cls(
            **cls.shared_from_hf(hf, common, rope),
            sliding_windows=(hf.sliding_window,) * hf.num_hidden_layers,
        )

    def to_hf(self) -> dict[str, Any]:
        values = self.shared_hf()
        if isinstance(scaling := self.rope.scaling, LongRope):
            values["original_max_position_embeddings"] = scaling.original_max_position_embeddings
        return {**values, "sliding_window": self.sliding_window}


class Phi3ForCausalLM(LlamaForCausalLM):
    """A Phi-3 decoder; the arguments and methods are those of ``LlamaForCausalLM``."""
