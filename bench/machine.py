"""What the device can do at most, measured in the same run as everything compared with it."""

import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True, slots=True)
class MachineLimits:
    """Args:
    read_bytes_per_s: summing a large array.
    matmul_flops_per_s: a large square product in ``dtype``.
    dtype: of the product.
    """

    read_bytes_per_s: float
    matmul_flops_per_s: float
    dtype: str


def _best_time_s(fn, *args, repeats: int = 10) -> float:
    fn(*args).block_until_ready()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        fn(*args).block_until_ready()
        times.append(time.perf_counter() - start)
    return min(times)


def measure_limits(dtype: jnp.dtype) -> MachineLimits:
    """Time a read of 4 GiB (256 MiB on a CPU) and a product of 8192 x 8192 matrices (1024 on a CPU)."""
    is_cpu = jax.default_backend() == "cpu"
    num_bytes, n = (1 << 28, 1024) if is_cpu else (1 << 32, 8192)
    array = jnp.ones(num_bytes // 4, jnp.float32)
    read_s = _best_time_s(jax.jit(jnp.sum), array)
    del array
    a, b = (jax.random.normal(jax.random.key(i), (n, n), jnp.float32).astype(dtype) for i in range(2))
    matmul_s = _best_time_s(jax.jit(jnp.matmul), a, b)
    return MachineLimits(num_bytes / read_s, 2 * n**3 / matmul_s, jnp.dtype(dtype).name)
