"""Logits to tokens and log-probabilities, on the device: penalties, temperature, filters, seeded draws.

The vocabulary is never sorted: each filter is one logit threshold a row, found by bisection over float32 bit patterns.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from jpaged.host.step_plan import Sample

MIN_TEMPERATURE = 1e-5
"""Below this a row is greedy: the division would leave nothing for the noise to decide."""

_MIN_FLAT_LEN = 64
_NUM_PIVOTS = 7  # a pass over the logits then settles 3 of the threshold's 32 bits
_KEY_OF_MINUS_INF = 0x007FFFFF

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

    The flat arrays (biases, history) have length 0 when no sample needs them, otherwise a power of two of 64 or more.

    Args:
        samples: at most ``num_rows``.
        num_rows: rows of the logits, padding included.
    """
    assert len(samples) <= num_rows, (len(samples), num_rows)
    floats = np.zeros((6, num_rows), np.float32)
    floats[[1, 3]] = 1.0  # top_p and repetition_penalty
    ints = np.zeros((2, num_rows), np.int32)
    seeds = np.zeros(num_rows, np.uint32)
    biases: list[tuple[int, Sequence[int], Sequence[float]]] = []
    histories: list[tuple[int, Sequence[int], bool]] = []
    float_columns, int_columns, seed_column = [], [], []
    for row, sample in enumerate(samples):
        params = sample.params
        float_columns.append(
            (
                params.temperature,
                params.top_p,
                params.min_p,
                params.repetition_penalty,
                params.presence_penalty,
                params.frequency_penalty,
            )
        )
        int_columns.append((max(params.top_k, 0), sample.position))
        seed_column.append(sample.seed)
        if params.logit_bias:
            biases.append((row, list(params.logit_bias), list(params.logit_bias.values())))
        if sample.banned_token_ids:
            biases.append((row, sample.banned_token_ids, [-np.inf] * len(sample.banned_token_ids)))
        if params.has_penalties:
            histories.append((row, sample.prompt_token_ids, False))
            histories.append((row, sample.output_token_ids, True))
    if samples:
        floats[:, : len(samples)] = np.transpose(float_columns)
        ints[:, : len(samples)] = np.transpose(int_columns)
        seeds[: len(samples)] = seed_column
    bias_lens = [len(ids) for _, ids, _ in biases]
    seen_lens = [len(ids) for _, ids, _ in histories]
    num_biases, num_seen = _flat_len(sum(bias_lens)), _flat_len(sum(seen_lens))
    return SampleInputs(
        temperature=floats[0],
        top_p=floats[1],
        min_p=floats[2],
        repetition_penalty=floats[3],
        presence_penalty=floats[4],
        frequency_penalty=floats[5],
        top_k=ints[0],
        positions=ints[1],
        seeds=seeds,
        bias_rows=_padded(np.repeat([row for row, _, _ in biases], bias_lens), num_biases, np.int32, num_rows),
        bias_ids=_padded(_concatenated([ids for _, ids, _ in biases], np.int32), num_biases, np.int32, 0),
        bias_values=_padded(_concatenated([v for _, _, v in biases], np.float32), num_biases, np.float32, 0),
        seen_rows=_padded(np.repeat([row for row, _, _ in histories], seen_lens), num_seen, np.int32, num_rows),
        seen_ids=_padded(_concatenated([ids for _, ids, _ in histories], np.int32), num_seen, np.int32, 0),
        seen_is_output=_padded(np.repeat([out for _, _, out in histories], seen_lens), num_seen, np.bool_, 0),
    )


def _flat_len(num_entries: int) -> int:
    return 0 if num_entries == 0 else max(_MIN_FLAT_LEN, 1 << (num_entries - 1).bit_length())


def _concatenated(parts: list, dtype: type) -> np.ndarray:
    return np.concatenate([np.asarray(part, dtype) for part in parts]) if parts else np.zeros(0, dtype)


def _padded(values: np.ndarray, length: int, dtype: type, fill: int) -> np.ndarray:
    padded = np.full(length, fill, dtype)
    padded[: len(values)] = values
    return padded


def sample(logits: Float[Array, "rows vocab"], inputs: SampleInputs, *, num_top: int) -> SampledTokens:
    """Draws one token a row and scores it; to be called under jit.

    In this order: biases and bans; penalties (repetition over prompt and output, CTRL, arXiv:1909.05858, section 4.1;
    presence and frequency over the output); temperature; top-k; top-p on what top-k left (Holtzman et al.,
    arXiv:1904.09751); min-p (arXiv:2407.01082), which therefore sees probabilities after temperature; then the draw.
    Ties with a threshold are kept, and so is the most probable token always. A greedy row takes the greatest
    penalised logit, the lowest id among equals. A token depends on its row's logits, seed and position alone.

    Args:
        logits: float32; -inf marks tokens that cannot be drawn. If a row has no other, token 0 is returned.
        inputs: as many rows as the logits.
        num_top: most probable tokens to score besides the drawn one (static; fewer if the vocabulary is smaller).
    """
    assert logits.dtype == jnp.float32, logits.dtype
    adjusted = _penalised(_biased(logits, inputs), inputs)
    is_random = inputs.temperature >= MIN_TEMPERATURE
    greedy_ids = jnp.argmax(adjusted, axis=-1).astype(jnp.int32)
    token_ids = lax.cond(
        jnp.any(is_random),
        lambda: jnp.where(is_random, _drawn(adjusted, inputs, is_random), greedy_ids),
        lambda: greedy_ids,
    )
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
    top_logits, top_ids = lax.top_k(logits, min(num_top, logits.shape[-1]))
    return Scores(
        logprobs=(target_logits - log_normaliser)[:, 0],
        ranks=1 + jnp.sum(logits > target_logits, axis=-1, dtype=jnp.int32),
        top_ids=top_ids,
        top_logprobs=top_logits - log_normaliser,
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


def _drawn(
    logits: Float[Array, "rows vocab"], inputs: SampleInputs, is_random: Bool[_Column, "rows"]
) -> Int[Array, "rows"]:
    """Gumbel-max over the tokens at or above the row's threshold. Greedy rows get any token, and no search."""
    top_logits = jnp.max(logits, axis=-1)
    temperature = jnp.where(is_random, inputs.temperature, 1.0)
    anchor = jnp.where(jnp.isfinite(top_logits), top_logits, 0.0)  # a row of -inf stays -inf instead of becoming NaN

    def scaled(x: Float[Array, "rows vocab"]) -> Float[Array, "rows vocab"]:
        return (x - anchor[:, None]) / temperature[:, None]

    def filtered() -> Float[Array, "rows"]:
        lowest = jnp.full(top_logits.shape, -jnp.inf, jnp.float32)
        threshold = _threshold(
            logits, top_logits, lowest, is_random & (inputs.top_k > 0),
            weigh=jnp.ones_like, target=inputs.top_k.astype(jnp.float32),
        )  # fmt: skip
        kept_mass = jnp.sum(jnp.where(logits >= threshold[:, None], jnp.exp(scaled(logits)), 0.0), axis=-1)
        threshold = _threshold(
            logits, top_logits, threshold, is_random & (inputs.top_p < 1),
            weigh=lambda x: jnp.exp(scaled(x)), target=inputs.top_p * kept_mass,
        )  # fmt: skip
        return threshold

    is_filtered = is_random & ((inputs.top_k > 0) | (inputs.top_p < 1))
    threshold = lax.cond(jnp.any(is_filtered), filtered, lambda: jnp.full(top_logits.shape, -jnp.inf, jnp.float32))
    # p >= min_p * p_max in logits; the greatest logit itself passes whatever the rounding.
    threshold = jnp.maximum(threshold, jnp.minimum(anchor + temperature * jnp.log(inputs.min_p), top_logits))
    noise = _gumbel(inputs.seeds, inputs.positions, logits.shape[-1])
    perturbed = jnp.where(logits >= threshold[:, None], scaled(logits) + noise, -jnp.inf)
    return jnp.argmax(perturbed, axis=-1).astype(jnp.int32)


def _threshold(
    logits: Float[Array, "rows vocab"],
    top_logits: Float[Array, "rows"],
    lowest: Float[Array, "rows"],
    is_wanted: Bool[_Column, "rows"],
    *,
    weigh: Callable[[Float[Array, "rows vocab"]], Float[Array, "rows vocab"]],
    target: Float[_Column, "rows"],
) -> Float[Array, "rows"]:
    """The greatest threshold from ``lowest`` to ``top_logits`` above which, itself included, logits weigh ``target``.

    ``lowest`` where no threshold reaches the target and in rows that want none. Exact: a sum of non-negative float32
    numbers in a fixed order never grows when one of them becomes zero, so bisection sees a monotone function.
    """

    def is_open(low: UInt32[Array, "rows"], high: UInt32[Array, "rows"]) -> Bool[Array, "rows"]:
        return high - low > 1

    def narrow(bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        step = (high - low - 1) // (_NUM_PIVOTS + 1) + 1
        new_low, new_high = low, high
        for i in range(_NUM_PIVOTS, 0, -1):
            pivot = low + jnp.uint32(i) * step
            weight = jnp.sum(jnp.where(logits >= _from_key(pivot)[:, None], weigh(logits), 0.0), axis=-1)
            reached = (pivot < high) & (weight >= target) & (new_low == low)
            missed = (pivot < high) & (weight < target)
            new_low = jnp.where(reached, pivot, new_low)
            # Exactly the target (top-k without ties): no bit further down changes what is kept.
            new_high = jnp.where(reached & (weight == target), pivot + 1, jnp.where(missed, pivot, new_high))
        return new_low, new_high

    low = _to_key(lowest)
    high = jnp.where(is_wanted, _to_key(top_logits) + 1, low + 1)
    low, _ = lax.while_loop(lambda bounds: jnp.any(is_open(*bounds)), narrow, (low, high))
    return _from_key(low)


def _to_key(x: Float[Array, "rows"]) -> UInt32[Array, "rows"]:
    """Unsigned integers in the order of the numbers: the bits, with the sign flipped, negatives reversed."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _from_key(key: UInt32[Array, "rows"]) -> Float[Array, "rows"]:
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
