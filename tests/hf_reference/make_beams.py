"""The writer of Hugging Face's beam searches over the reference checkpoints: ``beams.npz`` beside each checkpoint.

Run this script once, after make.py and in the same environment:

    pip install torch==2.13.0 transformers==5.23.0 && python tests/hf_reference/make_beams.py [CASE ...]

Every search is ``generate(num_beams=width)`` of one prompt in float32, with a cache. The script then replays the search
from the log-probabilities that ``generate`` returns, to measure how close each decision was. It keeps a prompt only if
every decision had a gap of at least ``MIN_GAP``. The arrays of a file:

    settings [searches]  prompt_len, width, max_tokens, length_penalty, early_stopping (index into EARLY_STOPPING),
                         eos_token_ids (-1: none)
    prompts [searches, longest prompt] int16, tokens [hypotheses, most tokens] int16: padded with -1
    scores [hypotheses] float32

The hypotheses of one search follow those of the search before, best first. Width 1 is Hugging Face's greedy search,
scored like a beam.
"""

import copy
import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from make import CASES
from transformers import AutoModelForCausalLM

WIDTHS = (1, 2, 4, 7)
SEARCHES_PER_WIDTH = 10
PROMPT_LENS = (1, 5, 16, 33)
LONGROPE_PROMPT_LENS = (1, 5, 60, 33)  # 60: the search crosses from the short to the long factors, at 64
MAX_TOKENS = (6, 12, 24)
LENGTH_PENALTIES = (-0.5, 0.0, 1.0, 2.0)
EARLY_STOPPING = (False, True, "never")
NUM_EOS = (0, 1, 2)
_STRIDE = 187  # shares no factor with the number of settings
MIN_GAP = 2e-4
"""The smallest gap between two scores whose order matters: several times the float32 error of a sum of logprobs."""

SETTINGS_DTYPE = np.dtype(
    [
        ("prompt_len", np.int16),
        ("width", np.int8),
        ("max_tokens", np.int8),
        ("length_penalty", np.float32),
        ("early_stopping", np.int8),
        ("eos_token_ids", np.int16, (max(NUM_EOS),)),
    ]
)


@dataclass(frozen=True)
class Setting:
    """The settings of one search."""

    width: int
    prompt_len: int
    max_tokens: int
    length_penalty: float
    early_stopping: bool | str
    num_eos: int


@dataclass(frozen=True)
class Search:
    """One search and its result: hypotheses without the prompt, best first."""

    setting: Setting
    prompt: list[int]
    eos_token_ids: list[int]
    hypotheses: list[list[int]]
    scores: list[float]


@dataclass
class Replay:
    """A search replayed from its log-probabilities, to measure its decisions."""

    hypotheses: list[tuple[list[int], float]]
    smallest_gap: float
    num_ended: int  # continuations that an end-of-sequence ended, before max_tokens
    was_full: bool  # the finished hypotheses reached the width before max_tokens


@dataclass(frozen=True)
class Find:
    """A search to keep; ``is_decisive`` if another stopping rule would have found other hypotheses."""

    search: Search
    smallest_gap: float
    is_decisive: bool


def _settings(case: str) -> Iterator[Setting]:
    """Yield the case's share of all settings.

    A stride through the product of the settings gives every case every value of each setting. Over all cases, every
    width gets every combination of any three settings.
    """
    prompt_lens = LONGROPE_PROMPT_LENS if case == "llama_longrope" else PROMPT_LENS
    product = list(itertools.product(prompt_lens, MAX_TOKENS, LENGTH_PENALTIES, EARLY_STOPPING, NUM_EOS))
    start = sorted(CASES).index(case) * SEARCHES_PER_WIDTH
    for i, width in enumerate(WIDTHS):
        for number in range(start, start + SEARCHES_PER_WIDTH):
            yield Setting(width, *product[_STRIDE * (number + i * SEARCHES_PER_WIDTH * len(CASES)) % len(product)])


def _generate(model: Any, prompt: list[int], setting: Setting, eos_token_ids: list[int]) -> Any:
    """Run Hugging Face's own search."""
    model = copy.deepcopy(model)  # rope scalings keep state from one sequence to the next
    model.generation_config.eos_token_id = eos_token_ids or None  # None as an argument would mean the checkpoint's
    model.generation_config.pad_token_id = 0  # only fills positions that are cut off again
    beams: dict[str, Any] = {
        "num_return_sequences": setting.width,
        "length_penalty": setting.length_penalty,
        "early_stopping": setting.early_stopping,
    }
    ids = torch.tensor([prompt])
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        num_beams=setting.width,
        max_new_tokens=setting.max_tokens,
        output_scores=True,
        return_dict_in_generate=True,
        **(beams if setting.width > 1 else {}),
    )


def _hypotheses(output: Any, prompt_len: int) -> list[list[int]]:
    """Return the generated tokens of each returned sequence, without padding."""
    sequences = output.sequences[:, prompt_len:].tolist()
    if "beam_indices" not in output:
        return sequences
    lengths = (output.beam_indices >= 0).sum(1).tolist()
    return [tokens[:length] for tokens, length in zip(sequences, lengths, strict=True)]


def _gap(descending: Sequence[float], rank: int) -> float:
    """Return the gap between the first ``rank`` values and the rest."""
    return float(descending[rank - 1] - descending[rank]) if len(descending) > rank else math.inf


def _replay(logprobs: list[np.ndarray], setting: Setting, eos_token_ids: list[int]) -> Replay:
    """Search again over ``logprobs``: per step [beams, vocab] float32, beams in the order of their scores."""
    width = setting.width
    # A penalty below 0 multiplies scores, and their noise too.
    unit = max(1.0, setting.max_tokens**-setting.length_penalty)
    beams: list[list[int]] = [[]]
    scores = np.zeros(1, np.float32)
    replay = Replay([], math.inf, 0, False)
    gaps = [math.inf]
    for length, rows in enumerate(logprobs, start=1):
        totals = rows[: len(beams)] + scores[:, None]
        order = np.argsort(-totals, axis=None, kind="stable")[: max(2, 1 + len(eos_token_ids)) * width]
        best = totals.ravel()[order]
        continuations = [[*beams[i // rows.shape[1]], int(i % rows.shape[1])] for i in order]
        is_last = length == setting.max_tokens
        has_ended = np.array([is_last or tokens[-1] in eos_token_ids for tokens in continuations])
        gaps += [_gap(best, width), _gap(best[~has_ended], width)]

        ended = [i for i in range(width) if has_ended[i]]
        replay.num_ended += 0 if is_last else len(ended)
        penalty = length**setting.length_penalty
        replay.hypotheses += [(continuations[i], float(best[i] / penalty)) for i in ended]
        replay.hypotheses.sort(key=lambda hypothesis: -hypothesis[1])
        gaps.append(_gap([score for _, score in replay.hypotheses], width) / unit)
        del replay.hypotheses[width:]

        beams = [tokens for tokens, ends in zip(continuations, has_ended, strict=True) if not ends][:width]
        scores = best[~has_ended][:width]
        if is_last:
            break
        if len(replay.hypotheses) == width:
            replay.was_full = True
            if setting.early_stopping is True or width == 1:
                break
            is_patient = setting.early_stopping == "never" and setting.length_penalty > 0
            attainable = scores[0] / (setting.max_tokens if is_patient else length) ** setting.length_penalty
            worst = replay.hypotheses[-1][1]
            gaps.append(abs(attainable - worst) / unit)
            if attainable <= worst:
                break
    ranked = [score for _, score in replay.hypotheses]
    gaps += [_gap(ranked, rank) / unit for rank in range(1, width)]
    replay.smallest_gap = min(gaps)
    return replay


def _search(model: Any, prompt: list[int], setting: Setting, eos_token_ids: list[int]) -> tuple[Search, Replay]:
    """Run the search by Hugging Face, and replay it.

    Raises:
        RuntimeError: the results differ although no decision was close.
    """
    output = _generate(model, prompt, setting, eos_token_ids)
    hypotheses = _hypotheses(output, len(prompt))
    # A greedy search returns logits; a beam search returns log-probabilities already.
    logprobs = [(step if setting.width > 1 else torch.log_softmax(step, -1)).numpy() for step in output.scores]
    replay = _replay(logprobs, setting, eos_token_ids)
    replayed = [tokens for tokens, _ in replay.hypotheses]
    scores = [score for _, score in replay.hypotheses]
    if setting.width > 1:
        scores = output.sequences_scores.tolist()
    is_same = hypotheses == replayed and np.allclose(scores, [s for _, s in replay.hypotheses], rtol=1e-6, atol=1e-6)
    if replay.smallest_gap > MIN_GAP and not is_same:
        raise RuntimeError(f"{setting} of {prompt}, ending at {eos_token_ids}: {hypotheses} replayed as {replayed}")
    return Search(setting, prompt, eos_token_ids, hypotheses, scores), replay


def _choose_eos_token_ids(
    model: Any, prompt: list[int], setting: Setting, random: np.random.Generator
) -> list[int] | None:
    """Choose the checkpoint's own ids if their number fits, otherwise inner tokens of a search without an end.

    Returns None if that search has too few distinct inner tokens.
    """
    own = model.generation_config.eos_token_id or []
    if len(own) == setting.num_eos:
        return own
    found = _hypotheses(_generate(model, prompt, setting, []), len(prompt))
    likely = sorted({token for tokens in found for token in tokens[1:-1]})
    if len(likely) < setting.num_eos:
        return None
    return random.choice(likely, setting.num_eos, replace=False).tolist()


def _is_stopping_decisive(model: Any, search: Search) -> bool:
    """Whether the most similar other stopping rule would have found other hypotheses."""
    setting = search.setting
    if setting.width == 1:
        return False
    if setting.early_stopping is True:
        rival: bool | str = False
    elif setting.length_penalty > 0:
        rival = "never" if setting.early_stopping is False else False
    else:  # without a penalty above 0, False and "never" are the same
        rival = True
    output = _generate(model, search.prompt, replace(setting, early_stopping=rival), search.eos_token_ids)
    return _hypotheses(output, len(search.prompt)) != search.hypotheses


def _find_search(model: Any, setting: Setting, random: np.random.Generator) -> Find:
    """Find a search without a close decision, in which an end-of-sequence, if there is one, ends hypotheses.

    The search is decisive if one of the first twelve prompts gives a decisive search.
    """
    may_be_decisive = setting.width > 1 and setting.num_eos > 0
    found = None
    for attempt in range(1000):
        if found is not None and (not may_be_decisive or attempt >= 12):
            break
        prompt = random.integers(model.config.vocab_size, size=setting.prompt_len).tolist()
        eos_token_ids = _choose_eos_token_ids(model, prompt, setting, random) if setting.num_eos else []
        if eos_token_ids is None:
            continue
        search, replay = _search(model, prompt, setting, eos_token_ids)
        if replay.smallest_gap <= MIN_GAP or (setting.num_eos and not replay.num_ended):
            continue
        if replay.was_full and _is_stopping_decisive(model, search):
            return Find(search, replay.smallest_gap, is_decisive=True)
        found = found or Find(search, replay.smallest_gap, is_decisive=False)
    if found is None:
        raise RuntimeError(f"{setting}: no prompt gives an unambiguous search")
    return found


def _padded(rows: list[list[int]]) -> np.ndarray:
    array = np.full((len(rows), max(map(len, rows))), -1, np.int16)
    for row, values in zip(array, rows, strict=True):
        row[: len(values)] = values
    return array


def _save(path: Path, searches: list[Search]) -> None:
    settings = np.zeros(len(searches), SETTINGS_DTYPE)
    for row, search in enumerate(searches):
        setting = search.setting
        eos_token_ids = [*search.eos_token_ids, *[-1] * (max(NUM_EOS) - setting.num_eos)]
        how = EARLY_STOPPING.index(setting.early_stopping)
        lengths = (setting.prompt_len, setting.width, setting.max_tokens)
        settings[row] = (*lengths, setting.length_penalty, how, eos_token_ids)
    np.savez_compressed(
        path,
        settings=settings,
        prompts=_padded([search.prompt for search in searches]),
        tokens=_padded([tokens for search in searches for tokens in search.hypotheses]),
        scores=np.array([score for search in searches for score in search.scores], np.float32),
    )


@torch.no_grad()
def make(case: str, root: Path) -> None:
    """Write one case's file."""
    model = AutoModelForCausalLM.from_pretrained(root / case, dtype=torch.float32, attn_implementation="eager").eval()
    finds = [
        _find_search(model, setting, np.random.default_rng([sorted(CASES).index(case), number]))
        for number, setting in enumerate(_settings(case))
    ]
    searches = [find.search for find in finds]
    _save(root / case / "beams.npz", searches)
    num_ended = sum(any(tokens[-1] in s.eos_token_ids for tokens in s.hypotheses) for s in searches)
    print(
        f"{case}: {len(finds)} searches, {num_ended} with results that end at an end-of-sequence, "
        f"{sum(find.is_decisive for find in finds)} that hang on when to stop, "
        f"smallest gap {min(find.smallest_gap for find in finds):.1e}",
        flush=True,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)  # the models are tiny
    transformers.logging.set_verbosity_error()
    for chosen in sys.argv[1:] or CASES:
        make(chosen, Path(__file__).parent)
