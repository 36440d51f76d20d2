"""Figures beside those of a peer and beside the least that the device allows."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from bench.machine import MachineLimits
from bench.serving.breakdown import StepBreakdown


@dataclass(frozen=True, slots=True)
class Floor:
    """Least times from bytes and FLOPs at the rates measured in this run. Attention's FLOPs are left out.

    Args:
        limits: the rates.
        weight_bytes: of all weights.
        embedding_bytes: of the table of input embeddings: a step looks up a few of its rows.
        has_tied_logits: whether the same table makes the logits, which reads all of it.
        weight_item_bytes: of one weight.
        bytes_per_block, block_size: of the pool.
    """

    limits: MachineLimits
    weight_bytes: int
    embedding_bytes: int
    has_tied_logits: bool
    weight_item_bytes: int
    bytes_per_block: int
    block_size: int

    @property
    def read_weight_bytes(self) -> int:
        """Read by every step."""
        return self.weight_bytes - (0 if self.has_tied_logits else self.embedding_bytes)

    @property
    def layer_bytes(self) -> int:
        """Weights that every token meets, whether or not somebody reads its logits."""
        return self.read_weight_bytes - self.embedding_bytes

    def decode_s(self, batch: int, context: int) -> float:
        """Of a step of ``batch`` rows that share nothing."""
        kv_bytes = batch * context * self.bytes_per_block / self.block_size
        return (self.read_weight_bytes + kv_bytes) / self.limits.read_bytes_per_s

    def compute_s(self, num_tokens: int) -> float:
        """Two FLOPs for each token and weight."""
        return 2 * num_tokens * self.layer_bytes / self.weight_item_bytes / self.limits.matmul_flops_per_s

    def run_s(self, num_steps: int, num_blocks: int, num_tokens: int) -> float:
        """Of so many steps.

        Args:
            num_steps: each reads the weights.
            num_blocks: sum over the steps of the blocks that it reads, each counted once.
            num_tokens: computed in all of them together.
        """
        num_bytes = num_steps * self.read_weight_bytes + num_blocks * self.bytes_per_block
        return max(num_bytes / self.limits.read_bytes_per_s, self.compute_s(num_tokens))


@dataclass(slots=True)
class Figures:
    """Collects the figures of a run, prints each as it comes, and saves them at once.

    Args:
        report: what is saved: "figures" and "steps" are filled.
        peers: engine -> its figures by name.
        save: writes the report.
    """

    report: dict[str, Any]
    peers: dict[str, dict[str, float]]
    save: Callable[[], Any]

    def add(
        self,
        name: str,
        value: float,
        *,
        lower_is_better: bool,
        floor: float | None = None,
        peer_name: str | None = None,
        **extra: Any,
    ) -> None:
        """Add a figure, beside the best of the peers.

        Args:
            name: name of the figure.
            value: the measured value.
            lower_is_better: whether less is better.
            floor: the limit, in the unit of the figure.
            peer_name: name of the peers' figure, if it differs.
            extra: further fields of the report.
        """
        found = {
            engine: figures[key] for engine, figures in self.peers.items() if (key := peer_name or name) in figures
        }
        best = min if lower_is_better else max
        engine = best(found, key=found.__getitem__) if found else None
        peer = None if engine is None else found[engine]
        self.report["figures"][name] = {
            "value": value,
            "peer": peer,
            "peer_engine": engine,
            "ratio_to_peer": _how_good(value, peer, lower_is_better),
            "floor": floor,
            "fraction_of_floor": _how_good(value, floor, lower_is_better),
            **extra,
        }
        self.save()
        self._print(name)

    def add_step(self, name: str, step: StepBreakdown) -> None:
        """What a step is made of."""
        self.report["steps"][name] = asdict(step)
        self.save()
        print(
            f"  a step of {step.step_us:,.0f} us: {_parts(step)}; {step.num_launches:.0f} launches\n"
            f"  largest: {_largest(step)}\n  {host_line(step.host_us)}",
            flush=True,
        )

    def print_header(self) -> None:
        print(f"\n{'':44} {'here':>10} {'peer':>10} {'ratio':>7} {'floor':>10} {'of it':>6}")

    def print_all(self) -> None:
        """All figures once more, without what was printed between them, and the steps."""
        self.print_header()
        for name in self.report["figures"]:
            self._print(name)
        if self.report["steps"]:
            columns = ("step", "gemm", "attention", "sampling", "other", "gaps")
            host = tuple(next(iter(self.report["steps"].values()))["host_us"])
            print(f"\n{'us a step':16}" + "".join(f"{c:>10}" for c in (*columns, "launches")) + "   host:", end="")
            print("".join(f"{c:>9}" for c in host))
            for name, step in self.report["steps"].items():
                cells = [_us(step[f"{column}_us"]) for column in columns] + [f"{step['num_launches']:,.0f}"]
                print(f"{name:16}" + "".join(f"{cell:>10}" for cell in cells) + " " * 8, end="")
                print("".join(f"{step['host_us'][part]:9,.0f}" for part in host))

    def _print(self, name: str) -> None:
        figure = self.report["figures"][name]
        here, peer, ratio, floor = (_short(figure[key]) for key in ("value", "peer", "ratio_to_peer", "floor"))
        fraction = "" if figure["fraction_of_floor"] is None else f"{figure['fraction_of_floor']:.0%}"
        print(f"{name:44} {here:>10} {peer:>10} {ratio:>7} {floor:>10} {fraction:>6}", flush=True)


def host_line(host_us: dict[str, float]) -> str:
    """The host's part of a step, in words."""
    return "host, us a step: " + ", ".join(f"{name} {us:,.0f}" for name, us in host_us.items())


def _how_good(value: float, other: float | None, lower_is_better: bool) -> float | None:
    """Above 1 where ``value`` is better than ``other``."""
    return None if other is None else other / value if lower_is_better else value / other


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:,.3g}" if value < 100 else f"{value:,.0f}"


def _us(value: float | None) -> str:
    return "?" if value is None else f"{value:,.0f}"


def _parts(step: StepBreakdown) -> str:
    parts = {"GEMMs": step.gemm_us, "attention": step.attention_us, "sampling": step.sampling_us}
    parts |= {"other kernels": step.other_us, "gaps": step.gaps_us}
    return ", ".join(f"{name} {_us(us)}" for name, us in parts.items())


def _largest(step: StepBreakdown, count: int = 6) -> str:
    return ", ".join(f"{k.name[:48]} ({k.group}, {k.num_launches:.0f} x) {k.us:,.0f}" for k in step.largest[:count])
