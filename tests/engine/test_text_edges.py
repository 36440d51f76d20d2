"""Edges of texts: empty prompts, ends of turns, stop strings that are special tokens or end inside a character."""

import copy
import json
from functools import cache

import numpy as np
import pytest

from jpaged import LLM, EngineConfig, FinishReason, SamplingParams
from jpaged.cli.chat import _Conversation
from jpaged.cli.options import DRAWING, generate_params, make_parser
from jpaged.cli.terminal import Answer
from jpaged.engine import loading
from jpaged.engine.loop import Engine
from jpaged.engine.sampling_defaults import read_sampling_defaults
from jpaged.models import save_checkpoint
from tests.support.tiny import TINY, tiny_config, tiny_model, with_few_sizes
from tests.support.tokenizer_makes import MAKES, tokenizer_of

CONFIG = tiny_config(vocab_size=300, max_position_embeddings=64)  # it names no end of text
SIZES = EngineConfig(block_size=8, num_blocks=32, max_num_seqs=4, max_num_batched_tokens=16)


@cache
def llm(make="byte level"):
    model = tiny_model(CONFIG)
    return with_few_sizes(LLM.from_model(model, CONFIG, SIZES, tokenizer=tokenizer_of(make), use_tqdm=False))


def id_of(token, make="byte level"):
    return tokenizer_of(make).convert_tokens_to_ids(token)


def says(*tokens, prompt="the", **params):
    """The completion of a model that is made to say a token, and then the next."""
    bias = {id_of(token): 100.0 - 10 * i for i, token in enumerate(tokens)}
    given = SamplingParams(**{"temperature": 0, "max_tokens": 3, "logit_bias": bias} | params)
    return llm().generate(prompt, given, use_tqdm=False)[0].outputs[0]


def test_empty_text_is_the_token_that_begins_a_text():
    [result] = llm().generate("", SamplingParams(max_tokens=1), use_tqdm=False)
    assert (result.prompt, result.prompt_token_ids) == ("", [id_of("<s>")])


def test_end_token_of_the_tokenizer_ends_a_text_unless_it_is_ignored():
    output = says("</s>")
    assert (output.token_ids, output.text, output.finish_reason) == ([id_of("</s>")], "", FinishReason.STOP)
    assert output.stop_reason is None
    assert says("</s>", ignore_eos=True).finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("include", [True, False])
def test_special_token_may_be_a_stop_string(skip, include):
    options = {"skip_special_tokens": skip, "include_stop_str_in_output": include, "ignore_eos": True}
    output = says("<|im_end|>", stop=["never", "<|im_end|>"], **options)
    assert (output.token_ids, output.finish_reason) == ([id_of("<|im_end|>")], FinishReason.STOP)
    assert output.stop_reason == "<|im_end|>"
    assert output.text == ("<|im_end|>" if include else "")
    params = SamplingParams(
        temperature=0, max_tokens=3, logit_bias={id_of("<|im_end|>"): 100.0}, stop="<|im_end|>", **options
    )
    deltas = list(llm().stream("the", params))
    assert "".join(delta.text for delta in deltas) == output.text
    assert deltas[-1].stop_reason == "<|im_end|>"


def test_special_token_that_stops_waits_for_the_least_tokens():
    output = says("<|im_end|>", "a", stop="<|im_end|>", min_tokens=2)
    assert output.token_ids == [id_of("a")] * 2 + [id_of("<|im_end|>")]
    assert output.text == "aa"


@pytest.mark.parametrize("max_tokens", [1, 3])
def test_stop_string_in_a_token_that_begins_a_character_stops_at_once(max_tokens):
    output = says("\u0120\u00f0", stop=" ", max_tokens=max_tokens)
    assert (output.text, output.finish_reason, output.stop_reason) == ("", FinishReason.STOP, " ")
    assert len(output.token_ids) == 1


def test_stop_string_that_only_the_end_completes_stops():
    output = says("\u00f0", stop="\ufffd", max_tokens=2)
    assert (output.text, output.finish_reason) == ("", FinishReason.STOP)


def test_names_of_tokens_keep_their_space_and_their_bytes():
    output = says("\u0120a", logprobs=0, max_tokens=1)
    assert output.logprobs[0][id_of("\u0120a")].decoded_token == " a"
    output = says("\u0120\u00f0", logprobs=0, max_tokens=1)
    assert output.logprobs[0][id_of("\u0120\u00f0")].decoded_token == r"bytes: \xf0"
    assert np.isfinite(output.cumulative_logprob)


# Conversations --------------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}{{ 'u:' if m.role == 'user' else 'a:' }}{{ m.content }}{{ joint }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def tokenizer_with(make, joint):
    tokenizer = copy.deepcopy(tokenizer_of(make))
    tokenizer.chat_template = TEMPLATE.replace("{{ joint }}", joint)
    return tokenizer


@pytest.mark.parametrize("joint", ["<|im_end|>", "\n", "he "])
@pytest.mark.parametrize("make", list(MAKES))
def test_turns_have_the_tokens_of_the_whole_conversation(make, joint):
    tokenizer = tokenizer_with(make, joint)
    asked = _Conversation([]).ask(tokenizer, "the a")
    whole = tokenizer.encode(asked.text + "a bat" + joint, add_special_tokens=False)
    token_ids = whole[len(asked.token_ids) : -len(tokenizer.encode(joint, add_special_tokens=False)) or None]
    answer = Answer(tokenizer.decode(token_ids), token_ids, FinishReason.LENGTH)
    again = asked.with_answer(tokenizer, answer).ask(tokenizer, "ing")
    assert again.text == f"{asked.text}{answer.text}{joint}u:ing{joint}a:"
    assert again.token_ids == tokenizer.encode(again.text, add_special_tokens=False)


# Recommended parameters -----------------------------------------------------------------------------------------------


def save_defaults(path, **values):
    (path / "generation_config.json").write_text(json.dumps(values))
    return path


def test_parameters_that_a_checkpoint_names_are_those_of_a_call_without_any(tmp_path):
    values = {
        "do_sample": False,
        "temperature": 0.25,
        "top_k": None,
        "top_p": 0.5,
        "max_new_tokens": 3,
        "bos_token_id": 1,
    }
    defaults = read_sampling_defaults(save_defaults(tmp_path, **values))
    assert defaults == {"temperature": 0.25, "top_p": 0.5, "max_tokens": 3}
    own = LLM.from_engine(Engine(llm().engine.runner, SIZES, tokenizer_of("byte level"), defaults | {"temperature": 0}))
    assert own.get_default_sampling_params() == SamplingParams(temperature=0, top_p=0.5, max_tokens=3)
    [with_defaults] = own.generate("the", use_tqdm=False)
    [given] = own.generate("the", SamplingParams(temperature=0, max_tokens=3), use_tqdm=False)
    assert with_defaults.outputs == given.outputs
    assert "".join(delta.text for delta in own.stream("the")) == given.outputs[0].text
    assert len(own.generate("the", SamplingParams(), use_tqdm=False)[0].outputs[0].token_ids) == 16


@pytest.mark.parametrize(("values", "match"), [({"temperature": -1}, "temperature=-1"), ({"top_p": "x"}, "top_p='x'")])
def test_parameters_that_are_not_valid_are_refused_with_their_file(tmp_path, values, match):
    with pytest.raises(ValueError, match=rf"generation_config\.json: {match} is not valid.*generation_config='none'"):
        read_sampling_defaults(save_defaults(tmp_path, **values))


def test_checkpoint_without_parameters_recommends_none(tmp_path):
    assert read_sampling_defaults(tmp_path) == {}
    assert llm().get_default_sampling_params() == SamplingParams()


@pytest.mark.parametrize("setting", ["auto", "none"])
def test_setting_says_whether_a_checkpoint_is_asked(tmp_path, setting, monkeypatch, caplog):
    caplog.set_level("INFO", "jpaged")
    save_checkpoint(tiny_model(), TINY, tmp_path)
    started = []
    monkeypatch.setattr(
        loading, "start_engine", lambda *_, sampling_defaults, **options: started.append(sampling_defaults)
    )
    save_defaults(tmp_path, temperature=0.5)
    config = EngineConfig(generation_config=setting)
    loading.load_checkpoint(tmp_path, config, warm_up=False, use_tqdm=False)
    assert started == [{"temperature": 0.5} if setting == "auto" else None]
    told = ["requests that give no parameters take temperature=0.5 from generation_config.json"]
    assert [record.getMessage() for record in caplog.records if "parameters" in record.getMessage()] == (
        told if setting == "auto" else []
    )


def test_command_line_takes_what_is_recommended_and_what_is_given():
    recommended = {"temperature": 0.5, "max_tokens": 7}
    args = make_parser().parse_args(
        ["generate", "a", "--top-p", "0.75", "--stop-token-ids", "5", "--stop-token-ids", "6"]
    )
    params = generate_params(args, recommended)
    assert (params.temperature, params.max_tokens, params.top_p, params.top_k) == (0.5, 7, 0.75, 0)
    assert params.stop_token_ids == [5, 6]
    for recommended_else in ({}, {"repetition_penalty": 1.5}):
        params = generate_params(args, recommended_else)
        assert params.temperature == DRAWING.temperature
        assert params.repetition_penalty == recommended_else.get("repetition_penalty", 1.0)
    params = generate_params(args, {})
    assert (params.temperature, params.max_tokens, params.top_p) == (DRAWING.temperature, 128, 0.75)
    beams = make_parser().parse_args(["generate", "a", "--beam-width", "2", "--stop-token-ids", "5"])
    assert generate_params(beams, recommended).temperature == 0
