"""The profile of a machine: rates of its link and its device, which the device half measures and the planner reads."""

import json
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

Direction = Literal["to_host", "from_host"]
"""A direction of the link; the name of its field in ``MachineProfile``."""


@dataclass(frozen=True, slots=True)
class Link:
    """One direction of the link: n bytes take ``fixed_s + n / bytes_per_s`` seconds.

    Args:
        fixed_s: fixed seconds of one transfer.
        bytes_per_s: bytes a second of a long transfer.
        shared_bytes_per_s: the same while the other direction is busy too.
    """

    fixed_s: float
    bytes_per_s: float
    shared_bytes_per_s: float


@dataclass(frozen=True, slots=True)
class MachineProfile:
    """Measured rates of one machine and one model.

    Args:
        block_bytes: bytes of one block, on this host.
        to_host: the link from device to host.
        from_host: the link from host to device.
        projection_flops_per_s: FLOP/s of the K and V projections by tokens projected at once, fewest tokens first.
        prefill_fixed_s: fixed seconds of a step that computes a chunk of a prompt.
        prefill_token_s: seconds that each token of a chunk adds, without context.
        prefill_context_s: seconds that each token adds for each token before it.
        layer_fixed_s: seconds of one layer of a decode, with no token to attend to.
        layer_token_s: seconds that each attended token of each sequence adds to one layer of a decode.
    """

    block_bytes: int
    to_host: Link
    from_host: Link
    projection_flops_per_s: tuple[tuple[int, float], ...]
    prefill_fixed_s: float
    prefill_token_s: float
    prefill_context_s: float
    layer_fixed_s: float
    layer_token_s: float


class Transferred(NamedTuple):
    """A transfer that is over.

    Args:
        direction: its direction.
        num_bytes: bytes that it moved.
        seconds: time from its start.
        is_end_seen: whether its end was observed, and nothing delayed it; otherwise ``seconds`` is an upper bound.
    """

    direction: Direction
    num_bytes: int
    seconds: float
    is_end_seen: bool


class Prefilled(NamedTuple):
    """A step that computed chunks of prompts, and ran alone.

    Args:
        num_tokens: tokens of the chunks.
        seconds: time of the step.
        context_len: tokens before a chunk, on average.
    """

    num_tokens: int
    seconds: float
    context_len: int


class Observations(NamedTuple):
    """Times observed since the last call."""

    transfers: list[Transferred]
    prefills: list[Prefilled]


def fit_link(few: tuple[int, float], many: tuple[int, float], *, shared_bytes_per_s: float) -> Link:
    """Fit the time of transfers to a short and a long one.

    Args:
        few: bytes and seconds of the short transfer.
        many: bytes and seconds of the long transfer.
        shared_bytes_per_s: bytes a second while the other direction is busy too.
    """
    (few_bytes, few_s), (many_bytes, many_s) = few, many
    byte_s = max((many_s - few_s) / (many_bytes - few_bytes), 1e-15)
    return Link(max(few_s - few_bytes * byte_s, 0.0), 1 / byte_s, shared_bytes_per_s)


def fit_prefill(short: tuple[int, float], long: tuple[int, float], *, fixed_s: float) -> tuple[float, float]:
    """Fit ``fixed_s + n * token_s + n^2 / 2 * context_s`` to the times of two prompts.

    Args:
        short: tokens and seconds of the short prompt.
        long: tokens and seconds of the long prompt.
        fixed_s: fixed seconds of a step.

    Returns:
        ``prefill_token_s`` and ``prefill_context_s`` of a profile. Neither is negative.
    """
    (short_len, short_s), (long_len, long_s) = short, long
    short_token_s, long_token_s = (short_s - fixed_s) / short_len, (long_s - fixed_s) / long_len
    context_s = 0.0
    if long_len > short_len:
        context_s = max(2 * (long_token_s - short_token_s) / (long_len - short_len), 0.0)
    return max(short_token_s - short_len / 2 * context_s, 0.0), context_s


def to_json(profile: MachineProfile) -> str:
    """Write a profile as JSON."""
    return json.dumps(asdict(profile))


def from_json(text: str) -> MachineProfile:
    """Read a profile that ``to_json`` wrote.

    Raises:
        ValueError: text that is no such profile.
    """
    try:
        values = json.loads(text)
        values["to_host"] = Link(**values["to_host"])
        values["from_host"] = Link(**values["from_host"])
        rates = values["projection_flops_per_s"]
        values["projection_flops_per_s"] = tuple((int(tokens), float(rate)) for tokens, rate in rates)
        return MachineProfile(**values)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"expected the profile of a machine as to_json writes it, got {text[:80]!r} ({error!r}): delete it, and "
            "the machine is measured again"
        ) from error
