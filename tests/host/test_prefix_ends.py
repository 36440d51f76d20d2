"""Prefix ends: which prompts are hit again in pools that hold no more than their hits need."""

import random

import pytest

from jpaged.contract.layer_groups import LayerGroup, LayerGroups
from jpaged.host.blocks.manager import BlockManager
from tests.support.fake_device import VOCAB_SIZE, FakeDevice
from tests.support.stories import add, finish_all, make_device

WINDOW, BLOCK_SIZE = 8, 4
GROUPS = LayerGroups((LayerGroup(1), LayerGroup(1, WINDOW), LayerGroup(1, WINDOW)))


def text(name: str, num_tokens: int) -> list[int]:
    return random.Random(name).choices(range(VOCAB_SIZE), k=num_tokens)


def make_windowed(num_blocks: int, **options) -> FakeDevice:
    return make_device(num_blocks, block_size=BLOCK_SIZE, groups=GROUPS, max_burst=4, **options)


class Chats:
    """Requests to a device, one round after the other."""

    def __init__(self, device: FakeDevice) -> None:
        self.device = device
        self.num_requests = 0

    def ask(self, prompts: list[list[int]], max_tokens: int = 2) -> list[list[int]]:
        """Serve some prompts. Returns the tokens of each sequence; ``num_hits`` are those that were cached."""
        names = [f"{self.num_requests + index}" for index in range(len(prompts))]
        self.num_requests += len(prompts)
        groups = [
            add(self.device, name, prompt, max_tokens=max_tokens, ignore_eos=True)
            for name, prompt in zip(names, prompts, strict=True)
        ]
        finish_all(self.device, *groups)
        self.num_hits = [group.num_cached_tokens for group in groups]
        return [group.sequences[0].token_ids for group in groups]


def needed_in_order(manager: BlockManager) -> list[int]:
    """The free blocks that prefix ends need, in the order of reuse."""
    device = manager.tiers.device
    return [block for block in device.free if block in device.cache and block not in device.cache.unneeded]


def overwrite_unneeded(manager: BlockManager) -> None:
    """Overwrite all free blocks that no prefix end needs, and none of the others."""
    device, needed = manager.tiers.device, needed_in_order(manager)
    device.release([device.take()[0] for _ in range(len(device.free) - len(needed))])
    assert needed_in_order(manager) == needed
    assert not device.cache.unneeded
    manager.check_invariants()


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("budget", [16, 64])
def test_prompts_are_hit_again_in_a_pool_that_holds_what_the_hits_need(rows, budget):
    prompts = [text(f"{index}", 64) for index in range(8)]
    chats = Chats(make_windowed(8 * (16 + 2 * 4) + 60, rows=rows, budget=budget))
    for expected in (0, 60, 60):  # of 64 tokens, one at least is computed, and hits end with a block
        chats.ask(prompts)
        assert chats.num_hits == [expected] * 8


def test_the_second_request_hits_the_beginning_that_it_shares_if_no_block_was_reused():
    chats = Chats(make_windowed(200))
    for expected in (0, 32, 32):
        chats.ask([text("system", 32) + text(f"question {chats.num_requests}", 24)])
        assert chats.num_hits == [expected]


def test_the_third_request_hits_the_beginning_that_it_shares_though_blocks_are_reused():
    chats = Chats(make_windowed(200))
    for expected in (0, 0, 32, 32, 32):
        chats.ask([text("system", 32) + text(f"question {chats.num_requests}", 24)])
        assert chats.num_hits == [expected]
        overwrite_unneeded(chats.device.scheduler.blocks)


@pytest.mark.parametrize("max_tokens", range(1, 22))
def test_a_conversation_goes_on_after_its_last_answer_or_without_it(max_tokens):
    chats = Chats(make_windowed(200, rows=2))
    prompt = text("prompt", 30)
    for turn in range(3):
        [tokens] = chats.ask([prompt], max_tokens)
        overwrite_unneeded(chats.device.scheduler.blocks)
        chats.ask([prompt + text(f"not the answer {turn}", 16)], 1)
        assert chats.num_hits == [len(prompt) // 4 * 4]
        overwrite_unneeded(chats.device.scheduler.blocks)
        [prompt] = chats.ask([tokens + text(f"more {turn}", 5)], 1)
        assert chats.num_hits == [(len(tokens) - 1) // 4 * 4], "the last token was drawn, and not computed"
        overwrite_unneeded(chats.device.scheduler.blocks)


def run(manager: BlockManager, seq_id: str, tokens: list[int]) -> int:
    """Compute a sequence, and free it. Returns the tokens that were cached."""
    match = manager.match_prefix(tokens, len(tokens) - 1)
    manager.reserve(seq_id, len(tokens), match=match)
    manager.publish(seq_id, tokens, len(tokens))
    manager.publish(seq_id, tokens, len(tokens), include_partial=True)
    manager.free(seq_id)
    manager.take_transfers()
    manager.finish_transfers()
    manager.check_invariants()
    return match.num_tokens


def test_blocks_that_no_prefix_end_needs_are_reused_first_and_not_saved_on_the_host():
    manager = BlockManager(41, BLOCK_SIZE, enable_prefix_caching=True, num_host_blocks=40, groups=GROUPS)
    run(manager, "a", text("a", 40))
    assert len(manager.tiers.device.cache.unneeded) == 2 * 7, "hits on 36 and 40 tokens need the last 3 of 10 blocks"
    manager.reserve("b", 8 * BLOCK_SIZE)
    assert manager.stats().num_cached == 10 + 2 * 3, "the 10 blocks that were not cached went too"
    assert manager.stats().num_blocks_spilled == 0
    manager.reserve("c", BLOCK_SIZE)
    assert manager.stats().num_blocks_spilled == 3


def test_full_blocks_that_are_computed_again_for_their_windows_are_as_recent_as_these():
    manager = BlockManager(60, BLOCK_SIZE, enable_prefix_caching=True, groups=GROUPS)
    run(manager, "a", text("a", 24))
    device = manager.tiers.device
    of_a = needed_in_order(manager)
    assert len(of_a) == 6 + 2 * 3
    run(manager, "b", text("b", 24))
    overwrite_unneeded(manager)
    for block in {block for block in of_a if device.cache._prefixes[block].group > 0}:
        device.hold(block)
        device.cache.evict(block)
        device.release([block])
    assert run(manager, "a", text("a", 24)) == 0
    needed = needed_in_order(manager)
    assert len(needed) == 2 * (6 + 2 * 3)
    first_blocks = [prefix.chain()[0].tokens for prefix in map(device.cache.prefix_of, needed) if prefix is not None]
    assert len(set(first_blocks[:12])) == len(set(first_blocks[12:])) == 1, "all of one prompt, then all of the other"
    prefixes = [prefix for prefix in map(device.cache.prefix_of, needed[12:]) if prefix is not None]
    assert [len(prefix.chain()) for prefix in prefixes if prefix.group == 0] == [6, 5, 4, 3, 2, 1], "the tail first"
    assert run(manager, "a", text("a", 24)) == 20


def test_a_fork_keeps_the_prefix_ends_of_its_parent():
    manager = BlockManager(80, BLOCK_SIZE, enable_prefix_caching=True, groups=GROUPS)
    prompt = text("prompt", 16)
    manager.reserve("parent", len(prompt))
    manager.fork("parent", "child")
    manager.free("parent")
    manager.append("child", 24)
    manager.publish("child", prompt + text("answer", 24), 40)
    manager.free("child")
    overwrite_unneeded(manager)
    assert run(manager, "again", prompt) == 12
    assert run(manager, "longer", prompt + text("other answer", 9)) == 16


def test_blocks_that_are_entered_when_others_have_lost_the_entries_are_not_needed_either():
    manager = BlockManager(80, BLOCK_SIZE, enable_prefix_caching=True, groups=GROUPS)
    tokens = text("twins", 24)
    for seq_id in ("first", "second"):
        manager.reserve(seq_id, len(tokens))
        manager.publish(seq_id, tokens, len(tokens))
    manager.free("first")
    overwrite_unneeded(manager)
    assert manager.stats().num_cached == 6 + 2 * 3
    manager.publish("second", tokens, len(tokens), include_partial=True)
    assert manager.stats().num_cached == 6 + 2 * 6
    assert len(manager.tiers.device.cache.unneeded) == 2 * 3
    manager.free("second")
    assert len(manager.tiers.device.cache.unneeded) == 2 * 3
    manager.check_invariants()
