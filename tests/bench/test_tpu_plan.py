"""The figures of bench.tpu.plan, beside independent arithmetic."""

import json
from dataclasses import asdict

import pytest

from bench.__main__ import main
from bench.tpu import plan as tpu_plan
from bench.tpu.compiler import why_no_compiler
from bench.tpu.plan import BATCHES, MODELS, plan, table
from pallas_kernels.chips.tpu import chip_of
from pallas_kernels.paged_attention.tpu.sizes import vmem_limit

pytestmark = [
    pytest.mark.skipif(why_no_compiler() is not None, reason=str(why_no_compiler())),
    pytest.mark.usefixtures("nothing_kept_by_jax"),  # it cannot be loaded for devices that are not there
]

LLAMA, QWEN, OPT, SHARE = MODELS
DECODE, LONG, PREFILL, MIXED = BATCHES


def test_decode_is_bound_by_reading_its_context():
    row = plan("v5e", LLAMA, DECODE, "bfloat16", 16)
    kv = 128 * 1024 * 2 * 8 * 128 * 2
    queries_and_outputs, new_and_written = 2 * 128 * 32 * 128 * 2, 2 * 128 * 2 * 8 * 128 * 2
    assert row.least_bytes == kv + queries_and_outputs + new_and_written
    assert kv < row.moved_bytes < 1.03 * row.least_bytes
    assert row.least_flops == 128 * 1024 * 32 * 2 * 128 * 2
    assert row.flops == 2 * row.least_flops, "a register has 8 rows, for 4 query heads"
    assert row.bound == "bytes"
    assert row.us == pytest.approx(1e6 * row.moved_bytes / 0.82e12, rel=1e-3)
    assert row.temporary_bytes < 2**20


def test_prefill_is_bound_by_its_products_over_both_cores():
    row = plan("v5p", LLAMA, PREFILL, "int8", 128)
    assert row.least_flops == 4 * 32 * 128 * (2048 * 2049 // 2)
    assert row.least_bytes == 2048 * 2 * 8 * 128 + 2 * 2048 * 32 * 128 * 2
    assert row.least_flops < row.flops < 1.5 * row.least_flops
    assert row.bound == "flops"
    assert row.us == pytest.approx(1e6 * row.flops / 459e12, rel=1e-3)


@pytest.mark.parametrize("batch", [PREFILL, MIXED], ids=lambda batch: batch.name)
def test_vmem_is_what_the_compiler_gave_the_kernel_and_no_more_than_planned(batch):
    row = plan("v5e", OPT, batch, "bfloat16", 16)
    kv = row.buffers * row.chunk_tokens * 2 * 40 * 128 * 2
    queries_and_outputs, state = (row.buffers + 2) * 40 * row.tile_rows * 128 * 2, 40 * row.tile_rows * 3 * 128 * 4
    assert kv + queries_and_outputs + state < row.vmem_bytes <= row.planned_vmem_bytes <= vmem_limit(chip_of("v5e"))


def test_command_writes_the_rows_that_it_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tpu_plan, "MODELS", (OPT,))
    monkeypatch.setattr(tpu_plan, "BATCHES", (DECODE, LONG))
    monkeypatch.setattr(tpu_plan, "POOL_DTYPES", ("int8",))
    assert main(["tpu-plan", "--generation", "v6e", "--out", str(tmp_path), "--commit", "a commit"]) == 0
    written = json.loads((tmp_path / "tpu_plan_v6e.json").read_text())
    rows = [plan("v6e", OPT, DECODE, "int8", block_size) for block_size in (16, 128)]
    assert written["rows"] == [asdict(row) | {"us": row.us, "bound": "bytes"} for row in rows], "contexts fit the model"
    assert written["about"] == "computed, not measured"
    assert written["environment"]["commit"] == "a commit"
    assert "libtpu" in written["environment"]
    assert table("v6e", rows) in capsys.readouterr().out
    assert (tmp_path / "tpu_plan_v6e.png").stat().st_size > 0
