"""Feeds: the tokens that running sequences compute next."""

from typing import NamedTuple

from jpaged.host.outcome import Outcome
from jpaged.host.plan_builder import PlanBuilder
from jpaged.host.sequence import Sequence, SequenceGroup


class Feed(NamedTuple):
    """A running sequence, and the number of its tokens that should be in the pool after the next iteration."""

    group: SequenceGroup
    seq: Sequence
    target: int

    @property
    def num_tokens(self) -> int:
        """Tokens still to compute."""
        return self.target - self.seq.num_computed


def longest_context(feeds: list[Feed]) -> int:
    """The most tokens before the next chunk of a prompt."""
    return max([feed.seq.num_computed for feed in feeds if feed.num_tokens > 1], default=0)


def compute_all(plan: PlanBuilder, feeds: list[Feed], outcome: Outcome) -> None:
    """Add feeds to a plan: single tokens first, then chunks of prompts while the budget lasts."""
    for feed in feeds:
        if feed.num_tokens == 1:
            plan.add(feed.group, feed.seq, 1)
    for feed in feeds:
        start, num_tokens = feed.seq.num_computed, feed.num_tokens
        if num_tokens > 1 and plan.has_budget:
            plan.add(feed.group, feed.seq, num_tokens)
            outcome.publish_planned(feed.seq, start)
