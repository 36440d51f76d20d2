"""FlashInfer on the shapes of ``python -m bench kernels``, in its own process: two allocators would fight for a GPU.

    python -m bench.peers.run_flashinfer --shapes decode_b128

Prints a line of JSON for each shape: microseconds of a layer, of the best configuration and of all. It needs torch and
flashinfer; without them it prints the reason and succeeds.

As in our measurement, every layer has its own K and V, and its queries are the outputs of the layer before. Plans are
made before the clock starts; the layers then run as one CUDA graph, replayed between two events.
"""

import argparse
import json
import sys
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np

from bench.kernels.shapes import AttentionShape, choose, value_deviations

NUM_LAYERS = 8
WORKSPACE_BYTES = 512 * 2**20
LAYOUTS = ("NHD", "HND")
LONG_REPLAY_MS, MAX_REPLAYS = 30.0, 256

AGREEMENT = 2e-2
"""Largest relative L2 distance of a configuration's outputs from the first one's; beyond it the call was wrong."""

type Run = Callable[[Any, Any, Any], Any]
"""One layer: from queries, and K and V, into a buffer."""


class Peer:
    """torch, flashinfer, and the workspace that all shapes share.

    Raises:
        ImportError, RuntimeError: something is missing.
    """

    def __init__(self) -> None:
        import flashinfer  # pyright: ignore[reportMissingImports]
        import torch  # pyright: ignore[reportMissingImports]

        if not torch.cuda.is_available():
            raise RuntimeError("torch sees no GPU")
        self.torch, self.flashinfer = torch, flashinfer
        self.workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")

    def versions(self) -> dict[str, str]:
        return {"flashinfer": self.flashinfer.__version__, "torch": str(self.torch.__version__)}

    def dtype(self, name: str) -> Any:
        return getattr(self.torch, name)

    def configurations(self, shape: AttentionShape, layout: str) -> dict[str, Callable[[], Run]]:
        """Configurations by name. Those of prompts attend any batch; BatchAttention balances ragged rows."""
        flashinfer, workspace = self.flashinfer, self.workspace
        found: dict[str, Callable[[], Run]] = {}
        if shape.kind == "decode":
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper
            for name, cores in (("tensor cores", True), ("CUDA cores", False)):
                found[name] = lambda cores=cores: self._planned(
                    wrapper(workspace, layout, use_tensor_cores=cores), shape
                )
        else:
            wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper
            for backend in ("fa3", "fa2"):
                found[backend] = lambda backend=backend: self._planned(
                    wrapper(workspace, layout, backend=backend), shape
                )
        if shape.is_ragged:
            found["persistent"] = lambda: self._planned(flashinfer.BatchAttention(kv_layout=layout), shape)
        return found

    def _planned(self, wrapper: Any, shape: AttentionShape) -> Run:
        """Plan a wrapper for a batch."""
        arrays = page_arrays(shape.q_lens, shape.kv_lens, shape.block_tables(), shape.block_size)
        pages = {name: self.torch.from_numpy(array) for name, array in arrays.items()}
        pages["pages"] = pages["pages"].cuda()
        is_persistent = type(wrapper).__name__ == "BatchAttention"
        starts = ["page_starts", "pages", "kv_lens" if is_persistent else "last_page_lens"]
        if shape.kind != "decode" or is_persistent:
            starts.insert(0, "q_starts")
        sizes = [shape.num_heads, shape.num_kv_heads, *[shape.head_dim] * (2 if is_persistent else 1), shape.block_size]
        wrapper.plan(
            *(pages[name] for name in starts),
            *sizes,
            q_data_type=self.dtype(shape.dtype),
            kv_data_type=self.dtype(shape.kv_dtype),
            **({"causal": True} if "q_starts" in starts else {}),
        )
        extra = {}
        if is_persistent:
            lse_shape = shape.num_tokens, shape.num_heads
            extra["lse"] = self.torch.empty(lse_shape, dtype=self.torch.float32, device="cuda")
        return lambda q, kv, out: wrapper.run(q, kv, out=out, **extra)

    def make_layers(self, shape: AttentionShape) -> list[Any]:
        """Random K and V of each layer, [pages, 2, elements of a page], for either layout."""
        torch, page_elements = self.torch, shape.block_size * shape.num_kv_heads * shape.head_dim
        of_slot = value_deviations(shape.positions(shape.block_tables()))
        counts = np.maximum((~np.isnan(of_slot)).sum(axis=1), 1)
        of_page = torch.from_numpy((np.nansum(of_slot, axis=1) / counts).astype(np.float32)).cuda()
        layers = []
        for _ in range(NUM_LAYERS):
            kv = torch.randn((shape.num_blocks, 2, page_elements), device="cuda")
            kv[:, 1] *= of_page[:, None]
            layers.append(kv.to(self.dtype(shape.kv_dtype)))
        return layers

    def measure(self, shape: AttentionShape, num_samples: int) -> dict[str, Any]:
        """Time every configuration in both layouts; the best one counts."""
        layers = self.make_layers(shape)
        shape_of_q = (shape.num_tokens, shape.num_heads, shape.head_dim)
        q = self.torch.randn(shape_of_q, device="cuda").to(self.dtype(shape.dtype))
        times: dict[str, tuple[float, float, float]] = {}
        failures: dict[str, str] = {}
        for layout in LAYOUTS:
            axes = (shape.block_size, shape.num_kv_heads) if layout == "NHD" else (shape.num_kv_heads, shape.block_size)
            views = [kv.view(shape.num_blocks, 2, *axes, shape.head_dim) for kv in layers]
            expected = None
            for name, make_run in self.configurations(shape, layout).items():
                try:
                    run = make_run()
                    expected = self._agreed(run, q, views[0], expected)
                    times[f"{layout}, {name}"] = self._time_us(run, q, views, num_samples)
                except Exception as error:
                    failures[f"{layout}, {name}"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        if not times:
            return {"shape": shape.name, "failures": failures}
        best = min(times, key=lambda name: times[name][0])
        us, fastest, slowest = times[best]
        return {
            "shape": shape.name,
            "configuration": best,
            "us": us,
            "fastest_us": fastest,
            "slowest_us": slowest,
            "num_samples": num_samples,
            "all_us": {name: timed[0] for name, timed in times.items()},
            "failures": failures,
        }

    def _agreed(self, run: Run, q: Any, kv: Any, expected: Any) -> Any:
        """The outputs expected of the next configuration.

        Raises:
            RuntimeError: the outputs of this one are not as expected.
        """
        out = self.torch.empty_like(q)
        run(q, kv, out)
        out = out.float()
        if not bool(out.isfinite().all()):
            raise RuntimeError("outputs are not finite")
        if expected is None:
            return out
        error = float((out - expected).norm() / expected.norm())
        if error > AGREEMENT:
            raise RuntimeError(f"outputs differ from the first configuration's by {error:.3g}")
        return expected

    def _time_us(self, run: Run, q: Any, views: list[Any], num_samples: int) -> tuple[float, float, float]:
        """Median, least and largest microseconds of a layer."""
        torch = self.torch
        buffers = [torch.empty_like(q) for _ in range(2)]

        def all_layers() -> None:
            x = q
            for layer, kv in enumerate(views):
                run(x, kv, buffers[layer % 2])
                x = buffers[layer % 2]

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                all_layers()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            all_layers()
        graph.replay()

        def replay_ms(count: int) -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(count):
                graph.replay()
            end.record()
            torch.cuda.synchronize()
            return start.elapsed_time(end)

        replay_ms(1)
        count = min(max(round(LONG_REPLAY_MS / replay_ms(1)), 1), MAX_REPLAYS)
        samples = [1e3 * replay_ms(count) / count / len(views) for _ in range(num_samples)]
        return median(samples), min(samples), max(samples)


def page_arrays(
    q_lens: tuple[int, ...], kv_lens: tuple[int, ...], tables: np.ndarray, block_size: int
) -> dict[str, np.ndarray]:
    """A batch as FlashInfer takes it: int32 arrays. Every row holds at least one token."""
    num_pages = -(-np.array(kv_lens) // block_size)
    arrays = {
        "q_starts": np.cumsum([0, *q_lens]),
        "page_starts": np.concatenate([[0], np.cumsum(num_pages)]),
        "pages": np.concatenate([table[:count] for table, count in zip(tables, num_pages, strict=True)]),
        "last_page_lens": np.array(kv_lens) - (num_pages - 1) * block_size,
        "kv_lens": np.array(kv_lens),
    }
    return {name: array.astype(np.int32) for name, array in arrays.items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", metavar="WORDS", help="parts of the names of shapes, separated by commas")
    parser.add_argument("--shrink", type=int, default=1, metavar="N", help="divide batches and lengths")
    parser.add_argument("--samples", type=int, default=7, help="default: %(default)s")
    args = parser.parse_args(argv)
    try:
        peer = Peer()
    except (ImportError, RuntimeError) as error:
        print(json.dumps({"unavailable": str(error)}))
        return 0
    print(json.dumps({"versions": peer.versions()}), flush=True)
    for shape in choose(args.shapes):
        if shape.kv_dtype == "int8":
            print(json.dumps({"shape": shape.name, "skipped": "FlashInfer 0.6.12 has no int8 KV"}))
            continue
        shape = shape.shrunk(args.shrink) if args.shrink > 1 else shape
        print(json.dumps(peer.measure(shape, args.samples)), flush=True)
        peer.torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
