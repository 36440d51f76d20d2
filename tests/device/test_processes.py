"""Two processes that share a model, each with devices of its own, as two hosts of a TPU slice do."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from jpaged import LLM, BeamSearchParams, SamplingParams
from jpaged.device.processes import join_processes

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 400

SETTINGS = {"num_blocks": 11, "max_num_seqs": 4, "max_num_batched_tokens": 32, "max_model_len": 128, "max_burst": 2}
SETTINGS |= {"num_host_blocks": 16, "preemption": "swap", "warm_up": False, "use_tqdm": False}
PROMPTS = ["def add(a, b):", "class Stack:", "import os\n\n\ndef main():", "x = 1"]

SCRIPT = """
import json, sys
from jpaged.device.processes import join_processes
join_processes("localhost:" + sys.argv[1], 2, int(sys.argv[2]))
from tests.device.test_processes import SETTINGS, outputs
from jpaged import LLM
llm = LLM(tensor_parallel_size=4, **SETTINGS | json.loads(sys.argv[3]))
if llm.is_leader:
    print(json.dumps(outputs(llm)))
else:
    llm.follow()
"""


FAILURES = """
import gc, json, os, signal, sys
from jpaged.device.processes import join_processes
join_processes("localhost:" + sys.argv[1], 2, int(sys.argv[2]))
from unittest import mock
from tests.device.test_processes import PROMPTS, SETTINGS
from jpaged import LLM, SamplingParams
from jpaged.device.runner import ModelRunner
from jpaged.device.step.programs import Programs
params, found = SamplingParams(temperature=0, max_tokens=8), []


def tokens(llm):
    return llm.generate(PROMPTS[0], params, use_tqdm=False)[0].outputs[0].token_ids


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
    llm = LLM(tensor_parallel_size=4, **SETTINGS)
    if llm.is_leader:
        try:
            tokens(llm)
        except RuntimeError as error:
            found.append(str(error))
        found.append(tokens(llm))
        with interrupted_at(7):
            try:
                tokens(llm)
            except KeyboardInterrupt:
                found.append("interrupted")
        found.append(tokens(llm))
        del llm
        gc.collect()
    else:
        llm.follow()
llm = LLM(tensor_parallel_size=4, **SETTINGS)
if llm.is_leader:
    found.append(tokens(llm))
    llm.close()
    try:
        tokens(llm)
    except RuntimeError as error:
        found.append(str(error))
    print(json.dumps(found))
else:
    llm.follow()
"""


def outputs(llm: LLM) -> dict:
    """The tokens of requests of every kind, with too few blocks for all of them; and how often blocks moved."""
    kinds = [
        SamplingParams(temperature=0, max_tokens=60, ignore_eos=True),
        SamplingParams(temperature=1.0, top_p=0.8, seed=3, max_tokens=50, ignore_eos=True),
        SamplingParams(temperature=0, max_tokens=50, ignore_eos=True, presence_penalty=0.5, logprobs=1),
    ]
    results = llm.generate(PROMPTS[: len(kinds)], kinds, use_tqdm=False)
    results += llm.beam_search(PROMPTS[:1], BeamSearchParams(beam_width=2, max_tokens=6), use_tqdm=False)
    tokens = [[output.token_ids for output in result.outputs] for result in results]
    return {"tokens": tokens, "num_swaps": llm.stats().num_swaps_out}


def run_two(arguments_of) -> list[subprocess.CompletedProcess]:
    """Two processes of two CPU devices each; ``arguments_of(port, process_id)`` of Python."""
    with socket.socket() as opened:
        opened.bind(("localhost", 0))
        port = str(opened.getsockname()[1])
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
    started = [subprocess.Popen([sys.executable, *arguments_of(port, str(i))], **pipes) for i in range(2)]
    try:
        ended = [(process, *process.communicate(timeout=TIMEOUT_S)) for process in started]
    finally:
        for process in started:
            process.kill()
    return [subprocess.CompletedProcess(p.args, p.returncode, out, err) for p, out, err in ended]


def test_two_processes_give_the_tokens_of_one_whatever_they_do():
    leader, follower = run_two(lambda port, i: ["-c", SCRIPT, port, i, "{}"])
    assert (leader.returncode, follower.returncode) == (0, 0), leader.stderr[-2000:] + follower.stderr[-2000:]
    found = json.loads(leader.stdout.splitlines()[-1])
    alone = outputs(LLM(**SETTINGS))
    assert found["tokens"] == alone["tokens"]
    assert found["num_swaps"] > 0


def test_failed_and_interrupted_steps_and_dropped_llms_leave_the_processes_together():
    leader, follower = run_two(lambda port, i: ["-c", FAILURES, port, i])
    assert (leader.returncode, follower.returncode) == (0, 0), leader.stderr[-2000:] + follower.stderr[-2000:]
    [alone] = LLM(**SETTINGS).generate(PROMPTS[0], SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    tokens = alone.outputs[0].token_ids
    closed = "this LLM was closed: make another one, in all processes"
    expected = ["on purpose", tokens, "interrupted", tokens, tokens, closed]
    assert json.loads(leader.stdout.splitlines()[-1]) == expected


def test_the_command_runs_on_two_processes_and_the_first_one_prints():
    options = ["--tensor-parallel-size", "4", "--max-tokens", "5", "--temperature", "0", "--num-processes", "2"]
    command = ["-m", "jpaged", "generate", PROMPTS[0], *options]
    leader, follower = run_two(
        lambda port, i: [*command, "--coordinator-address", f"localhost:{port}", "--process-id", i]
    )
    assert (leader.returncode, follower.returncode) == (0, 0), leader.stderr[-2000:] + follower.stderr[-2000:]
    [alone] = LLM(**SETTINGS).generate(PROMPTS[0], SamplingParams(temperature=0, max_tokens=5), use_tqdm=False)
    assert leader.stdout.splitlines()[-1] == (PROMPTS[0] + alone.outputs[0].text).splitlines()[-1]
    assert "def add" not in follower.stdout


def test_the_interpreter_which_knows_one_process_only_is_refused_in_several():
    options = json.dumps({"attention_implementation": "pallas_tpu", "interpret": True})
    for process in run_two(lambda port, i: ["-c", SCRIPT, port, i, options]):
        assert process.returncode != 0
        assert "the interpreter runs in one process, and there are 2" in process.stderr


def test_a_process_with_other_settings_is_told_which():
    other = ["{}", json.dumps({"max_num_seqs": 5})]
    leader, follower = run_two(lambda port, i: ["-c", SCRIPT, port, i, other[int(i)]])
    assert leader.returncode != 0
    assert follower.returncode != 0
    for process in (leader, follower):
        assert "ValueError: process" in process.stderr
        assert "config=EngineConfig" in process.stderr
        assert "start all processes with the same settings" in process.stderr


@pytest.mark.parametrize("given", [("localhost:1", None, None), (None, 2, None), ("localhost:1", 2, None)])
def test_joining_half_by_hand_is_refused(given):
    with pytest.raises(ValueError, match="give all three, or none"):
        join_processes(*given)
