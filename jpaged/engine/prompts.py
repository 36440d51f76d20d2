"""Prompts: what callers may give, checked and turned into token ids."""

import hashlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NotRequired, TypedDict

import numpy as np

from jpaged.engine.detokenizer import Tokenizer
from jpaged.engine.token_texts import special_tokens
from jpaged.models import ModelConfig
from jpaged.request import BeamSearchParams, Request, SamplingParams


class TextPrompt(TypedDict):
    """A prompt given as text. Prompts share cached KV only if their ``cache_salt`` is equal or both have none."""

    prompt: str
    cache_salt: NotRequired[str]


class TokensPrompt(TypedDict):
    """A prompt given as token ids; ``cache_salt`` as in ``TextPrompt``."""

    prompt_token_ids: list[int]
    cache_salt: NotRequired[str]


Prompt = str | TextPrompt | TokensPrompt

Bans = tuple[Sequence[int], tuple[tuple[int, ...], ...]]
"""The tokens that are never drawn, and the sequences of tokens that are not drawn one after the other."""


class PromptReader:
    """Makes requests of prompts: checks them against the vocabulary, and tokenises text.

    Args:
        tokenizer: turns text into token ids; None refuses text.
        model_config: the vocabulary, and what a prompt's KV depends on besides its tokens.
        default_params: sampling parameters of requests that give none.
    """

    def __init__(self, tokenizer: Tokenizer | None, model_config: ModelConfig, default_params: SamplingParams) -> None:
        self._tokenizer = tokenizer
        self._default_params = default_params
        self._model_config = model_config
        self._special_tokens = special_tokens(tokenizer)
        self._latest_bans: tuple[Any, Bans] = None, ((), ())

    def read(self, request_id: str, prompt: Prompt, params: SamplingParams | None, priority: int) -> Request:
        """Make a request.

        Raises:
            ValueError: a prompt that is empty or out of the vocabulary, or parameters that do not fit this model.
        """
        params = self._default_params if params is None else params
        if not isinstance(params, SamplingParams):
            raise ValueError(f"sampling_params is a {type(params).__name__}: expected SamplingParams")
        if not isinstance(priority, int) or isinstance(priority, bool):
            raise ValueError(f"priority={priority!r} is not valid: expected an integer, lower is served first")
        if isinstance(prompt, str):
            prompt = {"prompt": prompt}
        _check_keys(prompt)
        text = prompt.get("prompt")
        if "prompt" in prompt:
            token_ids = self._check_ids("the prompt", self._tokenize(text))
        else:
            token_ids = self._check_ids("prompt_token_ids", _as_list(prompt["prompt_token_ids"]))
        for name in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
            if ids := getattr(params, name):
                self._check_last(name, ids)
        if params.stop and self._tokenizer is None:
            raise ValueError(f"stop={params.stop!r} needs a tokenizer, and this model has none: use stop_token_ids")
        salt = self._model_config.prefix_salt(len(token_ids))
        if (cache_salt := prompt.get("cache_salt")) is not None:
            salt += hashlib.sha256(cache_salt.encode(errors="surrogatepass")).digest()
        banned_token_ids, banned_sequences = self._bans(params)
        return Request(
            request_id,
            text,
            token_ids,
            params,
            params.seed,
            salt,
            priority,
            banned_token_ids=banned_token_ids,
            banned_sequences=banned_sequences,
            special_stops=self._special_stops(params),
        )

    def _special_stops(self, params: SamplingParams) -> dict[int, str]:
        specials = self._special_tokens if params.stop else {}
        found = {specials[stop]: stop for stop in params.stop_strings if stop in specials}
        return {token_id: stop for token_id, stop in found.items() if token_id < self._model_config.vocab_size}

    def _bans(self, params: SamplingParams) -> Bans:
        """The bans of some parameters; those of many prompts of one call are found once."""
        bad_words, allowed = params.bad_words, params.allowed_token_ids
        if not bad_words and allowed is None:
            return (), ()
        asked = tuple(bad_words or ()), None if allowed is None else tuple(allowed)
        latest, bans = self._latest_bans
        if asked != latest:
            bans = self._find_bans(params)
            self._latest_bans = asked, bans
        return bans

    def _find_bans(self, params: SamplingParams) -> Bans:
        if params.bad_words and self._tokenizer is None:
            raise ValueError("bad_words needs a tokenizer, and this model has none: use logit_bias")
        words = [self._token_ids_of(word) for word in params.bad_words or ()]
        sequences = dict.fromkeys([each for variants in words for each in variants])
        banned = {each[0] for each in sequences if len(each) == 1}
        if params.allowed_token_ids is not None:
            banned |= set(range(self._model_config.vocab_size)) - set(params.allowed_token_ids)
        if len(banned) == self._model_config.vocab_size:
            raise ValueError("bad_words bans every one of allowed_token_ids: no token is left to draw")
        return array("i", sorted(banned)), tuple([each for each in sequences if len(each) > 1])

    def _token_ids_of(self, word: str) -> list[tuple[int, ...]]:
        """The token ids of a word, at the beginning of a text and after a space."""
        tokenizer: Any = self._tokenizer
        texts = word.lstrip(), f" {word.lstrip()}"
        return [tuple(tokenizer.encode(text, add_special_tokens=False)) for text in texts]

    def _tokenize(self, text: Any) -> list[int]:
        if self._tokenizer is None:
            raise ValueError("this model has no tokenizer: give the prompt as {'prompt_token_ids': [...]}")
        if not isinstance(text, str):
            raise ValueError(f"prompt={text!r} is not valid: expected a string")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the prompt is no valid text ({error}): remove the lone surrogates") from None
        token_ids = list(self._tokenizer.encode(text))
        if not token_ids:  # of an empty text, some tokenizers make the token that begins a text
            raise ValueError("the prompt is empty: give at least one character")
        return token_ids

    def _check_ids(self, where: str, token_ids: Any) -> list[int]:
        """The ids as plain integers, all of them in the vocabulary."""
        vocab_size, checked = self._model_config.vocab_size, []
        for i, token_id in enumerate(token_ids):
            is_int = isinstance(token_id, int | np.integer) and not isinstance(token_id, bool)
            if not is_int or not 0 <= token_id < vocab_size:
                raise ValueError(
                    f"{where}[{i}]={token_id!r} is not valid: expected token ids from 0 to {vocab_size - 1}, the "
                    "model's vocabulary"
                )
            checked.append(int(token_id))
        return checked

    def _check_last(self, name: str, token_ids: Iterable[int]) -> None:
        if (largest := max(token_ids)) >= self._model_config.vocab_size:
            last = self._model_config.vocab_size - 1
            raise ValueError(f"{name} has token id {largest}: the model's vocabulary ends at {last}")


def pair_up(prompts: Any, sampling_params: Any, priority: Any) -> list[tuple[Any, Any, Any]]:
    """Prompt, sampling parameters and priority of each request of a call. Their values are not checked.

    Args:
        prompts: one or many.
        sampling_params: one for all, or one each; None is the default.
        priority: one for all, or one each.

    Raises:
        ValueError: not a list where one is expected, or lists of different lengths.
    """
    if isinstance(prompts, str | Mapping):
        prompts = [prompts]
    if not isinstance(prompts, Iterable):
        raise ValueError(f"prompts={prompts!r} is not valid: expected a prompt or a list of prompts")
    prompts = list(prompts)
    if sampling_params is None or isinstance(sampling_params, SamplingParams):
        sampling_params = [sampling_params] * len(prompts)
    if isinstance(sampling_params, str | Mapping) or not isinstance(sampling_params, Sequence):
        raise ValueError(f"sampling_params={sampling_params!r} is not valid: expected SamplingParams or a list of them")
    if len(sampling_params) != len(prompts):
        raise ValueError(
            f"{len(sampling_params)} sampling_params for {len(prompts)} prompts: give one for all, or one each"
        )
    priority = 0 if priority is None else priority
    priorities = priority if isinstance(priority, list | tuple) else [priority] * len(prompts)
    if len(priorities) != len(prompts):
        raise ValueError(f"{len(priorities)} priorities for {len(prompts)} prompts: give one for all, or one each")
    return list(zip(prompts, sampling_params, priorities, strict=True))


def as_sampling_params(params: Any) -> SamplingParams | list[SamplingParams]:
    """The parameters of beam searches as those of ``LLM.generate``, one or a list.

    Raises:
        ValueError: anything else than BeamSearchParams or a list of them.
    """
    many = [params] if isinstance(params, BeamSearchParams) else params
    if not isinstance(many, list | tuple) or not all(isinstance(one, BeamSearchParams) for one in many):
        raise ValueError(f"params={params!r} is not valid: expected BeamSearchParams or a list of them")
    each = [one.to_sampling_params() for one in many]
    return each[0] if isinstance(params, BeamSearchParams) else each


def _check_keys(prompt: Any) -> None:
    if not isinstance(prompt, Mapping) or ("prompt" in prompt) == ("prompt_token_ids" in prompt):
        raise ValueError(
            f"prompt={prompt!r} is not valid: expected a string, {{'prompt': ...}} or {{'prompt_token_ids': [...]}}"
        )
    unknown = prompt.keys() - {"prompt", "prompt_token_ids", "cache_salt"}
    if unknown:
        raise ValueError(f"prompt has {sorted(unknown, key=str)}: expected prompt or prompt_token_ids, and cache_salt")
    cache_salt = prompt.get("cache_salt")
    if cache_salt is not None and not isinstance(cache_salt, str):
        raise ValueError(f"cache_salt={cache_salt!r} is not valid: expected a string")


def _as_list(token_ids: Any) -> Sequence[Any] | np.ndarray:
    if isinstance(token_ids, str) or not isinstance(token_ids, Sequence | np.ndarray):
        raise ValueError(f"prompt_token_ids={token_ids!r} is not valid: expected a list of integers")
    if len(token_ids) == 0:
        raise ValueError("prompt_token_ids is empty: give at least one token")
    return token_ids
