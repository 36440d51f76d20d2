"""Figures beside the best of the peers and beside the least that the device allows."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from flax import nnx

from bench.machine import MachineLimits
from bench.report import Table
from bench.serving.breakdown import StepBreakdown
from jpaged.models import ModelConfig
from jpaged.models.checkpoint.registry import abstract_model
from jpaged.sharding import make_mesh


@dataclass(frozen=True, slots=True)
class ExpertBytes:
    """Weights of a model's experts, of which a token passes some.

    Args:
        num_bytes: bytes of the experts of all layers.
        num_experts, top_k: experts of a layer, and those that a token chooses.
    """

    num_bytes: int
    num_experts: int
    top_k: int

    def of_step(self, num_tokens: float) -> float:
        """Bytes that a step is expected to read, of the distinct experts of tokens that choose at random."""
        return self.num_bytes * (1 - (1 - self.top_k / self.num_experts) ** num_tokens)


@dataclass(frozen=True, slots=True)
class Floor:
    """Least times from bytes and FLOPs at the rates measured in this run. Attention's FLOPs are left out.

    Args:
        limits: the rates.
        weight_bytes: bytes of all weights.
        embedding_bytes: bytes of the table of input embeddings, of which a step looks up a few rows.
        has_tied_logits: whether the same table makes the logits, which reads all of it.
        weight_item_bytes: bytes of one weight.
        bytes_per_block, block_size: size of a block in bytes and in tokens.
        experts: those among the weights; None if every token meets all weights.
        windows: sliding window of each layer in tokens, None for full attention; empty if all layers see everything.
        layers_per_block: layers that a block holds; None if it holds all.
    """

    limits: MachineLimits
    weight_bytes: int
    embedding_bytes: int
    has_tied_logits: bool
    weight_item_bytes: int
    bytes_per_block: int
    block_size: int
    experts: ExpertBytes | None = None
    windows: tuple[int | None, ...] = ()
    layers_per_block: int | None = None

    def read_weight_bytes(self, num_tokens: float) -> float:
        """Bytes of weights that a step of so many tokens reads."""
        shared = self.weight_bytes - (0 if self.has_tied_logits else self.embedding_bytes)
        if self.experts is None:
            return shared
        return shared - self.experts.num_bytes + self.experts.of_step(num_tokens)

    @property
    def layer_bytes(self) -> float:
        """Bytes of weights that a token meets, with or without logits."""
        return self.read_weight_bytes(1) - self.embedding_bytes

    def decode_s(self, batch: int, context: int) -> float:
        """Seconds of a step of ``batch`` rows that share nothing. A layer reads the tokens of its window only."""
        seen = [context if window is None else min(window, context) for window in self.windows or (None,)]
        layer_bytes = self.bytes_per_block / (self.layers_per_block or len(seen))
        kv_bytes = batch * sum(seen) * layer_bytes / self.block_size
        return (self.read_weight_bytes(batch) + kv_bytes) / self.limits.read_bytes_per_s

    def compute_s(self, num_tokens: int) -> float:
        """Seconds of two FLOPs for each token and weight."""
        return 2 * num_tokens * self.layer_bytes / self.weight_item_bytes / self.limits.matmul_flops_per_s

    def run_s(self, num_steps: int, num_blocks: int, num_tokens: int) -> float:
        """Seconds of several steps whose reads and products all overlap, as those of no program do.

        Args:
            num_steps: steps, each of which reads the weights.
            num_blocks: sum over the steps of the distinct blocks that the step reads.
            num_tokens: tokens computed in all steps together. Each step reads the experts of as many as the mean step.
        """
        num_bytes = (
            num_steps * self.read_weight_bytes(num_tokens / max(num_steps, 1)) + num_blocks * self.bytes_per_block
        )
        return max(num_bytes / self.limits.read_bytes_per_s, self.compute_s(num_tokens))

    def run_in_turn_s(self, num_steps: int, num_blocks: int, num_tokens: int) -> float:
        """Seconds of several steps whose attention reads blocks while no product runs; arguments as of ``run_s``."""
        attention_s = num_blocks * self.bytes_per_block / self.limits.read_bytes_per_s
        return self.run_s(num_steps, 0, num_tokens) + attention_s


def experts_of(config: ModelConfig, dtype: Any) -> ExpertBytes | None:
    """The experts of a model in a dtype; None if it has none."""
    num_experts, top_k = (getattr(config, name, None) for name in ("num_experts", "top_k"))
    if num_experts is None or top_k is None:
        return None
    _, state = abstract_model(config, dtype, make_mesh())
    params = [param.get_value() for path, param in nnx.to_flat_state(state) if "experts" in path]
    return ExpertBytes(sum(param.size * param.dtype.itemsize for param in params), num_experts, top_k)


@dataclass(slots=True)
class Figures:
    """Collects the figures of a run, prints each as it comes, and saves all at once.

    Args:
        report: content of the result file: "figures" and "steps" are filled.
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
        floor_in_turn: float | None = None,
        peer_name: str | None = None,
        **extra: Any,
    ) -> None:
        """Add a figure, beside the best of the peers.

        Args:
            name: name of the figure.
            value: the measured value.
            lower_is_better: whether less is better.
            floor: the limit, in the unit of the figure, if reads and products overlap.
            floor_in_turn: the limit if attention and products take turns.
            peer_name: name of the peers' figure, if it differs.
            extra: further fields of the report.
        """
        key = peer_name or name
        found = {engine: figures[key] for engine, figures in self.peers.items() if key in figures}
        engine = (min if lower_is_better else max)(found, key=found.__getitem__) if found else None
        peer = None if engine is None else found[engine]
        self.report["figures"][name] = {
            "value": value,
            "peer": peer,
            "peer_engine": engine,
            "ratio_to_peer": _how_good(value, peer, lower_is_better),
            "floor": floor,
            "fraction_of_floor": _how_good(value, floor, lower_is_better),
            "floor_in_turn": floor_in_turn,
            "fraction_of_floor_in_turn": _how_good(value, floor_in_turn, lower_is_better),
            **extra,
        }
        self.save()
        self._print(name)

    def add_step(self, name: str, step: StepBreakdown) -> None:
        """Add the breakdown of a step."""
        self.report["steps"][name] = asdict(step)
        self.save()
        print(f"  {step}\n  {host_line(step.host_us)}", flush=True)

    def add_seconds(self, workload: str, seconds: dict[str, float]) -> None:
        """Add the time that a workload took, part by part and in total."""
        self.report.setdefault("seconds", {})[workload] = seconds
        self.save()
        shown = ", ".join(f"{part} {value:.1f}" for part, value in seconds.items())
        print(f"{workload}: seconds: {shown}", flush=True)

    def print_header(self) -> None:
        """Print the heads of the columns."""
        print("\n" + _FIGURES.header())

    def print_all(self) -> None:
        """Print all figures and steps once more, without the lines between them."""
        self.print_header()
        for name in self.report["figures"]:
            self._print(name)
        steps = self.report["steps"]
        if not steps:
            return
        columns = ("step", "gemm", "attention", "sampling", "other", "gaps")
        host = list(next(iter(steps.values()))["host_us"])
        table = Table("us a step", *columns, "launches", *(f"host: {part}" for part in host), first=16)
        rows = {
            name: [*(step[f"{c}_us"] for c in columns), step["num_launches"], *(step["host_us"][part] for part in host)]
            for name, step in steps.items()
        }
        print("\n" + table.text(rows))

    def _print(self, name: str) -> None:
        figure = self.report["figures"][name]
        cells = [figure[key] for key in ("value", "peer", "ratio_to_peer")]
        for kind in ("floor", "floor_in_turn"):
            share = figure[f"fraction_of_{kind}"]
            cells += [figure[kind], None if share is None else f"{share:.0%}"]
        print(_FIGURES.row(name, *cells), flush=True)


_FIGURES = Table("", "here", "peer", "ratio", "floor", "of it", "in turn", "of it", first=44)


def host_line(host_us: dict[str, float]) -> str:
    """The host's part of a step, in words."""
    return "host, us a step: " + ", ".join(f"{name} {us:,.0f}" for name, us in host_us.items())


def _how_good(value: float, other: float | None, lower_is_better: bool) -> float | None:
    """A ratio above 1 where ``value`` is better than ``other``."""
    return None if other is None else other / value if lower_is_better else value / other
