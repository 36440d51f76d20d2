"""The planner: which tokens of KV on the host to recompute while the others are transferred (KVPR, arXiv 2411.17089).

Symbols, as in the formulas below: l of s tokens are recomputed. A token has k bytes of K and V, a bytes of
activations and c FLOPs of projection, all in one layer. B is the link's bytes a second, F the projection's FLOP/s, and
G the seconds of a layer without transfers.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from jaxtyping import Float64, Int64

from jpaged.contract.profile import MachineProfile
from jpaged.host.offload.profile import bytes_per_s, projection_s, transfer_s

Schedule = Literal["pipelined", "paper"]
"""The start of a layer's recomputation: after its first activations have arrived, or after all of them have."""

MIN_DEVICE_FREE = 0.01
"""Least share of the device that a restore gets: a chunk takes time from other work before it waits for ever."""

# Restore ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive tokens of one sequence whose KV is on the host and not on the device.

    Args:
        start: position of the first token: its KV depends on all tokens before.
        stop: position after the last token.
    """

    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class BlockShape:
    """Tokens and bytes of one block, over all layers. Blocks of 8-bit KV have fewer bytes."""

    block_size: int
    block_bytes: int


@dataclass(frozen=True, slots=True)
class Load:
    """Other work on the device and on the link.

    Args:
        device_free: share of the device's time that other work leaves, from 0 to 1.
        is_step_due: whether steps run anyway: a chunk that joins one has no fixed cost.
        queued_bytes: bytes ahead on the link.
        is_link_shared: whether the other direction of the link is busy too.
        busy_s: seconds of other work in the step that computes the tokens, and that the transfer hides behind.
    """

    device_free: float = 1.0
    is_step_due: bool = False
    queued_bytes: int = 0
    is_link_shared: bool = False
    busy_s: float = 0.0


IDLE = Load()


@dataclass(frozen=True, slots=True)
class RestoreSplit:
    """The division of one restore.

    Args:
        num_recomputed_tokens: tokens to recompute: the first ones of the spans, in order, in whole blocks.
        num_transferred_blocks: blocks to transfer: the last ones of the spans.
        seconds: predicted time until all KV is on the device.
    """

    num_recomputed_tokens: int
    num_transferred_blocks: int
    seconds: float


def split_restore(
    profile: MachineProfile,
    spans: Sequence[Span],
    shape: BlockShape,
    load: Load = IDLE,
    chunk_sizes: Sequence[int] = (),
) -> RestoreSplit:
    """Choose the tokens that a restore recomputes from their ids while the KV of the others arrives.

    Attention is causal, so the first l tokens need nothing of the others. A swap is l = 0, a recomputation l = s. Let a
    token take alpha seconds of prefill or gamma seconds of transfer, at no other cost. Both then end at once for
    ``l / s = 1 / (1 + alpha / gamma)``.

    Args:
        profile: rates of the machine.
        spans: missing tokens, in the order of their recomputation. Blocks on the device are in no span and cost
            nothing. Sequences that share missing blocks name the shared tokens once.
        shape: the blocks.
        load: other work on the device and on the link.
        chunk_sizes: tokens of the compiled steps; chunks of any size by default.

    Returns:
        The fastest division; of equal ones, that which recomputes less.
    """
    seconds = restore_s(profile, spans, shape, load, chunk_sizes)
    best = int(np.argmin(seconds))
    block_lens, _ = _cut(spans, shape.block_size)
    return RestoreSplit(int(block_lens[:best].sum()), len(block_lens) - best, float(seconds[best]))


def is_swap_cheaper(
    profile: MachineProfile,
    spans: Sequence[Span],
    shape: BlockShape,
    load: Load = IDLE,
    chunk_sizes: Sequence[int] = (),
    *,
    num_blocks_out: int,
    can_split: bool = True,
) -> bool:
    """Whether blocks on the host save more time at the restore than it takes to move them there.

    Args:
        profile: rates of the machine.
        spans: the tokens that would leave the device.
        shape: the blocks.
        load: other work on the device and on the link.
        chunk_sizes: as in ``split_restore``.
        num_blocks_out: blocks of the spans that the host does not hold yet.
        can_split: whether a restore may recompute some of the tokens; otherwise it transfers all.
    """
    seconds = restore_s(profile, spans, shape, load, chunk_sizes)
    out_s = transfer_s(profile.to_host, num_blocks_out * shape.block_bytes, is_shared=load.is_link_shared)
    restore = seconds.min() if can_split else seconds[0]
    return out_s + float(restore) < float(seconds[-1])


def restore_s(
    profile: MachineProfile,
    spans: Sequence[Span],
    shape: BlockShape,
    load: Load = IDLE,
    chunk_sizes: Sequence[int] = (),
) -> Float64[np.ndarray, " splits"]:
    """Predict the seconds of every division of a restore: the longer of computation and transfer.

    Args: as in ``split_restore``.

    Returns:
        Seconds by recomputed blocks: a swap is the first element, a recomputation the last.
    """
    block_lens, contexts = _cut(spans, shape.block_size)
    num_recomputed = np.concatenate([[0], np.cumsum(block_lens)])
    attended = np.concatenate([[0.0], np.cumsum(block_lens * (contexts + block_lens / 2))])
    num_chunks, num_computed = _chunks(num_recomputed, chunk_sizes)
    fixed_s = 0.0 if load.is_step_due else profile.prefill_fixed_s
    compute_s = num_chunks * fixed_s + num_computed * profile.prefill_token_s + attended * profile.prefill_context_s
    num_blocks = np.arange(len(block_lens), -1, -1)
    rate = bytes_per_s(profile.from_host, is_shared=load.is_link_shared)
    link_s = profile.from_host.fixed_s + (load.queued_bytes + num_blocks * shape.block_bytes) / rate
    compute_s = load.busy_s + compute_s / max(load.device_free, MIN_DEVICE_FREE)
    return np.maximum(compute_s, np.where(num_blocks, link_s, 0.0))


def _cut(spans: Sequence[Span], block_size: int) -> tuple[Int64[np.ndarray, " blocks"], Int64[np.ndarray, " blocks"]]:
    """Cut spans into blocks: tokens in each block, and tokens before it in its sequence."""
    lens, contexts = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for span in spans:
        edges = np.arange(span.start // block_size * block_size, span.stop + block_size, block_size).clip(
            span.start, span.stop
        )
        lens.append(np.diff(edges))
        contexts.append(edges[:-1])
    all_lens, all_contexts = np.concatenate(lens), np.concatenate(contexts)
    return all_lens[all_lens > 0], all_contexts[all_lens > 0]


def _chunks(
    num_tokens: Int64[np.ndarray, " splits"], sizes: Sequence[int]
) -> tuple[Int64[np.ndarray, " splits"], Int64[np.ndarray, " splits"]]:
    """Count the steps that compute so many tokens, and their tokens with padding."""
    if not sizes:
        return np.minimum(num_tokens, 1), num_tokens
    padded = np.array([0, *sorted(sizes)])
    num_full, rest = np.divmod(num_tokens, padded[-1])
    return num_full + (rest > 0), num_full * padded[-1] + padded[np.searchsorted(padded, rest)]


# Decode -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LayerStream:
    """The transfers and the work of one layer of a decode over KV on the host.

    Args:
        kv_bytes: bytes of K and V of one token (k).
        activation_bytes: bytes of one token's activations, from which K and V are projected (a).
        recompute_flops: FLOPs that project one token's activations to K and V (c).
        layer_s: seconds of the layer without transfers, over all rows (G).
        weight_bytes: bytes of weights that arrive too, where they are on the host. Column by column, the rows of all
            batches share them.
        is_link_shared: whether the other direction of the link is busy too.
    """

    kv_bytes: float
    activation_bytes: float
    recompute_flops: float
    layer_s: float
    weight_bytes: float = 0.0
    is_link_shared: bool = False


@dataclass(frozen=True, slots=True)
class DecodeSplit:
    """The division of every layer of a decode.

    Args:
        num_recomputed_blocks: blocks to recompute by row: its first ones on the host.
        seconds: predicted time of one layer.
    """

    num_recomputed_blocks: tuple[int, ...]
    seconds: float


def layer_stream(
    *,
    hidden_size: int,
    num_kv_heads: int,
    head_dim: int,
    layer_s: float,
    kv_itemsize: float = 2.0,
    activation_itemsize: float = 2.0,
) -> LayerStream:
    """Describe a layer whose weights are on the device: ``k = 2 n h i``, ``a = d i``, ``c = 4 d n h``.

    Activations save link time only if ``a < k``. With equal item sizes that is ``hidden_size < 2 n h``: multi-head
    attention, and few models with grouped queries.

    Args:
        hidden_size: width of the activations (d).
        num_kv_heads: KV heads (n).
        head_dim: elements of one head (h).
        layer_s: seconds of the layer without transfers.
        kv_itemsize: bytes of one element of K and V (i), its share of the scales included.
        activation_itemsize: bytes of one element of the activations, its share of the scales included.
    """
    kv_size = 2 * num_kv_heads * head_dim
    return LayerStream(kv_size * kv_itemsize, hidden_size * activation_itemsize, 2 * hidden_size * kv_size, layer_s)


def split_decode(
    profile: MachineProfile,
    stream: LayerStream,
    num_blocks: Sequence[int],
    *,
    block_size: int,
    schedule: Schedule = "pipelined",
    num_activation_blocks: Sequence[int] | None = None,
    sizes: Sequence[int] = (),
) -> DecodeSplit:
    """Choose the blocks that each layer of a decode recomputes from activations while the KV of the others arrives.

    Only the sum over rows decides the time. The rows share it as evenly as their lengths allow, since a rectangle of
    rows and tokens then has the least padding.

    Args:
        profile: rates of the machine.
        stream: one layer.
        num_blocks: full blocks on the host by row. Blocks that rows share count once, and blocks on the device not.
        block_size: tokens of a block.
        schedule: when a layer recomputes.
        num_activation_blocks: blocks by row, its first ones, whose activations are on the host too; all by default.
        sizes: recomputed tokens, over all rows, of the compiled steps; any number of blocks by default.

    Returns:
        The fastest division; of equal ones, that which recomputes less.
    """
    limits = num_blocks if num_activation_blocks is None else num_activation_blocks
    limits = [min(pair) for pair in zip(num_blocks, limits, strict=True)]
    most, num_tokens = sum(limits), sum(num_blocks) * block_size
    if sizes:
        totals = {0} | {size // block_size for size in sizes if size <= most * block_size}
    else:
        found = _candidates(profile, stream, num_tokens)
        totals = {min(near(tokens / block_size), most) for tokens in found for near in (math.floor, math.ceil)}
    layer_times = {
        total: decode_layer_s(profile, stream, num_tokens, total * block_size, schedule) for total in sorted(totals)
    }
    best = min(layer_times, key=layer_times.__getitem__)
    return DecodeSplit(tuple(fill_evenly(best, limits)), layer_times[best])


def decode_layer_s(
    profile: MachineProfile, stream: LayerStream, num_tokens: int, num_recomputed: int, schedule: Schedule
) -> float:
    """Predict the seconds of one layer in steady state.

    A is the transfer of the activations, K that of the K and V of the others, R the projection. The link goes on to the
    next layer while this one attends.

    - pipelined: ``max(A + K, R + G)``. A chunk is recomputed once it has arrived.
    - paper: ``max(A + K, max(A, G) + R)``. R waits for all activations, and the next layer's activations for K and R.

    Args:
        profile: rates of the machine.
        stream: the layer.
        num_tokens: tokens on the host, over all rows (s).
        num_recomputed: tokens to recompute of them (l).
        schedule: when the layer recomputes.
    """
    rate = bytes_per_s(profile.from_host, is_shared=stream.is_link_shared)
    saved_bytes = num_recomputed * (stream.kv_bytes - stream.activation_bytes)
    link_s = (stream.weight_bytes + num_tokens * stream.kv_bytes - saved_bytes) / rate
    activation_s = num_recomputed * stream.activation_bytes / rate
    recompute_s = projection_s(profile, num_recomputed, stream.recompute_flops)
    before_s = stream.layer_s if schedule == "pipelined" else max(activation_s, stream.layer_s)
    return max(link_s, before_s + recompute_s)


def paper_tokens(num_tokens: float, kv_token_s: float, recompute_token_s: float, *, lead_s: float = 0.0) -> float:
    """Balance the recomputation of l tokens with the arrival of the K and V of the others.

    ``l = (s k/B + lead) / (k/B + c/F)``: the optimum of the paper's linear program where a < k.

    Args:
        num_tokens: tokens on the host, over all rows (s).
        kv_token_s: seconds to transfer K and V of one token (k/B).
        recompute_token_s: seconds to recompute K and V of one token (c/F).
        lead_s: seconds of other transfers, less the fixed seconds of the recomputation.
    """
    return (num_tokens * kv_token_s + lead_s) / (kv_token_s + recompute_token_s)


def pipelined_tokens(
    num_tokens: float, kv_token_s: float, activation_token_s: float, recompute_token_s: float, *, lead_s: float = 0.0
) -> float:
    """Balance all transfers of a layer with all of its computation.

    ``l = (s k/B + lead) / (c/F + (k - a)/B)``; 0 where a >= k, since activations then only add bytes.

    Args:
        num_tokens: tokens on the host, over all rows (s).
        kv_token_s: seconds to transfer K and V of one token (k/B).
        activation_token_s: seconds to transfer the activations of one token (a/B).
        recompute_token_s: seconds to recompute K and V of one token (c/F).
        lead_s: seconds of other transfers, less G and the fixed seconds of the recomputation.
    """
    if activation_token_s >= kv_token_s:
        return 0.0
    return (num_tokens * kv_token_s + lead_s) / (recompute_token_s + kv_token_s - activation_token_s)


def fill_evenly(total: int, limits: Sequence[int]) -> list[int]:
    """Share a total among rows: all rows get the same, or their limit where it is lower.

    Rows that get the same differ by at most 1, where the total does not divide.
    """
    shares = [0] * len(limits)
    by_limit = sorted(range(len(limits)), key=limits.__getitem__)
    for num_left, row in zip(range(len(limits), 0, -1), by_limit, strict=True):
        shares[row] = min(limits[row], total // num_left)
        total -= shares[row]
    return shares


def _candidates(profile: MachineProfile, stream: LayerStream, num_tokens: int) -> Iterator[float]:
    """Tokens to recompute among which the optimum is, before rounding to blocks.

    The time of a layer is the largest of linear functions, piece by piece of the projection's measured rates. A piece
    has its minimum where the functions cross, or at an end.
    """
    rate = bytes_per_s(profile.from_host, is_shared=stream.is_link_shared)
    kv_s, activation_s, weight_s = (
        size / rate for size in (stream.kv_bytes, stream.activation_bytes, stream.weight_bytes)
    )
    if activation_s:
        yield min(stream.layer_s / activation_s, num_tokens)  # the paper's schedule bends where A = G
    ends = [0, *(tokens for tokens, _ in profile.projection_flops_per_s if tokens < num_tokens), num_tokens]
    for few, many in pairwise(ends):
        yield from (few, many)
        many_s = projection_s(profile, many, stream.recompute_flops)
        few_s = projection_s(profile, few, stream.recompute_flops) if few else many_s
        token_s = (many_s - few_s) / max(many - few, 1)
        lead_s = weight_s - (few_s - few * token_s)
        crossings = (
            paper_tokens(num_tokens, kv_s, token_s, lead_s=lead_s),
            pipelined_tokens(num_tokens, kv_s, activation_s, token_s, lead_s=lead_s - stream.layer_s),
        )
        yield from (min(max(tokens, few), many) for tokens in crossings)
