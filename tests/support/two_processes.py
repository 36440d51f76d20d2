"""Two processes with two CPU devices each, as two hosts of a TPU slice have devices of their own."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from jpaged import LLM, BeamSearchParams, SamplingParams
from jpaged.models import save_checkpoint
from tests.support.byte_tokenizer import NUM_TOKENS
from tests.support.tiny import enlarged, tiny_config, tiny_model

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 900
"""A safety net, far above what a busy machine takes."""

SETTINGS = {"num_blocks": 11, "block_size": 8, "max_num_seqs": 4, "max_num_batched_tokens": 8, "max_model_len": 64}
SETTINGS |= {"max_burst": 2, "num_host_blocks": 16, "preemption": "swap", "warm_up": False, "use_tqdm": False}
PROMPTS = [{"prompt_token_ids": list(range(n))} for n in (4, 5, 7)]


def save_tiny_checkpoint(path: Path) -> None:
    """A model of one layer over bytes, without a tokenizer; each process compiles every program itself."""
    config = tiny_config(vocab_size=NUM_TOKENS, num_layers=1, eos_token_ids=(0,))
    save_checkpoint(enlarged(tiny_model(config)), config, path)


def outputs_of_every_kind(llm: LLM) -> list[list[list[int]]]:
    """Tokens of each completion of each request, with too few blocks for all requests at once."""
    kinds = [
        SamplingParams(temperature=0, max_tokens=30, ignore_eos=True),
        SamplingParams(temperature=1.0, top_p=0.8, seed=3, max_tokens=25, ignore_eos=True),
        SamplingParams(temperature=0, max_tokens=25, ignore_eos=True, presence_penalty=0.5, logprobs=1),
    ]
    results = llm.generate(PROMPTS, kinds, use_tqdm=False)
    results += llm.beam_search(PROMPTS[:1], BeamSearchParams(beam_width=2, max_tokens=6), use_tqdm=False)
    return [[output.token_ids for output in result.outputs] for result in results]


def greedy_tokens(llm: LLM) -> list[int]:
    """Tokens of one short greedy completion."""
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    return llm.generate(PROMPTS[0], params, use_tqdm=False)[0].outputs[0].token_ids


def run_two(arguments_of: Callable[[str, str], list[str]]) -> list[subprocess.CompletedProcess]:
    """Run Python twice, with the arguments ``arguments_of(port, process_id)``."""
    flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
    with socket.socket() as reserved:
        # The port stays bound until the end, so that no other process gets it; gRPC listens beside the reservation.
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(("localhost", 0))
        port = str(reserved.getsockname()[1])
        started = [subprocess.Popen([sys.executable, *arguments_of(port, str(i))], **pipes) for i in range(2)]
        try:
            ended = [(process, *process.communicate(timeout=TIMEOUT_S)) for process in started]
        finally:
            for process in started:
                process.kill()
    return [subprocess.CompletedProcess(p.args, p.returncode, out, err) for p, out, err in ended]
