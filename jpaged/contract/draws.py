"""The draws of a plan: rows that get a token, and what changes their logits beyond the columns of the table."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64

from jpaged.contract.rows import MAX_FLOAT, NO_INTS
from jpaged.request import SamplingParams


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
    """

    bias_draws: Int32[np.ndarray, " biases"]
    bias_ids: Int32[np.ndarray, " biases"]
    bias_values: Float32[np.ndarray, " biases"]
    seen_draws: Int32[np.ndarray, " seen"]
    seen_ids: Int32[np.ndarray, " seen"]
    seen_is_output: Bool[np.ndarray, " seen"]

    @property
    def is_empty(self) -> bool:
        return len(self.bias_draws) == len(self.seen_draws) == 0


NO_EXTRAS = Extras(NO_INTS, NO_INTS, np.zeros(0, np.float32), NO_INTS, NO_INTS, np.zeros(0, bool))


@dataclass(slots=True)
class ExtrasBuilder:
    """Collects the extras of one plan. Written by the plan's builder."""

    _bias_draws: list[int] = field(default_factory=list)
    _bias_ids: list[int] = field(default_factory=list)
    _bias_values: list[float] = field(default_factory=list)
    _seen: list[tuple[int, Sequence[int], bool]] = field(default_factory=list)

    def add(
        self,
        draw: int,
        params: SamplingParams,
        banned_token_ids: Collection[int],
        prompt_token_ids: Sequence[int],
        output_token_ids: Sequence[int],
    ) -> None:
        """Add what one draw needs: nothing for most."""
        if params.logit_bias or banned_token_ids:
            bias = params.logit_bias or {}
            self._bias_draws += [draw] * (len(bias) + len(banned_token_ids))
            self._bias_ids += [*bias.keys(), *banned_token_ids]
            self._bias_values += [*bias.values(), *[-np.inf] * len(banned_token_ids)]
        if params.has_penalties:
            self._seen.append((draw, prompt_token_ids, False))
            self._seen.append((draw, output_token_ids, True))

    def build(self) -> Extras:
        if not self._bias_draws and not self._seen:
            return NO_EXTRAS
        lens = np.array([len(token_ids) for _, token_ids, _ in self._seen], np.int64)
        seen_ids = [np.array(token_ids, np.int32) for _, token_ids, _ in self._seen]
        return Extras(
            np.array(self._bias_draws, np.int32),
            np.array(self._bias_ids, np.int32),
            _to_float32(self._bias_values),
            np.repeat(np.array([draw for draw, _, _ in self._seen], np.int32), lens),
            np.concatenate([NO_INTS, *seen_ids]),
            np.repeat(np.array([is_output for _, _, is_output in self._seen], bool), lens),
        )


def _to_float32(values: list[float]) -> Float32[np.ndarray, " biases"]:
    """Values as float32, finite ones clipped to ``MAX_FLOAT``; infinite ones (bans) stay."""
    exact = np.array(values, np.float64)
    return np.where(np.isinf(exact), exact, np.clip(exact, -MAX_FLOAT, MAX_FLOAT)).astype(np.float32)


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
