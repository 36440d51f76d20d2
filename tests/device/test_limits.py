"""Rows and tokens of a step that the settings leave open: by memory, pool, model and platform."""

import dataclasses
from unittest import mock

import pytest

from jpaged.config import DEFAULT_NUM_ROWS, DEFAULT_TOKEN_BUDGET, EngineConfig
from jpaged.device.kv import limits
from jpaged.device.kv.limits import default_rows, default_tokens, with_limits
from jpaged.device.target import TARGETS, choose_backend
from jpaged.sharding import make_mesh
from tests.support.tiny import ENGINE_MODEL

GIB = 1 << 30


@pytest.mark.parametrize(
    ("num_blocks", "memory_gib", "vocab_size", "most_tokens", "rows"),
    [
        (50_000, 110, 128_256, None, 1024),
        (8192, 110, 128_256, None, 1024),
        (8191, 110, 128_256, None, 512),
        (2048, 110, 128_256, None, 256),
        (2, 110, 128_256, None, 256),
        (50_000, 20, 128_256, None, 512),
        (50_000, 110, 128_256, 2048, 1024),
        (50_000, 110, 128_256, 1024, 512),
        (50_000, 110, 128_256, 256, 256),
    ],
)
def test_rows_are_fewer_in_a_small_pool_a_small_memory_and_a_small_step(
    num_blocks, memory_gib, vocab_size, most_tokens, rows
):
    assert default_rows(num_blocks, memory_gib * GIB, vocab_size, most_tokens) == rows


def test_tokens_are_fewer_in_a_small_memory():
    assert default_tokens(141 * GIB, 2048) == 8192
    assert default_tokens(40 * GIB, 2048) == 4096
    assert default_tokens(8 * GIB, 2048) == 2048
    assert default_tokens(8 * GIB, 2500) == 2500


def limits_of(target: str, memory_gib: float = 141, **settings) -> tuple[int | None, int | None]:
    config, mesh = EngineConfig(**settings), make_mesh(1)
    backend = choose_backend(ENGINE_MODEL, config, "float32", mesh)
    with (
        mock.patch.object(limits, "target_of", return_value=TARGETS[target]),
        mock.patch.object(limits, "available_bytes", return_value=int(memory_gib * GIB)),
    ):
        found = with_limits(ENGINE_MODEL, config, "float32", mesh, backend)
    assert dataclasses.replace(config, max_num_seqs=1, max_num_batched_tokens=1) == dataclasses.replace(
        found, max_num_seqs=1, max_num_batched_tokens=1
    ), "nothing else changes"
    return found.max_num_seqs, found.max_num_batched_tokens


def test_an_accelerator_takes_1024_rows_and_8192_tokens():
    assert limits_of("gpu") == (1024, 8192)
    assert limits_of("gpu", num_blocks=2049) == (256, 8192)


def test_a_cpu_keeps_the_least_defaults():
    assert limits_of("cpu") == (None, None)
    assert (EngineConfig().most_rows, EngineConfig().token_budget) == (DEFAULT_NUM_ROWS, DEFAULT_TOKEN_BUDGET)


def test_settings_given_are_kept():
    assert limits_of("gpu", max_num_seqs=300) == (300, 8192)
    assert limits_of("gpu", max_num_batched_tokens=700) == (256, 700)
    assert limits_of("gpu", max_num_seqs=9, max_num_batched_tokens=70) == (9, 70)
    assert limits_of("gpu", max_num_seqs=10_000) == (10_000, 10_000)


def test_kv_in_host_memory_keeps_the_least_defaults():
    assert limits_of("gpu", kv_placement="auto", num_host_blocks=64) == (None, None)


def test_weights_that_are_still_to_be_loaded_leave_less():
    config, mesh = EngineConfig(), make_mesh(1)
    backend = choose_backend(ENGINE_MODEL, config, "float32", mesh)
    with (
        mock.patch.object(limits, "target_of", return_value=TARGETS["gpu"]),
        mock.patch.object(limits, "available_bytes", return_value=141 * GIB),
    ):
        found = with_limits(ENGINE_MODEL, config, "float32", mesh, backend, weight_bytes=100 * GIB)
    assert found.max_num_batched_tokens == 4096
