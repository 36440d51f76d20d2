"""The body of ``/v1/chat/completions``, and its messages."""

from typing import Annotated, Any

from pydantic import Field

from jpaged.engine.chat import content_text
from jpaged.server.errors import ApiError, refusals
from jpaged.server.protocol.sampling import GenerationBody

MAX_MESSAGES = 2048
MAX_NESTING = 64
"""Most levels of lists and objects in the tool calls of a message."""

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_TEXT_FIELDS = "name", "tool_call_id", "reasoning_content"


class ChatOptions(GenerationBody):
    """The fields that say how messages become a prompt."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MAX_MESSAGES)]
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, bool | int | float | str | None] | None = None
    reasoning_effort: str | None = None

    def conversation(self) -> list[dict[str, Any]]:
        """The messages as the model's chat template takes them: contents are texts.

        Raises:
            ApiError: 400 for a message of another form.
        """
        with refusals(["messages"]):
            return [_message(i, message) for i, message in enumerate(self.messages)]

    def template_options(self, known: frozenset[str]) -> dict[str, Any]:
        """The arguments of the chat template.

        Args:
            known: names that the request may set.

        Raises:
            ApiError: 400 for a name that it may not set.
        """
        kwargs: dict[str, Any] = dict(self.chat_template_kwargs or {})
        if unknown := sorted(kwargs.keys() - known):
            raise ApiError(
                400,
                f"chat_template_kwargs has {unknown[0][:64]!r}: the template of this model takes "
                f"{', '.join(sorted(known)) or 'none'}",
                param="chat_template_kwargs",
            )
        if self.reasoning_effort is not None and "reasoning_effort" in known:
            kwargs.setdefault("reasoning_effort", self.reasoning_effort)
        continues = bool(self.continue_final_message)
        adds = not continues if self.add_generation_prompt is None else self.add_generation_prompt
        return {"chat_template_kwargs": kwargs, "continue_final_message": continues, "add_generation_prompt": adds}


class ChatBody(ChatOptions):
    """The body of ``/v1/chat/completions``."""

    max_completion_tokens: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives of each token; None asks for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def check(self) -> None:
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs goes with logprobs=true only", param="top_logprobs")


def _message(i: int, message: dict[str, Any]) -> dict[str, Any]:
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise ApiError(400, f"messages[{i}].role is not valid: expected one of {', '.join(_ROLES)}", param="messages")
    fields: dict[str, Any] = {
        "role": _ROLES[role],
        "content": content_text(message.get("content"), f"messages[{i}].content"),
    }
    given = message | {"reasoning_content": message.get("reasoning_content") or message.get("reasoning")}
    for name in _TEXT_FIELDS:
        if (value := given.get(name)) is not None:
            if not isinstance(value, str):
                raise ApiError(400, f"messages[{i}].{name} is not valid: expected a text", param="messages")
            fields[name] = value
    if tool_calls := message.get("tool_calls"):
        is_list = isinstance(tool_calls, list) and all(isinstance(each, dict) for each in tool_calls)
        if not is_list or not _is_shallow(tool_calls, MAX_NESTING):
            raise ApiError(
                400,
                f"messages[{i}].tool_calls is not valid: expected a list of objects, nested at most {MAX_NESTING} deep",
                param="messages",
            )
        fields["tool_calls"] = tool_calls
    return fields


def _is_shallow(value: Any, most: int) -> bool:
    """Whether a value of JSON has at most so many levels."""
    if isinstance(value, dict):
        value = list(value.values())
    return not isinstance(value, list) or (most > 0 and all(_is_shallow(each, most - 1) for each in value))
