"""Logits to tokens and log-probabilities, on the device: penalties, temperature, filters, seeded draws.

The vocabulary is never sorted: each filter is one logit threshold a row, found by bisection over float32 bit patterns.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from jpaged.host.step_plan import Sample, TokenScores

MIN_TEMPERATURE = 1e-5
"""Below this a row is greedy: the division would leave nothing for the noise to decide."""

_MIN_FLAT_LEN = 64
_MAX_INT32 = 2**31 - 1
_MAX_FLOAT = 1e30  # parameters and their reciprocals stay normal float32: 0 * inf and -inf * 0 would be NaN
_NUM_PIVOTS = 7  # a pass over the logits then settles 3 of the threshold's 32 bits

NO_SCORES = TokenScores(
    np.zeros(0, np.float32), np.zeros(0, np.int32), np.zeros((0, 0), np.int32), np.zeros((0, 0), np.float32)
)

_Column = Array | np.ndarray  # numpy on the host, where make_sample_inputs builds it; Array under jit


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
        ranks: 1 + the number of tokens with a greater logit.
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


def make_sample_inputs(samples: Sequence[Sample], num_rows: int) -> SampleInputs:
    """Lays samples out as padded numpy arrays, row i for ``samples[i]``.

    The flat arrays (biases, history) have length 0 when no sample needs them, otherwise 64 times a power of 4.

    Args:
        samples: at most ``num_rows``.
        num_rows: rows of the logits, padding included.
    """
    assert len(samples) <= num_rows, (len(samples), num_rows)
    floats, ints, seeds = [], [], []
    bias_rows, bias_ids, bias_values = [], [], []
    history: list[tuple[int, Sequence[int], bool]] = []
    for row, sample in enumerate(samples):
        params = sample.params
        floats.append(
            (
                params.temperature,
                params.top_p,
                params.min_p,
                max(params.repetition_penalty, 1 / _MAX_FLOAT),
                params.presence_penalty,
                params.frequency_penalty,
            )
        )
        ints.append((min(max(params.top_k, 0), _MAX_INT32), sample.position))
        seeds.append(sample.seed)
        if params.logit_bias:
            bias_rows += [row] * len(params.logit_bias)
            bias_ids += params.logit_bias.keys()
            bias_values += params.logit_bias.values()
        if sample.banned_token_ids:
            bias_rows += [row] * len(sample.banned_token_ids)
            bias_ids += sample.banned_token_ids
            bias_values += [-np.inf] * len(sample.banned_token_ids)
        if params.has_penalties:
            history += (row, sample.prompt_token_ids, False), (row, sample.output_token_ids, True)
    num_padding = num_rows - len(samples)
    floats += [(0.0, 1.0, 0.0, 1.0, 0.0, 0.0)] * num_padding
    ints += [(0, 0)] * num_padding
    temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty = _to_float32(floats).T
    top_k, positions = np.array(ints, np.int32).T
    seen_ids = [np.asarray(token_ids, np.int32) for _, token_ids, _ in history]
    seen_lens = np.array([len(token_ids) for token_ids in seen_ids], np.int64)
    return SampleInputs(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seeds=np.array(seeds + [0] * num_padding, np.uint32),
        positions=positions,
        bias_rows=padded(np.array(bias_rows, np.int32), num_rows),
        bias_ids=padded(np.array(bias_ids, np.int32), 0),
        bias_values=padded(_to_float32(bias_values), 0),
        seen_rows=padded(np.repeat(np.array([row for row, _, _ in history], np.int32), seen_lens), num_rows),
        seen_ids=padded(np.concatenate([np.zeros(0, np.int32), *seen_ids]), 0),
        seen_is_output=padded(np.repeat(np.array([is_output for _, _, is_output in history], bool), seen_lens), False),
    )


def empty_sample_inputs(num_rows: int, num_biases: int, num_seen: int) -> SampleInputs:
    """Inputs of the given sizes that ask for nothing: what a sampler is compiled for."""
    inputs = make_sample_inputs([], num_rows)
    flat = {field.name: getattr(inputs, field.name) for field in dataclasses.fields(inputs)}
    for name, value in flat.items():
        size = num_biases if name.startswith("bias") else num_seen if name.startswith("seen") else len(value)
        flat[name] = np.zeros(size, value.dtype)
    return SampleInputs(**flat)


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


def sample(logits: Float[Array, "rows vocab"], inputs: SampleInputs, *, num_top: int) -> SampledTokens:
    """Draws one token a row and scores it; to be called under jit.

    In this order: biases and bans; penalties (repetition over prompt and output, CTRL, arXiv:1909.05858, section 4.1;
    presence and frequency over the output); temperature; top-k; top-p on what top-k left (Holtzman et al.,
    arXiv:1904.09751); min-p (arXiv:2407.01082), which therefore sees probabilities after temperature; then the draw.
    Ties with a threshold are kept (top-p and min-p compare float32 probabilities), and so is the most probable token.
    A greedy row takes the greatest penalised logit, the lowest id among equals. A token depends on its row's logits,
    seed and position alone.

    Args:
        logits: float32; -inf marks tokens that cannot be drawn. If a row has no other, token 0 is returned.
        inputs: as many rows as the logits.
        num_top: most probable tokens to score besides the drawn one (static; fewer if the vocabulary is smaller).
    """
    assert logits.dtype == jnp.float32, logits.dtype
    adjusted = _penalised(_biased(logits, inputs), inputs)
    top_logits = jnp.max(adjusted, axis=-1)
    is_random = inputs.temperature >= MIN_TEMPERATURE

    def draw() -> Int[Array, "rows"]:
        perturbed = jnp.where(is_random[:, None], _perturbed(adjusted, top_logits, inputs), adjusted)
        return _first_index(perturbed, jnp.max(perturbed, axis=-1))

    token_ids = lax.cond(jnp.any(is_random), draw, lambda: _first_index(adjusted, top_logits))
    return SampledTokens(token_ids, score(logits, token_ids, num_top=num_top))


def score(logits: Float[Array, "rows vocab"], targets: Int[Array, "rows"], *, num_top: int) -> Scores:
    """Scores one token a row under the model; to be called under jit.

    Args:
        logits: the model's own, float32.
        targets: the tokens to score.
        num_top: most probable tokens to score besides (static; fewer if the vocabulary is smaller).
    """
    log_normaliser = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    target_logits = jnp.take_along_axis(logits, targets[:, None], axis=-1)
    top_logits, top_ids = top_k(logits, min(num_top, logits.shape[-1]))
    return Scores(
        logprobs=(target_logits - log_normaliser)[:, 0],
        ranks=1 + jnp.sum(logits > target_logits, axis=-1, dtype=jnp.int32),
        top_ids=top_ids,
        top_logprobs=top_logits - log_normaliser,
    )


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


def top_k(values: Float[Array, "rows vocab"], k: int) -> tuple[Float[Array, "rows k"], Int[Array, "rows k"]]:
    """The ``k`` greatest values of each row and where they are, the lower index first among equals.

    ``lax.top_k`` sorts whole rows on an accelerator. Here the row is cut into chunks and only the ``k`` chunks of the
    greatest maxima are searched: a value of any other chunk is preceded by one from each of them.

    Args:
        values: of rows with NaN, some are returned.
        k: at most the vocabulary (static).
    """
    rows, size = values.shape
    values = jnp.where(values == 0, 0.0, values)  # lax.top_k orders 0.0 before -0.0, a maximum does not
    # Two sorts, of size / chunk maxima and of k * chunk values: shortest when they are equally long.
    chunk = 1 << round(math.log2(size / max(k, 1)) / 2)
    if k == 0 or chunk == 1:
        return lax.top_k(values, k)
    num_chunks = -(-size // chunk)
    chunks = jnp.pad(values, ((0, 0), (0, num_chunks * chunk - size)), constant_values=-jnp.inf)
    chunks = chunks.reshape(rows, num_chunks, chunk)
    _, best = lax.top_k(jnp.max(chunks, axis=-1), k)
    best = jnp.sort(best, axis=-1)  # in the order of the row, so that ties still go to the lower index
    searched = jnp.take_along_axis(chunks, best[:, :, None], axis=1).reshape(rows, k * chunk)
    top, at = lax.top_k(searched, k)
    indices = jnp.take_along_axis(best, at // chunk, axis=-1) * chunk + at % chunk
    return top, jnp.minimum(indices, size - 1)  # padding, in a row of NaN


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


def _first_index(x: Float[Array, "rows vocab"], values: Float[Array, "rows"]) -> Int[Array, "rows"]:
    """The lowest index that holds each row's value. With a maximum this is argmax, several times faster in XLA."""
    last = x.shape[-1] - 1  # the answer for a row of NaN: wrong as any other, but a token
    ids = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.min(jnp.where(x == values[:, None], ids, last), axis=-1)


def _perturbed(
    logits: Float[Array, "rows vocab"], top_logits: Float[Array, "rows"], inputs: SampleInputs
) -> Float[Array, "rows vocab"]:
    """Scaled logits plus Gumbel noise where every filter agrees, -inf elsewhere: the greatest one is the draw."""
    is_random = inputs.temperature >= MIN_TEMPERATURE
    temperature = jnp.where(is_random, inputs.temperature, 1.0)
    anchor = jnp.where(jnp.isfinite(top_logits), top_logits, 0.0)  # a row of -inf stays -inf instead of becoming NaN
    scaled = (logits - anchor[:, None]) / temperature[:, None]
    lowest = jnp.full_like(top_logits, -jnp.inf)
    wants_top_k = is_random & (inputs.top_k > 0)
    wants_top_p = is_random & (inputs.top_p < 1)
    wants_min_p = is_random & (inputs.min_p > 0)

    def search() -> Float[Array, "rows"]:
        highest = jnp.where(wants_top_k, top_logits, lowest)
        top_k = inputs.top_k.astype(jnp.float32)  # counts in float32 are exact up to 2**24
        threshold = _threshold(
            logits, lambda is_kept: jnp.sum(is_kept, axis=-1, dtype=jnp.float32), top_k, lowest, highest
        )
        # Relative to the most probable token, the scale of min-p. Stored, so that no pass computes exponentials.
        weights = jnp.where(logits >= threshold[:, None], jnp.exp(scaled), 0.0)
        min_weight = _threshold(
            weights,
            lambda is_kept: jnp.sum(jnp.where(is_kept, weights, 0.0), axis=-1),
            inputs.top_p * jnp.sum(weights, axis=-1),
            inputs.min_p,
            jnp.where(wants_top_p, 1.0, inputs.min_p),
        )
        # Back to a logit: an exponential computed again elsewhere may be rounded to the other side.
        lightest = jnp.min(jnp.where(weights >= min_weight[:, None], logits, jnp.inf), axis=-1)
        return jnp.maximum(threshold, lightest)

    threshold = lax.cond(jnp.any(wants_top_k | wants_top_p | wants_min_p), search, lambda: lowest)
    noise = _gumbel(inputs.seeds, inputs.positions, logits.shape[-1])
    return jnp.where(logits >= threshold[:, None], scaled + noise, -jnp.inf)


def _threshold(
    values: Float[Array, "rows vocab"],
    measure: Callable[[Bool[Array, "rows vocab"]], Float[Array, "rows"]],
    target: Float[_Column, "rows"],
    lowest: Float[_Column, "rows"],
    highest: Float[_Column, "rows"],
) -> Float[Array, "rows"]:
    """The greatest threshold in [lowest, highest] such that the tokens kept (value >= threshold) measure ``target``.

    ``lowest`` where none does. Rows with ``lowest == highest`` take no pass over the values, other rows 11 at most.
    Exact, because a sum of non-negative floats in a fixed order never grows when one of them becomes zero.
    """

    def narrow(bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds  # keys: low is reached (or where we started), high is not
        step = (high - low - 1) // (_NUM_PIVOTS + 1) + 1
        pivots = low[None, :] + step[None, :] * jnp.arange(1, _NUM_PIVOTS + 1, dtype=jnp.uint32)[:, None]
        # Sums side by side, not one over a [pivots, rows, vocab] array: XLA can fuse them into one read of the values.
        measured = jnp.stack([measure(values >= pivot[:, None]) for pivot in _from_key(pivots)])
        is_reached = (measured >= target[None, :]) & (pivots < high[None, :])
        low = jnp.max(jnp.where(is_reached, pivots, low[None, :]), axis=0)
        high = jnp.min(jnp.where(is_reached, high[None, :], jnp.minimum(pivots, high[None, :])), axis=0)
        # Met exactly, as top-k without ties always is in the end: the bits below do not change what is kept.
        is_met = jnp.any(is_reached & (measured == target[None, :]), axis=0)
        return low, jnp.where(is_met, low + 1, high)

    bounds = _to_key(lowest), _to_key(highest) + 1
    low, _ = lax.while_loop(lambda bounds: jnp.any(bounds[1] - bounds[0] > 1), narrow, bounds)
    return _from_key(low)


def _to_key(x: Float[_Column, "..."]) -> UInt32[Array, "..."]:
    """Unsigned integers in the order of the numbers: the bits, with the sign flipped, negatives reversed."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _from_key(key: UInt32[Array, "..."]) -> Float[Array, "..."]:
    bits = jnp.where(key >> 31 == 1, key & jnp.uint32((1 << 31) - 1), ~key)
    return lax.bitcast_convert_type(bits, jnp.float32)


def _gumbel(
    seeds: UInt32[_Column, "rows"], positions: Int[_Column, "rows"], vocab_size: int
) -> Float[Array, "rows vocab"]:
    """Standard Gumbel noise from (seed, position) alone, up to 22.9: 32 bits go into the tail that decides draws."""

    def random_bits(seed: Array, position: Array) -> UInt32[Array, "vocab"]:
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position)
        return jax.random.bits(key, (vocab_size,), jnp.uint32)

    bits = jax.vmap(random_bits)(jnp.asarray(seeds), jnp.asarray(positions))
    uniform = jnp.minimum((bits.astype(jnp.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)  # in (0, 1)
    return -jnp.log(-jnp.log1p(-uniform))
