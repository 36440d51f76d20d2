"""Times that a machine's profile predicts, and running averages that keep the profile current."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from jpaged.contract.profile import Direction, Link, MachineProfile, Observations

WEIGHT = 0.2
"""Weight of an observation in the running average."""

MAX_GROWTH = 4.0
"""Most by which an observation counts as slower than predicted: a process may have been stopped for a while."""

_MIN_S = 1e-9  # an observation scales a cost, so a cost of zero would never change

# Predictions ------------------------------------------------------------------------------------------------------


def transfer_s(link: Link, num_bytes: float, *, is_shared: bool = False) -> float:
    """Predict the seconds of one transfer: ``fixed_s + n / bytes_per_s``, and nothing for no byte.

    Args:
        link: the direction.
        num_bytes: bytes to transfer.
        is_shared: whether the other direction is busy too.
    """
    return link.fixed_s + num_bytes / bytes_per_s(link, is_shared=is_shared) if num_bytes else 0.0


def bytes_per_s(link: Link, *, is_shared: bool) -> float:
    """Choose the rate of one direction, with or without transfers in the other one."""
    return link.shared_bytes_per_s if is_shared else link.bytes_per_s


def prefill_s(profile: MachineProfile, num_tokens: int, *, context_len: int = 0) -> float:
    """Predict the seconds of a step that computes a chunk of a prompt.

    A token attends to all tokens before it, which are ``context_len + num_tokens / 2`` on average.

    Args:
        profile: rates of the machine.
        num_tokens: tokens of the chunk.
        context_len: tokens before the chunk.
    """
    return sum(_prefill_parts(profile, num_tokens, context_len)) if num_tokens else 0.0


def layer_s(profile: MachineProfile, num_tokens: int) -> float:
    """Predict the seconds of one layer of a decode with all KV on the device.

    Args:
        profile: rates of the machine.
        num_tokens: tokens attended to, over all sequences.
    """
    return profile.layer_fixed_s + num_tokens * profile.layer_token_s


def projection_s(profile: MachineProfile, num_tokens: float, flops_per_token: float) -> float:
    """Predict the seconds to project tokens to K and V.

    Seconds are linear between measured points, and proportional to tokens beyond the last one. Fewer tokens than the
    first point has take as long as that point: the device reads the same weights.

    Args:
        profile: rates of the machine.
        num_tokens: tokens to project at once, in one layer.
        flops_per_token: FLOPs of one token.
    """
    if num_tokens == 0:
        return 0.0
    points = [(tokens, tokens * flops_per_token / rate) for tokens, rate in profile.projection_flops_per_s]
    if num_tokens <= points[0][0]:
        return points[0][1]
    for (few, few_s), (many, many_s) in pairwise(points):
        if num_tokens <= many:
            return few_s + (many_s - few_s) * (num_tokens - few) / (many - few)
    return num_tokens * points[-1][1] / points[-1][0]


# Observations -----------------------------------------------------------------------------------------------------


def learn(profile: MachineProfile, observations: Observations) -> MachineProfile:
    """Learn from all transfers and steps observed."""
    for direction, num_bytes, seconds, is_end_seen in observations.transfers:
        profile = learn_transfer(profile, direction, num_bytes, seconds, is_end_seen=is_end_seen)
    for num_tokens, seconds, context_len in observations.prefills:
        profile = learn_prefill(profile, num_tokens, seconds, context_len=context_len)
    return profile


def learn_transfer(
    profile: MachineProfile,
    direction: Direction,
    num_bytes: int,
    seconds: float,
    *,
    is_shared: bool = False,
    is_end_seen: bool = True,
) -> MachineProfile:
    """Learn from a transfer.

    Args:
        profile: rates so far.
        direction: direction of the transfer.
        num_bytes: bytes that it moved.
        seconds: time from its start to its end.
        is_shared: whether the other direction was busy too.
        is_end_seen: whether its end was observed; otherwise ``seconds`` is an upper bound, and never slows a rate.

    Returns:
        The profile with new rates of this direction.
    """
    link: Link = getattr(profile, direction)
    rate = bytes_per_s(link, is_shared=is_shared)
    if is_end_seen:
        fixed, byte = _growths([link.fixed_s, num_bytes / rate], seconds)
    else:
        fixed = byte = min(_growth(seconds, transfer_s(link, num_bytes, is_shared=is_shared)), 1.0)
    field = "shared_bytes_per_s" if is_shared else "bytes_per_s"
    link = replace(link, fixed_s=link.fixed_s * fixed, **{field: rate / byte})
    return replace(profile, **{direction: link})


def learn_prefill(profile: MachineProfile, num_tokens: int, seconds: float, *, context_len: int = 0) -> MachineProfile:
    """Learn from a step that computed a chunk of a prompt.

    Args:
        profile: rates so far.
        num_tokens: tokens of the chunk.
        seconds: time of the step.
        context_len: tokens before the chunk.
    """
    fixed, token, context = _growths(_prefill_parts(profile, num_tokens, context_len), seconds)
    return replace(
        profile,
        prefill_fixed_s=profile.prefill_fixed_s * fixed,
        prefill_token_s=profile.prefill_token_s * token,
        prefill_context_s=profile.prefill_context_s * context,
    )


def report(profile: MachineProfile) -> dict[str, float]:
    """Name every rate with its unit, for statistics."""
    links = {"to_host": profile.to_host, "from_host": profile.from_host}
    rates = {
        f"{direction}_{name}": getattr(link, name)
        for direction, link in links.items()
        for name in ("fixed_s", "bytes_per_s", "shared_bytes_per_s")
    }
    rates |= {f"projection_{tokens}_flops_per_s": rate for tokens, rate in profile.projection_flops_per_s}
    names = ("prefill_fixed_s", "prefill_token_s", "prefill_context_s", "layer_fixed_s", "layer_token_s")
    return rates | {name: getattr(profile, name) for name in names}


def _prefill_parts(profile: MachineProfile, num_tokens: int, context_len: int) -> list[float]:
    """Seconds of a chunk by cause: the step, its tokens, their context."""
    return [
        profile.prefill_fixed_s,
        profile.prefill_token_s * num_tokens,
        profile.prefill_context_s * num_tokens * (context_len + num_tokens / 2),
    ]


def _growths(parts: Sequence[float], seconds: float) -> list[float]:
    """Factors by which an observation changes the costs that add up to a prediction.

    The sum moves by ``WEIGHT`` of its error. A cost moves by its share of the sum: a short transfer says little about
    bytes a second. Shares p_i give the factors ``1 + WEIGHT * (growth - 1) * p_i / sum(p^2)``.
    """
    predicted = sum(parts)
    shares = [part / max(predicted, _MIN_S) for part in parts]
    error = min(_growth(seconds, predicted), MAX_GROWTH) - 1
    scale = WEIGHT * error / max(sum(share * share for share in shares), _MIN_S)
    return [1 + scale * share for share in shares]


def _growth(seconds: float, predicted: float) -> float:
    return max(seconds, _MIN_S) / max(predicted, _MIN_S)
