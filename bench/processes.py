"""One model over several devices: held by one process, and by one process for each device.

``python -m bench.processes --random-weights qwen3-0.6b`` starts the processes itself, on the GPUs of this machine (or
with ``--device cpu`` on 2 CPU devices). All serve the same requests, greedily, and must draw the same tokens; saved are
the rates, and what the one message a step costs: the difference between the last two rows.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.results import RESULTS, environment, save

CONFIGS = Path(__file__).parent / "configs"
NUM_DEVICES = 2
BATCHES = (1, 32, 128)
NUM_TOKENS = 128
PROMPT_LEN = 64
TIMEOUT_S = 500

CASES = (
    ("one device", 1, False),
    ("2 devices of one process", NUM_DEVICES, False),
    ("2 devices of two processes", NUM_DEVICES, True),
)
"""What it is called, devices, and whether each has a process of its own."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run all cases; the exit status says whether they drew the same tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random-weights", default="qwen3-0.6b", metavar="NAME", help="a directory of bench/configs")
    parser.add_argument("--layers", type=int, help="of the model; all by default")
    parser.add_argument("--dtype", default="bfloat16", help="float32 to compare tokens (default: %(default)s)")
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--commit", help="the commit, where there is no git to ask")
    parser.add_argument("--output", type=Path, default=RESULTS, help="directory of the result (default: %(default)s)")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.serve is not None:
        _serve(args, **json.loads(args.serve))
        return 0
    found = {}
    for name, num_devices, is_split in CASES:
        found[name] = _start(args, num_devices, is_split)
        print(name, found[name]["tokens_per_s"], flush=True)
    same = {
        name: _share_of_same_tokens(found[CASES[0][0]]["token_ids"], each["token_ids"]) for name, each in found.items()
    }
    for name, each in found.items():
        del each["token_ids"]
        each["tokens_as_of_one_device"] = same[name]
    device = found[CASES[0][0]].pop("environment") | {"num_devices": NUM_DEVICES}
    content = {"environment": device, "model": args.random_weights, "layers": args.layers, "dtype": args.dtype}
    content |= {"prompt_len": PROMPT_LEN, "num_tokens": NUM_TOKENS, "cases": found}
    kind = device["device"].replace(" ", "-").lower() if args.device == "gpu" else "cpu"
    save(f"processes_{args.random_weights}_{args.dtype}_{kind}", content, args.output)
    print(json.dumps(content["cases"], indent=2))
    return 0


def _start(args: argparse.Namespace, num_devices: int, is_split: bool) -> dict[str, Any]:
    """One case, in processes of its own; what its first one found."""
    with socket.socket() as opened:
        opened.bind(("localhost", 0))
        address = f"localhost:{opened.getsockname()[1]}"
    started = []
    for index in range(num_devices if is_split else 1):
        own = [index] if is_split else list(range(num_devices))
        env = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, own))}
        if args.device == "cpu":
            env |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={len(own)}"}
        join = {"address": address, "num_processes": num_devices, "process_id": index} if is_split else None
        serve = json.dumps({"num_devices": num_devices, "join_as": join})
        command = [sys.executable, "-m", "bench.processes", *sys.argv[1:], "--serve", serve]
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    try:
        outputs = [process.communicate(timeout=TIMEOUT_S)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert all(process.returncode == 0 for process in started), [process.returncode for process in started]
    return json.loads(outputs[0].splitlines()[-1])


def _serve(args: argparse.Namespace, num_devices: int, join_as: dict[str, Any] | None) -> None:
    """Be one of the processes; the first prints what it found."""
    import dataclasses

    import numpy as np

    from jpaged import LLM, EngineConfig, SamplingParams
    from jpaged.device.processes import join_processes
    from jpaged.device.sharding import make_mesh
    from jpaged.engine import Prompt
    from jpaged.models import load_config, random_model

    if join_as is not None:
        join_processes(join_as["address"], join_as["num_processes"], join_as["process_id"])
    model_config = load_config(CONFIGS / args.random_weights)
    model_config = dataclasses.replace(model_config, num_layers=args.layers or model_config.num_layers)
    config = EngineConfig(
        dtype=args.dtype,
        max_num_seqs=max(BATCHES),
        max_num_batched_tokens=512,
        max_model_len=PROMPT_LEN + NUM_TOKENS,
        tensor_parallel_size=num_devices,
        attention_implementation="xla",
        enable_prefix_caching=False,
        num_host_blocks=0,
        preemption="recompute",
    )
    mesh = make_mesh(num_devices)
    model = random_model(model_config, args.dtype, mesh, 0)
    llm = LLM.from_model(model, model_config, config, mesh=mesh, warm_up=False, use_tqdm=False)
    if not llm.is_leader:
        llm.follow()
        return
    rng = np.random.default_rng(0)
    drawn = rng.integers(5, 1000, (max(BATCHES), PROMPT_LEN)).tolist()
    prompts: list[Prompt] = [{"prompt_token_ids": token_ids} for token_ids in drawn]
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    rates, token_ids = {}, []
    for batch in BATCHES:
        for _ in range(2):  # the first compiles programs
            started = time.perf_counter()
            results = llm.generate(prompts[:batch], params, use_tqdm=False)
            rates[batch] = round(batch * NUM_TOKENS / (time.perf_counter() - started), 1)
        token_ids = [result.outputs[0].token_ids for result in results]
    print(json.dumps({"tokens_per_s": rates, "token_ids": token_ids, "environment": environment(args.commit)}))


def _share_of_same_tokens(expected: list[list[int]], found: list[list[int]]) -> float:
    """Of all sequences, those that are the same from the first token to the last."""
    return sum(a == b for a, b in zip(expected, found, strict=True)) / len(expected)


if __name__ == "__main__":
    sys.exit(main())
