"""Readers of the block manager for its tests: all of its state, and the blocks of a match."""

from dataclasses import fields, is_dataclass

from jpaged.host.blocks.prefix_cache import Prefix, PrefixMatch


def snapshot(value):
    """Return all state of the manager, in order and detached. Prefixes never change: they compare by identity."""
    if isinstance(value, dict):
        return [(key, snapshot(item)) for key, item in value.items()]
    if isinstance(value, list):
        return [item if type(item) is int else snapshot(item) for item in value]
    if isinstance(value, set):
        return set(value)
    if isinstance(value, Prefix) or not type(value).__module__.startswith("jpaged"):
        return value
    names = [field.name for field in fields(value)] if is_dataclass(value) else vars(value)
    return type(value), [(name, snapshot(getattr(value, name))) for name in names]


def blocks_of(match: PrefixMatch) -> list[int]:
    return [hit.block for hit in match.hits]
