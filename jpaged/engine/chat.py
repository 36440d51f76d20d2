"""Conversations: messages to the text that the model's chat template makes of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jpaged.engine.prompts import TokensPrompt

ChatMessage = Mapping[str, Any]
"""A message: ``{"role": "user", "content": "..."}``. The content may be a list of parts, all of them texts."""


def render_chat(tokenizer: Any, messages: Sequence[ChatMessage], **options: Any) -> tuple[str, list[int]]:
    """The text and the token ids of a conversation; see ``chat_text``."""
    text = chat_text(tokenizer, messages, **options)
    return text, list(tokenizer.encode(text, add_special_tokens=False))


def chat_text(
    tokenizer: Any,
    messages: Sequence[ChatMessage],
    *,
    chat_template: str | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: list[dict[str, Any]] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    apply: Callable[..., str] | None = None,
) -> str:
    """The text of a conversation.

    Args:
        tokenizer: the model's Hugging Face tokenizer.
        messages: the messages in order.
        chat_template: a template other than the tokenizer's own.
        add_generation_prompt: whether the text ends with the beginning of the assistant's answer.
        continue_final_message: whether the answer continues the last message instead.
        tools: the tools that the template describes to the model.
        chat_template_kwargs: further variables of the template.
        apply: renders in place of the tokenizer's ``apply_chat_template``, with its arguments.

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
    plain = [
        {**message, "content": content_text(message.get("content"), f"messages[{i}].content")}
        for i, message in enumerate(messages)
    ]
    try:
        return (apply or tokenizer.apply_chat_template)(
            plain,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            tokenize=False,
            **dict(chat_template_kwargs or {}),
        )
    except (TemplateError, ArithmeticError, TypeError, ValueError) as error:
        raise ValueError(f"the chat template refuses the messages: {error}") from error


def render_chats(tokenizer: Any, messages: Any, **options: Any) -> tuple[list[str], list[TokensPrompt]]:
    """The texts and the prompts of one conversation or a list of them; see ``render_chat``."""
    is_one = isinstance(messages, Sequence) and len(messages) > 0 and isinstance(messages[0], Mapping)
    rendered = [render_chat(tokenizer, each, **options) for each in ([messages] if is_one else messages)]
    return [text for text, _ in rendered], [{"prompt_token_ids": token_ids} for _, token_ids in rendered]


def content_text(content: Any, name: str) -> str:
    """The content of a message as one text: that of parts has a line break between two of them.

    Args:
        content: a text, a list of ``{"type": "text", "text": "..."}``, or None for no text.
        name: the content's name in errors.

    Raises:
        ValueError: another content, or a part that is no text.
    """
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, Sequence) or isinstance(content, bytes | bytearray):
        raise ValueError(f"{name} is {type(content).__name__}: expected a text or a list of parts")
    texts: list[str] = []
    for i, part in enumerate(content):
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise ValueError(f"{name}[{i}] is no text, its type is {str(kind)[:64]!r}: send text alone")
        texts.append(text)
    return "\n".join(texts)


def _check(messages: Any) -> None:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"messages={messages!r} is not valid: expected a non-empty list of messages")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"messages[{i}]={message!r} is not valid: expected a mapping with a role and a content")
