"""Tensors in safetensors files: opened, and read by several threads at once."""

import json
import math
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from jpaged.models.checkpoint.config import read_json
from jpaged.models.checkpoint.hub import WEIGHTS_FILE, WEIGHTS_INDEX

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Supported dtypes, by their name in safetensors."""

PACKED = "U8"
"""Dtype of tensors that a spelling decodes."""

_CHUNK_BYTES = 8 << 20
"""Bytes that one thread reads at once: enough for the full rate of a disk."""

_NUM_THREADS = 4
"""One thread copies 2 to 4 GB/s from the page cache. Faster disks take several."""


class StoredTensor(NamedTuple):
    """A tensor in a file: ``slices[index]`` reads that part of it."""

    file: Path
    slices: Any
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.size * _dtype_of(self.dtype).itemsize


@dataclass(frozen=True)
class _OpenFile:
    """An open file of tensors, and the threads that read it."""

    path: Path
    number: int
    content: mmap.mmap
    pool: ThreadPoolExecutor


class _Slices:
    """Reads parts of one tensor: contiguous parts by the file's number, others from the mapped file.

    Neither way holds Python's lock, since numbers are copied as bits: several threads wait for the disk at once.
    """

    def __init__(self, file: _OpenFile, start: int, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self._file = file
        self._start = start
        self._dtype = dtype
        bits = np.dtype(f"u{dtype.itemsize}")
        self._bits = np.frombuffer(file.content, bits, math.prod(shape), start).reshape(shape)

    def __getitem__(self, index: Any) -> np.ndarray:
        part = np.asarray(self._bits[index])
        copy = np.empty(part.shape, part.dtype)
        if part.flags.c_contiguous:
            skipped = part.ctypes.data - self._bits.ctypes.data if part.size else 0
            self._read(memoryview(copy.reshape(-1).view(np.uint8)), self._start + skipped)
        else:
            step = max(1, _CHUNK_BYTES * len(part) // part.nbytes)
            rows = [slice(first, first + step) for first in range(0, len(part), step)]
            list(self._file.pool.map(lambda some: np.copyto(copy[some], part[some]), rows))
        return copy.view(self._dtype)

    def _read(self, target: memoryview, start: int) -> None:
        def read(first: int) -> None:
            chunk = target[first : first + _CHUNK_BYTES]
            while chunk:
                num_read = os.preadv(self._file.number, [chunk], start + first)
                if not num_read:
                    raise ValueError(f"{self._file.path} was truncated while it was read: download it again")
                chunk, first = chunk[num_read:], first + num_read

        list(self._file.pool.map(read, range(0, len(target), _CHUNK_BYTES)))


def open_tensors(path: Path, stack: ExitStack) -> dict[str, StoredTensor]:
    """Open all tensors of a checkpoint, by name; files stay open until ``stack`` closes.

    Raises:
        ValueError: a file is missing or damaged.
    """
    tensors: dict[str, StoredTensor] = {}
    pool = stack.enter_context(ThreadPoolExecutor(_NUM_THREADS))
    for file in _weight_files(path):
        try:
            with safe_open(file, framework="numpy"):  # checks the header, and the sizes
                pass
            opened = stack.enter_context(file.open("rb"))
            content = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is truncated or damaged ({error}): download it again") from error
        header_bytes = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + header_bytes])
        header.pop("__metadata__", None)
        shared = _OpenFile(file, opened.fileno(), content, pool)
        for name, entry in header.items():
            shape, dtype = tuple(entry["shape"]), entry["dtype"]
            is_read = dtype in DTYPES or dtype == PACKED
            start = 8 + header_bytes + entry["data_offsets"][0]
            slices = _Slices(shared, start, shape, _dtype_of(dtype)) if is_read else None
            tensors[name] = StoredTensor(file, slices, shape, dtype)
    return tensors


def _dtype_of(name: str) -> np.dtype:
    return np.dtype(np.uint8) if name == PACKED else jnp.dtype(DTYPES[name])


def _weight_files(path: Path) -> list[Path]:
    """List the safetensors files of a checkpoint directory."""
    index = path / WEIGHTS_INDEX
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index} has no weight_map: download the checkpoint again")
        files = [path / name for name in sorted(set(weight_map.values()))]
        for file in files:
            if file.parent != path:
                raise ValueError(f"{index} points outside its directory, to {file}: weights must lie beside it")
            if not file.is_file():
                raise ValueError(f"{file} is missing, but {index.name} names it: download the checkpoint again")
        return files
    if (path / WEIGHTS_FILE).is_file():
        return [path / WEIGHTS_FILE]
    if pickled := sorted(path.glob("pytorch_model*.bin")):
        raise ValueError(
            f"{pickled[0]} is a pickle, which can run code when it is loaded, so it is not read. Convert it once: "
            "save the model with transformers' save_pretrained, which writes safetensors"
        )
    raise ValueError(f"{path} has no weights: expected {WEIGHTS_FILE} or {WEIGHTS_INDEX}")
