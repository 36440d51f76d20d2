"""Code written for vLLM's LLM: its names, its parameters and its results mean here what they mean there."""

import argparse
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import jpaged
from jpaged import (
    LLM,
    AsyncEngineArgs,
    AsyncLLM,
    BeamSearchParams,
    EngineArgs,
    EngineConfig,
    FinishReason,
    SamplingParams,
)
from jpaged.engine.detokenizer import Detokenizer
from jpaged.engine.loop import Engine
from jpaged.engine.stats import STATISTICS, Counter, Gauge
from jpaged.engine.vllm_names import to_own_names
from jpaged.llm import DEMO_MODEL
from tests.support.tiny import with_few_sizes

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
TEMPLATE = (
    "{% for message in messages %}# {{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}def {% endif %}"
)


@cache
def llm(max_burst: int = 1) -> LLM:
    settings = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "num_blocks": 64, "max_burst": max_burst}
    return with_few_sizes(LLM(**settings, warm_up=False, use_tqdm=False))


def generate(prompt: Any, max_burst: int = 1, **params):
    return llm(max_burst).generate(prompt, replace(GREEDY, **params), use_tqdm=False)[0].outputs[0]


# Constructor ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "own"),
    [
        ({"gpu_memory_utilization": 0.5}, {"memory_fraction": 0.5}),
        ({"swap_space": 4}, {"host_memory_bytes": 4 * 2**30}),
        ({"swap_space": 0.5}, {"host_memory_bytes": 2**29}),
        ({"num_gpu_blocks_override": 10}, {"num_blocks": 11}),
        ({"enforce_eager": True}, {"warm_up": False}),
        ({"enforce_eager": False}, {"warm_up": None}),
        ({"preemption_mode": None}, {"preemption": "auto"}),
        ({"dtype": "half"}, {"dtype": "float16"}),
        ({"dtype": "float"}, {"dtype": "float32"}),
        ({"generation_config": "vllm"}, {"generation_config": "none"}),
        ({"generation_config": "auto"}, {"generation_config": "auto"}),
        ({"trust_remote_code": False, "tokenizer_mode": "auto", "quantization": None}, {}),
        ({"pipeline_parallel_size": 1, "enable_chunked_prefill": True, "disable_log_stats": True}, {}),
        ({"seed": 3, "max_model_len": 100}, {"seed": 3, "max_model_len": 100}),
    ],
)
def test_names_with_a_meaning_here_are_taken(given, own):
    assert to_own_names(given) == own


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"trust_remote_code": True}, "trust_remote_code=True .* no code of a checkpoint is ever run"),
        ({"quantization": "awq"}, "quantization='awq' .* kv_cache_dtype"),
        ({"cpu_offload_gb": 10}, "cpu_offload_gb=10 .* weight_placement='host'"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size=2 .* tensor_parallel_size"),
        ({"enable_lora": True}, "enable_lora=True .* merge them"),
        ({"tokenizer_mode": "slow"}, "tokenizer_mode='slow' .* LLM.from_model"),
        ({"generation_config": "some/dir"}, "generation_config='some/dir' is not valid: expected one of auto, none"),
        ({"revision": "main"}, "revision='main' .* hf download"),
        ({"gpu_memory_utilization": 0.5, "memory_fraction": 0.5}, "vLLM's name of memory_fraction: give one"),
    ],
)
def test_names_without_a_meaning_here_are_refused_with_what_to_use_instead(given, match):
    with pytest.raises(ValueError, match=match):
        LLM(**given)


def test_an_unknown_name_is_refused_as_ever():
    with pytest.raises(TypeError, match="temprature"):
        LLM(temprature=1)  # pyright: ignore[reportCallIssue]


def test_the_names_reach_the_engine(monkeypatch):
    loaded = []
    monkeypatch.setattr("jpaged.llm.load_checkpoint", lambda path, config, *_, **more: loaded.append((config, more)))
    LLM("somewhere", gpu_memory_utilization=0.25, enforce_eager=True)  # pyright: ignore[reportCallIssue]
    assert loaded == [(EngineConfig(memory_fraction=0.25), {"warm_up": False, "use_tqdm": True})]


def test_another_tokenizer_is_loaded_or_refused(tmp_path):
    with pytest.raises(ValueError, match="is no directory with a tokenizer"):
        LLM(tokenizer=tmp_path, use_tqdm=False)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (DEMO_MODEL / name).exists():
            (tmp_path / name).write_bytes((DEMO_MODEL / name).read_bytes())
    other = LLM(tokenizer=str(tmp_path), max_num_seqs=2, num_blocks=16, warm_up=False, use_tqdm=False)
    assert other.tokenizer.encode("def f(x):") == llm().tokenizer.encode("def f(x):")
    assert other.engine.config == EngineConfig(max_num_seqs=2, num_blocks=16)


# Sampling parameters --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_burst", [1, 4])
def test_only_allowed_tokens_are_drawn(max_burst):
    plain = generate("def f(x):")
    others = sorted(set(plain.token_ids))[1:]
    allowed = generate("def f(x):", max_burst, allowed_token_ids=others)
    assert set(allowed.token_ids) <= set(others)
    assert generate("def f(x):", max_burst, allowed_token_ids=sorted(set(plain.token_ids))).token_ids == plain.token_ids


def assert_draws_the_best_that_is_not_banned(prompt: str, token_ids: list[int], words: list[tuple[int, ...]]) -> int:
    """Compare each token with that of a request for it alone, with a bias against what is banned there."""
    ids, num_banned = llm().tokenizer.encode(prompt), 0
    for i, token_id in enumerate(token_ids):
        banned = {
            word[-1] for word in words if tuple(token_ids[i - len(word) + 1 : i]) == word[:-1] and len(word) <= i + 1
        }
        num_banned += bool(banned)
        [alone] = generate(
            {"prompt_token_ids": ids + token_ids[:i]}, max_tokens=1, logit_bias=dict.fromkeys(banned, -1e9)
        ).token_ids
        assert token_id == alone
    return num_banned


@pytest.mark.parametrize("max_burst", [1, 4])
def test_bad_words_are_never_completed(max_burst):
    plain, encode = generate("def f(x):"), llm().tokenizer.encode
    words = plain.text.split()
    assert len(words) > 1
    for word in (words[0], words[1], "  ".join(words[:2])):
        variants = [tuple(encode(text)) for text in (word, f" {word}")]
        output = generate("def f(x):", max_burst, bad_words=[word])
        for ids in variants:
            assert ids not in [tuple(output.token_ids[i : i + len(ids)]) for i in range(12)]
        assert_draws_the_best_that_is_not_banned("def f(x):", output.token_ids, variants)


def test_a_bad_word_of_several_tokens_bans_its_last_token_behind_the_others():
    plain = generate("def f(x):")
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    word = tuple(plain.token_ids[3:6])
    engine = llm().engine
    request = replace(engine.make_request("a", "def f(x):", params), banned_sequences=(word,))
    engine.add(request)
    while not (output := engine.step()).finished:
        pass
    token_ids = output.finished[0].outputs[0].token_ids
    assert token_ids[:5] == plain.token_ids[:5]
    assert token_ids[5] != plain.token_ids[5]
    assert assert_draws_the_best_that_is_not_banned("def f(x):", token_ids, [word]) >= 1


def test_bans_that_leave_no_token_are_refused():
    [token_id] = llm().tokenizer.encode("x")
    with pytest.raises(ValueError, match="no token is left to draw"):
        generate("x", allowed_token_ids=[token_id], bad_words=["x"])
    with pytest.raises(ValueError, match="allowed_token_ids has token id 99999"):
        generate("x", allowed_token_ids=[99999])


def test_prompts_of_one_call_share_their_bans():
    read, allowed = llm().engine.prompts.read, [3, 4]
    first, second = (read(name, "x", SamplingParams(allowed_token_ids=allowed), 0) for name in "ab")
    assert first.banned_token_ids is second.banned_token_ids
    allowed.append(5)
    third = read("c", "x", SamplingParams(allowed_token_ids=allowed), 0)
    assert set(second.banned_token_ids) - set(third.banned_token_ids) == {5}


def test_a_stop_string_is_included_on_demand_and_named():
    text = generate("def f(x):").text
    stop = text[5:8]
    end = text.index(stop)
    without = generate("def f(x):", stop=[stop, "never seen"])
    assert (without.text, without.stop_reason) == (text[:end], stop)
    included = generate("def f(x):", stop=[stop], include_stop_str_in_output=True)
    assert (included.text, included.stop_reason) == (text[: end + len(stop)], stop)
    params = replace(GREEDY, stop=[stop], include_stop_str_in_output=True)
    deltas = list(llm().stream("def f(x):", params))
    assert "".join(delta.text for delta in deltas) == included.text
    assert [delta.stop_reason for delta in deltas] == [None] * (len(deltas) - 1) + [stop]


def test_a_stop_token_is_named_and_the_end_of_text_is_not():
    plain = generate("def f(x):")
    stop = plain.token_ids[4]
    stopped = generate("def f(x):", stop_token_ids=[stop])
    assert (stopped.finish_reason, stopped.stop_reason) == (FinishReason.STOP, stop)
    assert plain.stop_reason is None
    eos = llm().engine.model_config.eos_token_ids[0]
    ended = generate("def f(x):", ignore_eos=False, allowed_token_ids=[eos])
    assert (ended.finish_reason, ended.stop_reason, ended.text) == (FinishReason.STOP, None, "")
    shown = generate(
        "def f(x):",
        ignore_eos=False,
        allowed_token_ids=[eos],
        include_stop_str_in_output=True,
        skip_special_tokens=False,
    )
    assert shown.text == llm().tokenizer.decode([eos], skip_special_tokens=False)


def test_special_tokens_are_text_on_demand():
    eos = llm().engine.model_config.eos_token_ids[0]
    special = llm().tokenizer.decode([eos], skip_special_tokens=False)
    hidden = generate("def f(x):", allowed_token_ids=[eos], max_tokens=3)
    shown = generate("def f(x):", allowed_token_ids=[eos], max_tokens=3, skip_special_tokens=False)
    assert (hidden.text, shown.text) == ("", special * 3)


def test_no_text_is_made_without_detokenize(monkeypatch):
    monkeypatch.setattr(Detokenizer, "extend", lambda self, ids: pytest.fail("text was made"))
    output = generate("def f(x):", detokenize=False)
    assert (output.text, len(output.token_ids)) == ("", 12)
    assert all(delta.text == "" for delta in llm().stream("def f(x):", replace(GREEDY, detokenize=False)))
    with pytest.raises(ValueError, match="detokenize=False makes no text"):
        SamplingParams(detokenize=False, stop="x")


def test_deltas_say_which_prompt_they_belong_to_and_carry_log_probabilities():
    prompts, params = ["import os\n", "def f(x):"], replace(GREEDY, logprobs=1)
    wholes = llm().generate(prompts, params, use_tqdm=False)
    deltas = list(llm().stream(prompts, params))
    for index, whole in enumerate(wholes):
        own = [delta for delta in deltas if delta.prompt_index == index]
        assert "".join(delta.text for delta in own) == whole.outputs[0].text
        found = [entry for delta in own for entry in delta.logprobs]
        assert [list(entry) for entry in found] == [list(entry) for entry in whole.outputs[0].logprobs]
        chosen = [entry[t].logprob for entry, t in zip(found, whole.outputs[0].token_ids, strict=True)]
        assert sum(chosen) == pytest.approx(whole.outputs[0].cumulative_logprob, abs=1e-3)


# Methods and results --------------------------------------------------------------------------------------------------


def test_a_chat_is_the_completion_of_what_the_template_makes_of_it():
    messages = [{"role": "user", "content": "add two numbers"}]
    text = "# user: add two numbers\ndef "
    [output] = llm().chat(messages, GREEDY, chat_template=TEMPLATE, use_tqdm=False)
    assert output.prompt == text
    assert output.outputs[0].text == generate(text).text
    both = llm().chat([messages, messages * 2], GREEDY, chat_template=TEMPLATE, use_tqdm=False)
    assert [each.prompt.count("add two") for each in both] == [1, 2]
    [plain] = llm().chat(messages, GREEDY, chat_template=TEMPLATE, use_tqdm=False, add_generation_prompt=False)
    assert plain.prompt == "# user: add two numbers\n"


def test_the_parts_of_a_content_are_lines_of_its_text():
    parts = [{"type": "text", "text": "add"}, {"type": "text", "text": "numbers"}]
    messages = [{"role": "user", "content": parts}, {"role": "user", "content": None}]
    [output] = llm().chat(messages, GREEDY, chat_template=TEMPLATE, use_tqdm=False)
    assert output.prompt == "# user: add\nnumbers\n# user: \ndef "


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (5, r"messages\[0\]\.content is int: expected a text or a list of parts"),
        ({"text": "x"}, r"messages\[0\]\.content is dict: expected a text"),
        ([{"type": "text", "text": "x"}, {"type": "image_url"}], r"content\[1\] is no text, its type is 'image_url'"),
        ([7], r"content\[0\] is no text, its type is 'int'"),
        ([{"type": "text", "text": 7}], r"content\[0\] is no text"),
    ],
)
def test_a_content_that_is_no_text_is_refused(content, match):
    with pytest.raises(ValueError, match=match):
        llm().chat([{"role": "user", "content": content}], GREEDY, chat_template=TEMPLATE, use_tqdm=False)


@pytest.mark.parametrize(
    ("messages", "options", "match"),
    [
        ("hello", {"chat_template": TEMPLATE}, "expected a non-empty list of messages"),
        ([{"content": "x"}], {"chat_template": TEMPLATE}, r"messages\[0\]=.* expected a mapping with a role"),
        (
            [{"role": "user", "content": "x"}],
            {"chat_template": "{{ raise_exception('no users') }}"},
            "the chat template refuses the messages: no users",
        ),
        (
            [{"role": "user", "content": "x"}],
            {"chat_template": TEMPLATE, "continue_final_message": True},
            "add_generation_prompt=False",
        ),
    ],
)
def test_a_chat_that_cannot_be_is_refused(messages, options, match):
    with pytest.raises(ValueError, match=match):
        llm().chat(messages, GREEDY, use_tqdm=False, **options)


def test_a_model_without_a_template_or_a_tokenizer_has_no_chat(monkeypatch):
    monkeypatch.setattr(llm().tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match="has no chat template"):
        llm().chat([{"role": "user", "content": "x"}], GREEDY)
    monkeypatch.setattr(llm().engine, "tokenizer", None)
    with pytest.raises(ValueError, match="has no tokenizer"):
        llm().chat([{"role": "user", "content": "x"}], GREEDY)


def test_the_prefix_cache_is_forgotten_while_nothing_runs():
    prompt = "class Stack:\n    def push(self, item):\n"

    def num_cached() -> int:
        return llm().generate(prompt, GREEDY, use_tqdm=False)[0].num_cached_tokens

    num_cached()
    assert num_cached() > 0
    stream = llm().stream("x = 1", GREEDY)
    next(stream)
    assert not llm().reset_prefix_cache()
    stream.close()
    pinned = llm().pin_prefix("import os\n")
    assert not llm().reset_prefix_cache()
    llm().unpin(pinned)
    assert llm().reset_prefix_cache()
    assert num_cached() == 0
    assert num_cached() > 0


def test_metrics_are_the_statistics_under_names_of_vllm():
    metrics = {metric.name: metric for metric in llm().get_metrics()}
    assert len(metrics) == len(STATISTICS) + 1
    assert isinstance(metrics["vllm:num_requests_running"], Gauge)
    assert isinstance(metrics["vllm:prefix_cache_queries"], Counter)
    assert metrics["vllm:generation_tokens"].value == llm().stats().num_output_tokens
    assert llm().get_tokenizer() is llm().tokenizer


def test_a_search_has_its_sequences_with_the_prompt():
    [found] = llm().beam_search(["def f(x):"], BeamSearchParams(2, 6, ignore_eos=True), use_tqdm=False)
    for sequence, output in zip(found.sequences, found.outputs, strict=True):
        assert sequence.text == "def f(x):" + output.text
        assert sequence.tokens == found.prompt_token_ids + output.token_ids
        assert sequence.cum_logprob == output.cumulative_logprob
    assert found.finished


def test_arguments_of_a_command_line_make_an_engine(monkeypatch):
    made = []
    monkeypatch.setattr(LLM, "__init__", lambda self, **settings: made.append(settings))
    monkeypatch.setattr(AsyncLLM, "__init__", lambda self, **settings: made.append(settings))
    parser = argparse.ArgumentParser()
    group = EngineArgs.add_cli_args(parser.add_argument_group("engine"))
    group.set_defaults(model="a-checkpoint")
    args = parser.parse_args(["--max-num-seqs", "8", "--memory-fraction", "0.5", "--no-enable-prefix-caching"])
    LLM(**vars(args))
    AsyncLLM.from_engine_args(AsyncEngineArgs.from_cli_args(args))
    assert made[0] == made[1]
    assert made[0].pop("model") == "a-checkpoint"
    assert EngineConfig(**made[0]) == EngineConfig(max_num_seqs=8, memory_fraction=0.5, enable_prefix_caching=False)
    AsyncLLM.from_engine_args(AsyncEngineArgs(enforce_eager=True))
    assert made[2] == {"model": None, "enforce_eager": True}
    parser.format_help()


def test_the_default_parameters_are_those_of_a_call_without_any():
    assert llm().get_default_sampling_params() == SamplingParams()


def test_examples_of_the_page_run(monkeypatch, capsys):
    engine = llm().engine
    made = []

    def make_async() -> AsyncLLM:
        made.append(AsyncLLM.from_llm(LLM.from_engine(Engine(engine.runner, engine.config, engine.tokenizer))))
        return made[0]

    page = (Path(__file__).parents[2] / "jpaged" / "docs" / "from-vllm.md").read_text()
    first, second = re.findall(r"```python\n(.*?)```", page, re.S)
    monkeypatch.setattr(jpaged, "LLM", llm, raising=False)
    exec(first, {})
    assert capsys.readouterr().out.startswith("def add(a, b): ")
    monkeypatch.setattr(jpaged, "AsyncLLM", make_async, raising=False)
    exec(second, {})
    assert capsys.readouterr().out
    assert made[0].health().state == "stopped"
