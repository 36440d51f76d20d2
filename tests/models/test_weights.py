"""Checkpoints written, read, sharded, and refused when they are damaged or belong to another model."""

import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jpaged.models import (
    OPTConfig,
    fuse_projections,
    load_config,
    load_model,
    random_model,
    save_checkpoint,
)
from jpaged.models.checkpoint import weights
from jpaged.sharding import make_mesh
from tests.support.oracles import HF_REFERENCE
from tests.support.tiny import tiny_config

LLAMA = tiny_config(
    architecture="Qwen3ForCausalLM",
    vocab_size=11,
    hidden_size=8,
    intermediate_size=12,
    num_layers=1,
    head_dim=6,
    max_position_embeddings=32,
    eos_token_ids=(3, 4),
    qk_norm=True,
    qkv_bias=True,
    o_bias=True,
)
OPT = OPTConfig(
    architecture="OPTForCausalLM",
    vocab_size=11,
    hidden_size=8,
    intermediate_size=12,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    head_dim=4,
    max_position_embeddings=32,
    tie_word_embeddings=True,
    word_embed_proj_dim=6,
    norm_affine=False,
    bias=False,
)


def _load(path, dtype="float32", tensor_parallel_size=1):
    return load_model(path, load_config(path), dtype, make_mesh(tensor_parallel_size), use_tqdm=False)


def _leaves(model):
    return {path: np.asarray(v[...]) for path, v in nnx.to_flat_state(nnx.state(model))}


@pytest.fixture(scope="module")
def llama():
    return random_model(LLAMA, "float32", make_mesh(), 0)


@pytest.fixture(scope="module")
def opt():
    return random_model(OPT, "bfloat16", make_mesh(), 1)


@pytest.fixture
def saved(llama, tmp_path):
    """A checkpoint directory, fresh for each test."""
    save_checkpoint(llama, LLAMA, tmp_path)
    return tmp_path


def _rewrite(path, change):
    """Lets ``change`` edit the tensors of ``path / model.safetensors`` in place."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_saved_model_loads_back_equal(family, request, tmp_path):
    model = request.getfixturevalue(family)
    dtype = "bfloat16" if family == "opt" else "float32"
    save_checkpoint(model, model.config, tmp_path / "new" / "directory")
    assert load_config(tmp_path / "new" / "directory") == replace(model.config, dtype=dtype)
    before, after = _leaves(model), _leaves(_load(tmp_path / "new" / "directory", dtype))
    assert before.keys() == after.keys()
    for path, value in before.items():
        np.testing.assert_array_equal(value, after[path])


@pytest.mark.parametrize(
    ("case", "tensor_parallel_size"), [("qwen2_window", 2), ("qwen2_window", 4), ("qwen3", 4), ("opt_post_norm", 1)]
)
def test_model_with_joined_projections_is_saved_like_one_without(case, tensor_parallel_size, tmp_path):
    model = _load(HF_REFERENCE / case, tensor_parallel_size=tensor_parallel_size)
    fuse_projections(model)
    save_checkpoint(model, load_config(HF_REFERENCE / case), tmp_path)
    expected, written = load_file(HF_REFERENCE / case / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert written.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(written[name], value)


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("wanted", ["bfloat16", "float32"])
def test_stored_dtype_is_converted_to_the_one_asked_for(stored, wanted, llama, tmp_path):
    save_checkpoint(llama, LLAMA, tmp_path, dtype=stored)
    for path, value in _leaves(_load(tmp_path, wanted)).items():
        assert value.dtype == jnp.dtype(wanted)
        expected = _leaves(llama)[path].astype(stored).astype(wanted)
        np.testing.assert_array_equal(value, expected)


def _drop_dtype(path):
    values = json.loads((path / "config.json").read_text())
    del values["dtype"]
    (path / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
def test_dtype_the_config_does_not_name_is_the_stored_one(stored, llama, tmp_path):
    save_checkpoint(llama, LLAMA, tmp_path, dtype=stored)
    _drop_dtype(tmp_path)
    assert load_config(tmp_path).dtype == stored


def test_dtype_of_mixed_weights_is_that_of_most_numbers(llama, tmp_path):
    save_checkpoint(llama, LLAMA, tmp_path, dtype="bfloat16")
    _drop_dtype(tmp_path)

    def widen_norms(tensors):
        for name in tensors:
            if "norm" in name or "bias" in name:
                tensors[name] = tensors[name].astype(np.float32)

    _rewrite(tmp_path, widen_norms)
    assert load_config(tmp_path).dtype == "bfloat16"


def test_dtype_of_sharded_weights_is_found(tmp_path):
    shutil.copytree(HF_REFERENCE / "llama_sharded", tmp_path, dirs_exist_ok=True)
    _drop_dtype(tmp_path)
    assert load_config(tmp_path).dtype == load_config(HF_REFERENCE / "llama_sharded").dtype


def test_dtype_without_config_or_weights_is_float32(saved):
    _drop_dtype(saved)
    (saved / "model.safetensors").unlink()
    assert load_config(saved).dtype == "float32"


@pytest.mark.parametrize("case", ["qwen2", "opt_post_norm"])
def test_saving_what_hugging_face_saved_gives_the_same_tensors(case, tmp_path):
    save_checkpoint(_load(HF_REFERENCE / case), load_config(HF_REFERENCE / case), tmp_path)
    expected = load_file(HF_REFERENCE / case / "model.safetensors")
    written = load_file(tmp_path / "model.safetensors")
    assert written.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(written[name], value)


def test_each_device_holds_only_its_share(saved):
    model = _load(saved, tensor_parallel_size=2)
    attention = model.model.layers[0].self_attn
    q, o, norm = attention.q_proj.kernel[...], attention.o_proj.kernel[...], model.model.norm.scale[...]
    assert {shard.data.shape for shard in q.addressable_shards} == {(8, 12)}  # whole heads: 2 of 4, 6 wide
    assert {shard.data.shape for shard in o.addressable_shards} == {(12, 8)}
    assert {shard.data.shape for shard in attention.k_proj.bias[...].addressable_shards} == {(6,)}
    assert {shard.data.shape for shard in norm.addressable_shards} == {(8,)}
    one, two = _leaves(_load(saved)), _leaves(model)
    for path, value in one.items():
        np.testing.assert_array_equal(value, two[path])


def test_progress_bar_counts_every_byte(saved, capsys):
    load_model(saved, LLAMA, "float32", make_mesh())
    shown = capsys.readouterr().err
    assert "Loading weights: 100%" in shown


def test_redundant_tensors_are_skipped(opt, tmp_path):
    save_checkpoint(opt, OPT, tmp_path, dtype="float32")

    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.decoder.embed_tokens.weight"].copy()
        tensors["model.decoder.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)

    _rewrite(tmp_path, add)
    _load(tmp_path)


def test_output_projection_that_differs_from_its_tied_embedding_is_used(opt, tmp_path, caplog):
    save_checkpoint(opt, OPT, tmp_path, dtype="float32")
    other = np.random.default_rng(0).normal(size=(11, 6)).astype(np.float32)
    _rewrite(tmp_path, lambda t: t.update({"lm_head.weight": other}))
    config = load_config(tmp_path)
    assert config == replace(OPT, dtype="float32", tie_word_embeddings=False)
    assert "ties the embeddings, but the weight files hold two that differ" in caplog.text
    model = load_model(tmp_path, config, "float32", make_mesh(), use_tqdm=False)
    np.testing.assert_array_equal(model.lm_head.kernel[...], other.T)
    embedding = opt.model.decoder.embed_tokens.embedding[...].astype("float32")
    np.testing.assert_array_equal(model.model.decoder.embed_tokens.embedding[...], embedding)


@pytest.mark.parametrize("has_prefix", [True, False])
def test_tied_embedding_is_read_under_the_name_of_the_projection(has_prefix, opt, tmp_path):
    save_checkpoint(opt, OPT, tmp_path)

    def rename(tensors):
        tensors["lm_head.weight"] = tensors.pop("model.decoder.embed_tokens.weight")
        for name in [] if has_prefix else list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    _rewrite(tmp_path, rename)
    loaded = _leaves(_load(tmp_path, "bfloat16"))
    for path, value in _leaves(opt).items():
        np.testing.assert_array_equal(value, loaded[path])


def test_tensors_that_no_architecture_reads_are_named_once(saved, caplog):
    modules = "vision_tower.layers.0.q_proj", "mtp.layers.0.norm", "model.layers.0.self_attn.memory", "score"
    _rewrite(saved, lambda t: t.update({f"{module}.weight": np.ones(2, np.float32) for module in modules}))
    _load(saved)
    [record] = caplog.records
    shown = "model.layers.0.self_attn.memory.weight, mtp.layers.0.norm.weight, score.weight, ..."
    assert f"4 tensors are not part of the model and are not read: {shown}" in record.getMessage()


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.self_attn.sinks", "model.layers.0.mlp.gate.weight", "model.norm.bias", "lm_head.bias"],
)
def test_unread_tensor_that_changes_what_a_model_computes_is_refused(name, saved):
    _rewrite(saved, lambda t: t.update({name: np.ones(2, np.float32)}))
    with pytest.raises(ValueError, match=rf"1 tensors are not part of the model .*'{name}': correct config\.json"):
        _load(saved)


def test_modules_that_any_architecture_has_in_its_layers_are_known():
    for file in HF_REFERENCE.glob("*/*.safetensors"):
        with safe_open(file, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                parts = name.split(".")
                is_of_layer = any(part.isdecimal() for part in parts)
                assert not is_of_layer or not weights._LAYER_MODULES.isdisjoint(parts), name


def test_checkpoint_of_a_bare_decoder_lacks_the_prefix(opt, tmp_path):
    save_checkpoint(opt, OPT, tmp_path)

    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    _rewrite(tmp_path, strip)
    loaded = _leaves(_load(tmp_path, "bfloat16"))
    for path, value in _leaves(opt).items():
        np.testing.assert_array_equal(value, loaded[path])


# Bad input ------------------------------------------------------------------------------------------------------------


def test_missing_tensor_is_named(saved):
    _rewrite(saved, lambda t: t.pop("model.norm.weight"))
    with pytest.raises(ValueError, match=r"1 of 18 tensors are missing .*'model\.norm\.weight'"):
        _load(saved)


def test_unexpected_tensor_is_named(saved):
    _rewrite(saved, lambda t: t.update({"model.layers.1.mlp.up_proj.weight": np.ones(2, np.float32)}))
    with pytest.raises(ValueError, match=r"model\.safetensors: 1 tensors are not part .*layers\.1\.mlp\.up_proj"):
        _load(saved)


def test_shape_that_disagrees_with_the_config_is_named(saved):
    _rewrite(saved, lambda t: t.update({"lm_head.weight": np.ones((12, 8), np.float32)}))
    with pytest.raises(ValueError, match=r"lm_head\.weight has shape \[12, 8\], but config\.json makes it \[11, 8\]"):
        _load(saved)


def test_stored_dtype_that_is_no_float_is_refused(saved):
    _rewrite(saved, lambda t: t.update({"lm_head.weight": np.ones((11, 8), np.int8)}))
    with pytest.raises(ValueError, match=r"lm_head\.weight is stored as I8"):
        _load(saved)


@pytest.mark.parametrize("length", [0, 4, 100, -1], ids=["empty", "no header", "header cut", "tensors cut"])
def test_truncated_file_is_refused(length, saved):
    content = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(content[:length])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or damaged .*: download it again"):
        _load(saved)


def test_truncated_file_is_refused_when_its_dtype_is_read(saved):
    _drop_dtype(saved)
    (saved / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or damaged .*: download it again"):
        load_config(saved)


def test_stored_dtype_that_is_not_supported_is_refused_when_it_is_read(saved):
    _drop_dtype(saved)
    _rewrite(saved, lambda t: t.update({name: value.astype(np.int8) for name, value in t.items()}))
    with pytest.raises(ValueError, match=r"stored as I8, which is not supported: expected one of F32, BF16, F16"):
        load_config(saved)


def test_offsets_beyond_the_file_are_refused(saved):
    header = json.dumps({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 1 << 40]}}).encode()
    (saved / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(ValueError, match="truncated or damaged"):
        _load(saved)


def test_pickled_weights_are_not_read(saved):
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is a pickle.* save_pretrained"):
        _load(saved)


def test_directory_without_weights_is_refused(saved):
    (saved / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no weights: expected model\.safetensors"):
        _load(saved)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{}", "has no weight_map"),
        ("{", "cannot be read as JSON"),
        ('{"weight_map": {"x": "model-2.safetensors"}}', r"model-2\.safetensors is missing, but"),
        ('{"weight_map": {"x": "../model.safetensors"}}', "points outside its directory"),
    ],
)
def test_index_that_does_not_match_its_files_is_refused(index, message, saved):
    (saved / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=message):
        _load(saved)


def test_refused_before_anything_is_read(saved, monkeypatch):
    """One shape is wrong among good ones: no tensor reaches a device."""
    _rewrite(saved, lambda t: t.update({"lm_head.weight": np.ones((12, 8), np.float32)}))
    monkeypatch.setattr(jax, "make_array_from_callback", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(ValueError, match=r"lm_head\.weight has shape"):
        _load(saved)


def test_missing_shard_is_named(tmp_path):
    path = tmp_path / "checkpoint"
    shutil.copytree(HF_REFERENCE / "llama_sharded", path)
    (path / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00004\.safetensors is missing"):
        _load(path)
