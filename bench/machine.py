"""Rates that the device cannot exceed, measured in the same run as everything compared with them."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import Array, lax

NUM_REPEATS = 10
"""Repetitions inside one program, so that dispatching it is a small part of what is timed."""


@dataclass(frozen=True, slots=True)
class MachineLimits:
    """Rates that no step can exceed.

    Args:
        read_bytes_per_s: rate of summing a large array.
        matmul_flops_per_s: rate of a large square product.
        dtype: type of the product's operands.
    """

    read_bytes_per_s: float
    matmul_flops_per_s: float
    dtype: str

    def of_devices(self, num_devices: int) -> "MachineLimits":
        """The rates of several such devices together, which exchange nothing."""
        return replace(
            self,
            read_bytes_per_s=num_devices * self.read_bytes_per_s,
            matmul_flops_per_s=num_devices * self.matmul_flops_per_s,
        )

    def __str__(self) -> str:
        reads, flops = self.read_bytes_per_s / 1e12, self.matmul_flops_per_s / 1e12
        return f"limits: {reads:.2f} TB/s read, {flops:.0f} TFLOP/s {self.dtype}"


def measure_limits(dtype: jnp.dtype) -> MachineLimits:
    """Time reads of 4 GiB (256 MiB on a CPU) and products of 8192 x 8192 matrices (1024 on a CPU)."""
    is_cpu = jax.default_backend() == "cpu"
    num_bytes, n = (1 << 28, 1024) if is_cpu else (1 << 32, 8192)
    array = jnp.ones(num_bytes // 4, jnp.float32)
    # Each repetition depends on the one before, or the compiler would do the work once.
    read_s = _best_time_s(lambda x: _repeat(lambda total: jnp.sum(x + total) * 1e-30, jnp.float32(0)), array)
    array.delete()
    a, b = (jax.random.normal(jax.random.key(i), (n, n), jnp.float32).astype(dtype) for i in range(2))
    matmul_s = _best_time_s(lambda a, b: _repeat(lambda x: x @ b, a), a, b)
    return MachineLimits(num_bytes / read_s, 2 * n**3 / matmul_s, jnp.dtype(dtype).name)


def _repeat(once: Callable[[Array], Array], start: Array) -> Array:
    return lax.fori_loop(0, NUM_REPEATS, lambda _, x: once(x), start)


def _best_time_s(run: Callable[..., Array], *args: Array) -> float:
    """Seconds of one repetition, the best of five programs."""
    program = jax.jit(run)
    program(*args).block_until_ready()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        program(*args).block_until_ready()
        times.append(time.perf_counter() - start)
    return min(times) / NUM_REPEATS
