"""The backend of plain XLA, which runs everywhere."""

from collections.abc import Callable
from typing import Any, ClassVar

from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jpaged.device.backends import Backend
from jpaged.models.layers.moe import Gated, Routes, Weights, all_experts


class XlaBackend(Backend):
    """Gathers, scatters and matrix products, which the compiler itself splits over devices."""

    name: ClassVar[str] = "xla"

    def on_each_device(self, run: Callable[..., Any], in_specs: tuple[P, ...], out_specs: Any) -> Callable[..., Any]:
        return run

    def experts(
        self, x: Float[Array, "tokens hidden_size"], routes: Routes, weights: Weights, gated: Gated
    ) -> Float[Array, "tokens hidden_size"]:
        if self.num_devices == 1:
            return super().experts(x, routes, weights, gated)
        return all_experts(x, routes, weights, gated)  # the compiler would send gathered weights between devices
