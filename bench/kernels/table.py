"""Rows of a run: printed as they come, and saved at once."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.kernels.copies import Copy
from bench.kernels.shapes import AttentionShape
from bench.kernels.timing import Timing
from bench.machine import MachineLimits
from bench.report import Table

FLASHINFER = "flashinfer"

COMPARISONS = (
    (
        "mixed over its decodes and chunks alone",
        "mixed_128x2k_2x1024_at_4k",
        ("decode_b128_2k", "prefill_2x1024_at_4k"),
    ),
    ("block 64 over block 16", "decode_b128_2k_block64", ("decode_b128_2k",)),
    ("block 128 over block 16", "decode_b128_2k_block128", ("decode_b128_2k",)),
    ("fp8 over bf16", "decode_b128_2k_fp8", ("decode_b128_2k",)),
    ("int8 over bf16", "decode_b128_2k_int8", ("decode_b128_2k",)),
    ("prefill: fp8 over bf16", "prefill_2x1024_at_4k_fp8", ("prefill_2x1024_at_4k",)),
    ("prefill: int8 over bf16", "prefill_2x1024_at_4k_int8", ("prefill_2x1024_at_4k",)),
)
"""Ratios of times: a title, one shape, and the shapes whose sum it is compared with."""

_TABLE = Table("", "us/layer", "least", "most", "TB/s", "TFLOP/s", "limit", "peer", "")


@dataclass
class Rows:
    """Rows of one run.

    Args:
        report: content of the result file, with lists "rows" and "copies" and a dict "comparisons" to fill.
        limits: limits of the device, in this run.
        save: writes the report.
        has_failed: whether anything of ours broke.
    """

    report: dict[str, Any]
    limits: MachineLimits
    save: Callable[[], Path]
    has_failed: bool = False

    def print_header(self) -> None:
        """Print the heads of the columns."""
        print("\n" + _TABLE.header())

    def print_shape(self, shape: AttentionShape) -> None:
        """Print the head of a shape's rows."""
        print(f"{shape.name}: {shape.kv_bytes / 1e6:,.0f} MB, {shape.flops / 1e9:,.0f} GFLOP a layer", flush=True)

    def add(
        self,
        shape: AttentionShape,
        name: str,
        layer: Timing,
        *,
        configuration: str = "",
        is_ours: bool = False,
        is_paged: bool = True,
        **extra: Any,
    ) -> None:
        """Add the time of one layer. Rows of peers come before ours, which have ratios to them."""
        seconds, limits = layer.median_s, self.limits
        bytes_per_s, flops_per_s = shape.kv_bytes / seconds, shape.flops / seconds
        of_read, of_matmul = bytes_per_s / limits.read_bytes_per_s, flops_per_s / limits.matmul_flops_per_s
        peer_us = self._best_peer_us(shape) if is_ours else None
        ratio = None if peer_us is None else peer_us / (1e6 * seconds)
        row = {
            "shape": shape.name,
            "implementation": name,
            "configuration": configuration,
            "is_ours": is_ours,
            "is_paged": is_paged,
            "us": 1e6 * seconds,
            "fastest_us": 1e6 * layer.fastest_s,
            "slowest_us": 1e6 * layer.slowest_s,
            "num_samples": layer.num_samples,
            "bytes_per_s": bytes_per_s,
            "flops_per_s": flops_per_s,
            "fraction_of_read_bandwidth": of_read,
            "fraction_of_matmul_rate": of_matmul,
            "tokens_per_s": shape.num_tokens / seconds,
            "speed_over_best_peer": ratio,
            **extra,
        }
        times = (f"{row[key]:.1f}" for key in ("us", "fastest_us", "slowest_us"))
        limit, peer = f"{max(of_read, of_matmul):.0%}", None if ratio is None else f"{ratio:.2f}x"
        tokens = f" {row['tokens_per_s']:,.0f} tokens/s" if shape.is_quantized else ""
        rates = f"{bytes_per_s / 1e12:.2f}", f"{flops_per_s / 1e12:.1f}"
        self._keep(row, _TABLE.row(f"  {name}", *times, *rates, limit, peer, f" {configuration}{tokens}"))

    def add_flashinfer(self, shape: AttentionShape, result: dict[str, Any]) -> None:
        """Add a shape's result of bench.peers.run_flashinfer."""
        if "skipped" in result:
            self.skip(shape, FLASHINFER, result["skipped"])
        elif "us" not in result:
            self.fail(shape, FLASHINFER, json.dumps(result["failures"]), is_ours=False)
        else:
            median_s, fastest_s, slowest_s = (result[key] / 1e6 for key in ("us", "fastest_us", "slowest_us"))
            layer = Timing(median_s, fastest_s, slowest_s, result["num_samples"])
            extra = {key: result[key] for key in ("all_us", "failures")}
            self.add(shape, FLASHINFER, layer, configuration=result["configuration"], **extra)

    def add_copy(self, copy: Copy) -> None:
        """Add a write into the large pool."""
        us, rate = 1e6 * copy.timing.median_s, copy.num_bytes / copy.timing.median_s
        self.report["copies"].append(asdict(copy) | {"us": us, "bytes_per_s": rate})
        self.save()
        print(
            f"{copy.name:28} {us:9.1f} us, {rate / 1e12:.3f} TB/s read and written; {copy.temporary_bytes:,} bytes "
            f"allocated beside a pool of {copy.pool_bytes / 1e9:.3g} GB",
            flush=True,
        )

    def fail_copies(self, reason: str) -> None:
        """Record that writing broke."""
        self.report["copies"].append({"failed": reason})
        self.has_failed = True
        print(f"writes and copies FAILED: {reason}", flush=True)

    def skip(self, shape: AttentionShape, name: str, reason: str) -> None:
        """Record that an implementation refuses a shape."""
        row = {"shape": shape.name, "implementation": name, "skipped": reason}
        self._keep(row, f"  {name:26} skipped: {reason}")

    def fail(self, shape: AttentionShape, name: str, reason: str, *, is_ours: bool) -> None:
        """Record that an implementation broke."""
        self.has_failed |= is_ours
        self._keep({"shape": shape.name, "implementation": name, "failed": reason}, f"  {name:26} FAILED: {reason}")

    def compare(self) -> None:
        """Add the ratios of ``COMPARISONS``, for implementations that ran all their shapes."""
        times: dict[str, dict[str, float]] = {}
        for row in self.report["rows"]:
            if "us" in row:
                times.setdefault(row["implementation"], {})[row["shape"]] = row["us"]
        print()
        for title, one, others in COMPARISONS:
            ratios = {
                name: of_shape[one] / sum(of_shape[other] for other in others)
                for name, of_shape in times.items()
                if {one, *others} <= of_shape.keys()
            }
            if ratios:
                self.report["comparisons"][title] = ratios
                print(f"time of {title}: " + ", ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items()))

    def _keep(self, row: dict[str, Any], line: str) -> None:
        self.report["rows"].append(row)
        self.save()
        print(line, flush=True)

    def _best_peer_us(self, shape: AttentionShape) -> float | None:
        peers = (row for row in self.report["rows"] if row["shape"] == shape.name and "us" in row)
        return min((row["us"] for row in peers if row["is_paged"] and not row["is_ours"]), default=None)
