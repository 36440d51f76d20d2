"""The layer groups of a model, as ``jpaged info`` shows them: blocks of a sequence, and sequences that fit."""

from dataclasses import dataclass, replace
from typing import Any

from jpaged.config import EngineConfig
from jpaged.device.backends import Backend
from jpaged.device.kv.layout import grouping_of, pool_layout
from jpaged.models import ModelConfig
from jpaged.models.groups import ungrouped


@dataclass(frozen=True, slots=True)
class GroupInfo:
    """Layers that share blocks; ``num_blocks`` are those that the longest sequence holds while it decodes."""

    num_layers: int
    window: int | None
    num_blocks: int


@dataclass(frozen=True, slots=True)
class GroupsInfo:
    """The layer groups of a model with windows.

    ``num_sequences`` is how many of the longest sequences the pool holds, while one of them computes its prompt and the
    others decode. A pool of as many bytes holds ``num_sequences_ungrouped`` if no window frees a block.
    """

    groups: list[GroupInfo]
    block_bytes: int
    max_model_len: int
    num_sequences: float
    num_sequences_ungrouped: float

    def __str__(self) -> str:
        tables = [
            f"{group.num_blocks:,} for {group.num_layers} {'layer' if group.num_layers == 1 else 'layers'}"
            + ("" if group.window is None else f" with a window of {group.window:,}")
            for group in self.groups
        ]
        return (
            f"{len(self.groups)}, blocks of {self.block_bytes:,} bytes; {self.max_model_len:,} tokens take "
            f"{sum([group.num_blocks for group in self.groups]):,} blocks ({', '.join(tables)}); "
            f"{self.num_sequences:.1f} such sequences fit, {self.num_sequences_ungrouped:.1f} if no window freed blocks"
        )


def describe_groups(
    model: ModelConfig, config: EngineConfig, dtype: Any, backend: Backend, num_blocks: int
) -> GroupsInfo | None:
    """The layer groups of a model, if it has windows that free blocks.

    Args:
        model: shape of the model.
        config: the engine's settings.
        dtype: type of the activations.
        backend: lays out the heads.
        num_blocks: blocks of the pool, block 0 included.
    """
    groups, block_size = grouping_of(model, config).groups, config.block_size
    if groups.is_plain:
        return None
    layout, max_model_len = pool_layout(model, config, dtype, backend), config.max_model_len or model.max_model_len
    single = ungrouped(tuple(model.layer_specs)).groups
    single_bytes = replace(layout, num_layers=single.layers_per_block).block_bytes
    most = groups.num_blocks(max_model_len, block_size)
    for_prompt = groups.num_blocks(max_model_len, block_size, config.token_budget) - most
    pool_bytes = max(num_blocks, 1) * layout.block_bytes
    num_ungrouped = (pool_bytes // single_bytes - 1) / single.num_blocks(max_model_len, block_size)
    return GroupsInfo(
        groups=[
            GroupInfo(group.num_layers, group.window, group.num_blocks(max_model_len, block_size, 1))
            for group in groups.groups
        ],
        block_bytes=layout.block_bytes,
        max_model_len=max_model_len,
        num_sequences=round(max((num_blocks - 1 - for_prompt) / most, 0.0), 3),
        num_sequences_ungrouped=round(max(num_ungrouped, 0.0), 3),
    )
