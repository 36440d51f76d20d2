"""Tensors of safetensors files, read in parts by several threads."""

import logging
from contextlib import ExitStack

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jpaged.models import load_config, load_model
from jpaged.models.checkpoint import stored
from jpaged.sharding import make_mesh
from tests.support.oracles import HF_REFERENCE

WHOLE = slice(None)


@pytest.fixture
def tensors(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        "odd": rng.integers(0, 255, 5, np.uint8),  # the tensors behind it are not aligned
        "matrix": rng.normal(size=(37, 24)).astype(ml_dtypes.bfloat16),
        "cube": rng.normal(size=(3, 5, 7)).astype(np.float32),
        "vector": rng.normal(size=11).astype(np.float16),
        "empty": np.zeros((0, 4), np.float32),
        "count": np.array(3, np.int64),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return tensors


@pytest.mark.parametrize("chunk_bytes", [1, 64, 1 << 20])
def test_parts_are_those_of_the_tensors_whatever_a_thread_reads_at_once(chunk_bytes, tensors, tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "_CHUNK_BYTES", chunk_bytes)
    parts = {
        "odd": [WHOLE, slice(1, 3)],
        "matrix": [WHOLE, np.s_[3:9, :], np.s_[:, 5:11], np.s_[8:8, :], np.s_[30:99, 1:2]],
        "cube": [np.s_[:, :, :], np.s_[1:3, :, :], np.s_[:, 2:4, :], np.s_[:, :, 6:7]],
        "vector": [(WHOLE,), (slice(4, 11),)],
        "empty": [WHOLE],
    }
    with ExitStack() as stack:
        opened = stored.open_tensors(tmp_path, stack)
        assert {name: (t.shape, t.size) for name, t in opened.items()} == {
            name: (t.shape, t.size) for name, t in tensors.items()
        }
        for name, indices in parts.items():
            assert opened[name].num_bytes == tensors[name].nbytes
            for index in indices:
                part = opened[name].slices[index]
                assert part.dtype == tensors[name].dtype
                np.testing.assert_array_equal(part, tensors[name][index])


def test_a_file_that_shrinks_while_it_is_read_is_refused(tensors, tmp_path):
    with ExitStack() as stack:
        opened = stored.open_tensors(tmp_path, stack)
        with (tmp_path / "model.safetensors").open("r+b") as file:
            file.truncate(100)
        with pytest.raises(ValueError, match=r"model\.safetensors was truncated while it was read"):
            opened["cube"].slices[WHOLE]


def test_size_time_and_rate_of_loading_are_logged(caplog):
    path = HF_REFERENCE / "llama_sharded"
    with caplog.at_level(logging.INFO, logger="jpaged"):
        load_model(path, load_config(path), "float32", make_mesh(), use_tqdm=False)
    num_bytes = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    [message] = [record.getMessage() for record in caplog.records]
    size, _, rest = message.partition(" GB of weights were read in ")
    assert 0.8 * num_bytes < float(size) * 1e9 < num_bytes
    assert rest.endswith(" GB/s")
