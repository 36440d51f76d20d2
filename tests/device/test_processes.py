"""Two processes that share a model, each with devices of its own, as two hosts of a TPU slice do."""

import json

import pytest

from jpaged import LLM, SamplingParams
from jpaged.device.processes import join_processes
from tests.support.byte_tokenizer import save_tokenizer
from tests.support.tiny import with_few_sizes
from tests.support.two_processes import SETTINGS, greedy_tokens, outputs_of_every_kind, run_two, save_tiny_checkpoint

JOIN = """
import gc, json, os, signal, sys, traceback
from jpaged.device.processes import join_processes
join_processes("localhost:" + sys.argv[1], 2, int(sys.argv[2]))
from unittest import mock
from tests.support.byte_tokenizer import save_tokenizer
from tests.support.tiny import with_few_sizes
from tests.support.two_processes import SETTINGS, greedy_tokens, outputs_of_every_kind
from jpaged import LLM
from jpaged.device.runner import ModelRunner
from jpaged.device.step.programs import Programs
"""

EVERYTHING = f"""
{JOIN}
signal.signal(signal.SIGINT, signal.default_int_handler)  # a process started in the background ignores it
found = []


def fail_at(number):
    calls, compute = [], ModelRunner._compute

    def failing(self, step):
        calls.append(step)
        if len(calls) == number:
            raise RuntimeError("on purpose")
        return compute(self, step)

    return mock.patch.object(ModelRunner, "_compute", failing)


def interrupted_at(number):
    calls, get = [], Programs.get

    def interrupted(self, key):
        calls.append(key)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGINT)
        return get(self, key)

    return mock.patch.object(Programs, "get", interrupted)


with fail_at(3):  # in both processes
    llm = LLM(sys.argv[3], tensor_parallel_size=4, **SETTINGS)
    if llm.is_leader:
        with_few_sizes(llm).engine.scheduler.growth.horizon = 0  # requests preempt each other
        try:
            greedy_tokens(llm)
        except RuntimeError as error:
            found.append(str(error))
        found.append(greedy_tokens(llm))
        with interrupted_at(7):
            try:
                greedy_tokens(llm)
            except KeyboardInterrupt:
                found.append("interrupted")
        found.append(greedy_tokens(llm))
        found.append(outputs_of_every_kind(llm))
        found.append(llm.stats().num_swaps_out)
        del llm
        gc.collect()
    else:
        llm.follow()
llm = LLM(sys.argv[3], tensor_parallel_size=4, **SETTINGS)
if llm.is_leader:
    with_few_sizes(llm)
    found.append(greedy_tokens(llm))
    llm.close()
    try:
        greedy_tokens(llm)
    except RuntimeError as error:
        found.append(str(error))
    print(json.dumps(found))
else:
    llm.follow()
"""

REFUSED = f"""
{JOIN}
try:
    LLM(sys.argv[3], tensor_parallel_size=4, attention_implementation="pallas_tpu", interpret=True, **SETTINGS)
except ValueError:
    traceback.print_exc()
LLM(sys.argv[3], tensor_parallel_size=4, **SETTINGS | {{"max_num_seqs": 4 + int(sys.argv[2])}})
"""


@pytest.fixture
def checkpoint(tmp_path):
    save_tiny_checkpoint(tmp_path)
    return tmp_path


@pytest.mark.starts_first
def test_two_processes_give_the_tokens_of_one_and_stay_together_whatever_happens(checkpoint):
    """Requests of every kind; failed and interrupted steps; LLMs that are dropped and closed."""
    leader, follower = run_two(lambda port, i: ["-c", EVERYTHING, port, i, str(checkpoint)])
    assert (leader.returncode, follower.returncode) == (0, 0), leader.stderr[-2000:] + follower.stderr[-2000:]
    *found, of_every_kind, num_swaps, again, closed = json.loads(leader.stdout.splitlines()[-1])
    alone = with_few_sizes(LLM(checkpoint, **SETTINGS))
    tokens = greedy_tokens(alone)
    assert found == ["on purpose", tokens, "interrupted", tokens]
    assert of_every_kind == outputs_of_every_kind(alone)
    assert num_swaps > 0
    assert again == tokens
    assert closed == "this LLM was closed: make another one, in all processes"


@pytest.mark.starts_first
def test_the_command_runs_on_two_processes_and_the_first_one_prints(checkpoint):
    save_tokenizer(checkpoint)
    prompt, options = "def add(a, b):", ["--max-tokens", "5", "--temperature", "0"]
    options += ["--model", str(checkpoint), "--tensor-parallel-size", "4", "--num-processes", "2"]
    command = ["-m", "jpaged", "generate", prompt, *options]
    leader, follower = run_two(
        lambda port, i: [*command, "--coordinator-address", f"localhost:{port}", "--process-id", i]
    )
    assert (leader.returncode, follower.returncode) == (0, 0), leader.stderr[-2000:] + follower.stderr[-2000:]
    alone = LLM(checkpoint, **SETTINGS)
    [result] = alone.generate(prompt, SamplingParams(temperature=0, max_tokens=5), use_tqdm=False)
    assert leader.stdout.splitlines()[-1] == (prompt + result.outputs[0].text).splitlines()[-1]
    assert "def add" not in follower.stdout


def test_settings_that_differ_and_the_interpreter_which_knows_one_process_are_refused(checkpoint):
    for process in run_two(lambda port, i: ["-c", REFUSED, port, i, str(checkpoint)]):
        assert process.returncode != 0
        assert "the interpreter runs in one process, and there are 2" in process.stderr
        assert "ValueError: process" in process.stderr
        assert "config=EngineConfig" in process.stderr
        assert "start all processes with the same settings" in process.stderr


@pytest.mark.parametrize("given", [("localhost:1", None, None), (None, 2, None), ("localhost:1", 2, None)])
def test_joining_half_by_hand_is_refused(given):
    with pytest.raises(ValueError, match="give all three, or none"):
        join_processes(*given)
