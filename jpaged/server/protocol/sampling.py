"""The fields that completions and chats share, and the ``SamplingParams`` that they mean."""

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from jpaged.request import MAX_LOGIT_BIAS, RequestOutputKind, SamplingParams
from jpaged.server.errors import ApiError, refusals
from jpaged.server.protocol.body import Body, ignored_header

MAX_CHARACTERS = 4096
"""Most characters of all stop strings together, and of all bad words, which every prompt of a request tokenises."""

MAX_STOP_TOKEN_IDS = 1024

_SAMPLING = (
    "n", "best_of", "use_beam_search", "length_penalty", "early_stopping", "temperature", "top_p", "top_k", "min_p",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "stop", "stop_token_ids",
    "include_stop_str_in_output", "ignore_eos", "min_tokens", "bad_words", "allowed_token_ids", "skip_special_tokens",
    "prompt_logprobs",
)  # fmt: skip

_NO_STRUCTURE = "structured output is not supported: leave {name} out"
_NO_TOOLS = "tool calls are not supported: leave {name} out"
_REFUSED: dict[str, tuple[str, tuple[Any, ...]]] = {
    "response_format": (_NO_STRUCTURE, ({"type": "text"},)),
    "structured_outputs": (_NO_STRUCTURE, ({},)),
    "guided_json": (_NO_STRUCTURE, ()),
    "guided_regex": (_NO_STRUCTURE, ()),
    "guided_choice": (_NO_STRUCTURE, ()),
    "guided_grammar": (_NO_STRUCTURE, ()),
    "tools": (_NO_TOOLS, ([],)),
    "tool_choice": (_NO_TOOLS, ("none", "auto")),
    "functions": (_NO_TOOLS, ([],)),
    "function_call": (_NO_TOOLS, ("none", "auto")),
    "suffix": ("text is not filled in before a suffix: leave {name} out", ("",)),
    "modalities": ("answers are text: leave {name} out", (["text"],)),
    "audio": ("answers are text: leave {name} out", ()),
    "chat_template": ("the model's own chat template is used: leave {name} out", ()),
}
"""Fields that would change the answer, why they are refused, and the values that change nothing."""

Count = Annotated[int, Field(ge=-(2**31), lt=2**31)]
CacheSalt = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:/+=-]{1,128}$")]
Ids = Annotated[list[int], Field(max_length=1 << 20)]


class StreamOptions(BaseModel):
    """The fields of ``stream_options``."""

    model_config = ConfigDict(strict=True, frozen=True)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationBody(Body):
    """The body of a request for text. None is a field that is not given."""

    n: int | None = None
    best_of: int | None = None
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    early_stopping: bool | str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Count | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=MAX_LOGIT_BIAS)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: Annotated[list[Count], Field(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    max_tokens: Count | None = None
    min_tokens: Count | None = None
    prompt_logprobs: int | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: Ids | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Count | None = None
    cache_salt: CacheSalt | None = None
    return_token_ids: bool | None = None
    user: str | None = None

    @property
    def ignored(self) -> list[str]:
        return [name for name in super().ignored if name not in _REFUSED]

    @property
    def is_streamed(self) -> bool:
        """Whether the answer comes as events."""
        return bool(self.stream)

    @property
    def token_limit(self) -> int | None:
        """Most tokens to generate; None fills the context."""
        return self.max_tokens

    def headers(self) -> dict[str, str]:
        """Headers of the response: the ignored fields, and the seed as the engine takes it."""
        seed = {} if self.seed is None else {"x-jpaged-seed": str(self.seed % 2**32)}
        return ignored_header(self) | seed

    def check(self) -> None:
        """Refuse what would change the answer and cannot.

        Raises:
            ApiError: 400, with the field.
        """
        for name, value in (self.model_extra or {}).items():
            if name in _REFUSED and value is not None:
                message, harmless = _REFUSED[name]
                if value not in harmless:
                    raise ApiError(400, message.format(name=name), code="unsupported_parameter", param=name)
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options goes with stream=true only", param="stream_options")
        if self.stream and self.prompt_logprobs is not None:
            raise ApiError(400, "prompt_logprobs does not go with stream=true", param="prompt_logprobs")
        if self.stream and self.best_of is not None and self.best_of != (self.n or 1) and not self.use_beam_search:
            raise ApiError(400, "best_of with stream=true has to be equal to n", param="best_of")
        for name in ("stop", "bad_words"):
            texts = getattr(self, name) or ()
            if sum(map(len, texts)) > MAX_CHARACTERS:
                raise ApiError(400, f"{name} has more than {MAX_CHARACTERS} characters", param=name)

    def params(self, logprobs: int | None, defaults: Mapping[str, Any]) -> SamplingParams:
        """The sampling parameters. Where no token is asked for, one is generated, and is to be hidden.

        Args:
            logprobs: alternatives of each token; None asks for none.
            defaults: the parameters of drawing that the checkpoint recommends.

        Raises:
            ApiError: 400, with the reason.
        """
        given: dict[str, Any] = {name: value for name in _SAMPLING if (value := getattr(self, name)) is not None}
        if self.use_beam_search:
            defaults = {"temperature": 0.0}
        if self.logit_bias is not None:
            given["logit_bias"] = {_token_id(key): value for key, value in self.logit_bias.items()}
        if self.seed is not None:
            given["seed"] = self.seed % 2**32
        limit = defaults.get("max_tokens") if self.token_limit is None else self.token_limit
        kind = RequestOutputKind.DELTA if self.stream else RequestOutputKind.FINAL_ONLY
        with refusals(type(self).model_fields):
            options = {"max_tokens": 1 if limit == 0 else limit, "logprobs": logprobs, "output_kind": kind}
            return SamplingParams(**{**defaults, **given, **options})


def _token_id(key: str) -> int:
    if re.fullmatch(r"[0-9]{1,10}", key) is None:
        raise ApiError(400, f"logit_bias has {key[:32]!r}: expected token ids, in quotes", param="logit_bias")
    return int(key)
