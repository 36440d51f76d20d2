"""Log-probabilities of tokens, kept as arrays until they are read."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

from jpaged.contract.result import TokenScores
from jpaged.engine.token_texts import TokenTexts
from jpaged.request import Logprob


@dataclass(frozen=True, slots=True, eq=False)
class ScoredTokens(Sequence[dict[int, Logprob]]):
    """The log-probabilities at each of some tokens, made when they are read: a million takes seconds.

    Args:
        token_ids: the tokens.
        rows: the scores that each came with, and its row in them.
        num_top: alternatives of each token.
        texts: the texts of tokens; None without a tokenizer.
    """

    token_ids: list[int]
    rows: list[tuple[TokenScores, int]]
    num_top: int
    texts: TokenTexts | None

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> dict[int, Logprob]: ...
    @overload
    def __getitem__(self, index: slice) -> "ScoredTokens": ...
    def __getitem__(self, index: int | slice) -> "dict[int, Logprob] | ScoredTokens":
        if isinstance(index, slice):
            return ScoredTokens(self.token_ids[index], self.rows[index], self.num_top, self.texts)
        return self._entry(self.token_ids[index], *self.rows[index])

    def to_list(self) -> list[dict[int, Logprob]]:
        """All of them."""
        return list(self)

    def behind_first(self) -> list[dict[int, Logprob] | None]:
        """All of them, after the None of a prompt's first token."""
        return [None, *self]

    def _entry(self, token_id: int, scores: TokenScores, row: int) -> dict[int, Logprob]:
        """The most probable tokens, best first, and the chosen one if it is not among them."""
        num_top = min(self.num_top, scores.top_ids.shape[1])
        top_ids, top_logprobs = scores.top_ids[row, :num_top].tolist(), scores.top_logprobs[row, :num_top].tolist()
        pairs = enumerate(zip(top_ids, top_logprobs, strict=True), 1)
        found = {each: Logprob(logprob, rank, self._text(each)) for rank, (each, logprob) in pairs}
        found[token_id] = Logprob(float(scores.logprobs[row]), int(scores.ranks[row]), self._text(token_id))
        return found

    def _text(self, token_id: int) -> str | None:
        return None if self.texts is None else self.texts.text(token_id)
