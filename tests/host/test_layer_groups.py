"""Layer groups: how layers are divided, and the blocks of each group, against a model with contents."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jpaged.contract.layer_groups import LayerGroup, LayerGroups
from jpaged.contract.plan import BlockCopy
from jpaged.host.blocks.manager import BlockManager, OutOfBlocks
from jpaged.host.blocks.prefix_cache import Prefix, PrefixMatch
from jpaged.host.scheduler import Scheduler
from jpaged.models.groups import grouped, ungrouped
from jpaged.models.spec import LayerSpec
from jpaged.request import Request, SamplingParams
from tests.support.blocks import snapshot

# How layers are divided


def specs_of(windows: list[int | None]) -> tuple[LayerSpec, ...]:
    return tuple(
        LayerSpec(layer=layer, num_kv_heads=1, head_dim=8, sm_scale=1.0, sliding_window=window)
        for layer, window in enumerate(windows)
    )


GEMMA_3_27B = [None if layer % 6 == 5 else 1024 for layer in range(62)]


@pytest.mark.parametrize(
    ("windows", "max_model_len", "expected"),
    [
        (GEMMA_3_27B, 131_072, [(10, None), *[(10, 1024)] * 5, (2, 1024)]),
        ([None, 128] * 12, 131_072, [(12, None), (12, 128)]),
        ([8, 8, None], 64, [(1, None), (1, 8), (1, 8)]),
        ([4096] * 32, 32_768, [(32, 4096)]),
        ([None] * 20 + [512, 2048] * 10, 32_768, [(10, None), (10, None), (10, 512), (10, 2048)]),
    ],
)
def test_layers_are_grouped_by_window_in_few_groups_of_few_unused_slots(windows, max_model_len, expected):
    layers, groups = grouped(specs_of(windows), max_model_len)
    assert [(group.num_layers, group.window) for group in groups.groups] == expected
    assert len({(spec.group, spec.layer) for spec in layers}) == len(windows)
    for spec, window in zip(layers, windows, strict=True):
        assert spec.sliding_window == window == groups.groups[spec.group].window
        assert spec.layer < groups.groups[spec.group].num_layers <= groups.layers_per_block


@pytest.mark.parametrize(
    ("windows", "max_model_len"), [([None] * 32, 4096), ([4096] * 32, 4096), ([None] * 27 + [64], 1000)]
)
def test_layers_stay_in_one_group_where_windows_save_nothing(windows, max_model_len):
    specs = specs_of(windows)
    assert grouped(specs, max_model_len) == ungrouped(specs) == (specs, LayerGroups.single(len(specs)))
    assert ungrouped(specs).groups.is_plain


def test_blocks_of_a_sequence_are_counted_by_group():
    groups = LayerGroups((LayerGroup(2), LayerGroup(2, 6), LayerGroup(1, 6)))
    assert [groups.num_blocks(num_tokens, 4) for num_tokens in (0, 1, 5, 9, 40)] == [0, 3, 6, 9, 10 + 2 * 3]
    assert groups.num_blocks(40, 4, chunk=8) == 10 + 2 * 4
    assert groups.num_forked_blocks(8, [10, 10], 4, chunk=1) == 4 + 2 * 4
    assert groups.num_forked_blocks(8, [40, 40], 4, chunk=1) == 18 + 2 * 6
    for num_blocks in range(60):
        most = groups.most_tokens(num_blocks, 4)
        assert groups.num_blocks(most, 4) <= num_blocks < groups.num_blocks(most + 1, 4)
    assert LayerGroups((LayerGroup(1, 6),)).most_tokens(3, 4) > 10**9, "windows alone hold any sequence"
    assert groups.share_used == 2.5


def test_a_block_is_live_while_the_next_token_sees_a_part_of_it():
    group = LayerGroup(1, window=5)
    for position in range(40):
        seen = range(max(position - 4, 0), position + 1)
        assert group.first_live(position, 4) == seen[0] // 4


# The block manager

WINDOWED = LayerGroups((LayerGroup(1), LayerGroup(1, 5)))


def make_manager(num_blocks: int = 30, groups: LayerGroups = WINDOWED, **options) -> BlockManager:
    return BlockManager(num_blocks, 4, enable_prefix_caching=True, groups=groups, **options)


def run(manager: BlockManager, seq_id, tokens: list[int]) -> PrefixMatch:
    """Start and compute a sequence; returns its match."""
    match = manager.match_prefix(tokens)
    manager.reserve(seq_id, len(tokens), match=match)
    manager.publish(seq_id, tokens, len(tokens))
    manager.take_transfers()
    manager.finish_transfers()
    return match


def test_a_window_frees_blocks_that_it_has_passed_and_other_groups_keep_theirs():
    manager = make_manager()
    manager.reserve("a", 18)
    full, windowed = (manager.block_table("a", group) for group in (0, 1))
    assert len(full) == len(windowed) == 5
    assert manager.windows.next_slide("a") == 8
    manager.windows.slide("a", 7)
    assert manager.num_free_blocks == 29 - 10
    manager.windows.slide("a", 13)
    assert manager.num_free_blocks == 29 - 8
    assert manager.block_table("a") == full
    assert manager.block_table("a", 1) == [0, 0, *windowed[2:]]
    assert manager.windows.next_slide("a") == 16
    assert manager.stats().num_used_by_group == (5, 3)
    manager.check_invariants()
    manager.free("a")
    assert manager.num_free_blocks == 29


def test_a_pin_keeps_the_blocks_that_a_request_sees_which_shares_its_full_blocks():
    groups = LayerGroups((LayerGroup(1, None), LayerGroup(1, 8)))
    blocks = BlockManager(30, 4, enable_prefix_caching=True, groups=groups)
    scheduler = Scheduler(blocks, max_num_seqs=2, max_num_batched_tokens=32, max_model_len=64)
    scheduler.pin(Request("pin", None, list(range(15)), SamplingParams(max_tokens=1), 0))
    scheduler.add(Request("beside", None, list(range(20, 25)), SamplingParams(max_tokens=9), 0))
    pin = int(scheduler.schedule().chunks.seq_ids[0])
    scheduler.schedule_ahead()
    assert blocks.block_table(pin, 1)[0] == 0, "no token from the 13th on sees the first block"
    assert all(blocks.block_table(pin, 1)[1:]), "the 13th token sees the second block, and the 16th does not"


@pytest.mark.parametrize("position", [-1, 7])
def test_a_window_does_not_move_past_the_tokens_of_its_sequence(position):
    manager = make_manager()
    manager.reserve("a", 6)
    before = snapshot(manager)
    with pytest.raises(ValueError, match="holds"):
        manager.windows.slide("a", position)
    assert snapshot(manager) == before


def test_a_fork_copies_the_last_block_of_each_group():
    manager = make_manager()
    manager.reserve("a", 10)
    manager.windows.slide("a", 9)
    manager.fork("a", "b")
    assert manager.to_append([("a", 1), ("b", 1)]).num_blocks == 2
    copies = manager.append("b")
    assert copies == [
        BlockCopy(manager.block_table("a", group)[2], manager.block_table("b", group)[2]) for group in (0, 1)
    ]
    assert manager.append("a") == []
    manager.windows.slide("b", 9)
    manager.check_invariants()


def test_a_hit_needs_all_blocks_of_full_layers_and_the_last_blocks_of_windows():
    manager = make_manager()
    tokens = list(range(20))
    run(manager, "a", tokens)
    manager.windows.slide("a", 19)
    match = manager.match_prefix(tokens)
    assert match.num_tokens == 20
    assert match.device_blocks == {*manager.block_table("a"), manager.block_table("a", 1)[4]}
    assert manager.to_reserve("b", 21, match=match).num_blocks == 2
    manager.reserve("b", 21, match=match)
    assert manager.block_table("b", 1)[:4] == [0, 0, 0, 0]
    manager.check_invariants()


def test_a_hit_ends_where_a_window_still_has_its_blocks():
    manager = make_manager(17)
    tokens = list(range(20))
    run(manager, "a", tokens)
    manager.windows.slide("a", 19)
    manager.reserve("others", 16)  # takes 6 free blocks, and the last 2 that the window passed: their content is lost
    manager.free("others")
    assert manager.match_prefix(tokens).num_tokens == 20
    assert manager.match_prefix([*tokens[:16], 99, 99, 99, 99]).num_tokens == 16
    assert manager.match_prefix([*tokens[:12], 99, 99, 99, 99]).num_tokens == 4


def test_a_match_that_is_no_longer_cached_is_refused():
    manager = make_manager(9, LayerGroups((LayerGroup(1, 5),)))
    tokens = list(range(16))
    run(manager, "a", tokens)
    match = manager.match_prefix(tokens)
    assert match.num_tokens == 16
    manager.free("a")
    for wrong in (
        replace(match, hits=match.hits[:-1]),
        replace(match, hits=(match.hits[-1], *match.hits[1:])),
        replace(match, prefix=None),
    ):
        with pytest.raises(ValueError, match="does not continue a cached prefix"):
            manager.reserve("b", 16, match=wrong)
    manager.reserve("others", 32)
    manager.free("others")
    with pytest.raises(ValueError, match="does not continue a cached prefix"):
        manager.reserve("b", 16, match=match)


def test_unused_slots_of_blocks_are_waste():
    manager = make_manager(groups=LayerGroups((LayerGroup(4), LayerGroup(1, 5))))
    manager.reserve("a", 4)
    stats = manager.stats()
    assert (stats.num_used, stats.tokens_held) == (2, 8)
    assert stats.waste == (8 - 5) / 8


# A state machine


def content_of(prefix: Prefix) -> tuple:
    """Group, salt and tokens of a prefix."""
    return prefix.group, prefix.salt, b"".join([link.tokens[::8] for link in prefix.chain()])


TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=14)
SALTS = st.sampled_from([b"", b"salt"])


class Sequence:
    def __init__(self, tokens: list[int], computed: int, salt: bytes, ends: set[int]) -> None:
        self.tokens, self.computed, self.salt = tokens, computed, salt
        self.ends = ends  # prefix ends, in blocks
        self.is_swapped = False


class GroupsMachine(RuleBasedStateMachine):
    """Every rule is a plan: its moves to the host, then its copies, then what it computes; loads land at the end."""

    @initialize(
        num_blocks=st.sampled_from([64, 40, 24, 12]),
        num_host_blocks=st.sampled_from([0, 4, 16, 64]),
        block_size=st.sampled_from([1, 2, 3, 4]),
        num_full=st.integers(0, 1),
        windows=st.lists(st.integers(1, 3), min_size=1, max_size=2),
        less=st.integers(0, 3),
    )
    def start(self, num_blocks, num_host_blocks, block_size, num_full, windows, less):
        self.windows = [None] * num_full + [max(window * block_size - less, 1) for window in windows]
        groups = LayerGroups(tuple(LayerGroup(1 + i, window) for i, window in enumerate(self.windows)))
        self.manager = BlockManager(
            num_blocks, block_size, enable_prefix_caching=True, num_host_blocks=num_host_blocks, groups=groups
        )
        self.block_size = block_size
        self.device: list[list] = [[None] * block_size for _ in range(num_blocks)]
        self.host: list[list] = [[None] * block_size for _ in range(num_host_blocks)]
        self.sequences: dict[int, Sequence] = {}
        self.ended: list[Sequence] = []
        self.needed: dict[int, Prefix] = {}  # blocks of windows that some prefix end needs, while they hold the prefix
        self.next_id = 0

    def content(self, group: int, salt: bytes, tokens: list[int], position: int) -> tuple:
        return group, salt, tuple(tokens[: position + 1])

    def first_seen(self, group: int, position: int) -> int:
        window = self.windows[group]
        return 0 if window is None else max(position - window + 1, 0)

    def plan(self, copies: list[BlockCopy] = []) -> None:  # noqa: B006
        """End a plan that computes nothing."""
        moves = self.manager.take_transfers()
        for move in moves.to_host:
            self.host[move.dst] = list(self.device[move.src])
        for copy, content in zip(copies, [list(self.device[copy.src]) for copy in copies], strict=True):
            self.device[copy.dst] = content
        for move in moves.from_host:
            self.device[move.dst] = list(self.host[move.src])
        self.manager.finish_transfers()
        self.need(move.dst for move in moves.from_host)

    def need(self, blocks) -> None:
        """Note that prefix ends need these blocks, if they are cached."""
        prefixes = {block: self.manager.tiers.device.cache.prefix_of(block) for block in blocks}
        self.needed |= {block: prefix for block, prefix in prefixes.items() if prefix is not None}

    def need_ends(self, seq: Sequence, ends: set[int]) -> None:
        """Note the cached blocks that the windows before some ends of a sequence cover, found by their content."""
        blocks = {content_of(prefix): block for block, prefix in self.manager.tiers.device.cache._prefixes.items()}
        for end in ends:
            if end * self.block_size <= seq.computed:
                needed = [blocks.get(content) for content in self.needed_by(seq.tokens, end, seq.salt)]
                self.need(block for block in needed if block is not None)

    def compute(self, seq_id: int, stop: int) -> None:
        """Write the tokens up to ``stop``, once every token sees what it should, and publish them."""
        seq = self.sequences[seq_id]
        for group in range(len(self.windows)):
            table = self.manager.block_table(seq_id, group)
            for position in range(seq.computed, stop):
                block, offset = table[position // self.block_size], position % self.block_size
                assert block > 0
                assert self.manager.tiers.device.ref_counts[block] == 1, "no block is written that others hold"
                self.device[block][offset] = self.content(group, seq.salt, seq.tokens, position)
        before, seq.computed = seq.computed, stop
        self.manager.publish(seq_id, seq.tokens, seq.computed, salt=seq.salt)
        self.need_ends(seq, {end for end in seq.ends if end > before // self.block_size})

    def cached(self) -> set[tuple]:
        """Group, salt and tokens of every cached full block, of either tier."""
        caches = self.manager.tiers.device.cache, self.manager.tiers.host.cache
        return {content_of(prefix) for cache in caches for prefix in cache._prefixes.values()}

    def needed_by(self, tokens: list[int], num_blocks: int, salt: bytes) -> list[tuple]:
        """Group, salt and tokens of the blocks that a hit on the first blocks of some tokens needs."""
        return [
            (group, salt, bytes(tokens[: (index + 1) * self.block_size]))
            for group in range(len(self.windows))
            for index in range(self.first_seen(group, num_blocks * self.block_size) // self.block_size, num_blocks)
        ]

    def longest(self, tokens: list[int], salt: bytes) -> int:
        """Blocks of the longest match, found by trying all."""
        cached = self.cached()
        ends = range(len(tokens) // self.block_size, 0, -1)
        return next((end for end in ends if cached.issuperset(self.needed_by(tokens, end, salt))), 0)

    def branch(self, tokens: list[int], salt: bytes, num_hit: int) -> int:
        """Blocks after which cached tokens go on in another way, and of which windows lack some; 0 if none do."""
        cached, block_size = self.cached(), self.block_size
        keys = [(salt, bytes(tokens[:stop])) for stop in range(block_size, len(tokens) + 1, block_size)]
        num_known = 0
        if None in self.windows:
            while num_known < len(keys) and (0, *keys[num_known]) in cached:
                num_known += 1
        else:
            seeing = [group for group in range(len(self.windows)) if self.first_seen(group, block_size) < block_size]
            ends = range(len(keys), 0, -1)
            num_known = next((n for n in ends if cached.issuperset((group, *keys[n - 1]) for group in seeing)), 0)
        known = bytes(tokens[: num_known * block_size])
        goes_on = any(
            group == 0 and other == salt and len(longer) == len(known) + block_size and longer.startswith(known)
            for group, other, longer in cached
        )
        return num_known if num_known > num_hit and goes_on else 0

    def pick(self, data, *, is_swapped: bool = False) -> int | None:
        ids = sorted(seq_id for seq_id, seq in self.sequences.items() if seq.is_swapped == is_swapped)
        return data.draw(st.sampled_from(ids)) if ids else None

    def is_refused(self, num_blocks: int, num_free: int, call) -> bool:
        if num_blocks <= num_free:
            return False
        before = snapshot(self.manager)
        with pytest.raises(OutOfBlocks):
            call()
        assert snapshot(self.manager) == before
        return True

    @rule(
        data=st.data(),
        tokens=TOKENS,
        salt=SALTS,
        known=st.sampled_from([30, 0, 3, 8]),
        chunk=st.integers(1, 14),
        is_pin=st.sampled_from([False, False, False, True]),
    )
    def reserve(self, data, tokens, salt, known, chunk, is_pin):
        manager = self.manager
        others = [*self.ended[-4:], *self.sequences.values()]
        if known and others:
            other = others[data.draw(st.integers(0, len(others) - 1))]
            tokens, salt = [*other.tokens[:known], *tokens], other.salt
        match = manager.match_prefix(tokens, salt=salt)
        num_hit = self.longest(tokens, salt)
        assert match.num_tokens == num_hit * self.block_size
        assert match.branch == self.branch(tokens, salt, num_hit)
        stop = match.num_tokens if is_pin else min(len(tokens), match.num_tokens + chunk)
        seq_id, ticket = self.next_id, manager.to_reserve(self.next_id, stop, match=match)
        if self.is_refused(
            ticket.num_blocks, manager.num_free_blocks, lambda: manager.reserve(seq_id, stop, match=match)
        ):
            return
        assert manager.reserve(seq_id, stop, match=match) == []
        self.next_id += 1
        ends = {num_hit, match.branch, max(stop - 1, 0) // self.block_size, stop // self.block_size}
        self.sequences[seq_id] = Sequence(tokens[:stop], match.num_tokens, salt, ends)
        self.need(match.device_blocks)
        self.plan()
        self.check_sees(seq_id)
        self.compute(seq_id, stop)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), tokens=TOKENS)
    def step(self, data, tokens):
        """A sequence slides, takes blocks for some tokens, and computes them."""
        if (seq_id := self.pick(data)) is None:
            return
        seq, manager = self.sequences[seq_id], self.manager
        manager.windows.slide(seq_id, seq.computed)
        assert manager.windows.next_slide(seq_id) > seq.computed
        ticket = manager.to_append([(seq_id, len(tokens))])
        if self.is_refused(ticket.num_blocks, manager.num_free_blocks, lambda: manager.append(seq_id, len(tokens))):
            return
        num_free = manager.num_free_blocks
        copies = manager.append(seq_id, len(tokens))
        assert num_free - manager.num_free_blocks == ticket.num_blocks
        self.plan(copies)
        seq.tokens = seq.tokens + tokens
        most = manager.groups.num_blocks(len(seq.tokens), self.block_size, len(tokens))
        assert len(manager.holdings.held_by(seq_id).live_blocks) <= most
        self.check_sees(seq_id)
        self.compute(seq_id, len(seq.tokens))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), number=st.integers(1, 3))
    def fork(self, data, number):
        if (seq_id := self.pick(data)) is None:
            return
        parent = self.sequences[seq_id]
        for _ in range(number):
            self.manager.fork(seq_id, self.next_id)
            self.sequences[self.next_id] = Sequence(parent.tokens, parent.computed, parent.salt, parent.ends)
            self.next_id += 1

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), include_partial=st.booleans())
    def free(self, data, include_partial):
        seq_id = data.draw(st.sampled_from(sorted(self.sequences)))
        seq = self.sequences.pop(seq_id)
        self.ended.append(seq)
        if include_partial and not seq.is_swapped:
            self.manager.publish(seq_id, seq.tokens, seq.computed, salt=seq.salt, include_partial=True)
        self.manager.free(seq_id)
        if not seq.is_swapped:
            self.need_ends(seq, {*seq.ends, seq.computed // self.block_size})

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), number=st.integers(1, 3))
    def swap_out(self, data, number):
        ids = {self.pick(data) for _ in range(number)} - {None}
        ticket, manager = self.manager.to_swap_out(ids), self.manager
        if self.is_refused(ticket.num_blocks, len(manager.tiers.host.free), lambda: manager.swap_out(ids)):
            return
        manager.swap_out(ids)
        for seq_id in ids:
            seq = self.sequences[seq_id]
            self.need_ends(seq, {seq.computed // self.block_size})
            seq.is_swapped = True
        self.plan()

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), number=st.integers(1, 3))
    def swap_in(self, data, number):
        ids = {self.pick(data, is_swapped=True) for _ in range(number)} - {None}
        ticket, manager = self.manager.to_swap_in(ids), self.manager
        if self.is_refused(ticket.num_blocks, manager.num_free_blocks, lambda: manager.swap_in(ids)):
            return
        manager.swap_in(ids)
        for seq_id in ids:
            self.sequences[seq_id].is_swapped = False
            self.need(manager.holdings.held_by(seq_id).live_blocks)
        self.plan()

    def check_sees(self, seq_id: int) -> None:
        """Every token that the next one sees is there, in each group."""
        seq, holdings = self.sequences[seq_id], self.manager.holdings
        cells = (holdings.on_host if seq.is_swapped else holdings.on_device)[seq_id].blocks
        pool = self.host if seq.is_swapped else self.device
        for group in range(len(self.windows)):
            for position in range(self.first_seen(group, seq.computed), seq.computed):
                block = cells[position // self.block_size * len(self.windows) + group]
                expected = self.content(group, seq.salt, seq.tokens, position)
                assert pool[block][position % self.block_size] == expected

    @invariant()
    def every_sequence_sees_its_own_tokens(self):
        for seq_id in self.sequences:
            self.check_sees(seq_id)

    @invariant()
    def cached_blocks_of_windows_are_needed_if_a_window_before_a_prefix_end_covers_them(self):
        cache = self.manager.tiers.device.cache
        windowed = {block: prefix for block, prefix in cache._prefixes.items() if self.windows[prefix.group]}
        unneeded = {block for block, prefix in windowed.items() if self.needed.get(block) is not prefix}
        assert cache.unneeded == unneeded

    @invariant()
    def every_block_is_accounted_for(self):
        manager = self.manager
        manager.check_invariants()
        held = Counter()
        for holding in manager.holdings.on_device.values():
            held.update(holding.live_blocks)
        assert manager.num_free_blocks + len(held) == manager.num_blocks - 1
        stats = manager.stats()
        assert (stats.num_used, stats.num_logical) == (len(held), held.total())
        assert sum(stats.num_used_by_group) == len(held)
        on_host = {b for holding in manager.holdings.on_host.values() for b in holding.live_blocks}
        assert stats.num_host_used == len(on_host)

    def teardown(self):
        for seq_id in list(getattr(self, "sequences", ())):
            self.manager.free(seq_id)
        if hasattr(self, "manager"):
            assert self.manager.num_free_blocks == self.manager.num_blocks - 1
            assert len(self.manager.tiers.host.free) == self.manager.num_host_blocks
            self.manager.check_invariants()


TestGroupsAgainstModel = GroupsMachine.TestCase
TestGroupsAgainstModel.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
