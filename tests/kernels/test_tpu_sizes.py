"""The sizes of TPU launches, and the bytes that they move: as planned, as the interpreter moves them, at the least."""

import json
import tomllib
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import block_pool_shape
from pallas_kernels.chips.tpu import CORES_OF_DEVICE, chip_of
from pallas_kernels.paged_attention.call import Batch, Call, KvLayer, Scoring
from pallas_kernels.paged_attention.tpu import attend_tpu, lane_layout, tuning, write_and_attend_tpu
from pallas_kernels.paged_attention.tpu.batch import plan_launch
from pallas_kernels.paged_attention.tpu.launch import Launch, Sizes, vmem_bytes
from pallas_kernels.paged_attention.tpu.sizes import vmem_limit
from pallas_kernels.paged_attention.tpu.traffic import count_traffic, least_bytes, least_flops
from pallas_kernels.paged_attention.tpu.tuning import TUNED, shape_class
from tests.support.attention import Options, Shape, make_batch
from tests.support.tpu_interpret import WATCHED, counted_bytes, no_tpu_races  # noqa: F401

pytestmark = pytest.mark.usefixtures("no_tpu_races")


def launch_for(
    generation: str,
    *,
    num_tokens: int,
    num_seqs: int,
    group: int = 4,
    num_kv_heads: int = 8,
    head_dim: int = 128,
    block_size: int = 16,
    pool_dtype: type = jnp.bfloat16,
    q_dtype: type = jnp.bfloat16,
    window: int | None = None,
    is_fused: bool = False,
) -> Launch:
    layout = lane_layout(num_kv_heads, head_dim)
    shaped, pool = jax.ShapeDtypeStruct, block_pool_shape(100, 2, layout.num_kv_heads, block_size, layout.head_dim)
    call = Call(
        q=shaped((num_tokens, num_kv_heads * group, head_dim), q_dtype),
        kv=KvLayer(shaped(pool, pool_dtype), 0),
        batch=Batch(*(shaped(shape, jnp.int32) for shape in ((num_seqs, 1), (num_seqs,), (num_seqs + 1,)))),
        scoring=Scoring(0.1, window),
    )
    return plan_launch(call, layout, None, chip_of(generation), is_fused=is_fused)


@pytest.mark.parametrize("generation", CORES_OF_DEVICE)
def test_launches_fit_vmem_and_keep_the_bandwidth_busy(generation):
    chip = chip_of(generation)
    for head_dim, group, block_size, num_kv_heads, tokens in product(
        (64, 128, 256), (1, 8), (16, 128), (1, 8, 32), (64, 2048)
    ):
        launch = launch_for(
            generation,
            num_tokens=tokens,
            num_seqs=64,
            group=group,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            block_size=block_size,
        )
        assert vmem_bytes(launch) <= vmem_limit(chip) < chip.vmem_bytes
        in_flight = (launch.sizes.buffers - 1) * launch.sizes.chunk_blocks * launch.block_bytes
        is_capped = launch.chunk_tokens >= 512
        if tokens == 64 and generation != "v4":
            assert is_capped or in_flight >= 1.9e-6 * chip.hbm_bytes_per_s


def test_heads_beyond_vmem_are_refused_with_what_to_do():
    with pytest.raises(NotImplementedError, match="shard the heads"):
        launch_for("v4", num_tokens=64, num_seqs=64, num_kv_heads=2048, block_size=128)


@pytest.fixture
def tune(tmp_path, monkeypatch):
    """Puts a file of this content in tuned.json's place, where there is an empty one."""

    def write(content: object) -> Path:
        path.write_text(json.dumps(content))
        tuning.load.cache_clear()
        return path

    path = tmp_path / "tuned.json"
    monkeypatch.setattr(tuning, "TUNED", path)
    write({})
    yield write
    tuning.load.cache_clear()


DECODE, RAGGED = {"num_tokens": 64, "num_seqs": 64}, {"num_tokens": 2048, "num_seqs": 64}
MEASURED = Sizes(tile_row_tiles=64, chunk_blocks=4, buffers=5)


def test_tuned_sizes_are_chosen_on_their_generation_for_their_shapes_alone(tune):
    before = launch_for("v5e", **RAGGED)
    key = shape_class(before, longest_q=2048)
    assert before.sizes != MEASURED
    tune({"v5e": {key: asdict(MEASURED)}})
    assert launch_for("v5e", **RAGGED).sizes == MEASURED
    assert launch_for("v5e", **RAGGED | {"num_tokens": 1024}).sizes == MEASURED
    for other in ({"generation": "v6e"}, DECODE, {"block_size": 32}, {"num_kv_heads": 4}, {"pool_dtype": jnp.int8}):
        launch = {"generation": "v5e"} | RAGGED | other
        chosen = launch_for(**launch).sizes
        tune({})
        assert chosen == launch_for(**launch).sizes
        tune({"v5e": {key: asdict(MEASURED)}})


def test_tuned_tile_is_no_larger_than_the_queries(tune):
    few = launch_for("v5e", num_tokens=24, num_seqs=8)
    tune({"v5e": {shape_class(few, longest_q=24): asdict(MEASURED)}})
    assert few.rows.tokens == 4
    assert launch_for("v5e", num_tokens=24, num_seqs=8).sizes == replace(MEASURED, tile_row_tiles=6)


def test_tuned_sizes_beyond_vmem_are_refused_by_name(tune):
    key = shape_class(launch_for("v4", **DECODE), longest_q=1)
    path = tune({"v4": {key: asdict(replace(MEASURED, chunk_blocks=128))}})
    with pytest.raises(ValueError, match="VMEM") as refused:
        launch_for("v4", **DECODE)
    assert f"{path}: v4: {key}: " in str(refused.value)


@pytest.mark.parametrize(
    "entry",
    [
        {"tile_row_tiles": 1, "chunk_blocks": 4},
        asdict(MEASURED) | {"tiles": 1},
        asdict(MEASURED) | {"tile_row_tiles": 0},
        asdict(MEASURED) | {"tile_row_tiles": 1.5},
        asdict(MEASURED) | {"chunk_blocks": 3},
        asdict(MEASURED) | {"chunk_blocks": 256},
        asdict(MEASURED) | {"buffers": 1},
        asdict(MEASURED) | {"buffers": "3"},
        None,
    ],
)
def test_invalid_tuned_entry_is_refused_by_name(tune, entry):
    path = tune({"v5e": {"a shape class": entry}})
    with pytest.raises(ValueError, match="a power of two") as refused:
        launch_for("v5e", **DECODE)
    assert f"{path}: v5e: a shape class: " in str(refused.value)


def test_tuned_sizes_of_an_unknown_generation_are_refused(tune):
    tune({"v3": {}})
    with pytest.raises(ValueError, match="v3: expected v4"):
        launch_for("v5e", **DECODE)


def test_installed_package_has_the_tuned_sizes():
    assert tuning.load().keys() <= CORES_OF_DEVICE.keys()
    root = Path(__file__).parents[2]
    data = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    packaged = ((root / package.replace(".", "/"), pattern) for package in data for pattern in data[package])
    assert any(TUNED in folder.glob(pattern) for folder, pattern in packaged)


def test_unknown_generation_is_refused():
    with pytest.raises(NotImplementedError, match="v3"):
        chip_of("v3")


@pytest.mark.parametrize("generation", CORES_OF_DEVICE)
@pytest.mark.parametrize(
    ("group", "num_kv_heads", "head_dim", "pool_dtype", "is_fused"),
    [
        (4, 8, 128, jnp.bfloat16, True),
        (1, 40, 128, jnp.bfloat16, True),
        (8, 1, 128, jnp.bfloat16, True),
        (4, 8, 256, jnp.bfloat16, False),
        (4, 8, 128, jnp.int8, False),
        (8, 8, 128, jnp.float8_e4m3fn, False),
    ],
)
def test_decode_moves_within_3_percent_of_the_least(generation, group, num_kv_heads, head_dim, pool_dtype, is_fused):
    launch = launch_for(
        generation,
        num_tokens=256,
        num_seqs=256,
        group=group,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        pool_dtype=pool_dtype,
        is_fused=is_fused,
    )
    lens = [1] * 256, [1024] * 256
    assert 1 <= count_traffic(launch, *lens, 256).total_bytes / least_bytes(launch, group, *lens) < 1.03


KILOTOKEN = Shape(2, 2, 64, num_heads=8, num_kv_heads=2, head_dim=128, block_size=16, dtype=jnp.bfloat16)
MIXED = Shape(40, 4, 12, num_heads=8, num_kv_heads=2, head_dim=128, block_size=16, dtype=jnp.bfloat16)


@pytest.mark.parametrize(
    ("shape", "q_lens", "kv_lens", "window", "is_fused"),
    [
        (KILOTOKEN, [1, 1], [1024, 1000], None, True),
        (KILOTOKEN, [1, 1], [1024, 1000], 100, False),
        (replace(KILOTOKEN, quantized=jnp.int8), [1, 1], [1024, 1000], None, False),
        (MIXED, [1, 20, 9], [130, 70, 160], None, False),
    ],
    ids=["fused_decode", "window", "int8", "mixed"],
)
def test_planned_bytes_are_those_that_the_interpreter_moves(monkeypatch, shape, q_lens, kv_lens, window, is_fused):
    batch = make_batch(shape, q_lens, kv_lens)
    call, launch = batch.call(Options(sliding_window=window)), {"chip": chip_of("v5e"), "interpret": WATCHED}
    with counted_bytes(monkeypatch) as moved:
        if is_fused:
            new = jnp.ones((shape.num_tokens, shape.num_kv_heads, shape.head_dim), shape.dtype)
            out = write_and_attend_tpu(call, new, new, is_decode=True, **launch).out
        else:
            out = attend_tpu(call, **launch)
        out.block_until_ready()
    planned = count_traffic(
        launch_for(
            "v5e",
            num_tokens=shape.num_tokens,
            num_seqs=shape.num_seqs,
            num_kv_heads=shape.num_kv_heads,
            pool_dtype=shape.quantized or shape.dtype,
            window=window,
            is_fused=is_fused,
        ),
        q_lens,
        kv_lens,
        shape.num_tokens,
    )
    assert sum(moved) == planned.total_bytes


@pytest.mark.parametrize("window", [None, 7])
def test_least_flops_are_those_of_the_visible_pairs(window):
    launch = launch_for("v5e", num_tokens=64, num_seqs=4, window=window)
    q_lens, kv_lens = [1, 0, 20, 9], [130, 0, 20, 40]
    pairs = sum(
        min(position + 1, window or position + 1)
        for q_len, kv_len in zip(q_lens, kv_lens, strict=True)
        for position in range(kv_len - q_len, kv_len)
    )
    assert least_flops(launch, 4, q_lens, kv_lens) == pairs * 32 * 2 * 128 * 2
    assert count_traffic(launch, q_lens, kv_lens, 64).flops >= pairs * 32 * 2 * 128 * 2


def test_no_row_of_the_pool_is_padding_where_heads_can_share_it():
    assert lane_layout(8, 64) == (4, 128, 2)
    assert lane_layout(8, 32) == (2, 128, 4)
    assert lane_layout(8, 128) == (8, 128, 1)
    assert lane_layout(8, 96) == (8, 128, 1)
    assert lane_layout(1, 64) == (1, 128, 1)
    assert np.prod(lane_layout(12, 64)[:2]) == 12 * 64
