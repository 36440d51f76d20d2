"""The command line, in process, over a tiny checkpoint with a byte-level tokenizer."""

import io
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass, field, replace

import jax
import numpy as np
import pytest

import jpaged.llm
from jpaged.cli import main as cli
from jpaged.cli.info import gather_info
from jpaged.cli.options import ENGINE_OPTIONS, engine_settings
from jpaged.cli.terminal import to_json
from jpaged.config import EngineConfig
from jpaged.contract.profile import Link, MachineProfile
from jpaged.device.target import TARGETS
from jpaged.engine.loading import load_checkpoint
from jpaged.models import random_model, save_checkpoint
from jpaged.request import BeamSearchParams, SamplingParams
from jpaged.rules import settings_of
from jpaged.sharding import make_mesh
from tests.support.byte_tokenizer import save_tokenizer
from tests.support.oracles import HF_REFERENCE
from tests.support.tiny import tiny_config

CONTEXT = 96
TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Two checkpoints with the same weights: one with a chat template, one without."""
    config = tiny_config(
        vocab_size=257,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        max_position_embeddings=CONTEXT,
        eos_token_ids=(0,),
    )
    model = random_model(config, "float32", make_mesh(), seed=0)
    paths = {}
    for name, template in (("chat", TEMPLATE), ("plain", None)):
        paths[name] = tmp_path_factory.mktemp(name)
        save_checkpoint(model, config, paths[name])
        save_tokenizer(paths[name], template)
    return paths


@pytest.fixture(scope="module")
def llms(checkpoints):
    """One LLM per checkpoint, as the command makes it: commands share the programs it has compiled."""
    return {
        str(path): jpaged.llm.LLM(path, max_num_seqs=3, max_num_batched_tokens=16, warm_up=False, use_tqdm=False)
        for path in checkpoints.values()
    }


@pytest.fixture
def run(monkeypatch, capsys, checkpoints, llms):
    """Runs a command on a checkpoint; returns exit status, stdout and stderr."""
    monkeypatch.setattr(jpaged.llm, "LLM", lambda model, **options: llms[model])

    def run(*argv, model="plain", stdin=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        status = cli.main([*argv, "--model", str(checkpoints[model])])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


# generate -------------------------------------------------------------------------------------------------------------


def test_text_and_json_agree(run):
    options = ("generate", "def f", "--max-tokens", "9", "--ignore-eos", "--seed", "1")
    status, out, err = run(*options, "--json", "--logprobs", "2")
    assert (status, err) == (0, "")
    result = json.loads(out)
    [output] = result["outputs"]
    assert result["prompt"] == "def f"
    assert output["finish_reason"] == "length"
    assert len(output["token_ids"]) == len(output["logprobs"]) == 9
    assert all(str(t) in row for t, row in zip(output["token_ids"], output["logprobs"], strict=True))
    status, out, err = run(*options)
    assert (status, out, err) == (0, "def f" + output["text"] + "\n" * (not output["text"].endswith("\n")), "")


def test_prompt_comes_from_stdin_as_it_is(run):
    _, out, _ = run("generate", "-", "--max-tokens", "2", "--json", stdin="a\nb\n")
    assert json.loads(out)["prompt"] == "a\nb\n"


def test_several_completions_are_printed_whole_under_headers(run):
    options = ("generate", "ab", "-n", "2", "--seed", "3", "--max-tokens", "6", "--ignore-eos")
    _, out, _ = run(*options, "--json")
    texts = [output["text"] for output in json.loads(out)["outputs"]]
    assert texts[0] != texts[1]
    _, out, _ = run(*options)
    for index, text in enumerate(texts):
        assert f"=== completion {index + 1} of 2 (length) ===\nab{text}" in out


def test_stop_text_ends_the_completion(run):
    options = ("generate", "ab", "--max-tokens", "12", "--ignore-eos", "--temperature", "0", "--json")
    _, out, _ = run(*options)
    text = json.loads(out)["outputs"][0]["text"]
    stop = text[2:4]
    _, out, _ = run(*options, "--stop", "never", "--stop", stop)
    output = json.loads(out)["outputs"][0]
    assert (output["text"], output["finish_reason"]) == (text[: text.index(stop)], "stop")


def test_default_length_is_what_the_context_leaves(run):
    _, out, _ = run("generate", "x" * (CONTEXT - 5), "--ignore-eos", "--json")
    assert len(json.loads(out)["outputs"][0]["token_ids"]) == 5


@pytest.mark.parametrize(
    "options", [("--max-tokens", "50"), ("--max-tokens", "50", "--min-tokens", "9"), ("--min-tokens", "9")]
)
def test_context_ends_what_was_to_be_longer(run, options):
    status, out, _ = run("generate", "x" * (CONTEXT - 5), "--ignore-eos", "--json", *options)
    [output] = json.loads(out)["outputs"]
    assert (status, len(output["token_ids"]), output["finish_reason"]) == (0, 5, "length")


def test_seed_repeats_a_draw_and_no_seed_does_not(run):
    def text(*options):
        _, out, _ = run("generate", "ab", "--max-tokens", "8", "--ignore-eos", "--json", *options)
        return json.loads(out)["outputs"][0]["token_ids"]

    assert text("--seed", "5") == text("--seed", "5")
    assert text() != text()


def test_best_of_prints_the_likeliest_of_what_n_draws(run):
    options = ("generate", "ab", "--seed", "3", "--max-tokens", "6", "--ignore-eos")
    _, out, _ = run(*options, "-n", "3", "--json")
    best, second, _ = sorted(json.loads(out)["outputs"], key=lambda output: -output["cumulative_logprob"])
    assert best["index"] != 0, "or the first would do"
    status, out, err = run(*options, "--best-of", "3")
    text = "ab" + best["text"]
    assert (status, out, err) == (0, text + "\n" * (not text.endswith("\n")), "")
    _, out, _ = run(*options, "-n", "2", "--best-of", "3")
    first, last = (
        out.index(f"=== completion {i} of 2, log-probability {o['cumulative_logprob']:.5g} (length) ===\nab{o['text']}")
        for i, o in ((1, best), (2, second))
    )
    assert first < last


# Beam search ----------------------------------------------------------------------------------------------------------

BEAMS = ("generate", "ab", "--beam-width", "2", "--max-tokens", "6", "--ignore-eos")


def test_beams_are_printed_best_first_with_their_scores(run):
    status, out, err = run(*BEAMS, "--length-penalty", "0.5", "--json")
    assert (status, err) == (0, "")
    outputs = json.loads(out)["outputs"]
    scores = [output["score"] for output in outputs]
    assert scores == pytest.approx([output["cumulative_logprob"] / 6**0.5 for output in outputs])
    assert scores[0] > scores[1]
    printed = [
        f"=== completion {i + 1} of 2, score {output['score']:.5g} (length) ===\nab{output['text']}"
        for i, output in enumerate(outputs)
    ]
    status, out, err = run(*BEAMS, "--length-penalty", "0.5")
    assert (status, err) == (0, "")
    first, second = (out.index(text) for text in printed)
    assert first < second
    _, out, _ = run(*BEAMS, "--length-penalty", "0.5", "-n", "1")
    assert out.startswith(printed[0].replace("of 2", "of 1"))
    assert out.count("===") == 2


def test_beam_of_width_1_is_greedy(run):
    _, greedy, _ = run("generate", "ab", "--temperature", "0", "--max-tokens", "6", "--json")
    _, searched, _ = run("generate", "ab", "--beam-width", "1", "--max-tokens", "6", "--json")
    greedy, searched = (json.loads(out)["outputs"][0] for out in (greedy, searched))
    assert searched["token_ids"] == greedy["token_ids"]
    assert searched["cumulative_logprob"] == pytest.approx(greedy["cumulative_logprob"], abs=1e-4)


def test_drawing_that_changes_nothing_goes_with_beams(run):
    _, plain, _ = run(*BEAMS)
    assert run(*BEAMS, "--temperature", "0", "--top-p", "1", "--min-tokens", "6") == (0, plain, "")


def test_early_stopping_is_as_asked(run, monkeypatch, llms, checkpoints):
    asked = []
    llm = llms[str(checkpoints["plain"])]
    generate = llm.generate

    def spy(prompt, params, **options):
        asked.append(params)
        return generate(prompt, params, **options)

    monkeypatch.setattr(llm, "generate", spy)
    for choice in ("false", "true", "never"):
        run(*BEAMS, "--early-stopping", choice)
    assert [params.early_stopping for params in asked] == [False, True, "never"]


def test_rows_and_engine_options_reach_the_engine(run, monkeypatch, llms, checkpoints):
    asked = []
    monkeypatch.setattr(jpaged.llm, "LLM", lambda model, **options: asked.append(options) or llms[model])
    options = ("--preemption", "swap", "--num-host-blocks", "7", "--max-tokens", "1")
    assert run("generate", "a", "--best-of", "2", *options)[0] == 0
    assert run("generate", "a", "--beam-width", "2", "-n", "1", *options)[0] == 0
    assert [(o["max_num_seqs"], o["preemption"], o["num_host_blocks"]) for o in asked] == [(2, "swap", 7)] * 2


def spoil(monkeypatch, llm, num_good):
    """Make logits NaN from some step on."""
    runner, fetched = llm.engine.runner, []
    fetch = runner.fetch

    def fetch_nan(step):
        result = fetch(step)
        fetched.append(result)
        if len(fetched) <= num_good:
            return result
        return replace(result, scores=replace(result.scores, logprobs=np.full_like(result.scores.logprobs, np.nan)))

    monkeypatch.setattr(runner, "fetch", fetch_nan)


@pytest.mark.parametrize("options", [(), ("-n", "2"), ("-n", "1", "--best-of", "2")])
def test_text_without_logits_is_told_with_the_option_that_helps(run, monkeypatch, llms, checkpoints, options):
    spoil(monkeypatch, llms[str(checkpoints["plain"])], 2)
    status, out, err = run("generate", "ab", "--ignore-eos", *options)
    assert status == 2
    assert "ab" in out
    assert "logits are NaN or infinite" in err
    assert "--dtype bfloat16" in err


def test_json_is_json_whatever_the_numbers(run, monkeypatch, llms, checkpoints):
    spoil(monkeypatch, llms[str(checkpoints["plain"])], 2)
    status, out, _ = run("generate", "ab", "--ignore-eos", "--json", "--logprobs", "1")
    result = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (status, result["outputs"][0]["finish_reason"]) == (2, "error")
    assert result["error"].startswith("the model's logits are NaN")
    assert json.loads(to_json({"a": [math.nan, (math.inf, 1.5)], 3: -math.inf})) == {
        "a": [None, [None, 1.5]],
        "3": None,
    }


def test_chat_tells_of_an_answer_without_logits_and_forgets_it(run, monkeypatch, llms, checkpoints):
    spoil(monkeypatch, llms[str(checkpoints["chat"])], 2)
    status, _, err = run("chat", model="chat", stdin="hi\n")
    assert status == 0
    assert "[the model's logits are NaN" in err


# Mistakes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("generate", ""), "prompt is empty"),
        (("generate", "a", "--temperature", "nan"), "--temperature nan is not valid"),
        (("generate", "a", "--top-p", "-1"), "--top-p -1.0"),
        (("generate", "a", "-n", "0"), "-n 0 is not valid"),
        (("generate", "a", "-n", "1000000"), "-n 1000000"),
        (("generate", "a", "--max-tokens", "0"), "--max-tokens 0 is not valid: expected an integer"),
        (("generate", "a", "--max-tokens", "1000"), "--max-tokens 1000 is more than --max-model-len 96"),
        (("generate", "a", "--min-tokens", "9", "--max-tokens", "3"), "--min-tokens 9"),
        (("generate", "a", "--stop", ""), "stop"),
        (("generate", "a", "--seed", "-1"), "--seed -1"),
        (("generate", "a", "--logprobs", "1"), "--json"),
        (("generate", "a", "--json", "--logprobs", "21"), "--logprobs 21"),
        (("generate", "a", "-n", "2", "--best-of", "1"), "--best-of 1 is less than -n 2"),
        (("generate", "a", "--beam-width", "0"), "--beam-width 0"),
        (("generate", "a", "--beam-width", "65"), "--beam-width 65"),
        (("generate", "a", "--beam-width", "2", "-n", "3"), "-n 3 is more than --beam-width 2"),
        (("generate", "a", "--beam-width", "2", "--best-of", "2"), "--best-of does not go with --beam-width"),
        (
            ("generate", "a", "--beam-width", "2", "--temperature", "0.8"),
            "--temperature 0.8 does not go with --beam-width",
        ),
        (("generate", "a", "--beam-width", "2", "--top-p", "0.9"), "--top-p 0.9 does not go with"),
        (("generate", "a", "--beam-width", "2", "--seed", "1"), "--seed 1 does not go with"),
        (("generate", "a", "--beam-width", "2", "--stop", "b"), "--stop ['b'] does not go with"),
        (("generate", "a", "--length-penalty", "2"), "add --beam-width"),
        (("generate", "a", "--early-stopping", "true"), "add --beam-width"),
        (("generate", "x" * CONTEXT), "shorten the prompt"),
        (("info", "--block-size", "0"), "--block-size 0"),
        (("info", "--interpret"), "--interpret with no --attention-implementation: only"),
        (("info", "--process-id", "1"), "no --num-processes, --process-id 1: give all three"),
        (("info", "--tensor-parallel-size", "99"), "--tensor-parallel-size 99"),
        (("info", "--num-host-blocks", "1", "--host-memory-bytes", "9999"), "give one of them"),
        (("info", "--preemption", "swap", "--num-host-blocks", "0"), "--preemption swap needs a host pool"),
        (("info", "--host-memory-bytes", str(1 << 60)), "does not fit"),
        (("chat",), "no chat template"),
    ],
)
def test_mistake_is_one_line_and_status_2(run, argv, message):
    status, out, err = run(*argv)
    assert (status, out) == (2, "")
    assert err.startswith("jpaged: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_mistake_in_the_options_is_found_before_anything_loads(run, monkeypatch):
    monkeypatch.setattr(jpaged.llm, "LLM", None)
    for argv in (("generate", "a", "--top-k", "-9"), ("generate", "-"), ("chat", "--min-p", "2")):
        assert run(*argv)[0] == 2


def test_debug_raises_with_the_traceback(run):
    with pytest.raises(ValueError, match="prompt is empty"):
        run("generate", "", "--debug")


def test_error_from_outside_jpaged_names_debug(run, monkeypatch):
    monkeypatch.setattr("jpaged.cli.start.load", lambda *_, **options: json.loads("{"))
    status, _, err = run("generate", "a")
    assert (status, err.count("\n")) == (2, 1)
    assert err.endswith("(--debug shows where)\n")
    assert "--debug" not in run("generate", "")[2], "a mistake that jpaged found says what to do"


@pytest.mark.parametrize("command", [("generate", "a"), ("chat",), ("info",)])
def test_directory_that_is_no_checkpoint(command, tmp_path, capsys):
    assert cli.main([*command, "--model", str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err
    assert cli.main([*command, "--model", str(tmp_path / "missing")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_interrupt_is_status_130(run, monkeypatch):
    def interrupted(*_, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("jpaged.cli.start.load", interrupted)
    assert run("generate", "a") == (130, "", "")


@pytest.mark.parametrize(
    "argv", [[], ["generate"], ["generate", "a", "--no-such-option"], ["generate", "a", "-n", "x"]]
)
def test_unknown_usage_is_argparse_own_error(argv, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(argv)
    assert "usage: jpaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generate", "--temprature", "3", "x"], "unknown option --temprature: did you mean --temperature?"),
        (["generate", "x", "--max_tokens=4"], "unknown option --max_tokens: did you mean --max-tokens?"),
        (["generate", "x", "--temp", "3"], "unknown option --temp"),
        (["chat", "--zzz"], "unknown option --zzz (jpaged chat --help shows all)"),
        (["generate", "def", "f"], "'f' is one argument too many: a text of several words needs quotes"),
        (["serve", "a-directory"], "'a-directory' is one argument too many: --model names a checkpoint"),
    ],
)
def test_unknown_options_suggest_the_nearest(argv, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(argv)
    assert message in capsys.readouterr().err


OF_PROGRAMS = {
    "include_stop_str_in_output", "bad_words", "allowed_token_ids", "detokenize", "skip_special_tokens", "output_kind",
}  # fmt: skip
"""Parameters that only a program has a use for."""


def test_every_setting_is_an_option_or_is_left_out_on_purpose():
    """A new setting has to be made an option, or named here."""
    args = cli.make_parser().parse_args(["generate", "a"])
    left_out = set(settings_of(EngineConfig)) - set(ENGINE_OPTIONS)
    assert left_out == {"enable_prefix_caching", "seed"}
    assert all(hasattr(args, name) for name in (*ENGINE_OPTIONS, "no_prefix_caching"))
    left_out = {name for name in settings_of(SamplingParams) if not hasattr(args, name)}
    assert left_out == {"use_beam_search", "logit_bias", *OF_PROGRAMS}
    assert all(hasattr(args, name) for name in settings_of(BeamSearchParams))


def test_every_option_of_the_engine_reaches_its_settings():
    values, large = {int: "7", float: "0.5", str: "xla"}, {"max_num_batched_tokens": "300"}
    for name in ENGINE_OPTIONS:
        rule = settings_of(EngineConfig)[name].rule
        value = rule.choices[-1] if rule.choices else large.get(name, values.get(rule.type, ""))
        argv = ["info", f"--{name.replace('_', '-')}", *filter(None, [value])]
        config = EngineConfig(**engine_settings(cli.make_parser().parse_args(argv)))
        assert str(getattr(config, name)) == (value or "True")


@pytest.mark.parametrize("command", [[], ["generate"], ["chat"], ["serve"], ["batch"], ["info"]])
def test_help_names_every_default(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([*command, "--help"])
    out = capsys.readouterr().out
    assert "%(" not in out
    assert "None" not in out


def test_help_loads_neither_jax_nor_transformers():
    code = (
        "import sys\nfrom jpaged.cli.main import main\n"
        "try:\n    main(['generate', '--help'])\nexcept SystemExit:\n    pass\n"
        "assert not {'jax', 'transformers', 'numpy', 'starlette'} & sys.modules.keys(), 'heavy'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_reader_who_leaves_ends_the_command_quietly(checkpoints):
    read_end, write_end = os.pipe()
    os.close(read_end)
    argv = [sys.executable, "-m", "jpaged", "info", "--model", str(checkpoints["plain"])]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(argv, stdout=write_end, stderr=subprocess.PIPE, env=env, text=True, check=False)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (141, "")


# chat -----------------------------------------------------------------------------------------------------------------


@dataclass
class Turn:
    """One request of a conversation: its prompt, as text and as ids, its parameters and what came back."""

    text: str
    token_ids: list[int]
    params: SamplingParams
    answer_ids: list[int] = field(default_factory=list)


@pytest.fixture
def turns(monkeypatch, llms, checkpoints):
    """The requests that a conversation makes."""
    llm, seen = llms[str(checkpoints["chat"])], []
    stream = llm.stream

    def spy(prompt, params):
        token_ids = prompt["prompt_token_ids"]
        seen.append(Turn(llm.tokenizer.decode(token_ids), token_ids, params))
        for delta in stream(prompt, params):
            seen[-1].answer_ids += delta.token_ids
            yield delta

    monkeypatch.setattr(llm, "stream", spy)
    return seen


def test_conversation_continues_the_tokens_in_the_prefix_cache(run, turns, llms, checkpoints):
    options = ("chat", "--system", "be brief", "--max-tokens", "12", "--temperature", "0")
    status, _, err = run(*options, model="chat", stdin="hello you\n\nagain\n/quit\nnever\n")
    assert status == 0
    first, second = turns
    assert first.text == "s:be brief\nu:hello you\na:"
    assert second.text.startswith(first.text)
    assert second.text.endswith("\nu:again\na:")
    assert second.token_ids[: len(first.token_ids) + 12] == first.token_ids + first.answer_ids
    answer = second.text[len(first.text) : -len("\nu:again\na:")]
    tokenizer = llms[str(checkpoints["chat"])].tokenizer
    assert tokenizer.encode(answer) != first.answer_ids, "the tokens could not be found again from the text alone"
    num_cached, num_prompt = (int(word) for word in err.splitlines()[-1].strip("[]").split() if word.isdigit())
    assert 32 <= num_cached < num_prompt
    assert "came from the prefix cache" in err


def test_answer_cut_by_a_stop_string_goes_on_from_its_text(run, turns, llms, checkpoints):
    options = ("chat", "--max-tokens", "12", "--temperature", "0")
    run(*options, model="chat", stdin="hello\n")
    tokenizer = llms[str(checkpoints["chat"])].tokenizer
    answer = tokenizer.decode(turns[0].answer_ids)
    stop = answer[3:5]
    run(*options, "--stop", stop, model="chat", stdin="hello\nmore\n")
    assert turns[2].text == f"u:hello\na:{answer[: answer.index(stop)]}\nu:more\na:"


def test_reset_forgets_all_but_the_system_message(run, turns):
    run("chat", "--system", "s", "--max-tokens", "2", model="chat", stdin="one\n/reset\ntwo\n")
    assert [turn.text for turn in turns] == ["s:s\nu:one\na:", "s:s\nu:two\na:"]


def test_unknown_command_is_not_said_to_the_model(run, turns):
    status, out, err = run("chat", model="chat", stdin="/help\n")
    assert status == 0
    assert out == ""
    assert "/help is no command: /reset forgets the conversation, /quit ends it" in err


def test_full_context_says_how_to_go_on(run, turns):
    status, _, err = run("chat", model="chat", stdin=f"{'x' * 88}\n{'y' * 200}\n/reset\n{'z' * 200}\nhi\n")
    assert status == 0
    assert err.count("/reset to start afresh") >= 2
    too_long = len("u:" + "z" * 200 + "\na:")
    assert f"{too_long} tokens long and the context holds {CONTEXT}" in err
    assert turns[0].params.max_tokens == CONTEXT - len("u:" + "x" * 88 + "\na:")
    assert turns[-1].text == "u:hi\na:", "a message that does not fit is no part of the conversation"


def refusing(condition, reason):
    return f"{{% if {condition} %}}{{{{ raise_exception('{reason}') }}}}{{% endif %}}{TEMPLATE}"


def test_template_without_a_system_role_is_a_mistake_found_at_the_start(run, turns, monkeypatch, llms, checkpoints):
    template = refusing("messages[0]['role'] == 'system'", "No system role")
    monkeypatch.setattr(llms[str(checkpoints["chat"])].tokenizer, "chat_template", template)
    status, out, err = run("chat", "--system", "be brief", model="chat", stdin="hi\n")
    assert (status, out, err.count("\n"), turns) == (2, "", 1, [])
    assert err.startswith("jpaged: error: ")
    assert "No system role" in err
    assert "--system" in err
    assert run("chat", "--max-tokens", "2", model="chat", stdin="hi\n")[0] == 0


def test_message_that_the_template_refuses_is_dropped(run, turns, monkeypatch, llms, checkpoints):
    template = refusing("'bad' in messages[-1]['content']", "No bad words")
    monkeypatch.setattr(llms[str(checkpoints["chat"])].tokenizer, "chat_template", template)
    status, _, err = run("chat", "--max-tokens", "2", model="chat", stdin="bad\none\nbad\n/reset\ntwo\n")
    assert status == 0
    assert err.count("No bad words") == 2
    assert [turn.text for turn in turns] == ["u:one\na:", "u:two\na:"]


def test_answer_cut_off_says_so(run, turns):
    while True:  # some seed's first four tokens do not end the text
        _, _, err = run("chat", "--max-tokens", "4", "--seed", str(len(turns)), model="chat", stdin="hi\n")
        if "cut off" in err:
            break
    assert "cut off after 4 tokens: start with a higher --max-tokens" in err


def test_interrupt_stops_the_answer_and_keeps_what_there_is(run, monkeypatch, llms, checkpoints):
    llm, prompts = llms[str(checkpoints["chat"])], []
    stream = llm.stream

    def interrupted(prompt, params):
        prompts.append(llm.tokenizer.decode(prompt["prompt_token_ids"]))
        yield next(stream(prompt, params))
        raise KeyboardInterrupt

    monkeypatch.setattr(llm, "stream", interrupted)
    status, out, _ = run("chat", "--temperature", "0", model="chat", stdin="hi\nmore\n")
    assert status == 0
    assert prompts == ["u:hi\na:", f"u:hi\na:{out.split(chr(10))[0]}\nu:more\na:"]
    assert not llm.engine.has_unfinished


def test_interrupt_at_the_prompt_ends_the_conversation(run, monkeypatch):
    messages = ["hi"]

    def interrupted(_):
        if messages:
            return messages.pop()
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    status, _, err = run("chat", model="chat")
    assert status == 130
    assert "came from the prefix cache" in err


# info -----------------------------------------------------------------------------------------------------------------


def test_info_names_shape_kernel_and_pool(run, checkpoints):
    status, out, err = run("info", "--json", "--num-blocks", "11", "--block-size", "8", "--dtype", "bfloat16")
    assert (status, err) == (0, "")
    info = json.loads(out)
    assert info["versions"]["jax"] == jax.__version__
    assert len(info["devices"]) == jax.device_count()
    assert info["attention_implementation"] == "xla"
    assert info["model"]["path"] == str(checkpoints["plain"])
    assert info["model"]["max_model_len"] == CONTEXT
    assert info["model"]["weight_bytes"] == 2 * info["model"]["num_parameters"]
    bytes_per_token = 1 * 2 * 1 * 8 * 2  # layers, K and V, KV heads, head_dim, bfloat16
    assert info["kv_cache"] == {
        "block_size": 8,
        "bytes_per_token": bytes_per_token,
        "num_blocks": 11,
        "pool_bytes": 11 * 8 * bytes_per_token,
        "num_tokens": 80,
    }
    assert info["host_pool"]["num_blocks"] == 0, "a CPU's pool is host memory already"
    assert info["preemption"] == "auto"


@pytest.fixture
def accelerator(monkeypatch):
    """The defaults of an accelerator, on this CPU."""
    monkeypatch.setitem(TARGETS, "cpu", replace(TARGETS["cpu"], dtype=None))


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize(
    ("option", "dtype", "note"),
    [
        ("auto", "bfloat16", "the checkpoint is in float32, and runs in bfloat16: dtype='float32' runs it as it is"),
        ("float32", "float32", None),
    ],
)
def test_info_and_the_log_say_that_a_float32_checkpoint_runs_in_bfloat16(option, dtype, note, run, checkpoints, caplog):
    model = json.loads(run("info", "--json", "--dtype", option)[1])["model"]
    assert (model["dtype"], model["weight_bytes"] // model["num_parameters"]) == (dtype, 2 if note else 4)
    assert (model["dtype_note"] or "").startswith(note or "")
    assert (f"dtype          {model['dtype_note']}" in run("info", "--dtype", option)[1]) == (note is not None)
    caplog.set_level("INFO", "jpaged")
    config = EngineConfig(dtype=option, num_blocks=4, max_num_seqs=1, max_num_batched_tokens=16)
    engine = load_checkpoint(checkpoints["plain"], config, warm_up=False, use_tqdm=False)
    assert engine.runner.dtype.name == dtype
    assert [record.getMessage() for record in caplog.records if "float32" in record.getMessage()] == [
        *filter(None, [model["dtype_note"]])
    ]


def test_info_says_how_many_experts_a_layer_and_a_token_have():
    info = gather_info(HF_REFERENCE / "mixtral", EngineConfig(num_blocks=9, num_host_blocks=0))
    assert info.model.experts == (7, 2)
    assert "experts        7 in a layer, 2 for each token\n" in f"{info}\n"


@pytest.mark.usefixtures("accelerator")
def test_info_says_what_it_assumes_of_a_checkpoint_that_tells_no_dtype(checkpoints, tmp_path, capsys):
    config = json.loads((checkpoints["plain"] / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))

    def info():
        assert cli.main(["info", "--json", "--model", str(tmp_path)]) == 0
        model = json.loads(capsys.readouterr().out)["model"]
        return model["dtype"], model["dtype_note"]

    assumed = "config.json names none, and the weights are not here: those in float16 run in float16"
    assert info() == ("bfloat16", assumed)
    (tmp_path / "model.safetensors").write_bytes((checkpoints["plain"] / "model.safetensors").read_bytes())
    dtype, note = info()
    assert (dtype, note is not None and note.startswith("the checkpoint is in float32")) == ("bfloat16", True)


def test_info_foretells_the_pools(checkpoints, capsys):
    path, num_bytes = checkpoints["plain"], 100_000
    llm = jpaged.llm.LLM(path, host_memory_bytes=num_bytes, preemption="swap", warm_up=False, use_tqdm=False)
    options = ["--host-memory-bytes", str(num_bytes), "--preemption", "swap"]
    assert cli.main(["info", "--json", "--model", str(path), *options]) == 0
    info, runner = json.loads(capsys.readouterr().out), llm.engine.runner
    assert info["kv_cache"]["num_blocks"] == runner.num_blocks
    assert info["model"]["weight_bytes"] == runner.weight_bytes
    assert info["preemption"] == "swap"
    assert info["host_pool"] == {
        "num_blocks": runner.num_host_blocks,
        "pool_bytes": runner.num_host_blocks * runner.bytes_per_block,
        "memory_kind": "unpinned_host",
    }
    assert num_bytes - runner.bytes_per_block < info["host_pool"]["pool_bytes"] <= num_bytes


def test_info_foretells_a_host_pool_for_contexts_longer_than_the_device_pool(checkpoints, capsys):
    path, options = checkpoints["plain"], ["--kv-placement", "host", "--num-blocks", "6"]
    llm = jpaged.llm.LLM(path, kv_placement="host", num_blocks=6, warm_up=False, use_tqdm=False)
    assert cli.main(["info", "--json", "--model", str(path), *options]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["host_pool"]["num_blocks"] == llm.engine.runner.num_host_blocks
    assert info["placement_note"].startswith("kv_placement='host' gains nothing here")


def test_info_tells_weights_in_host_memory_from_others(run, checkpoints, monkeypatch):
    status, out, _ = run("info", "--json", "--weight-placement", "host")
    model = json.loads(out)["model"]
    assert (status, 0 < model["host_weight_bytes"] < model["weight_bytes"]) == (0, True)
    assert "of it in host memory" in run("info", "--weight-placement", "host")[1]
    assert "of it in host memory" not in run("info")[1]
    monkeypatch.setattr("jpaged.device.weights.free_machine_bytes", lambda: 10)
    status, _, err = run("info", "--weight-placement", "host")
    assert status != 0
    assert "and 10 bytes of it are free" in err


def test_info_says_how_requests_make_way(run):
    def last_lines(*options):
        return [line.partition("  ")[2].strip() for line in run("info", *options)[1].splitlines()[-2:]]

    assert last_lines()[1] == "auto: recompute, as there is no host pool"
    assert last_lines("--preemption", "recompute")[1] == "recompute"
    pool, preemption = last_lines("--num-host-blocks", "1024", "--preemption", "auto")
    assert pool == "1,024 blocks are 1.00 MiB of unpinned host memory", "1,024 x 16 tokens x 64 bytes"
    assert preemption.startswith("auto: swap or recompute")


def test_info_says_which_bound_of_a_step_is_in_effect(run, monkeypatch):
    def step(*options):
        [line] = [line for line in run("info", *options)[1].splitlines() if line.startswith("step ")]
        return line.removeprefix("step").strip()

    limits, pool = "256 sequences and 2,048 tokens at most", ("--num-host-blocks", "64")
    asked = "--max-inter-token-ms", "20"
    assert step() == f"{limits}; no bound beside decodes"
    assert step(*asked) == f"{limits}; no bound beside decodes", "no rates are measured without a host pool"
    assert step(*asked, *pool, "--preemption", "swap") == f"{limits}; no bound beside decodes"
    assert step(*asked, *pool) == f"{limits}; 20 ms beside decodes"
    link = Link(0.0, 1e9, 1e9)
    kept = MachineProfile(1, link, link, (), 0.0031, 1e-6, 0.0, 0.0, 0.0)
    monkeypatch.setattr("jpaged.cli.info.load_profile", lambda path: kept)
    assert step(*asked, *pool) == f"{limits}; 20 ms beside decodes, of which one token takes 3.1"
    sizes = "--max-num-seqs", "4", "--max-num-batched-tokens", "32"
    assert step(*sizes) == "4 sequences and 32 tokens at most; no bound beside decodes"


def test_a_command_chooses_the_sizes_of_a_step_unless_options_do(monkeypatch):
    given = []

    def noted(model, **settings):
        given.append((settings["max_num_seqs"], settings["max_num_batched_tokens"]))
        raise ValueError("enough")

    monkeypatch.setattr(jpaged.llm, "LLM", noted)
    for options in (
        ["-n", "3"],
        ["-n", "600"],
        ["-n", "3", "--max-num-seqs", "5"],
        ["--max-num-batched-tokens", "64"],
        ["--max-num-seqs", "600", "--max-num-batched-tokens", "700"],
    ):
        assert cli.main(["generate", "a", *options]) == 2
    assert given == [(3, 512), (600, 616), (5, 512), (1, 64), (600, 700)]


def test_a_server_and_a_batch_choose_when_to_compile():
    parser = cli.make_parser()
    for command in (["serve"], ["batch", "in", "out"]):
        assert parser.parse_args(command).warm_up == "auto"
        assert parser.parse_args([*command, "--warm-up", "first"]).warm_up == "first"
    assert not hasattr(parser.parse_args(["generate", "a"]), "warm_up")


def test_info_reads_no_weights(run, checkpoints, tmp_path):
    (tmp_path / "config.json").write_bytes((checkpoints["plain"] / "config.json").read_bytes())
    assert cli.main(["info", "--model", str(tmp_path)]) == 0


def test_info_says_which_sampling_parameters_the_checkpoint_names(checkpoints, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes((checkpoints["plain"] / "config.json").read_bytes())
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.5, "max_new_tokens": 9}')
    options = ["info", "--model", str(tmp_path)]
    assert cli.main(options) == 0
    assert "sampling       temperature 0.5, max_tokens 9" in capsys.readouterr().out
    assert cli.main([*options, "--json", "--generation-config", "none"]) == 0
    assert json.loads(capsys.readouterr().out)["sampling_defaults"] == {}


def test_info_as_text_has_a_line_for_everything(run):
    _, out, _ = run("info", "--attention-implementation", "xla")
    assert [line.split("  ")[0] for line in out.splitlines()] == [
        "versions", "devices", "attention", "compile cache", "model", "shape", "weights", "KV cache", "step",
        "host pool", "preemption",
    ]  # fmt: skip
    assert "xla (as asked)" in out
