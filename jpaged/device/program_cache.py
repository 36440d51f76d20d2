"""Compiled programs kept between runs, found without tracing them again.

JAX's own cache finds a program by its lowered text, which takes a second or two for each to make. This one goes by what
that text is made of: this project's own code, the versions and settings of what compiles it, and the shape of the
model. It holds nothing whose code it does not know.
"""

import hashlib
import logging
import os
import pickle
import re
import shutil
from collections.abc import Sequence
from concurrent.futures import Executor
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np
from flax import nnx
from jax.experimental import serialize_executable

log = logging.getLogger(__name__)

KNOWN_PACKAGES = ("jpaged", "flax")
"""Of the classes of a model's modules: the cache knows their code, by its content or its version."""

SOURCE_PACKAGES = ("jpaged", "pallas_kernels")
SOURCE_SUFFIXES = (".py", ".json")

MOST_KEPT = 8
"""Models, settings and versions whose programs are kept: those of the least recently started one go first."""


class ProgramCache:
    """The programs of one model under one set of settings, in a directory of their own.

    Args:
        directory: where they are; made when the first is saved. Its neighbours are caches too.
        devices: that they run on.
    """

    def __init__(self, directory: Path, devices: Sequence[Any]) -> None:
        self._directory = directory
        self._devices = devices

    def load_all(self, keys: Sequence[tuple], threads: Executor) -> dict[tuple, jax.stages.Compiled]:
        """The programs of those keys that have one, and a note that this cache is in use."""
        if not self._directory.is_dir():
            return {}
        os.utime(self._directory)
        programs = zip(keys, threads.map(self.load, keys), strict=True)
        return {key: program for key, program in programs if program is not None}

    def load(self, key: tuple) -> jax.stages.Compiled | None:
        """The program of a key, ready to run; None if there is none that this process can use."""
        path = self._path(key)
        try:
            parts = pickle.loads(path.read_bytes())
            program = serialize_executable.deserialize_and_load(*parts, execution_devices=self._devices)
        except FileNotFoundError:
            return None
        except Exception as error:  # of many kinds: it was written by another version, or not to its end
            log.warning("%s cannot be loaded and is compiled again: %s", path, error)
            return None
        return program

    def save(self, key: tuple, program: jax.stages.Compiled) -> None:
        """Keep a program. One that cannot be kept is compiled again next time."""
        path = self._path(key)
        unfinished = path.with_suffix(f".{os.getpid()}")
        try:
            self._make_room()
            unfinished.write_bytes(pickle.dumps(serialize_executable.serialize(program)))
            unfinished.replace(path)
        except (OSError, ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
            unfinished.unlink(missing_ok=True)
            log.warning("a compiled program was not kept: %s", error)

    def _make_room(self) -> None:
        """Make the directory, and drop those of its neighbours that have not been used for long."""
        if self._directory.is_dir():
            return
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        by_use = sorted(self._directory.parent.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in by_use[MOST_KEPT:]:
            shutil.rmtree(path, ignore_errors=True)

    def _path(self, key: tuple) -> Path:
        return self._directory / hashlib.sha256(repr(key).encode()).hexdigest()


def model_identity(model: nnx.Module) -> str | None:
    """What a model computes, whatever its weights; None if that is for its user's own code to say."""
    if any(type(module).__module__.partition(".")[0] not in KNOWN_PACKAGES for _, module in nnx.iter_modules(model)):
        return None
    return re.sub(r" at 0x[0-9a-f]+", "", repr(nnx.graphdef(model)))


def program_cache_for(identity: str | None, devices: Sequence[Any], *ingredients: object) -> ProgramCache | None:
    """The cache of a model's programs, beside JAX's own.

    Args:
        identity: of the model (``model_identity``).
        devices: that they run on.
        ingredients: all else that its programs depend on, and that has a ``repr`` which says it all.

    Returns:
        None for an unknown model, where JAX keeps nothing either, and where others could write too.
    """
    root = jax.config.jax_compilation_cache_dir
    if identity is None or not root or not _is_ones_own(Path(root)):
        return None
    text = repr((_surroundings(devices), identity, ingredients))
    return ProgramCache(Path(root) / "programs" / hashlib.sha256(text.encode()).hexdigest()[:32], devices)


def _is_ones_own(path: Path) -> bool:
    """Whether only this user can have written what is there: programs are run."""
    try:
        stat = path.stat()
    except OSError:
        return False
    return stat.st_uid == os.getuid() and not stat.st_mode & 0o022


def _surroundings(devices: Sequence[Any]) -> tuple[object, ...]:
    """What programs depend on besides the model and the engine's settings."""
    settings = sorted((name, repr(value)) for name, value in jax.config.values.items() if "cache" not in name)
    variables = sorted((name, value) for name, value in os.environ.items() if "XLA" in name or "LIBTPU" in name)
    versions = jax.__version__, version("jaxlib"), flax.__version__, np.__version__
    where = devices[0].client.platform_version, jax.device_count(), [(d.id, d.device_kind) for d in devices]
    return _source_digest(), versions, where, settings, variables


@cache
def _source_digest() -> str:
    """Of this project's own code."""
    digest = hashlib.sha256()
    for package in SOURCE_PACKAGES:
        root = Path(__import__(package).__path__[0])
        for path in sorted(path for path in root.rglob("*") if path.suffix in SOURCE_SUFFIXES):
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()
