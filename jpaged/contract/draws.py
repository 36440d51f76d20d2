"""The draws of a plan: rows that get a token, and what changes their logits beyond the columns of the table."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64

from jpaged.contract.rows import MAX_FLOAT, NO_INTS


class Bias(NamedTuple):
    """Numbers added to some logits of every draw of a request; -inf bans a token."""

    token_ids: Int32[np.ndarray, " biases"]
    values: Float32[np.ndarray, " biases"]


def make_bias(logit_bias: Mapping[int, float], banned_token_ids: Sequence[int]) -> Bias | None:
    """The bias of a request; None if it has none.

    Args:
        logit_bias: numbers by token; finite ones are clipped to ``MAX_FLOAT``.
        banned_token_ids: tokens that are never drawn.
    """
    if not logit_bias and not banned_token_ids:
        return None
    values = np.clip(np.array(list(logit_bias.values()), np.float64), -MAX_FLOAT, MAX_FLOAT)
    return Bias(
        np.concatenate([np.array(list(logit_bias), np.int32), np.array(banned_token_ids, np.int32)]),
        np.concatenate([values, np.full(len(banned_token_ids), -np.inf)]).astype(np.float32),
    )


def next_banned(sequences: Iterable[Sequence[int]], output_token_ids: Sequence[int]) -> tuple[int, ...]:
    """The last tokens of those sequences whose other tokens the output ends with."""
    ends = {len(each) - 1: tuple(output_token_ids[len(output_token_ids) - len(each) + 1 :]) for each in sequences}
    return tuple([each[-1] for each in sequences if ends[len(each) - 1] == tuple(each[:-1])])


@dataclass(frozen=True, slots=True, eq=False)
class Extras:
    """Logit biases, bans, and the tokens that penalties count.

    Args:
        bias_draws: the draw that each bias belongs to, as an index.
        bias_ids: its token.
        bias_values: number added to that token's logit; -inf bans the token.
        seen_draws: the penalised draw that each token of a history belongs to.
        seen_ids: that token.
        seen_is_output: whether the token was generated; otherwise it is part of the prompt.
        needs_tokens: whether a ban of the next draw depends on the tokens of these.
    """

    bias_draws: Int32[np.ndarray, " biases"]
    bias_ids: Int32[np.ndarray, " biases"]
    bias_values: Float32[np.ndarray, " biases"]
    seen_draws: Int32[np.ndarray, " seen"]
    seen_ids: Int32[np.ndarray, " seen"]
    seen_is_output: Bool[np.ndarray, " seen"]
    needs_tokens: bool = False

    @property
    def is_empty(self) -> bool:
        return len(self.bias_draws) == len(self.seen_draws) == 0


NO_EXTRAS = Extras(NO_INTS, NO_INTS, np.zeros(0, np.float32), NO_INTS, NO_INTS, np.zeros(0, bool))


@dataclass(slots=True)
class ExtrasBuilder:
    """Collects the extras of one plan. Written by the plan's builder."""

    needs_tokens: bool = False
    _biases: list[tuple[int, Bias]] = field(default_factory=list)
    _seen: list[tuple[int, Sequence[int], bool]] = field(default_factory=list)

    def add(self, draw: int, bias: Bias | None, banned_token_ids: Sequence[int]) -> None:
        """Add the bias of one draw, and the tokens that this draw alone may not take."""
        if bias is not None:
            self._biases.append((draw, bias))
        if banned_token_ids and (bans := make_bias({}, banned_token_ids)) is not None:
            self._biases.append((draw, bans))

    def add_history(self, draw: int, prompt_token_ids: Sequence[int], output_token_ids: Sequence[int]) -> None:
        """Add the tokens that the penalties of one draw count."""
        self._seen.append((draw, prompt_token_ids, False))
        self._seen.append((draw, output_token_ids, True))

    def build(self) -> Extras:
        if not (self._biases or self._seen or self.needs_tokens):
            return NO_EXTRAS
        lens = np.array([len(token_ids) for _, token_ids, _ in self._seen], np.int64)
        seen_ids = [np.array(token_ids, np.int32) for _, token_ids, _ in self._seen]
        num_biases = np.array([len(bias.token_ids) for _, bias in self._biases], np.int64)
        return Extras(
            np.repeat(np.array([draw for draw, _ in self._biases], np.int32), num_biases),
            np.concatenate([NO_INTS, *[bias.token_ids for _, bias in self._biases]]),
            np.concatenate([NO_EXTRAS.bias_values, *[bias.values for _, bias in self._biases]]),
            np.repeat(np.array([draw for draw, _, _ in self._seen], np.int32), lens),
            np.concatenate([NO_INTS, *seen_ids]),
            np.repeat(np.array([is_output for _, _, is_output in self._seen], bool), lens),
            self.needs_tokens,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Draws:
    """Tokens to draw. Each sits behind the last token of a chunk, and is the newest token of its row afterwards.

    Args:
        rows: row id of each draw, all different.
        seq_ids: the sequence that has this row.
        chunks: index into ``StepPlan.chunks`` of the logits read. Several draws read one chunk before a prompt forks.
        num_tokens: tokens to draw, one in each of the plan's first steps, each fed to the next step.
        num_logprobs: most alternatives that any draw asks for; None if no log-probabilities were asked for.
        extras: biases, bans and histories.
    """

    rows: Int32[np.ndarray, " draws"]
    seq_ids: Int64[np.ndarray, " draws"]
    chunks: Int32[np.ndarray, " draws"]
    num_tokens: Int32[np.ndarray, " draws"]
    num_logprobs: int | None = None
    extras: Extras = NO_EXTRAS

    def __len__(self) -> int:
        return len(self.rows)


NO_DRAWS = Draws(NO_INTS, np.zeros(0, np.int64), NO_INTS, NO_INTS)
