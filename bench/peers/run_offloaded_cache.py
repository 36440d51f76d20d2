"""Hugging Face's generate with its KV cache in host memory, in a process and an environment of its own.

    python -m bench.peers.run_offloaded_cache --config bench/configs/opt-13b

Random weights in fp16. Prints a line of JSON for each cache: "offloaded" keeps KV in host memory and brings it back
layer by layer, "dynamic" keeps it on the device. It needs torch, transformers and a GPU; without them it prints the
reason and succeeds. The time of a decode step is the difference of a long and a short run.
"""

import argparse
import json
import sys
import time
from typing import Any

CACHES = ("offloaded", "dynamic")
SHORT_TOKENS, LONG_TOKENS = 3, 19


class Peer:
    """A model of random weights on the GPU.

    Args:
        config: directory of its config.json.

    Raises:
        ImportError, RuntimeError: something is missing.
    """

    def __init__(self, config: str) -> None:
        import torch  # pyright: ignore[reportMissingImports]
        import transformers

        if not torch.cuda.is_available():
            raise RuntimeError("torch sees no GPU")
        self._torch = torch
        self.versions = {"torch": str(torch.__version__), "transformers": transformers.__version__}
        settings = transformers.AutoConfig.from_pretrained(config)
        with torch.device("cuda"):
            self._model = transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.float16).eval()

    def measure(self, cache: str, num_seqs: int, prompt_len: int) -> dict[str, Any]:
        """Milliseconds of a decode step over so many sequences, each of a random prompt."""
        torch = self._torch
        prompts = torch.randint(5, self._model.config.vocab_size, (num_seqs, prompt_len), device="cuda")
        self._run(prompts, cache, SHORT_TOKENS)
        short_s, long_s = (self._run(prompts, cache, num_tokens) for num_tokens in (SHORT_TOKENS, LONG_TOKENS))
        step_ms = 1e3 * (long_s - short_s) / (LONG_TOKENS - SHORT_TOKENS)
        return {"cache": cache, "num_seqs": num_seqs, "prompt_len": prompt_len, "step_ms": step_ms}

    def _run(self, prompts: Any, cache: str, num_tokens: int) -> float:
        self._torch.cuda.synchronize()
        started = time.perf_counter()
        with self._torch.inference_mode():
            self._model.generate(
                prompts,
                attention_mask=self._torch.ones_like(prompts),
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
                do_sample=False,
                cache_implementation=cache,
            )
        self._torch.cuda.synchronize()
        return time.perf_counter() - started


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="DIR", help="directory of a config.json")
    parser.add_argument("--num-seqs", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--prompt-len", type=int, default=1024, help="default: %(default)s")
    args = parser.parse_args(argv)
    try:
        peer = Peer(args.config)
    except (ImportError, RuntimeError) as error:
        print(json.dumps({"unavailable": str(error)}))
        return 0
    print(json.dumps({"versions": peer.versions}), flush=True)
    for cache in CACHES:
        print(json.dumps(peer.measure(cache, args.num_seqs, args.prompt_len)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
