"""Feeds: the tokens that running sequences compute next."""

from typing import NamedTuple

from jpaged.host.outcome import Outcome
from jpaged.host.plan_builder import PlanBuilder
from jpaged.host.sequence import Sequence, SequenceGroup


class Feed(NamedTuple):
    """A running sequence, and the tokens of it that the next iteration should compute: from ``start`` to ``target``."""

    group: SequenceGroup
    seq: Sequence
    start: int
    target: int

    @property
    def num_tokens(self) -> int:
        """Tokens still to compute."""
        return self.target - self.start


def longest_context(feeds: list[Feed]) -> int:
    """The most tokens before the next chunk of a prompt."""
    return max([feed.start for feed in feeds if feed.num_tokens > 1], default=0)


def compute_all(plan: PlanBuilder, feeds: list[Feed], outcome: Outcome) -> None:
    """Add feeds to a plan: single tokens first, then chunks of prompts while the budget lasts."""
    for feed in feeds:
        if feed.num_tokens == 1:
            plan.add(feed.group, feed.seq, 1)
    for feed in feeds:
        if feed.num_tokens > 1 and plan.has_budget:
            plan.add(feed.group, feed.seq, feed.num_tokens)
            outcome.publish_planned(feed.seq, feed.start)
