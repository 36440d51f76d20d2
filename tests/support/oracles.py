"""Oracles: dense attention, cache-free decoding, and Hugging Face's results on tiny checkpoints."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32

from jpaged.models.spec import Attend, LayerSpec
from jpaged.request import RequestOutput, SamplingParams

HF_REFERENCE = Path(__file__).parents[1] / "hf_reference"
HF_CASES = sorted(path.parent.name for path in HF_REFERENCE.glob("*/reference.npz"))
"""The reference checkpoints: directories of ``HF_REFERENCE``, written by its make.py."""

HF_BEAM_CASES = sorted(path.parent.name for path in HF_REFERENCE.glob("*/beams.npz"))
"""Those of ``HF_CASES`` with beam searches, written by its make_beams.py."""

HF_GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logprobs=0, prompt_logprobs=0)
"""Asks for what a ``Continuation`` has."""

HF_PROMPT_LENS = (1, 2, 15, 16, 17, 31, 33, 70)


@dataclass(frozen=True)
class Continuation:
    """A prompt, the 40 greedy tokens Hugging Face continues it with, and its log-probabilities, in float32.

    ``prompt_logprobs`` are those of every prompt token but the first.
    """

    prompt: Int32[np.ndarray, "prompt_len"]
    tokens: Int32[np.ndarray, "num_tokens"]
    logprobs: Float[np.ndarray, "num_tokens"]
    prompt_logprobs: Float[np.ndarray, "prompt_len_less_one"]


def load_reference(case: str) -> dict[int, Continuation]:
    """Hugging Face's continuation by prompt length, for the checkpoint ``HF_REFERENCE / case``."""
    with np.load(HF_REFERENCE / case / "reference.npz") as file:
        names = Continuation.__dataclass_fields__
        return {n: Continuation(**{name: file[f"{name}_{n}"] for name in names}) for n in HF_PROMPT_LENS}


def assert_equals_reference(output: RequestOutput, reference: Continuation) -> None:
    """Tokens, and log-probabilities of prompt and tokens, of a greedy request that asked for them, to 1e-4."""
    completion = output.outputs[0]
    assert completion.token_ids == reference.tokens.tolist()
    chosen = [entry[t].logprob for t, entry in zip(completion.token_ids, completion.logprobs, strict=True)]
    np.testing.assert_allclose(chosen, reference.logprobs, atol=1e-4, rtol=0)
    scored = [e[t].logprob for t, e in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)]
    np.testing.assert_allclose(scored, reference.prompt_logprobs, atol=1e-4, rtol=0)


def dense_attend(num_seqs: int = 1) -> Attend:
    """Attention without a cache over ``num_seqs`` sequences of equal (padded) length, one after another."""

    def attend(
        spec: LayerSpec,
        q: Float[Array, "tokens num_heads head_dim"],
        k: Float[Array, "tokens num_kv_heads head_dim"],
        v: Float[Array, "tokens num_kv_heads head_dim"],
        *,
        sinks: Float[Array, " num_heads"] | None = None,
        alibi_slopes: Float[Array, " num_heads"] | None = None,
    ) -> Float[Array, "tokens num_heads head_dim"]:
        tokens, num_heads, head_dim = q.shape
        length, group = tokens // num_seqs, num_heads // k.shape[1]
        q, k, v = (x.astype(jnp.float32).reshape(num_seqs, length, -1, head_dim) for x in (q, k, v))
        k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
        query_at, key_at = jnp.arange(length)[:, None], jnp.arange(length)[None]
        is_seen = key_at <= query_at
        if spec.sliding_window is not None:
            is_seen &= key_at > query_at - spec.sliding_window
        scores = jnp.einsum("sqhd,skhd->shqk", q, k) * spec.sm_scale
        if spec.soft_cap is not None:
            scores = spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
        if alibi_slopes is not None:
            scores += alibi_slopes[None, :, None, None] * (key_at - query_at).astype(jnp.float32)[None, None]
        scores = jnp.where(is_seen[None, None], scores, -jnp.inf)
        if sinks is not None:
            logits = jnp.broadcast_to(sinks[None, :, None, None], (*scores.shape[:3], 1))
            scores = jnp.concatenate([scores, logits], axis=-1)
        weights = jax.nn.softmax(scores, axis=-1)[..., :length]
        out = jnp.einsum("shqk,skhd->sqhd", weights, v)
        return out.reshape(tokens, num_heads, head_dim).astype(q.dtype)

    return attend


@partial(jax.jit, static_argnums=0)
def _logits(
    graphdef: Any, state: Any, token_ids: Int32[Array, "seqs length"], prompt_lens: Int32[Array, "seqs"]
) -> Float[Array, "seqs length vocab"]:
    model = nnx.merge(graphdef, state)
    num_seqs, length = token_ids.shape
    positions = jnp.tile(jnp.arange(length, dtype=jnp.int32), num_seqs)
    hidden = model(token_ids.reshape(-1), positions, jnp.repeat(prompt_lens, length), dense_attend(num_seqs))
    return model.logits(hidden).reshape(num_seqs, length, -1)


def teacher_forced_logits(
    model: Any, sequences: list[np.ndarray], prompt_lens: list[int], padded_len: int
) -> Float[np.ndarray, "seqs padded_len vocab"]:
    """Logits after every token of each sequence, by one forward pass over all of them, padded at the end."""
    token_ids = np.stack([np.pad(ids, (0, padded_len - len(ids))) for ids in sequences]).astype(np.int32)
    graphdef, state = nnx.split(model)
    return np.asarray(_logits(graphdef, state, jnp.asarray(token_ids), jnp.asarray(prompt_lens, jnp.int32)))


def greedy_without_cache(
    model: Any, prompt_ids: list[int], max_tokens: int, padded_len: int = 128
) -> tuple[list[int], Float[np.ndarray, "max_tokens vocab"]]:
    """Greedy tokens and their logits, by a full forward pass per token.

    Every pass has the shape ``[1, padded_len]``: one compilation per model shape.
    """
    token_ids, rows = list(prompt_ids), []
    for _ in range(max_tokens):
        logits = teacher_forced_logits(model, [np.array(token_ids)], [len(prompt_ids)], padded_len)
        rows.append(logits[0, len(token_ids) - 1])
        token_ids.append(int(rows[-1].argmax()))
    return token_ids[len(prompt_ids) :], np.stack(rows)


@dataclass(frozen=True)
class BeamReference:
    """One beam search of Hugging Face: its settings, and its hypotheses, best first.

    A hypothesis's score is its cumulative log-probability over its length to the ``length_penalty``.
    """

    prompt: list[int]
    width: int
    max_tokens: int
    length_penalty: float
    early_stopping: bool | Literal["never"]
    eos_token_ids: tuple[int, ...]
    hypotheses: list[list[int]]
    scores: Float[np.ndarray, "width"]


_EARLY_STOPPING: tuple[bool | Literal["never"], ...] = (False, True, "never")  # by number, as in beams.npz


def load_beam_references(case: str) -> list[BeamReference]:
    """Hypotheses that Hugging Face's beam search finds for a checkpoint, as make_beams.py writes them."""
    with np.load(HF_REFERENCE / case / "beams.npz") as file:
        settings, prompts, tokens, scores = (file[name] for name in ("settings", "prompts", "tokens", "scores"))
    ends = np.cumsum(settings["width"], dtype=int)
    return [
        BeamReference(
            prompt=_unpadded(prompt),
            width=int(setting["width"]),
            max_tokens=int(setting["max_tokens"]),
            length_penalty=float(setting["length_penalty"]),
            early_stopping=_EARLY_STOPPING[setting["early_stopping"]],
            eos_token_ids=tuple(_unpadded(setting["eos_token_ids"])),
            hypotheses=[_unpadded(row) for row in tokens[end - setting["width"] : end]],
            scores=scores[end - setting["width"] : end],
        )
        for setting, prompt, end in zip(settings, prompts, ends, strict=True)
    ]


def _unpadded(token_ids: Int32[np.ndarray, "padded_len"]) -> list[int]:
    return token_ids[token_ids >= 0].tolist()


def beam_search_without_cache(
    logprobs_of: Callable[[list[list[int]]], Float[np.ndarray, "sequences vocab"]],
    prompt: list[int],
    width: int,
    max_tokens: int,
    length_penalty: float,
    early_stopping: bool | Literal["never"],
    eos_token_ids: Sequence[int],
) -> list[tuple[list[int], float]]:
    """Hugging Face's beam search (``generate(num_beams=width)``): hypotheses and scores, best first.

    Width 1 is their greedy search, which stops at the first end-of-sequence.

    Args:
        logprobs_of: log-probabilities of what follows each of some sequences; -inf where a token is banned.
        prompt: token ids; the hypotheses returned are without it.
        width, max_tokens, length_penalty, early_stopping, eos_token_ids: as in ``generate``.
    """
    beams: list[tuple[list[int], float]] = [([], 0.0)]
    finished: list[tuple[list[int], float]] = []
    for length in range(1, max_tokens + 1):
        logprobs = logprobs_of([prompt + tokens for tokens, _ in beams])
        vocab_size = logprobs.shape[1]
        totals = (logprobs + np.array([[total] for _, total in beams])).ravel()
        best = np.argsort(-totals, kind="stable")[: max(2, 1 + len(eos_token_ids)) * width]
        candidates = [
            ([*beams[i // vocab_size][0], int(i % vocab_size)], float(totals[i])) for i in best if totals[i] > -np.inf
        ]
        is_ended = [length == max_tokens or tokens[-1] in eos_token_ids for tokens, _ in candidates]
        for (tokens, total), ended in zip(candidates[:width], is_ended, strict=False):
            if ended:
                finished.append((tokens, total / length**length_penalty))
        finished = sorted(finished, key=lambda hypothesis: -hypothesis[1])[:width]
        beams = [candidate for candidate, ended in zip(candidates, is_ended, strict=True) if not ended][:width]
        if not beams:
            break
        if len(finished) == width:
            # Length that the best beam is taken to reach: "never" stops only once nothing better can come.
            reach = max_tokens if early_stopping == "never" and length_penalty > 0 else length
            can_improve = beams[0][1] / reach**length_penalty > finished[-1][1]
            if early_stopping is True or width == 1 or not can_improve:
                break
    return finished
