"""Beam search: token for token and score for score what Hugging Face finds, however often its group is preempted."""

import dataclasses
from functools import lru_cache
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged.config import EngineConfig
from jpaged.contract.result import BeamCandidates
from jpaged.engine.loop import Engine
from jpaged.host.search.beam import BeamSearch
from jpaged.llm import LLM
from jpaged.models import load_config, load_model
from jpaged.models.groups import grouped
from jpaged.request import SamplingParams
from jpaged.sharding import make_mesh
from tests.support.oracles import (
    HF_BEAM_CASES,
    HF_GREEDY,
    HF_REFERENCE,
    BeamReference,
    assert_equals_reference,
    beam_search_without_cache,
    load_beam_references,
    load_reference,
    teacher_forced_logits,
)

WIDEST, LONGEST = 7, 96  # of the references
NUM_ROWS = 32


def assert_scores_equal(scores: list[float | None], reference: BeamReference) -> None:
    """To 1e-4, in log-probability where a length penalty below 0 makes scores larger than that."""
    lengths = np.array([len(tokens) for tokens in reference.hypotheses], float)
    error = np.abs(np.array(scores, float) - reference.scores)
    np.testing.assert_array_less(error / np.maximum(1, lengths**-reference.length_penalty), 1e-4)


@pytest.mark.parametrize("case", ["llama_dynamic", "llama_longrope", "llama_tied", "opt_post_norm", "qwen2_window"])
def test_search_without_cache_equals_hugging_face(case):
    path, mesh = HF_REFERENCE / case, make_mesh(1)
    model = load_model(path, load_config(path), jnp.float32, mesh, use_tqdm=False)
    references = load_beam_references(case)[::4]
    assert {reference.width for reference in references} == {1, 2, 4, 7}
    for reference in references:
        prompt_len = len(reference.prompt)

        def logprobs_of(sequences: list[list[int]], prompt_len: int = prompt_len) -> np.ndarray:
            rows = [np.array(tokens) for tokens in sequences + sequences[:1] * (WIDEST - len(sequences))]
            logits = teacher_forced_logits(model, rows, [prompt_len] * WIDEST, LONGEST)
            last = logits[: len(sequences), len(sequences[0]) - 1]
            return np.asarray(jax.nn.log_softmax(last))

        found = beam_search_without_cache(
            logprobs_of,
            reference.prompt,
            reference.width,
            reference.max_tokens,
            reference.length_penalty,
            reference.early_stopping,
            reference.eos_token_ids,
        )
        assert [tokens for tokens, _ in found] == reference.hypotheses
        assert_scores_equal([score for _, score in found], reference)


def _params(reference: BeamReference, model_eos: tuple[int, ...]) -> SamplingParams:
    """The search as a request: it ends at the checkpoint's own end-of-sequence, or at stop tokens instead of it."""
    is_own = set(reference.eos_token_ids) == set(model_eos)
    return SamplingParams(
        use_beam_search=True,
        n=reference.width,
        best_of=reference.width,
        temperature=0,
        max_tokens=reference.max_tokens,
        length_penalty=reference.length_penalty,
        early_stopping=reference.early_stopping,
        ignore_eos=not is_own,
        stop_token_ids=None if is_own else reference.eos_token_ids,
    )


@lru_cache(maxsize=1)
def _load_llm(case: str) -> LLM:
    """An LLM over a pool that holds few of the case's searches, with a host pool that holds them all."""
    path, mesh = HF_REFERENCE / case, make_mesh(1)
    model_config = load_config(path)
    model = load_model(path, model_config, jnp.float32, mesh, use_tqdm=False)
    num_groups = len(grouped(model_config.layer_specs, model_config.max_model_len).groups)  # each has blocks of its own
    config = EngineConfig(
        block_size=4,
        num_blocks=1 + 64 * num_groups,
        max_num_seqs=NUM_ROWS,
        max_num_batched_tokens=64,
        preemption="swap",
        num_host_blocks=256,
    )
    llm = LLM.from_model(model, model_config, config, mesh=mesh, warm_up=False, use_tqdm=False)
    del llm.engine.runner.buckets[:-1]
    return llm


PREEMPTIONS = ("swap", "recompute")
HF_RUNS = sorted(
    {(case, PREEMPTIONS[i % 2]) for i, case in enumerate(HF_BEAM_CASES)}
    | set(product(("llama_gqa", "opt", "qwen2_window"), PREEMPTIONS))
)
"""One way to preempt a checkpoint; both with grouped heads, learned positions and a sliding window."""


@pytest.mark.usefixtures("no_growth")
@pytest.mark.parametrize(("case", "preemption"), HF_RUNS)
def test_searches_and_log_probabilities_under_pressure_equal_hugging_face(case, preemption):
    """All searches and greedy requests of a case in one batch, in a pool that holds few of them."""
    llm = _load_llm(case)
    num_host_blocks = 256 if preemption == "swap" else 0
    config = dataclasses.replace(llm.engine.config, preemption=preemption, num_host_blocks=num_host_blocks)
    llm = LLM.from_engine(Engine(llm.engine.runner, config))

    searches = load_beam_references(case)
    greedy = list(load_reference(case).values())
    model_eos = llm.engine.model_config.eos_token_ids
    params = [_params(search, model_eos) for search in searches]
    params += [HF_GREEDY] * len(greedy)
    prompts = [search.prompt for search in searches] + [reference.prompt.tolist() for reference in greedy]
    order = np.random.default_rng(0).permutation(len(prompts))
    shuffled = llm.generate(
        [{"prompt_token_ids": prompts[i]} for i in order], [params[i] for i in order], use_tqdm=False
    )
    outputs = [shuffled[i] for i in np.argsort(order)]

    for search, output in zip(searches, outputs, strict=False):
        assert [hypothesis.token_ids for hypothesis in output.outputs] == search.hypotheses
        assert_scores_equal([hypothesis.score for hypothesis in output.outputs], search)
    for reference, output in zip(greedy, outputs[len(searches) :], strict=True):
        assert_equals_reference(output, reference)
    stats = llm.stats()
    assert stats.num_used_blocks == 0
    assert stats.num_preemptions > 0
    assert (stats.num_swaps_out > 0) == (stats.num_swaps_in > 0) == (preemption == "swap")


def _search(**params) -> BeamSearch:
    sampling = SamplingParams(use_beam_search=True, temperature=0, max_tokens=10, **params)
    return BeamSearch(sampling, 10, frozenset({0}))


def _candidates(*rows: tuple[int, int, float]) -> BeamCandidates:
    beams, tokens, scores = zip(*rows, strict=True)
    return BeamCandidates(np.array(beams, np.int32), np.array(tokens, np.int32), np.array(scores, np.float32))


@pytest.mark.parametrize(
    ("early_stopping", "length_penalty", "is_over"),
    [
        (False, 1.0, True),  # -0.8 / 2 is worse than the worst result, -0.7 / 2
        ("never", 1.0, False),  # -0.8 / 10 would be better
        (False, -1.0, False),  # -0.65 * 2 is better than -0.7 * 2
        ("never", -1.0, False),  # and -0.65 * 10 is not asked for, since no length would make it better
        (True, -1.0, True),
    ],
)
def test_a_search_ends_when_no_live_beam_can_beat_the_worst_result(early_stopping, length_penalty, is_over):
    search = _search(n=2, length_penalty=length_penalty, early_stopping=early_stopping)
    live = search.advance([[]], _candidates((0, 0, -0.3), (0, 5, -0.35), (0, 6, -0.6), (0, 7, -0.9)))
    assert [beam.token_id for beam in live] == [5, 6]
    best_live = -0.8 if length_penalty > 0 else -0.65
    rows = [(0, 0, -0.7), (0, 3, best_live), (1, 3, -0.9), (1, 4, -1.0)]
    live = search.advance([[5], [6]], _candidates(*sorted(rows, key=lambda row: -row[2])))
    assert len(search.finished) == 2
    assert (live == []) is is_over


@pytest.mark.parametrize(("stop_token_ids", "expected"), [((), 8), ((1,), 8), ((1, 2), 12), ((1, 2, 3), 16)])
def test_enough_candidates_go_on_even_if_every_stop_token_is_among_them(stop_token_ids, expected):
    search = BeamSearch(SamplingParams(use_beam_search=True, temperature=0, n=4), 10, frozenset(stop_token_ids))
    assert search.num_candidates == expected


def test_a_candidate_beyond_the_width_shows_that_others_go_on_but_is_no_result():
    search = _search(n=2)
    live = search.advance([[]], _candidates((0, 5, -1.0), (0, 6, -1.1), (0, 0, -1.2), (0, 7, -1.3)))
    assert search.finished == []
    assert [(beam.parent, beam.token_id) for beam in live] == [(0, 5), (0, 6)]


def test_a_vocabulary_with_nothing_left_ends_the_search():
    search = _search(n=2)
    assert search.advance([[]], _candidates((0, 0, -0.5), (0, 0, -np.inf), (0, 0, -np.inf), (0, 0, -np.inf))) == []
    assert [hypothesis.token_ids for hypothesis in search.finished] == [[0]]
