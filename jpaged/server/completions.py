"""``/v1/completions``: prompts as text or token ids, continued."""

from collections.abc import Sequence
from dataclasses import replace
from time import monotonic, time
from typing import Any

from starlette.requests import Request

from jpaged.engine.token_texts import TextOffsets
from jpaged.request import CompletionDelta, CompletionOutput, RequestOutput
from jpaged.server.answer import Answer
from jpaged.server.protocol.body import read_body
from jpaged.server.protocol.completions import CompletionBody
from jpaged.server.protocol.results import (
    completion_logprobs,
    prompt_logprobs,
    usage_of,
    without_output,
)
from jpaged.server.state import Call, Server, server_of


async def completions(request: Request) -> Answer:
    """Continue prompts."""
    server = server_of(request)
    body = await read_body(request, CompletionBody, is_strict=server.settings.strict_params)
    arrived = monotonic()
    body.check()
    server.check_model(body.model)
    params = body.params(body.logprobs, server.llm.engine.sampling_defaults)
    if body.echo and body.logprobs is not None:
        params = replace(params, prompt_logprobs=max(body.logprobs, params.prompt_logprobs or 0))
    given = body.prompts(server.settings.max_prompts)
    texts = [each for each in given if isinstance(each, str)]
    token_ids = [each for each in given if not isinstance(each, str)]
    if texts:
        token_ids = await server.codec.encode(texts, add_special_tokens=body.add_special_tokens is not False)
    elif body.echo:
        texts = [await server.codec.decode(each) for each in token_ids]
    call = server.make_call(request, "cmpl", token_ids, params, body, arrived)
    return Answer(server, call, CompletionForm(server, call, body, texts), body)


class CompletionForm:
    """The form of the responses of one call.

    Args:
        server: the server.
        call: the call.
        body: the body of the request.
        texts: the text of each prompt, for ``echo``.
    """

    text_frame: tuple[bytes, bytes] = (b'"text":', b',"logprobs":null,"finish_reason":null')

    def __init__(self, server: Server, call: Call, body: CompletionBody, texts: Sequence[str]) -> None:
        self._call = call
        self._body = body
        self._texts = texts if body.echo else [""] * len(call.prompts)
        self._codec = server.codec
        self._offsets: dict[int, TextOffsets] = {}  # by choice
        self.needs_choice = body.logprobs is not None or bool(body.return_token_ids)
        self.chunk_head = {
            "id": call.call_id,
            "object": "text_completion",
            "created": int(time()),
            "model": server.model_name,
        }

    # Whole ------------------------------------------------------------------------------------------------------------

    def whole(self, results: Sequence[RequestOutput]) -> dict[str, Any]:
        if self._body.token_limit == 0:
            results = [without_output(result) for result in results]
        choices = [
            self._whole_choice(number, result, output)
            for number, result in enumerate(results)
            for output in result.outputs
        ]
        return self.chunk_head | {"choices": choices, "usage": usage_of(results)}

    def _whole_choice(self, number: int, result: RequestOutput, output: CompletionOutput) -> dict[str, Any]:
        body = self._body
        choice: dict[str, Any] = {
            "index": number * self._call.params.n + output.index,
            "text": self._texts[number] + output.text,
            "logprobs": None,
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }
        if body.logprobs is not None:
            tokens: list[Any] = list(zip(output.token_ids, output.logprobs or (), strict=True))
            offsets = self._output_offsets(number).extend(output.token_ids)
            if body.echo:
                tokens = [*zip(result.prompt_token_ids, result.prompt_logprobs or (), strict=True), *tokens]
                before = self._codec.prompt_offsets(self._texts[number])
                offsets = [*before.extend(result.prompt_token_ids), *offsets]
            choice["logprobs"] = completion_logprobs(tokens, offsets, self._codec.decode_one)
        if body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(result.prompt_logprobs or ())
        if body.return_token_ids:
            choice |= {"prompt_token_ids": result.prompt_token_ids, "token_ids": output.token_ids}
        return choice

    def _output_offsets(self, number: int) -> TextOffsets:
        skips = self._call.params.skip_special_tokens
        return self._codec.output_offsets(len(self._texts[number]), skip_special_tokens=skips)

    # Events -----------------------------------------------------------------------------------------------------------

    def first_choices(self, number: int, index: int) -> list[dict[str, Any]]:
        text = self._texts[number]
        if not text and not self._body.return_token_ids:
            return []
        choice: dict[str, Any] = {"index": index, "text": text, "logprobs": None, "finish_reason": None}
        if self._body.return_token_ids:
            choice |= {"prompt_token_ids": self._call.prompts[number], "token_ids": []}
        return [choice]

    def choice(self, index: int, delta: CompletionDelta) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": index,
            "text": delta.text,
            "logprobs": None,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if self._body.logprobs is not None and delta.token_ids:
            if index not in self._offsets:
                self._offsets[index] = self._output_offsets(index // self._call.params.n)
            tokens = list(zip(delta.token_ids, delta.logprobs or (), strict=True))
            offsets = self._offsets[index].extend(delta.token_ids)
            choice["logprobs"] = completion_logprobs(tokens, offsets, self._codec.decode_one)
        if self._body.return_token_ids:
            choice["token_ids"] = delta.token_ids
        return choice
