"""The numbers that all families with mixtures of experts share."""

from dataclasses import dataclass

from jpaged.models.families.llama import LlamaConfig
from jpaged.models.layers.moe import check_experts


@dataclass(frozen=True, kw_only=True)
class MixtureConfig(LlamaConfig):
    """A decoder of Llama's parts with experts in some or all layers.

    Args:
        num_experts: experts of a layer.
        top_k: experts of a token.
    """

    num_experts: int
    top_k: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_experts(self.num_experts, self.top_k)

    @property
    def experts(self) -> tuple[int, int]:
        return self.num_experts, self.top_k
