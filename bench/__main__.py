"""``python -m bench``: every benchmark by name."""

import importlib
import sys

BENCHMARKS = {
    "serving": ("bench.serving.__main__", "throughput, step latency, start-up and memory waste of the whole engine"),
    "sharing": ("bench.sharing", "blocks saved by sharing, beside the paper's figure 15"),
    "kernels": ("bench.kernels", "attention kernels: speed, correctness (--check), kernel sizes (--tune)"),
    "host": ("bench.host", "host time of a decode step: schedule, update, pack"),
    "sampling": ("bench.sampling", "the sampler, beside one read of the logits"),
    "paper": ("bench.paper.__main__", "the PagedAttention paper's experiments, simulated"),
    "tpu-plan": ("bench.tpu_plan", "bytes and time of the TPU attention kernel, computed"),
    "tpu-models": ("bench.tpu_models", "whole models compiled for TPUs: memory and collectives, computed"),
    "flashinfer": ("bench.flashinfer_peer", "FlashInfer on the shapes of kernels"),
}


def main(argv: list[str]) -> int:
    if not argv or argv[0] not in BENCHMARKS:
        print("usage: python -m bench NAME [options]; python -m bench NAME --help\n")
        for name, (_, line) in BENCHMARKS.items():
            print(f"  {name:12} {line}")
        return 0 if argv in ([], ["-h"], ["--help"]) else 2
    return importlib.import_module(BENCHMARKS[argv[0]][0]).main(argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
