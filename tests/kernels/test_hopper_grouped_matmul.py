"""The Hopper kernel of grouped products in Pallas's interpreter, watched for races, against numpy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.grouped_matmul.hopper import (
    TILE_ROWS,
    _case_of,
    _grouped,
    columns_of_tile,
    grouped_matmul_hopper,
)
from pallas_kernels.grouped_matmul.plan import most_tiles, plan_tiles

pytestmark = pytest.mark.usefixtures("no_races")

WATCHED = plgpu.InterpretGPUParams(detect_races=True)


def _case(sizes, num_rows, features, columns, *, is_transposed, dtype=jnp.bfloat16):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((num_rows, features)), dtype)
    weights = jnp.asarray(rng.standard_normal((len(sizes), features, columns)) / features**0.5, dtype)
    return x, jnp.swapaxes(weights, 1, 2) if is_transposed else weights, jnp.array(sizes, jnp.int32)


def _expected(x, weights, sizes, *, is_transposed, matrices=None):
    x, weights = np.asarray(x, np.float32), np.asarray(weights, np.float32)
    groups = np.repeat(np.arange(len(sizes)) if matrices is None else matrices, sizes)
    matrices = weights.swapaxes(1, 2) if is_transposed else weights
    return np.stack([x[row] @ matrices[group] for row, group in enumerate(groups)])


@pytest.mark.parametrize(
    ("sizes", "num_rows", "features", "columns", "is_transposed", "consumers"),
    [
        ((5, 0, 70, 1, 30), 140, 128, 128, True, 1),  # an empty group, more rows than a tile, rows behind all groups
        ((5, 0, 70, 1, 30), 140, 192, 64, False, 1),
        ((130, 3), 133, 128, 192, False, 2),  # the last tile reaches beyond the rows
        ((200, 0, 3), 203, 64, 512, True, 1),  # several tiles of a group, and several columns of tiles
        ((0, 1, 2, 0), 3, 64, 128, True, 1),  # fewer rows than a tile
    ],
)
def test_groups_are_multiplied_by_their_own_matrices(sizes, num_rows, features, columns, is_transposed, consumers):
    x, weights, group_sizes = _case(sizes, num_rows, features, columns, is_transposed=is_transposed)
    options = {"is_transposed": is_transposed, "consumers": consumers, "num_sms": 2, "interpret": WATCHED}
    out = grouped_matmul_hopper(x, weights, group_sizes, **options)
    expected = _expected(x, weights, sizes, is_transposed=is_transposed)
    np.testing.assert_allclose(np.asarray(out, np.float32)[: sum(sizes)], expected, atol=0.03, rtol=0.02)


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("implementation", ["xla", "hopper"])
def test_groups_take_the_matrices_that_are_named(implementation, is_transposed):
    """A matrix may have no group, or two."""
    sizes, matrices = (1, 70, 0, 2), (3, 0, 1, 3)
    x, weights, _ = _case([0] * 5, 73, 64, 128, is_transposed=is_transposed)
    sizes, named = jnp.array(sizes, jnp.int32), jnp.array(matrices, jnp.int32)
    if implementation == "xla":
        out = grouped_matmul(
            x, weights, sizes, matrices=named, is_transposed=is_transposed, implementation=implementation
        )
    else:
        out = grouped_matmul_hopper(
            x, weights, sizes, matrices=named, is_transposed=is_transposed, num_sms=2, interpret=WATCHED
        )
    expected = _expected(x, weights, np.asarray(sizes), is_transposed=is_transposed, matrices=matrices)
    np.testing.assert_allclose(np.asarray(out, np.float32), expected, atol=0.03, rtol=0.02)


@pytest.mark.parametrize("is_transposed", [False, True])
def test_xla_multiplies_groups_as_the_kernel_does(is_transposed):
    sizes = (5, 0, 70, 1, 30)
    x, weights, group_sizes = _case(sizes, 140, 24, 12, is_transposed=is_transposed, dtype=jnp.float32)
    out = grouped_matmul(x, weights, group_sizes, is_transposed=is_transposed, implementation="xla")
    expected = _expected(x, weights, sizes, is_transposed=is_transposed)
    np.testing.assert_allclose(out[: sum(sizes)], expected, atol=1e-4)


@pytest.mark.parametrize("has_matrices", [False, True])
def test_tiles_hold_each_row_once_and_rows_of_one_group(has_matrices):
    rng, num_rows = np.random.default_rng(1), 630
    for _ in range(50):
        sizes = rng.integers(0, 90, 7) * rng.integers(0, 2, 7)
        matrices = rng.integers(0, 99, 7)
        named = jnp.asarray(matrices, jnp.int32) if has_matrices else None
        *columns, totals = np.asarray(plan_tiles(jnp.asarray(sizes, jnp.int32), named, num_rows, 64))
        num_tiles, owners = totals[0], np.repeat(np.arange(7), sizes)
        assert (totals == num_tiles).all()
        assert num_tiles <= len(totals) == most_tiles(num_rows, 7, 64)
        columns, rows = np.array(columns), []
        for tile, (matrix, first, size, first_tile, of_group) in enumerate(columns[:, :num_tiles].T):
            group = owners[first]
            assert matrix == (matrices[group] if has_matrices else group)
            assert 1 <= size <= 64
            assert first_tile <= tile < first_tile + of_group
            assert of_group == -(-sizes[group] // 64)
            assert (owners[first : first + size] == group).all()
            rows.extend(range(first, first + size))
        assert rows == list(range(len(owners)))
        assert not columns[:, num_tiles:].any()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": jnp.zeros((140, 64), jnp.float32)}, ValueError, "expected one type"),
        ({"x": jnp.zeros((140, 32), jnp.bfloat16)}, ValueError, "as many features in both"),
        ({"group_sizes": jnp.zeros(3, jnp.int32)}, ValueError, r"group_sizes is int32\[3\]: expected int32\[2\]"),
        ({"matrices": jnp.zeros(3, jnp.int32)}, ValueError, r"group_sizes is int32\[2\]: expected int32\[3\]"),
        ({"matrices": jnp.zeros(2, jnp.int16)}, ValueError, "matrices names in int32"),
        ({"implementation": "cuda"}, ValueError, "'cuda' is unknown"),
        ({"weights": jnp.zeros((2, 64, 72), jnp.bfloat16)}, NotImplementedError, "expected multiples of 64"),
    ],
)
def test_operands_that_do_not_fit_are_refused(changes, error, message):
    operands = {
        "x": jnp.zeros((140, 64), jnp.bfloat16),
        "weights": jnp.zeros((2, 64, 128), jnp.bfloat16),
        "group_sizes": jnp.zeros(2, jnp.int32),
        "implementation": "hopper",
    }
    with pytest.raises(error, match=message):
        grouped_matmul(**operands | changes, interpret=changes.get("implementation") is None)


@pytest.mark.parametrize(
    ("num_columns", "num_tiles", "expected"),
    [(1536, 132, 256), (1536, 8, 64), (28672, 2, 256), (4096, 2, 64), (4096, 6, 128), (2880, 40, 192), (2880, 4, 64)],
)
def test_few_tiles_of_rows_take_narrow_columns(num_columns, num_tiles, expected):
    assert columns_of_tile(num_columns, num_tiles, 132) == expected


@pytest.mark.parametrize(
    ("num_rows", "num_groups", "num_experts", "hidden_size", "ffn"),
    [
        (8, 8, 128, 2048, 768),
        (2048, 128, 128, 2048, 768),
        (16384, 8, 8, 4096, 14336),
        (1024, 32, 32, 2880, 2880),
    ],
    ids=["one token", "qwen3-30b-a3b", "mixtral-8x7b", "gpt-oss-20b"],
)
def test_compiles_for_the_gpu_at_real_sizes(num_rows, num_groups, num_experts, hidden_size, ffn):
    for features, matrix, is_transposed in (
        (hidden_size, (2 * ffn, hidden_size), True),
        (ffn, (ffn, hidden_size), False),
    ):
        x = jax.ShapeDtypeStruct((max(num_rows, TILE_ROWS), features), jnp.bfloat16)
        weights = jax.ShapeDtypeStruct((num_experts, *matrix), jnp.bfloat16)
        case = _case_of(x, weights, num_groups, is_transposed=is_transposed, consumers=None, num_sms=132)  # pyright: ignore[reportArgumentType]
        sizes = jax.ShapeDtypeStruct((num_groups,), jnp.int32)
        tiles = jax.eval_shape(partial(plan_tiles, num_rows=x.shape[0], tile_rows=case.tile_rows), sizes, sizes)
        traced = _grouped.trace(x, weights, tiles, case=case, num_sms=132, interpret=None)
        traced.lower(lowering_platforms=("cuda",))
