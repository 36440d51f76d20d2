"""The interpreter for tests of TPU kernels, watched for races and counted, and batches attended there."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chips.tpu import chip_of
from pallas_kernels.paged_attention.tpu import attend_tpu, lane_layout
from pallas_kernels.paged_attention.tpu.launch import Sizes
from tests.support.attention import NO_OPTIONS, Batch, Options, dense_attention

WATCHED = pltpu.InterpretParams(detect_races=True)
"""Copies happen when they are waited for, so that a copy without a wait never arrives."""

EAGER = pltpu.InterpretParams(detect_races=True, dma_execution_mode="eager")
"""Copies happen when they are started, so that a copy started too early overwrites data still in use."""

SMALL = Sizes(tile_row_tiles=2, chunk_blocks=4, buffers=3)


@pytest.fixture
def no_tpu_races(capsys):
    """No launch of an interpreted TPU kernel raced: jax 0.12 raises, 0.11 prints.

    An exception in a kernel leaves the interpreter's state behind, and would fail every later test.
    """
    yield
    pltpu.reset_tpu_interpret_mode_state()
    assert "RACE DETECTED" not in capsys.readouterr().out


def attend(
    batch: Batch,
    options: Options = NO_OPTIONS,
    *,
    sizes: Sizes | None = SMALL,
    generation: str = "v5e",
    interpret: pltpu.InterpretParams = WATCHED,
) -> np.ndarray:
    """The kernel's outputs of a batch, over a pool of NaN in all slots that no query sees."""
    shape = batch.shape
    layout = lane_layout(shape.num_kv_heads, shape.head_dim)
    pool, _ = batch.pool(options.sliding_window)
    out = attend_tpu(
        batch.call(options, in_lanes(pool, layout.heads_per_row) if shape.head_dim < 128 else None),
        num_kv_heads=shape.num_kv_heads,
        sizes=sizes,
        chip=chip_of(generation),
        interpret=interpret,
    )
    assert out.dtype == shape.dtype
    return np.asarray(out).astype(np.float64)


def in_lanes(pool: np.ndarray, heads_per_row: int) -> np.ndarray:
    """A pool of narrow heads as ``lane_layout`` wants it: side by side, and then zeros."""
    *axes, num_kv_heads, block_size, head_dim = pool.shape
    split = pool.reshape(*axes, num_kv_heads // heads_per_row, heads_per_row, block_size, head_dim)
    wide = np.moveaxis(split, -3, -2).reshape(*axes, num_kv_heads // heads_per_row, block_size, -1)
    padding = np.zeros((*wide.shape[:-1], -wide.shape[-1] % 128), wide.dtype)
    return np.concatenate([wide, padding], axis=-1)


def assert_near(out: np.ndarray, right: np.ndarray, dtype: type) -> None:
    """Within what rounding weights and results to the type costs, and so less than what one token more or less does."""
    rounding = max(float(jnp.finfo(dtype).eps), 1e-6)
    np.testing.assert_allclose(out, right, rtol=2 * rounding, atol=rounding)


def check(batch: Batch, options: Options = NO_OPTIONS, **launch) -> None:
    """Dense attention's outputs, and zeros for padding."""
    out = attend(batch, options, **launch)
    num_tokens = int(batch.q_starts[-1])
    np.testing.assert_array_equal(out[num_tokens:], 0)
    assert_near(out[:num_tokens], dense_attention(batch, options)[:num_tokens], batch.shape.dtype)


@contextmanager
def counted_bytes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The sizes of all copies that kernels make, gathered where the interpreter makes them."""
    sizes: list[int] = []
    execute = interpreter.DMA.execute_read

    def counting(self: interpreter.DMA) -> None:
        is_first = self.data is None
        execute(self)
        if is_first:
            sizes.append(self.data_size)

    with monkeypatch.context() as patched:
        patched.setattr(interpreter.DMA, "execute_read", counting)
        yield sizes
        jax.effects_barrier()
