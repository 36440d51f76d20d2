"""The groups of a model's layers: layers of one group lie in the same blocks, and share a block table."""

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from jpaged.contract.layer_groups import LayerGroup, LayerGroups
from jpaged.models.spec import LayerSpec

COST_OF_GROUP = 0.02
"""Share of the memory that each group must save at least: it adds a cell for each block to tables and plans."""


class Grouping(NamedTuple):
    """The layers of a model, divided into groups.

    Args:
        layers: the layers in the order of the model; ``layer`` is the index of a layer in the blocks of its group.
        groups: the groups.
    """

    layers: tuple[LayerSpec, ...]
    groups: LayerGroups


def ungrouped(specs: tuple[LayerSpec, ...]) -> Grouping:
    """All layers in one group, which keeps all blocks of a sequence."""
    return Grouping(specs, LayerGroups.single(len(specs)))


@lru_cache(maxsize=64)
def grouped(specs: tuple[LayerSpec, ...], max_model_len: int) -> Grouping:
    """Divide layers into groups of one window each, with as many layers as a block has slots, or fewer.

    Many slots stay unused in the groups that have fewer layers, and few slots make many groups. The number chosen is
    that with which the longest sequence takes the least memory, where each group counts as 2% of the memory.

    Args:
        specs: the layers of a model, in order.
        max_model_len: tokens of the longest sequence. A window as long hides no token.
    """
    by_window: dict[int | None, list[int]] = {}
    for index, spec in enumerate(specs):
        window = spec.sliding_window
        by_window.setdefault(None if window is None or window >= max_model_len else window, []).append(index)
    shares = [((window or max_model_len) / max_model_len, len(layers)) for window, layers in by_window.items()]

    def cost(num_slots: int) -> float:
        numbers = [-(-num_layers // num_slots) for _, num_layers in shares]
        memory = num_slots * sum([share * number for (share, _), number in zip(shares, numbers, strict=True)])
        return memory * (1 + COST_OF_GROUP * sum(numbers))

    most_slots = max(map(len, by_window.values()))
    num_slots = min(range(most_slots, 0, -1), key=cost)
    if cost(num_slots) >= len(specs) * (1 + COST_OF_GROUP):
        return ungrouped(specs)
    layers, groups = list(specs), []
    for window in sorted(by_window, key=lambda window: window or 0):  # layers that see all tokens come first
        indices = by_window[window]
        for start in range(0, len(indices), num_slots):
            members = indices[start : start + num_slots]
            for layer, index in enumerate(members):
                layers[index] = replace(specs[index], layer=layer, group=len(groups))
            groups.append(LayerGroup(len(members), window))
    return Grouping(tuple(layers), LayerGroups(tuple(groups)))
