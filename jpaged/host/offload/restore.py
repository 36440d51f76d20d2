"""Restore: brings KV back from the host, one part by transfer and one by computation, in one iteration (KVPR)."""

from jpaged.contract.profile import MachineProfile
from jpaged.host.blocks.manager import BlockManager
from jpaged.host.offload.profile import prefill_s
from jpaged.host.offload.split import BlockShape, Load, Span, split_restore
from jpaged.host.plan_builder import PlanBuilder
from jpaged.host.sequence import Sequence, SequenceGroup


def can_split(blocks: BlockManager, group: SequenceGroup) -> bool:
    """Whether a restore of a group may recompute some of its tokens.

    Sequences that share tokens, and tokens whose scores are wanted, come back whole. So do 8-bit blocks: their scales
    depend on the order in which their tokens were written. Windows may have freed the blocks that first tokens need.
    """
    is_single = len(group.sequences) == 1 and group.beam is None and not group.is_pin
    can_compute = blocks.groups.is_plain and not blocks.is_quantized
    return is_single and can_compute and not group.needs_prompt_scores


def recompute_first(
    plan: PlanBuilder, blocks: BlockManager, profile: MachineProfile, group: SequenceGroup, seq: Sequence
) -> int:
    """Compute the first tokens of a sequence in the plan that loads its blocks, if that is faster.

    The copies hide behind the forward pass, which now computes the K and V of the first blocks. The planner weighs
    the chunk against the rest of the pass, and against all copies of the plan.

    Args:
        plan: the plan under construction; the chunk is added to it.
        blocks: the bookkeeping of the pools. The first loads of the sequence become blocks that the chunk writes.
        profile: rates of the machine.
        group: the group of the sequence, whose only one it is.
        seq: the sequence; its tokens up to ``seq.num_computed`` are on the device when the plan has run.

    Returns:
        Tokens that the plan computes instead of loading their K and V.
    """
    tiers, block_size, num_tokens = blocks.tiers, blocks.block_size, seq.num_computed
    table = blocks.block_table(seq.seq_id)[: num_tokens // block_size]
    first = next((i for i, block in enumerate(table) if tiers.is_awaited(block)), len(table))
    after = next((i for i in range(first, len(table)) if not tiers.is_loading(table[i])), len(table))
    if first == after:
        return 0
    num_planned = plan.num_tokens
    load = Load(
        is_step_due=num_planned > 0,
        busy_s=prefill_s(profile, num_planned),
        queued_bytes=(tiers.num_loads_queued - (after - first)) * profile.block_bytes,
    )
    shape = BlockShape(block_size, profile.block_bytes)
    split = split_restore(profile, [Span(first * block_size, after * block_size)], shape, load)
    num_blocks = min(split.num_recomputed_tokens // block_size, plan.budget // block_size)
    if num_blocks == 0:
        return 0
    tiers.compute_instead(table[first : first + num_blocks])
    seq.num_computed = first * block_size
    plan.add(group, seq, num_blocks * block_size)
    seq.num_computed = num_tokens
    return num_blocks * block_size


def spans_of(num_tokens: int, longest: int) -> list[Span]:
    """The spans of so many missing tokens, of sequences of at most ``longest`` tokens: their last ones are missing."""
    if longest == 0:
        return []
    num_whole, rest = divmod(num_tokens, longest)
    return [Span(0, longest)] * num_whole + [Span(longest - rest, longest)] * (rest > 0)
