"""The server in a process of its own: it prints one JSON object a line, and its state at each SIGUSR1."""

import asyncio
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import jax

from bench.http.launch import workload_of
from bench.report import device_name, environment
from bench.serving.runs import as_prompts
from bench.workloads import Workload
from jpaged import LLM, AsyncLLM, EngineConfig, SamplingParams
from jpaged.models import load_config, random_model
from jpaged.server import ServerSettings
from jpaged.server.run import serve
from jpaged.sharding import make_mesh


def main() -> int:
    """Serve as the first argument says (``Launch``). Returns the status of the process."""
    wanted = json.loads(sys.argv[1])
    if wanted["device"] == "cpu":
        jax.config.update("jax_platforms", "cpu")
    began = time.perf_counter()
    llm = _make_llm(wanted)
    store = llm.engine.runner.programs.store
    say(
        preparation={
            "seconds": time.perf_counter() - began,
            "num_programs": len(store.programs),
            "num_from_cache": store.num_loaded,
        },
        environment=environment(wanted["commit"]),
        device_name=device_name(),
        vocab_size=llm.engine.model_config.vocab_size,
        num_blocks=llm.engine.runner.num_blocks,
    )
    if wanted["workload"] is not None:
        say(offline=_measure(llm, workload_of(wanted["workload"], llm.engine.model_config.vocab_size)))
    served = AsyncLLM.from_llm(llm)

    def ready(address: str) -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, lambda: say(state=_state(served)))
        say(address=address)

    return serve(lambda: served, ServerSettings(port=0, **wanted["server"]), ready)


def say(**fields: Any) -> None:
    """Tell the parent."""
    print(json.dumps(fields), flush=True)


def _make_llm(wanted: dict[str, Any]) -> LLM:
    settings = {"enable_prefix_caching": False} | wanted["engine"]
    if wanted["random_weights"] is None:
        return LLM(wanted["model"], **settings, warm_up=True, use_tqdm=False)
    model_config = load_config(Path(wanted["random_weights"]))
    config = EngineConfig(**settings)
    mesh = make_mesh(config.tensor_parallel_size)
    tokenizer = _words(model_config.vocab_size)
    # No name holds the model: the runner joins its projections, and the single ones would take the pool's place.
    return LLM.from_model(
        random_model(model_config, model_config.dtype, mesh, 0),
        model_config,
        config,
        mesh=mesh,
        tokenizer=tokenizer,
        warm_up=True,
        use_tqdm=False,
    )


def _words(vocab_size: int) -> Any:
    """A tokenizer whose tokens are words, so that random tokens are detokenised as those of real models are."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w1")


def _measure(llm: LLM, work: Workload) -> dict[str, Any]:
    """Seconds and tokens of ``LLM.generate``, after a short run that compiles what was not compiled before."""
    prompts = as_prompts(work.prompts)
    params = [SamplingParams(temperature=0, ignore_eos=True, max_tokens=n) for n in work.output_lens]
    llm.generate(prompts[:8], params[:8], use_tqdm=False)
    began = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "tokens_per_s": work.num_output_tokens / seconds}


def _state(llm: AsyncLLM) -> dict[str, Any]:
    """The figures in which a leak shows."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "rss_bytes": 1024 * int(status["VmRSS"].split()[0]),
        "num_files": len(os.listdir("/proc/self/fd")),
        "num_tasks": len(asyncio.all_tasks()),
        "num_used_blocks": llm.latest_stats.num_used_blocks,
        "num_unfinished": llm.num_unfinished,
    }


if __name__ == "__main__":
    sys.exit(main())
