"""Parts of responses: log-probabilities and usage, as OpenAI's clients read them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from jpaged.request import CompletionDelta, FinishReason, Logprob, RequestOutput

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say."""

TokenLogprobs = Sequence[tuple[int, dict[int, Logprob] | None]]
"""Tokens with the log-probabilities at their positions; None where nothing precedes the token."""

ChosenLogprobs = Iterable[tuple[int, dict[int, Logprob]]]
"""Tokens with the log-probabilities at their positions."""

BytesOf = Callable[[int, str], list[int]]


def usage(num_prompt_tokens: int, num_output_tokens: int, num_cached_tokens: int) -> dict[str, Any]:
    """The tokens of a call."""
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_output_tokens,
        "total_tokens": num_prompt_tokens + num_output_tokens,
        "prompt_tokens_details": {"cached_tokens": num_cached_tokens},
    }


def usage_of(results: Sequence[RequestOutput]) -> dict[str, Any]:
    """The tokens of finished requests."""
    return usage(
        sum(len(result.prompt_token_ids) for result in results),
        sum(len(output.token_ids) for result in results for output in result.outputs),
        sum(result.num_cached_tokens for result in results),
    )


def finite(logprob: float) -> float:
    """A log-probability that JSON can say."""
    return max(logprob, LEAST_LOGPROB)


def completion_logprobs(
    tokens: TokenLogprobs, text_offsets: list[int], decode_one: Callable[[int], str]
) -> dict[str, Any]:
    """The log-probabilities of ``/v1/completions``.

    ``top_logprobs`` is keyed by text. Where tokens have the same text, the most probable token stays. The chosen token
    is thus the greatest entry only if no other token is more probable.

    Args:
        tokens: the tokens.
        text_offsets: characters before each token.
        decode_one: the text of a token.
    """
    texts: list[str] = []
    chosen: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    for token_id, entries in tokens:
        if entries is None:
            texts.append(decode_one(token_id))
            chosen.append(None)
            tops.append(None)
        else:
            texts.append(token_text(token_id, entries[token_id]))
            chosen.append(finite(entries[token_id].logprob))
            top: dict[str, float] = {}
            for each, entry in entries.items():
                text, logprob = token_text(each, entry), finite(entry.logprob)
                top[text] = max(top.get(text, logprob), logprob)
            tops.append(top)
    return {"tokens": texts, "token_logprobs": chosen, "top_logprobs": tops, "text_offset": text_offsets}


def chat_logprobs(tokens: ChosenLogprobs, num_top: int, bytes_of: BytesOf) -> dict[str, Any]:
    """The log-probabilities of ``/v1/chat/completions``.

    Args:
        tokens: the tokens.
        num_top: alternatives of each token.
        bytes_of: the bytes of a token of which the id and the text are given.
    """

    def entry(token_id: int, logprob: Logprob) -> dict[str, Any]:
        text = token_text(token_id, logprob)
        return {"token": text, "logprob": finite(logprob.logprob), "bytes": bytes_of(token_id, text)}

    content = []
    for token_id, entries in tokens:
        best = [entry(*each) for each in entries.items() if each[1].rank <= num_top][:num_top]
        content.append(entry(token_id, entries[token_id]) | {"top_logprobs": best})
    return {"content": content, "refusal": None}


def prompt_logprobs(entries: Sequence[dict[int, Logprob] | None]) -> list[dict[str, Any] | None]:
    """The log-probabilities of a prompt, in vLLM's form."""
    return [
        None
        if each is None
        else {
            str(token_id): {
                "logprob": finite(entry.logprob),
                "rank": entry.rank,
                "decoded_token": token_text(token_id, entry),
            }
            for token_id, entry in each.items()
        }
        for each in entries
    ]


def token_text(token_id: int, entry: Logprob) -> str:
    """The text of a token; without a tokenizer its id, as vLLM writes it."""
    return f"token_id:{token_id}" if entry.decoded_token is None else entry.decoded_token


def without_output(result: RequestOutput) -> RequestOutput:
    """A result as if no token had been asked for: the engine computes at least one."""
    outputs = [
        replace(each, text="", token_ids=[], logprobs=[], finish_reason=FinishReason.LENGTH, stop_reason=None)
        for each in result.outputs
    ]
    return replace(result, outputs=outputs)


def without_tokens(delta: CompletionDelta) -> CompletionDelta:
    """A last delta as if no token had been asked for."""
    return delta._replace(text="", token_ids=[], logprobs=[], finish_reason=FinishReason.LENGTH, stop_reason=None)
