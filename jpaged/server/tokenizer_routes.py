"""``/tokenize``, ``/detokenize`` and ``/tokenizer_info``: the model's tokenizer over HTTP."""

from typing import Annotated, Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from jpaged.server.json_response import OrjsonResponse
from jpaged.server.protocol.body import Body, ignored_header, parse, read_body, read_fields
from jpaged.server.protocol.chat import ChatOptions
from jpaged.server.state import server_of


class TokenizeBody(Body):
    """The body of ``/tokenize`` for a text."""

    prompt: str
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeChatBody(ChatOptions):
    """The body of ``/tokenize`` for a conversation."""

    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    """The body of ``/detokenize``."""

    tokens: list[Annotated[int, Field(ge=0, lt=2**31)]]
    skip_special_tokens: bool | None = None


async def tokenize(request: Request) -> Response:
    """Turn a text or a conversation into token ids."""
    server, fields = server_of(request), await read_fields(request)
    server.admission.count(request.state.key)
    kind = TokenizeChatBody if "messages" in fields else TokenizeBody
    body = parse(kind, fields, is_strict=server.settings.strict_params)
    server.check_model(body.model)
    if isinstance(body, TokenizeChatBody):
        body.check()
        token_ids = await server.template.render(body)
    else:
        [token_ids] = await server.codec.encode([body.prompt], add_special_tokens=body.add_special_tokens is not False)
    server.admission.count_tokens(request.state.key, len(token_ids))
    content: dict[str, Any] = {
        "count": len(token_ids),
        "max_model_len": server.llm.max_model_len,
        "tokens": token_ids,
        "token_strs": await server.codec.tokens_of(token_ids) if body.return_token_strs else None,
    }
    return OrjsonResponse(content, 200, ignored_header(body))


async def detokenize(request: Request) -> Response:
    """Turn token ids into text."""
    server = server_of(request)
    body = await read_body(request, DetokenizeBody, is_strict=server.settings.strict_params)
    server.check_model(body.model)
    server.admission.count(request.state.key)
    server.admission.count_tokens(request.state.key, len(body.tokens))
    text = await server.codec.decode(body.tokens, skip_special_tokens=bool(body.skip_special_tokens))
    return OrjsonResponse({"prompt": text}, 200, ignored_header(body))


async def tokenizer_info(request: Request) -> Response:
    """Describe the tokenizer: its special tokens and its chat template."""
    tokenizer = server_of(request).codec.tokenizer
    specials = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    template = getattr(tokenizer, "chat_template", None)
    content: dict[str, Any] = dict.fromkeys(("eos_token", "bos_token", "pad_token")) | specials
    content |= {
        "tokenizer_class": type(tokenizer).__name__,
        "vocab_size": len(tokenizer),
        "chat_template": template if isinstance(template, str) else None,
    }
    return OrjsonResponse(content)
