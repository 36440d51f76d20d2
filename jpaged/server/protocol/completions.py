"""The body of ``/v1/completions``."""

from typing import Any

from jpaged.server.errors import ApiError
from jpaged.server.protocol.sampling import GenerationBody

DEFAULT_MAX_TOKENS = 16
"""OpenAI's own."""


class CompletionBody(GenerationBody):
    """The body of ``/v1/completions``: ``prompt`` is a text, token ids, or a list of either."""

    prompt: Any
    echo: bool | None = None
    logprobs: int | None = None
    add_special_tokens: bool | None = None

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if "max_tokens" in self.model_fields_set else DEFAULT_MAX_TOKENS

    def check(self) -> None:
        super().check()
        if self.echo and self.stream and self.logprobs is not None:
            raise ApiError(400, "echo with logprobs does not go with stream=true", param="echo")

    def prompts(self, most: int) -> list[str | list[int]]:
        """The prompts: see ``prompts_of``."""
        return prompts_of(self.prompt, most)


def prompts_of(prompt: Any, most: int) -> list[str | list[int]]:
    """The prompts of a field, each of which is a text or a list of token ids.

    Args:
        prompt: a text, token ids, or a list of either.
        most: prompts that a request may have.

    Raises:
        ApiError: 400 for anything else.
    """
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and _is_int(prompt[0])):
        prompt = [prompt]
    expected = "expected a text, a list of token ids, or a list of either"
    if not isinstance(prompt, list) or not prompt:
        raise ApiError(400, f"prompt is not valid: {expected}", param="prompt")
    if len(prompt) > most:
        raise ApiError(400, f"prompt has {len(prompt)} prompts: at most {most} are taken", param="prompt")
    if not (all(isinstance(each, str) for each in prompt) or all(_is_ids(each) for each in prompt)):
        raise ApiError(400, f"prompt is not valid: {expected}, not a mixture", param="prompt")
    return prompt


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_ids(value: Any) -> bool:
    # A body has millions of them, and the event loop waits: all types at once take a tenth of the time.
    return isinstance(value, list) and set(map(type, value)) == {int}
