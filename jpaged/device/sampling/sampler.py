"""Logits to tokens and log-probabilities, on the device: penalties, temperature, filters, seeded draws."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from jpaged.contract.plan import Decoder, DecodeSamples, Sample, TokenScores
from jpaged.device.sampling.draws import (
    Chunks,
    draw,
    finite_or_zero,
    first_of_greatest,
    log_masses,
    log_normaliser,
    summarise,
)
from jpaged.device.sampling.filters import Filters, find_threshold, top_k
from jpaged.request import MAX_LOGPROBS, SamplingParams

MIN_TEMPERATURE = 1e-5
"""Below this a row is greedy: the division would leave nothing for the noise to decide."""

_MIN_FLAT_LEN = 64
_MAX_INT32 = 2**31 - 1
_MAX_FLOAT = 1e30  # parameters and their reciprocals stay normal float32: 0 * inf and -inf * 0 would be NaN

NO_SCORES = TokenScores(
    np.zeros(0, np.float32), np.zeros(0, np.int32), np.zeros((0, 0), np.int32), np.zeros((0, 0), np.float32)
)

_Column = Array | np.ndarray  # numpy on the host, where samples are packed; Array under jit


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SampleInputs:
    """What ``sample`` reads besides the logits: one row per token to draw.

    Padding rows have temperature 0 and no filter, so they cost no noise and no search.

    Args:
        temperature: below ``MIN_TEMPERATURE`` the row is greedy.
        top_k: 0 is off.
        top_p: 1 is off.
        min_p: 0 is off.
        repetition_penalty: 1 is off.
        presence_penalty: 0 is off.
        frequency_penalty: 0 is off.
        seeds: with ``positions``, all that a row's noise depends on.
        positions: where the drawn token will sit in its sequence.
        bias_rows: the row of each logit bias; padding entries hold the number of rows.
        bias_ids: its token.
        bias_values: what is added to that token's logit; -inf bans it.
        seen_rows: the row of each token of the penalised rows' history; padding entries hold the number of rows.
        seen_ids: that token.
        seen_is_output: whether it was generated; otherwise it belongs to the prompt.
    """

    temperature: Float[_Column, "rows"]
    top_k: Int[_Column, "rows"]
    top_p: Float[_Column, "rows"]
    min_p: Float[_Column, "rows"]
    repetition_penalty: Float[_Column, "rows"]
    presence_penalty: Float[_Column, "rows"]
    frequency_penalty: Float[_Column, "rows"]
    seeds: UInt32[_Column, "rows"]
    positions: Int[_Column, "rows"]
    bias_rows: Int[_Column, "biases"]
    bias_ids: Int[_Column, "biases"]
    bias_values: Float[_Column, "biases"]
    seen_rows: Int[_Column, "seen"]
    seen_ids: Int[_Column, "seen"]
    seen_is_output: Bool[_Column, "seen"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scores:
    """Log-probabilities of chosen tokens under the model: before biases, penalties, temperature and filters.

    Args:
        logprobs: of the chosen token.
        ranks: 1 + the number of tokens with a greater logit; 0 where nobody asked.
        top_ids: the most probable tokens, best first.
        top_logprobs: theirs.
    """

    logprobs: Float[Array, "rows"]
    ranks: Int[Array, "rows"]
    top_ids: Int[Array, "rows num_top"]
    top_logprobs: Float[Array, "rows num_top"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SampledTokens:
    """One drawn token a row, with its scores."""

    token_ids: Int[Array, "rows"]
    scores: Scores


class SampleSizes(NamedTuple):
    """The static sizes of packed sample inputs.

    Args:
        num_rows: rows of the logits, padding included.
        num_biases, num_seen: length of the flat arrays: 0, or 64 times a power of 4.
    """

    num_rows: int
    num_biases: int = 0
    num_seen: int = 0

    @property
    def packed_size(self) -> int:
        """Length of the packed array."""
        return len(_COLUMNS) * self.num_rows + len(_BIAS_FIELDS) * self.num_biases + len(_SEEN_FIELDS) * self.num_seen


def rows_from(inputs: SampleInputs, start: Int[Array, ""], num_rows: int) -> SampleInputs:
    """Some rows of inputs without biases and penalties."""
    columns = {name: lax.dynamic_slice(getattr(inputs, name), (start,), (num_rows,)) for name in _COLUMNS}
    return replace(inputs, **columns)


_COLUMNS = {
    "temperature": np.float32,
    "top_p": np.float32,
    "min_p": np.float32,
    "repetition_penalty": np.float32,
    "presence_penalty": np.float32,
    "frequency_penalty": np.float32,
    "top_k": np.int32,
    "seeds": np.uint32,
    "positions": np.int32,
}
_NUM_PARAM_COLUMNS = 7  # those first: what a request's parameters say of each of its rows
_BIAS_FIELDS = {"bias_rows": np.int32, "bias_ids": np.int32, "bias_values": np.float32}
_SEEN_FIELDS = {"seen_rows": np.int32, "seen_ids": np.int32, "seen_is_output": np.bool_}


class _ParamRow(NamedTuple):
    """What a request's parameters say of each of its rows: ``_NUM_PARAM_COLUMNS`` packed numbers of 4 bytes each.

    ``has_more`` is whether there is more to tell: biases, or a history.
    """

    params: SamplingParams
    packed: bytes
    has_more: bool


class SamplePacker:
    """Packs the samples of plans, one after the other. Of sequences that the plan before had, parameters are kept."""

    def __init__(self) -> None:
        self._rows: dict[int, _ParamRow] = {}  # of those last looked at, by sequence id
        # Who decoded in the last plan, and all columns, if they tell everything.
        self._last: tuple[Sequence[Decoder], Int[np.ndarray, "columns rows"]] | None = None

    def pack(self, samples: Sequence[Sample], num_rows: int) -> tuple[Int[np.ndarray, " size"], SampleSizes]:
        """The inputs of samples, row i for ``samples[i]``, in one int32 array, a new one: one transfer a step.

        Args:
            samples: at most ``num_rows``.
            num_rows: rows of the logits, padding included.
        """
        num_samples = len(samples)
        assert num_samples <= num_rows, (num_samples, num_rows)
        decodes = samples.decodes if isinstance(samples, DecodeSamples) else None
        if decodes is not None and self._last is not None:
            decoders, columns = self._last
            if decoders is decodes.decoders and columns.shape[1] == num_rows:
                columns = columns.copy()
                columns[-1, :num_samples] = decodes.positions
                return columns.reshape(-1), SampleSizes(num_rows)
        owners = samples if decodes is None else decodes.decoders
        rows = self._rows_of(owners)
        columns = np.empty((len(_COLUMNS), num_rows), np.int32)
        of_params = np.frombuffer(b"".join([row.packed for row in rows]), np.int32)
        columns[:_NUM_PARAM_COLUMNS, :num_samples] = of_params.reshape(-1, _NUM_PARAM_COLUMNS).T
        columns[-2, :num_samples] = np.array([owner.seed for owner in owners], np.uint32).view(np.int32)
        columns[-1, :num_samples] = [sample.position for sample in samples] if decodes is None else decodes.positions
        columns[:, num_samples:] = _PADDING[:, None]
        is_all = not any(row.has_more for row in rows)
        if decodes is None:
            is_all = is_all and not any(sample.banned_token_ids for sample in samples)
        self._last = (decodes.decoders, columns) if decodes is not None and is_all else None
        if is_all:
            return columns.reshape(-1), SampleSizes(num_rows)
        biases, seen = _pack_biases(samples, num_rows), _pack_history(samples, num_rows)
        sizes = SampleSizes(num_rows, biases.shape[1], seen.shape[1])
        return np.concatenate([columns.reshape(-1), biases.reshape(-1), seen.reshape(-1)]), sizes

    def _rows_of(self, owners: Sequence[Sample] | Sequence[Decoder]) -> list[_ParamRow]:
        before, rows = self._rows, []
        for owner in owners:
            row = before.get(owner.seq_id)
            rows.append(row if row is not None and row[0] is owner.params else _param_row(owner.params))
        self._rows = {owner.seq_id: row for owner, row in zip(owners, rows, strict=True)}
        return rows


def _param_row(params: SamplingParams) -> _ParamRow:
    floats = (
        params.temperature,
        params.top_p,
        params.min_p,
        max(params.repetition_penalty, 1 / _MAX_FLOAT),
        params.presence_penalty,
        params.frequency_penalty,
    )
    top_k = min(max(params.top_k, 0), _MAX_INT32)
    packed = struct.pack(f"{len(floats)}fi", *(min(max(x, -_MAX_FLOAT), _MAX_FLOAT) for x in floats), top_k)
    return _ParamRow(params, packed, bool(params.logit_bias) or params.has_penalties)


def _padding() -> Int[np.ndarray, " columns"]:
    """A row that asks for nothing."""
    floats = np.array([0.0, 1.0, 0.0, 1.0, 0.0, 0.0], np.float32)
    return np.concatenate([floats.view(np.int32), np.zeros(len(_COLUMNS) - len(floats), np.int32)])


_PADDING = _padding()


def _pack_biases(samples: Sequence[Sample], num_rows: int) -> Int[np.ndarray, "fields biases"]:
    """Logit biases and bans, padded."""
    rows, ids, values = [], [], []
    for row, sample in enumerate(samples):
        bias, banned = sample.params.logit_bias or {}, sample.banned_token_ids
        rows += [row] * (len(bias) + len(banned))
        ids += [*bias.keys(), *banned]
        values += [*bias.values(), *[-np.inf] * len(banned)]
    fields = padded(np.array(rows, np.int32), num_rows), padded(np.array(ids, np.int32), 0)
    return np.stack([*fields, padded(_to_float32(values), 0).view(np.int32)])


def _pack_history(samples: Sequence[Sample], num_rows: int) -> Int[np.ndarray, "fields seen"]:
    """The tokens that penalties count, padded."""
    history: list[tuple[int, np.ndarray, bool]] = []
    for row, sample in enumerate(samples):
        if sample.params.has_penalties:
            history.append((row, np.array(sample.prompt_token_ids, np.int32), False))
            history.append((row, np.array(sample.output_token_ids, np.int32), True))
    lens = np.array([len(token_ids) for _, token_ids, _ in history], np.int64)
    rows = np.repeat(np.array([row for row, _, _ in history], np.int32), lens)
    ids = np.concatenate([np.zeros(0, np.int32), *(token_ids for _, token_ids, _ in history)])
    is_output = np.repeat(np.array([is_output for _, _, is_output in history], np.int32), lens)
    return np.stack([padded(rows, num_rows), padded(ids, 0), padded(is_output, 0)])


def unpack_samples(packed: Int[_Column, " size"], sizes: SampleSizes) -> SampleInputs:
    """The fields of a packed array: on the device, or views of a numpy array."""
    fields, start = {}, 0
    for dtypes, length in zip((_COLUMNS, _BIAS_FIELDS, _SEEN_FIELDS), sizes, strict=True):
        for name, dtype in dtypes.items():
            field = packed[start : start + length]
            fields[name] = field != 0 if dtype is np.bool_ else field.view(dtype)
            start += length
    return SampleInputs(**fields)


def make_sample_inputs(samples: Sequence[Sample], num_rows: int) -> SampleInputs:
    """``samples`` laid out as padded numpy arrays; see ``SamplePacker.pack``."""
    return unpack_samples(*SamplePacker().pack(samples, num_rows))


def num_top_of(samples: Sequence[Sample]) -> int | None:
    """What ``sample`` is to be told of the log-probabilities that samples ask for."""
    owners = samples.decodes.decoders if isinstance(samples, DecodeSamples) else samples
    wanted = {owner.params.logprobs for owner in owners} - {None}
    if not wanted:
        return None
    return MAX_LOGPROBS if any(wanted) else 0


def _to_float32(values: list) -> np.ndarray:
    """As float32, finite values clipped to ``_MAX_FLOAT``; infinite ones (bans) stay."""
    exact = np.array(values, np.float64)
    return np.where(np.isinf(exact), exact, np.clip(exact, -_MAX_FLOAT, _MAX_FLOAT)).astype(np.float32)


def padded(values: np.ndarray, fill: int) -> np.ndarray:
    """To 64, 256, 1024, ... entries: each length is a program of its own, and padding costs next to nothing."""
    if len(values) == 0:
        return values
    length = _MIN_FLAT_LEN
    while length < len(values):
        length *= 4
    return np.concatenate([values, np.full(length - len(values), fill, values.dtype)])


def sample(logits: Float[Array, "rows vocab"], inputs: SampleInputs, *, num_top: int | None) -> SampledTokens:
    """Draws one token a row and scores it; to be called under jit.

    In this order: biases and bans; penalties (repetition over prompt and output, CTRL, arXiv:1909.05858, section 4.1;
    presence and frequency over the output); temperature; top-k; top-p on what top-k left (Holtzman et al.,
    arXiv:1904.09751); min-p (arXiv:2407.01082), which therefore sees probabilities after temperature; then the draw.
    A filter is a logit that tokens have to reach: those of equal logits share their fate, and the most probable one is
    kept. A greedy row takes the greatest penalised logit, the lowest id among equals. A token depends on its row's
    logits, seed and position alone.

    Args:
        logits: float32; -inf marks tokens that cannot be drawn. If a row has no other, token 0 is returned.
        inputs: as many rows as the logits.
        num_top: most probable tokens to score besides the drawn one (static; fewer if the vocabulary is smaller). None
            if nobody asked for log-probabilities: then the drawn token's own comes without its rank, at no pass over
            the logits more than the draw takes.
    """
    assert logits.dtype == jnp.float32, logits.dtype
    adjusted = _penalised(_biased(logits, inputs), inputs)
    is_random = inputs.temperature >= MIN_TEMPERATURE
    filters = Filters(
        top_k=jnp.where(is_random, inputs.top_k, 0),
        top_p=jnp.where(is_random, inputs.top_p, 1.0),
        min_p=jnp.where(is_random, inputs.min_p, 0.0),
        temperature=jnp.where(is_random, inputs.temperature, 1.0),
    )
    # The barriers keep XLA from tearing a pass into several, by what reads its results.
    chunks = Chunks(*lax.optimization_barrier(summarise(adjusted, 1 / filters.temperature)))
    greatest = jnp.max(chunks.maxima, axis=1)
    drawn = _draw(adjusted, chunks, finite_or_zero(greatest), filters, inputs)
    token_ids = jnp.where(is_random, drawn, first_of_greatest(chunks, greatest, logits.shape[1]))
    normaliser = log_normaliser(chunks.maxima, chunks.masses) if adjusted is logits else _own_log_normaliser(logits)
    return SampledTokens(token_ids, _score(logits, normaliser, token_ids, num_top))


def score(logits: Float[Array, "rows vocab"], targets: Int[Array, "rows"], *, num_top: int) -> Scores:
    """Scores one token a row under the model; to be called under jit.

    Args:
        logits: the model's own, float32.
        targets: the tokens to score.
        num_top: most probable tokens to score besides (static; fewer if the vocabulary is smaller).
    """
    return _score(logits, _own_log_normaliser(logits), targets, num_top)


def _draw(
    logits: Float[Array, "rows vocab"],
    chunks: Chunks,
    greatest: Float[Array, "rows"],
    filters: Filters,
    inputs: SampleInputs,
) -> Int[Array, "rows"]:
    """A token of each row, as if it were random."""
    coldness = 1 / filters.temperature
    unfiltered = jnp.full_like(greatest, -jnp.inf), log_masses(chunks, greatest, coldness)

    def filtered() -> tuple[Array, Array]:
        threshold = jnp.where(filters.is_any, find_threshold(logits, chunks, filters), -jnp.inf)
        left = summarise(jnp.where(logits >= threshold[:, None], logits, -jnp.inf), coldness)
        # Rows without filters keep their own: the same sums, compiled differently, may be rounded differently.
        masses = jnp.where(filters.is_any[:, None], log_masses(left, greatest, coldness), unfiltered[1])
        return threshold, masses

    threshold, masses = lax.cond(jnp.any(filters.is_any), filtered, lambda: unfiltered)
    return draw(logits, threshold, masses, coldness, jnp.asarray(inputs.seeds), jnp.asarray(inputs.positions))


def _own_log_normaliser(logits: Float[Array, "rows vocab"]) -> Float[Array, "rows"]:
    chunks = summarise(logits, jnp.ones(logits.shape[0], jnp.float32))
    return log_normaliser(*lax.optimization_barrier((chunks.maxima, chunks.masses)))


def _score(
    logits: Float[Array, "rows vocab"],
    normaliser: Float[Array, "rows"],
    targets: Int[Array, "rows"],
    num_top: int | None,
) -> Scores:
    target_logits = jnp.take_along_axis(logits, targets[:, None], axis=1)
    top_logits, top_ids = top_k(logits, min(num_top or 0, logits.shape[1]))
    ranks = jnp.zeros(targets.shape, jnp.int32)
    if num_top is not None:
        ranks = 1 + jnp.sum(logits > target_logits, axis=1, dtype=jnp.int32)
    return Scores(target_logits[:, 0] - normaliser, ranks, top_ids, top_logits - normaliser[:, None])


def first_rows(scores: Scores, num_rows: int) -> TokenScores:
    """Scores fetched to the host, without padding rows."""
    return TokenScores(
        logprobs=np.asarray(scores.logprobs)[:num_rows],
        ranks=np.asarray(scores.ranks)[:num_rows],
        top_ids=np.asarray(scores.top_ids)[:num_rows],
        top_logprobs=np.asarray(scores.top_logprobs)[:num_rows],
    )


def join_scores(parts: Sequence[TokenScores]) -> TokenScores:
    """The rows of all parts, which have equally many alternatives."""
    return TokenScores(
        logprobs=np.concatenate([part.logprobs for part in parts]),
        ranks=np.concatenate([part.ranks for part in parts]),
        top_ids=np.concatenate([part.top_ids for part in parts]),
        top_logprobs=np.concatenate([part.top_logprobs for part in parts]),
    )


def _biased(logits: Float[Array, "rows vocab"], inputs: SampleInputs) -> Float[Array, "rows vocab"]:
    if inputs.bias_rows.shape[0] == 0:
        return logits
    return logits.at[inputs.bias_rows, inputs.bias_ids].add(inputs.bias_values, mode="drop")


def _penalised(logits: Float[Array, "rows vocab"], inputs: SampleInputs) -> Float[Array, "rows vocab"]:
    if inputs.seen_rows.shape[0] == 0:
        return logits
    # One temporary holds both counts: bit 0 says "in the prompt", the bits above count occurrences in the output.
    # A token of the other kind goes to row num_rows, which is dropped.
    num_rows = logits.shape[0]
    prompt_rows = jnp.where(inputs.seen_is_output, num_rows, inputs.seen_rows)
    output_rows = jnp.where(inputs.seen_is_output, inputs.seen_rows, num_rows)
    seen = jnp.zeros(logits.shape, jnp.int32)
    seen = (
        seen.at[prompt_rows, inputs.seen_ids].set(1, mode="drop").at[output_rows, inputs.seen_ids].add(2, mode="drop")
    )
    num_generated = (seen >> 1).astype(jnp.float32)
    repetition = jnp.where(seen > 0, inputs.repetition_penalty[:, None], 1.0)
    logits = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits -= inputs.frequency_penalty[:, None] * num_generated
    return logits - inputs.presence_penalty[:, None] * (num_generated > 0).astype(jnp.float32)
