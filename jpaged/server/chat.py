"""``/v1/chat/completions``: the next message of a conversation."""

from collections.abc import Sequence
from time import monotonic, time
from typing import Any

from starlette.requests import Request

from jpaged.request import CompletionDelta, CompletionOutput, RequestOutput
from jpaged.server.answer import Answer
from jpaged.server.protocol.body import read_body
from jpaged.server.protocol.chat import ChatBody
from jpaged.server.protocol.results import chat_logprobs, prompt_logprobs, usage_of, without_output
from jpaged.server.state import Call, Server, server_of


async def chat(request: Request) -> Answer:
    """Answer a conversation."""
    server = server_of(request)
    body = await read_body(request, ChatBody, is_strict=server.settings.strict_params)
    arrived = monotonic()
    body.check()
    server.check_model(body.model)
    params = body.params(body.num_logprobs, server.llm.engine.sampling_defaults)
    token_ids = await server.template.render(body)
    call = server.make_call(request, "chatcmpl", [token_ids], params, body, arrived)
    return Answer(server, call, ChatForm(server, call, body), body)


class ChatForm:
    """The form of the responses of one call.

    Args:
        server: the server.
        call: the call.
        body: the body of the request.
    """

    text_frame: tuple[bytes, bytes] = (b'"delta":{"content":', b'},"logprobs":null,"finish_reason":null')

    def __init__(self, server: Server, call: Call, body: ChatBody) -> None:
        self._call = call
        self._body = body
        self._bytes_of = server.codec.bytes_of
        self.needs_choice = body.num_logprobs is not None or bool(body.return_token_ids)
        self._head = {"id": call.call_id, "created": int(time()), "model": server.model_name}
        self.chunk_head = self._head | {"object": "chat.completion.chunk"}

    def whole(self, results: Sequence[RequestOutput]) -> dict[str, Any]:
        if self._body.token_limit == 0:
            results = [without_output(result) for result in results]
        [result] = results
        fields = self._head | {
            "object": "chat.completion",
            "choices": [self._whole_choice(output) for output in result.outputs],
            "usage": usage_of(results),
        }
        if self._body.prompt_logprobs is not None:
            fields["prompt_logprobs"] = prompt_logprobs(result.prompt_logprobs or ())
        if self._body.return_token_ids:
            fields["prompt_token_ids"] = result.prompt_token_ids
        return fields

    def _whole_choice(self, output: CompletionOutput) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": output.index,
            "message": {"role": "assistant", "content": output.text, "refusal": None},
            "logprobs": self._logprobs(output),
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = output.token_ids
        return choice

    def _logprobs(self, output: CompletionOutput | CompletionDelta) -> dict[str, Any] | None:
        if self._body.num_logprobs is None or output.logprobs is None:
            return None
        tokens = zip(output.token_ids, output.logprobs, strict=True)
        return chat_logprobs(tokens, self._body.num_logprobs, self._bytes_of)

    def first_choices(self, number: int, index: int) -> list[dict[str, Any]]:
        choice: dict[str, Any] = {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        if self._body.return_token_ids:
            choice |= {"prompt_token_ids": self._call.prompts[number], "token_ids": []}
        return [choice]

    def choice(self, index: int, delta: CompletionDelta) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": index,
            "delta": {"content": delta.text} if delta.text else {},
            "logprobs": self._logprobs(delta) if delta.token_ids else None,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = delta.token_ids
        return choice
