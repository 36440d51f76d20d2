"""The table of a run: rows printed as they come, and saved at once."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.attention.copies import Copy
from bench.attention.shapes import AttentionShape
from bench.attention.timing import Timing
from bench.machine import MachineLimits

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
)
"""Times worth a ratio: of one shape, over the sum of others."""


@dataclass
class Table:
    """Rows of one run.

    Args:
        report: what is saved, with lists "rows" and "copies" and a dict "comparisons" to fill.
        limits: of the device, in this run.
        save: writes the report.
        has_failed: whether something of ours broke.
    """

    report: dict[str, Any]
    limits: MachineLimits
    save: Callable[[], Path]
    has_failed: bool = False

    def print_header(self) -> None:
        print(f"\n{'':28} {'us/layer':>9} {'least':>8} {'most':>8} {'TB/s':>6} {'TFLOP/s':>8} {'limit':>6} {'peer':>6}")

    def print_shape(self, shape: AttentionShape) -> None:
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
        """A time of one layer. Peers come before ours, or their ratio is unknown."""
        seconds, limits = layer.median_s, self.limits
        bytes_per_s, flops_per_s = shape.kv_bytes / seconds, shape.flops / seconds
        of_read, of_matmul = bytes_per_s / limits.read_bytes_per_s, flops_per_s / limits.matmul_flops_per_s
        peer_us = self._best_peer_us(shape) if is_ours else None
        ratio = None if peer_us is None else peer_us / (1e6 * seconds)
        self._keep(
            {
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
        )
        tokens = f"{shape.num_tokens / seconds:,.0f} tokens/s" if shape.is_quantized else ""
        print(
            f"  {name:26} {1e6 * seconds:9.1f} {1e6 * layer.fastest_s:8.1f} {1e6 * layer.slowest_s:8.1f} "
            f"{bytes_per_s / 1e12:6.2f} {flops_per_s / 1e12:8.1f} {max(of_read, of_matmul):6.0%} "
            f"{'' if ratio is None else f'{ratio:.2f}x':>6}  {configuration}{tokens}",
            flush=True,
        )

    def add_flashinfer(self, shape: AttentionShape, result: dict[str, Any]) -> None:
        """What bench.flashinfer_peer printed of a shape."""
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
        """A write into the large pool."""
        us, rate = 1e6 * copy.timing.median_s, copy.num_bytes / copy.timing.median_s
        self.report["copies"].append(asdict(copy) | {"us": us, "bytes_per_s": rate})
        self.save()
        print(
            f"{copy.name:28} {us:9.1f} us, {rate / 1e12:.3f} TB/s read and written; {copy.temporary_bytes:,} bytes "
            f"allocated beside a pool of {copy.pool_bytes / 1e9:.3g} GB",
            flush=True,
        )

    def fail_copies(self, reason: str) -> None:
        """Writing broke."""
        self.report["copies"].append({"failed": reason})
        self.has_failed = True
        print(f"writes and copies FAILED: {reason}", flush=True)

    def skip(self, shape: AttentionShape, name: str, reason: str) -> None:
        """It does not take this shape, and says so."""
        self._keep({"shape": shape.name, "implementation": name, "skipped": reason})
        print(f"  {name:26} skipped: {reason}", flush=True)

    def fail(self, shape: AttentionShape, name: str, reason: str, *, is_ours: bool) -> None:
        """It broke."""
        self._keep({"shape": shape.name, "implementation": name, "failed": reason})
        self.has_failed |= is_ours
        print(f"  {name:26} FAILED: {reason}", flush=True)

    def compare(self) -> None:
        """The ratios of ``COMPARISONS``, for whoever has all their shapes."""
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

    def _keep(self, row: dict[str, Any]) -> None:
        self.report["rows"].append(row)
        self.save()

    def _best_peer_us(self, shape: AttentionShape) -> float | None:
        peers = (row for row in self.report["rows"] if row["shape"] == shape.name and "us" in row)
        return min((row["us"] for row in peers if row["is_paged"] and not row["is_ours"]), default=None)
