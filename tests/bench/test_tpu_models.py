"""Whole models through the TPU compiler, with few of their layers; and what the committed table says of all of them."""

import json

import pytest

from bench.report import RESULTS
from bench.tpu.compiler import why_no_compiler
from bench.tpu.models import PLACES, count_collectives, fit, table

pytestmark = pytest.mark.usefixtures("nothing_kept_by_jax")  # it cannot be loaded for devices that are not there

FITS = json.loads((RESULTS / "tpu_models.json").read_text())["fits"]


@pytest.mark.skipif(why_no_compiler() is not None, reason=str(why_no_compiler()))
def test_a_model_with_fewer_kv_heads_than_chips_is_split_and_its_pool_written_in_place():
    found = fit("llama3-70b", "v5e", 16, num_layers=1)
    assert found.reason is None
    hidden, ffn, vocab, kv = 8192, 28672, 128256, 128  # each chip has one of 8 KV heads, whole
    per_layer = hidden * (2 * hidden // 16 + 2 * kv + 3 * ffn // 16) + 2 * hidden
    assert found.parameter_bytes == 2 * (per_layer + hidden + 2 * vocab // 16 * hidden)
    assert found.total_bytes < found.hbm_bytes
    decode, prefill = found.steps
    for step in found.steps:
        assert step.collectives == {"all-reduce": 3}, "two a layer, and one for the embedding"
        assert step.aliased_bytes >= found.pool_bytes
        assert step.temporary_bytes < found.pool_bytes / 100
    assert decode.sampling_collectives == {"all-to-all": 1, "all-reduce": 2}
    assert prefill.sampling_collectives == {}


@pytest.mark.skipif(why_no_compiler() is not None, reason=str(why_no_compiler()))
def test_a_model_whose_parameters_leave_no_room_is_said_not_to_fit():
    found = fit("llama3-8b", "v5e", 1)
    assert found.steps == ()
    assert found.reason is not None
    assert "no room" in found.reason
    assert "does not fit" in table([found])


def test_collectives_are_counted_apart_from_those_of_sampling():
    hlo = """
  %a = bf16[4]{0} all-reduce(%x), metadata={op_name="jit(decode)/while/body/dot_general"}
  %b = (s32[2]{0}, s32[2]{0}) collective-permute-start(%y), metadata={op_name="jit(decode)/slice"}
  %c = s32[2]{0} collective-permute-done(%b)
  %d = f32[4]{0} all-to-all(%z), metadata={op_name="jit(decode)/sampling/sharding_constraint"}
"""
    assert count_collectives(hlo) == ({"all-reduce": 1, "collective-permute": 1}, {"all-to-all": 1})


def test_the_committed_table_is_complete_and_shows_nothing_but_the_expected_collectives():
    assert [(f["model"], f["generation"], f["num_chips"]) for f in FITS] == [
        (name, *place) for name, places in PLACES for place in places
    ]
    for found in FITS:
        for step in found["steps"]:
            is_split, draws = found["num_chips"] > 1, step["num_tokens"] == step["num_rows"]
            assert step["collectives"] == ({"all-reduce": 2 * found["num_layers"] + 1} if is_split else {})
            expected = {"all-to-all": 1, "all-reduce": 2} if is_split and draws else {}
            assert step["sampling_collectives"] == expected
            assert step["aliased_bytes"] >= found["pool_bytes"]
        assert found["total_bytes"] < found["hbm_bytes"] or found["reason"] is not None
