"""FlashInfer on the shapes of bench.kernels, in a process of its own: two allocators that share a GPU would fight.

    python -m bench.peers.run_flashinfer --shapes decode_b128

Prints a line of JSON for each shape: microseconds of a layer, of its best configuration and of all. It needs torch and
flashinfer, as nothing else here does; without them it says so and succeeds.

As in bench.kernels, every layer has K and V of its own, and its queries are the outputs of the layer before. Plans are
made before the clock starts; the layers then run as one CUDA graph, replayed between two events.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from bench.kernels.shapes import AttentionShape, choose, value_deviations

NUM_LAYERS = 8
WORKSPACE_BYTES = 512 * 2**20
LAYOUTS = ("NHD", "HND")
LONG_REPLAY_MS, MAX_REPLAYS = 30.0, 256

AGREEMENT = 2e-2
"""How far, in relative L2 norm, a configuration's outputs may be from the first's. What is further off was called
wrongly, and does not count."""

type Run = Callable[[Any, Any, Any], Any]
"""One layer: from queries and K and V into a buffer."""


@dataclass(frozen=True, slots=True)
class Pages:
    """A batch as FlashInfer takes it: tensors of int32, those to plan with on the host.

    Args:
        q_starts, page_starts: where each row's queries and pages begin; one more entry than rows.
        pages: all rows' pages, one row after the other, on the device.
        last_page_lens, kv_lens: tokens in each row's last page, and in all.
    """

    q_starts: Any
    page_starts: Any
    pages: Any
    last_page_lens: Any
    kv_lens: Any


class Peer:
    """torch, flashinfer, and what all shapes share."""

    def __init__(self) -> None:
        """Raises ImportError or RuntimeError if something is missing."""
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

    def pages(self, q_lens: tuple[int, ...], kv_lens: tuple[int, ...], tables: np.ndarray, block_size: int) -> Pages:
        on_host = page_arrays(q_lens, kv_lens, tables, block_size)
        tensors = {name: self.torch.from_numpy(array) for name, array in on_host.items()}
        return Pages(**tensors | {"pages": tensors["pages"].cuda()})

    def batch(self, shape: AttentionShape) -> Pages:
        return self.pages(shape.q_lens, shape.kv_lens, shape.block_tables(), shape.block_size)

    def decode(self, shape: AttentionShape, layout: str, use_tensor_cores: bool, pages: Pages) -> Run:
        wrapper = self.flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            self.workspace, layout, use_tensor_cores=use_tensor_cores
        )
        wrapper.plan(
            pages.page_starts,
            pages.pages,
            pages.last_page_lens,
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_dim,
            shape.block_size,
            q_data_type=self.dtype(shape.dtype),
            kv_data_type=self.dtype(shape.kv_dtype),
        )
        return lambda q, kv, out: wrapper.run(q, kv, out=out)

    def prefill(self, shape: AttentionShape, layout: str, backend: str, pages: Pages) -> Run:
        wrapper = self.flashinfer.BatchPrefillWithPagedKVCacheWrapper(self.workspace, layout, backend=backend)
        wrapper.plan(
            pages.q_starts,
            pages.page_starts,
            pages.pages,
            pages.last_page_lens,
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_dim,
            shape.block_size,
            causal=True,
            q_data_type=self.dtype(shape.dtype),
            kv_data_type=self.dtype(shape.kv_dtype),
        )
        return lambda q, kv, out: wrapper.run(q, kv, out=out)

    def persistent(self, shape: AttentionShape, layout: str) -> Run:
        """BatchAttention: one launch that balances any mix of rows."""
        pages = self.batch(shape)
        wrapper = self.flashinfer.BatchAttention(kv_layout=layout)
        wrapper.plan(
            pages.q_starts,
            pages.page_starts,
            pages.pages,
            pages.kv_lens,
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_dim,
            shape.head_dim,
            shape.block_size,
            causal=True,
            q_data_type=self.dtype(shape.dtype),
            kv_data_type=self.dtype(shape.kv_dtype),
        )
        lse = self.torch.empty((shape.num_tokens, shape.num_heads), dtype=self.torch.float32, device="cuda")
        return lambda q, kv, out: wrapper.run(q, kv, out=out, lse=lse)

    def apart(self, shape: AttentionShape, layout: str) -> Run:
        """Decodes and chunks by the kernel made for each, one after the other. Decodes come first in the batch."""
        num_decodes = shape.q_lens.index(next(q_len for q_len in shape.q_lens if q_len > 1))
        decodes, chunks = (
            self.pages(shape.q_lens[rows], shape.kv_lens[rows], shape.block_tables()[rows], shape.block_size)
            for rows in (slice(num_decodes), slice(num_decodes, None))
        )
        decode = self.decode(shape, layout, True, decodes)
        prefill = self.prefill(shape, layout, "fa3", chunks)

        def run(q: Any, kv: Any, out: Any) -> None:
            decode(q[:num_decodes], kv, out[:num_decodes])
            prefill(q[num_decodes:], kv, out[num_decodes:])

        return run

    def cascade(self, shape: AttentionShape, layout: str) -> Run:
        """The blocks that all rows share read once, the rest row by row."""
        num_rows, num_shared, tables = len(shape.kv_lens), shape.shared_blocks, shape.block_tables()
        shared_len = num_shared * shape.block_size
        own_lens = tuple(kv_len - shared_len for kv_len in shape.kv_lens)
        levels = [
            self.pages((num_rows,), (shared_len,), tables[:1], shape.block_size),
            self.pages(shape.q_lens, own_lens, tables[:, num_shared:], shape.block_size),
        ]
        wrapper = self.flashinfer.MultiLevelCascadeAttentionWrapper(2, self.workspace, layout)
        wrapper.plan(
            [level.q_starts for level in levels],
            [level.page_starts for level in levels],
            [level.pages for level in levels],
            [level.last_page_lens for level in levels],
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_dim,
            shape.block_size,
            q_data_type=self.dtype(shape.dtype),
            kv_data_type=self.dtype(shape.kv_dtype),
        )
        return lambda q, kv, out: out.copy_(wrapper.run(q, kv))

    def configurations(self, shape: AttentionShape, layout: str) -> dict[str, Callable[[], Run]]:
        """All that FlashInfer offers for a batch."""
        found: dict[str, Callable[[], Run]] = {}
        if shape.kind == "decode":
            found["tensor cores"] = lambda: self.decode(shape, layout, True, self.batch(shape))
            found["CUDA cores"] = lambda: self.decode(shape, layout, False, self.batch(shape))
        else:
            found["fa3"] = lambda: self.prefill(shape, layout, "fa3", self.batch(shape))
            found["fa2"] = lambda: self.prefill(shape, layout, "fa2", self.batch(shape))
        if shape.kind == "mixed":
            found["tensor cores, then fa3"] = lambda: self.apart(shape, layout)
        if shape.is_ragged:
            found["persistent"] = lambda: self.persistent(shape, layout)
        if shape.shared_blocks:
            found["cascade"] = lambda: self.cascade(shape, layout)
        return found

    def make_layers(self, shape: AttentionShape) -> list[Any]:
        """K and V of each layer, [pages, 2, elements of a page]: random numbers, in whatever layout one reads them."""
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
        """Every configuration in both layouts; the best one's time."""
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
        """The outputs to expect of the next configuration.

        Raises:
            RuntimeError: these are not as expected.
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

    def build(self, shapes: list[AttentionShape]) -> None:
        """Compile all kernels at once; each would otherwise take its 20 seconds when it is first planned."""
        from flashinfer import jit  # pyright: ignore[reportMissingImports]

        specs = {}
        for shape in shapes:
            q_type, kv_type = self.dtype(shape.dtype), self.dtype(shape.kv_dtype)
            common = (q_type, kv_type, q_type, self.torch.int32, shape.head_dim, shape.head_dim, 0)
            wanted = [jit.gen_batch_prefill_module("fa2", *common, False, False, False)]
            if shape.kind != "prefill":
                wanted.append(jit.gen_batch_decode_module(*common, False, False))
            if shape.kind != "decode" or shape.shared_blocks:
                wanted.append(jit.gen_batch_prefill_module("fa3", *common, False, False, False))
            if shape.is_ragged:
                wanted.append(jit.gen_batch_attention_module(*common, False, False))
            specs |= {spec.name: spec for spec in wanted}
        jit.build_jit_specs(list(specs.values()))


def page_arrays(
    q_lens: tuple[int, ...], kv_lens: tuple[int, ...], tables: np.ndarray, block_size: int
) -> dict[str, np.ndarray]:
    """The fields of ``Pages`` for rows and their block tables. Every row holds a token at least."""
    num_pages = -(-np.array(kv_lens) // block_size)
    arrays = {
        "q_starts": np.cumsum([0, *q_lens]),
        "page_starts": np.concatenate([[0], np.cumsum(num_pages)]),
        "pages": np.concatenate([table[:count] for table, count in zip(tables, num_pages, strict=True)]),
        "last_page_lens": np.array(kv_lens) - (num_pages - 1) * block_size,
        "kv_lens": np.array(kv_lens),
    }
    return {name: array.astype(np.int32) for name, array in arrays.items()}


def why_not(shape: AttentionShape) -> str | None:
    """What FlashInfer 0.6.12 lacks for a shape."""
    return "it has no int8 KV" if shape.kv_dtype == "int8" else None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.peers.run_flashinfer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
    shapes = []
    for shape in choose(args.shapes):
        if (reason := why_not(shape)) is None:
            shapes.append(shape.shrunk(args.shrink) if args.shrink > 1 else shape)
        else:
            print(json.dumps({"shape": shape.name, "skipped": reason}))
    try:
        peer.build(shapes)
    except Exception as error:  # each configuration then builds its own, and says what is wrong with it
        print(f"flashinfer: building ahead failed: {error}", file=sys.stderr)
    for shape in shapes:
        print(json.dumps(peer.measure(shape, args.samples)), flush=True)
        peer.torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
