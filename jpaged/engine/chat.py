"""Conversations: messages to the text that the model's chat template makes of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from jpaged.engine.prompts import TokensPrompt

ChatMessage = Mapping[str, Any]
"""A message: ``{"role": "user", "content": "..."}``."""


def render_chat(
    tokenizer: Any,
    messages: Sequence[ChatMessage],
    *,
    chat_template: str | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: list[dict[str, Any]] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[str, list[int]]:
    """The text and the token ids of a conversation.

    Args:
        tokenizer: the model's Hugging Face tokenizer.
        messages: the messages in order.
        chat_template: a template other than the tokenizer's own.
        add_generation_prompt: whether the text ends with the beginning of the assistant's answer.
        continue_final_message: whether the answer continues the last message instead.
        tools: the tools that the template describes to the model.
        chat_template_kwargs: further variables of the template.

    Raises:
        ValueError: no tokenizer or no template, messages of a wrong form, or messages that the template refuses.
    """
    if getattr(tokenizer, "apply_chat_template", None) is None:
        raise ValueError("this model has no tokenizer, and so no chat template: use generate with token ids")
    if chat_template is None and getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("this model has no chat template, so it is not made for conversation: use generate")
    _check(messages)
    from jinja2 import TemplateError

    if add_generation_prompt and continue_final_message:
        raise ValueError("continue_final_message=True goes with add_generation_prompt=False only")
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            tokenize=False,
            **dict(chat_template_kwargs or {}),
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise ValueError(f"the chat template refuses the messages: {error}") from error
    return text, list(tokenizer.encode(text, add_special_tokens=False))


def render_chats(tokenizer: Any, messages: Any, **options: Any) -> tuple[list[str], list[TokensPrompt]]:
    """The texts and the prompts of one conversation or a list of them; see ``render_chat``."""
    is_one = isinstance(messages, Sequence) and len(messages) > 0 and isinstance(messages[0], Mapping)
    rendered = [render_chat(tokenizer, each, **options) for each in ([messages] if is_one else messages)]
    return [text for text, _ in rendered], [{"prompt_token_ids": token_ids} for _, token_ids in rendered]


def _check(messages: Any) -> None:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"messages={messages!r} is not valid: expected a non-empty list of messages")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"messages[{i}]={message!r} is not valid: expected a mapping with a role and a content")
