"""Beam search on the device: the best continuations of each group of beams, found without leaving it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jpaged.contract.plan import BeamSelect
from jpaged.contract.result import BeamCandidates
from jpaged.device.sampling.filters import top_k
from jpaged.request import MAX_BEAM_CANDIDATES, MAX_BEAM_WIDTH

CANDIDATE_SIZES = (8, 32, 128, MAX_BEAM_CANDIDATES)
"""Each is a program for each size of batch, compiled when first needed."""

_MIN_FLAT_LEN = 64

_Column = Array | np.ndarray  # numpy on the host, where make_beam_inputs builds it; Array under jit


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BeamInputs:
    """The input of ``beam_candidates`` besides the logits.

    Args:
        group_rows: row of logits of each beam, a group's beams in order; padding holds the number of rows.
        scores: cumulative log-probability of each beam; 0 for padding.
        bias_rows: row of each bias; padding holds the number of rows.
        bias_ids: token of each bias.
        bias_values: number added to that token's log-probability; -inf bans the token.
    """

    group_rows: Int[_Column, "groups width"]
    scores: Float[_Column, "groups width"]
    bias_rows: Int[_Column, "biases"]
    bias_ids: Int[_Column, "biases"]
    bias_values: Float[_Column, "biases"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Candidates:
    """Continuations of each group, best first. A group with fewer has score -inf, beam 0 and token 0 in the others.

    Args:
        beams: the beam that each continues.
        token_ids: the token that each adds.
        scores: cumulative log-probabilities; all NaN in a group with a beam whose logits are no distribution.
    """

    beams: Int[Array, "groups candidates"]
    token_ids: Int[Array, "groups candidates"]
    scores: Float[Array, "groups candidates"]


def make_beam_inputs(beams: Sequence[BeamSelect], *, first_row: int, num_rows: int) -> BeamInputs:
    """Lay searches out as padded numpy arrays, group i for ``beams[i]``.

    There are as many groups as rows. Each has as many beams as a search of ``num_candidates_of`` can have. So a program
    serves every mixture of searches that asks for no more candidates.

    Args:
        beams: the searches; their beams' rows of logits follow one another.
        first_row: the first of these rows.
        num_rows: rows of the logits, padding included.
    """
    shape = num_rows, _most_beams(num_candidates_of(beams))
    group_rows, scores = np.full(shape, num_rows, np.int32), np.zeros(shape, np.float32)
    assert all(2 * len(beam.chunks) <= beam.num_candidates for beam in beams), "two for each beam, at least"
    widths = np.array([len(beam.chunks) for beam in beams])
    ends = np.cumsum(widths)
    assert first_row + ends[-1] <= num_rows, (first_row, ends[-1], num_rows)
    index = np.arange(ends[-1], dtype=np.int32)
    places = np.repeat(np.arange(len(beams)), widths), index - np.repeat(ends - widths, widths)
    group_rows[places] = first_row + index
    scores[places] = list(chain.from_iterable([beam.scores for beam in beams]))
    banned = [beam.banned_token_ids for beam in beams for _ in beam.chunks]
    bias_ids = np.array(list(chain.from_iterable(banned)), np.int32)
    return BeamInputs(
        group_rows,
        scores,
        bias_rows=_padded(np.repeat(first_row + index, list(map(len, banned))), num_rows),
        bias_ids=_padded(bias_ids, 0),
        bias_values=_padded(np.full(len(bias_ids), -np.inf, np.float32), 0),
    )


def empty_beam_inputs(num_rows: int, num_candidates: int, num_biases: int) -> BeamInputs:
    """Inputs of the sizes that a program is compiled for."""
    shape = num_rows, _most_beams(num_candidates)
    return BeamInputs(
        np.zeros(shape, np.int32),
        np.zeros(shape, np.float32),
        np.zeros(num_biases, np.int32),
        np.zeros(num_biases, np.int32),
        np.zeros(num_biases, np.float32),
    )


def pack_beam_inputs(inputs: BeamInputs) -> Int[np.ndarray, " size"]:
    """All fields in one int32 array: one transfer a step."""
    return np.concatenate([np.asarray(field).reshape(-1).view(np.int32) for field in jax.tree.leaves(inputs)])


def unpack_beam_inputs(packed: Int[Array, " size"], like: BeamInputs) -> BeamInputs:
    """The fields of a packed array on the device, of the shapes and types of ``like``."""
    fields, tree = jax.tree.flatten(like)
    parts = jnp.split(packed, np.cumsum([field.size for field in fields])[:-1])
    return tree.unflatten(
        [part.reshape(field.shape).view(field.dtype) for part, field in zip(parts, fields, strict=True)]
    )


def num_candidates_of(beams: Sequence[BeamSelect]) -> int:
    """Candidates to find for every search: as many as the widest asks for, rounded up to one of a few sizes."""
    wanted = max(beam.num_candidates for beam in beams)
    return next(size for size in CANDIDATE_SIZES if size >= wanted)


def _most_beams(num_candidates: int) -> int:
    """A search has two candidates for each beam at least."""
    return min(num_candidates // 2, MAX_BEAM_WIDTH)


def beam_candidates(logits: Float[Array, "rows vocab"], inputs: BeamInputs, *, num_candidates: int) -> Candidates:
    """The best ``num_candidates`` of each group's beams x vocabulary; to be called under jit.

    A candidate's score is its beam's plus the token's log-probability, in float32. Bans act on log-probabilities and
    nothing is renormalised after them, as in Hugging Face's beam search. Among equal scores the lower beam comes first,
    then the lower token.

    Args:
        logits: the model's own, float32.
        inputs: a row belongs to one beam at most.
        num_candidates: candidates of each group (static); -inf fills those that a group does not have.
    """
    assert logits.dtype == jnp.float32, logits.dtype
    rows, vocab_size = logits.shape
    groups, width = inputs.group_rows.shape
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    # A logit that is NaN or +inf makes all of its row NaN, and the search an error.
    is_wrong = jnp.isnan(logprobs[:, 0]).at[inputs.group_rows].get(mode="fill", fill_value=False).any(axis=1)
    logprobs = jnp.where(jnp.isnan(logprobs), -jnp.inf, logprobs)
    if inputs.bias_rows.shape[0] > 0:
        logprobs = logprobs.at[inputs.bias_rows, inputs.bias_ids].add(inputs.bias_values, mode="drop")
    # Scores join before the search: rounding them may make equals of log-probabilities that differ.
    scores = jnp.zeros(rows, jnp.float32).at[inputs.group_rows].set(inputs.scores, mode="drop")
    per_row, per_group = min(num_candidates, vocab_size), min(num_candidates, width * vocab_size)
    row_scores, row_tokens = top_k(logprobs + scores[:, None], per_row)
    of_groups = row_scores.at[inputs.group_rows].get(mode="fill", fill_value=-jnp.inf).reshape(groups, width * per_row)
    token_ids = row_tokens.at[inputs.group_rows].get(mode="fill", fill_value=0).reshape(groups, width * per_row)
    best, at = top_k(of_groups, per_group)
    is_there = best > -jnp.inf
    missing = ((0, 0), (0, num_candidates - per_group))
    return Candidates(
        beams=jnp.pad(jnp.where(is_there, at // per_row, 0), missing),
        token_ids=jnp.pad(jnp.where(is_there, jnp.take_along_axis(token_ids, at, axis=-1), 0), missing),
        scores=jnp.where(is_wrong[:, None], jnp.nan, jnp.pad(best, missing, constant_values=-jnp.inf)),
    )


def split_candidates(candidates: Candidates, beams: Sequence[BeamSelect]) -> tuple[BeamCandidates, ...]:
    """Candidates fetched to the host, one result per search with as many as it asked for."""
    fields = [np.asarray(field) for field in (candidates.beams, candidates.token_ids, candidates.scores)]
    return tuple(
        [BeamCandidates(*[field[group, : beam.num_candidates] for field in fields]) for group, beam in enumerate(beams)]
    )


def _padded(values: np.ndarray, fill: int) -> np.ndarray:
    """Pad to 64, 256, 1024, ... entries: each length is a program of its own, and padding costs next to nothing."""
    if len(values) == 0:
        return values
    length = _MIN_FLAT_LEN
    while length < len(values):
        length *= 4
    return np.concatenate([values, np.full(length - len(values), fill, values.dtype)])
