"""Compiled programs kept between runs, found without tracing them again.

JAX's own cache finds a program by its lowered text, which takes a second or two for each to make. This one goes by what
that text is made of: this project's code, the versions and settings of what compiles it, and the shape of the model. It
keeps nothing of models that hold somebody else's code, and loads nothing that somebody else may have written.
"""

import hashlib
import logging
import os
import pickle
import re
import shutil
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import Executor
from importlib.metadata import distributions
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import Any

import jax
from flax import nnx
from jax.experimental import serialize_executable

log = logging.getLogger(__name__)

SOURCE_PACKAGES = ("jpaged", "pallas_kernels")
SOURCE_SUFFIXES = (".py", ".json")

KNOWN_PACKAGES = (*SOURCE_PACKAGES, "flax", "jax", "jaxlib", "numpy", "ml_dtypes", "builtins")
"""Of what a model is made of: the cache knows their code, by its content or its version."""

VERSIONED_PREFIXES = ("flax", "jax", "ml-dtypes", "ml_dtypes", "numpy", "nvidia-", "libtpu")
"""Of the distributions whose versions programs depend on."""

VARIABLE_PARTS = ("XLA", "LIBTPU", "MOSAIC", "NVIDIA")
"""Of the names of environment variables that programs may depend on."""

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
        """The programs of those keys that have one. This cache is then the one used last."""
        if not self._is_ones_own():
            return {}
        try:
            os.utime(self._directory)
        except OSError as error:  # it serves nevertheless: of a read-only disk, say
            log.warning("%s cannot be marked as used: %s", self._directory, error)
        programs = zip(keys, threads.map(self.load, keys), strict=True)
        return {key: program for key, program in programs if program is not None}

    def load(self, key: tuple) -> jax.stages.Compiled | None:
        """The program of a key, ready to run; None if there is none that this process can use."""
        path = self._path(key)
        if not (self._is_ones_own() and _is_ones_own(path)):
            return None
        try:
            parts = pickle.loads(path.read_bytes())
            return serialize_executable.deserialize_and_load(
                *parts, backend=self._devices[0].client, execution_devices=self._devices
            )
        except Exception as error:  # of many kinds: it was written by another version, or not to its end
            log.warning("%s cannot be loaded and is compiled again: %s", path, error)
            return None

    def save(self, key: tuple, program: jax.stages.Compiled) -> None:
        """Keep a program. One that cannot be kept costs a warning, and is compiled again next time."""
        unfinished = None
        try:
            data = pickle.dumps(serialize_executable.serialize(program))
            self._make_room()
            file, unfinished = tempfile.mkstemp(dir=self._directory)
            with open(file, "wb") as opened:
                opened.write(data)
            os.replace(unfinished, self._path(key))
        except Exception as error:  # of many kinds: a full disk, or a program that no backend can write down
            if unfinished is not None:
                Path(unfinished).unlink(missing_ok=True)
            log.warning("a compiled program was not kept: %s", error)

    def _make_room(self) -> None:
        """Make the directory, and drop those of its neighbours that have not been used for long."""
        if self._directory.is_dir():
            return
        programs = self._directory.parent
        for path in (programs, self._directory):
            path.mkdir(mode=0o700, exist_ok=True)
        for path in sorted(programs.iterdir(), key=_last_used, reverse=True)[MOST_KEPT:]:
            shutil.rmtree(path, ignore_errors=True)

    def _is_ones_own(self) -> bool:
        programs = self._directory.parent
        return all(map(_is_ones_own, (programs.parent, programs, self._directory)))

    def _path(self, key: tuple) -> Path:
        return self._directory / hashlib.sha256(repr(key).encode()).hexdigest()


def compile_program(
    lowered: jax.stages.Lowered, compiler_options: dict[str, Any] | None
) -> tuple[jax.stages.Compiled, bool]:
    """A program, and whether it can be saved.

    What JAX found in its own cache cannot: XLA writes down a program that it has loaded without all of its code, which
    is noticed when it runs (so on CPUs, with jaxlib 0.12.0).
    """
    _this_thread.is_hit = False
    program = lowered.compile(compiler_options=compiler_options)
    return program, not _this_thread.is_hit


def model_identity(model: nnx.Module) -> str | None:
    """What a model computes, whatever its weights; None if that is partly for its user's own code to say."""
    for _, module in nnx.iter_modules(model):
        if not _is_known(type(module)) or not all(map(_is_known, vars(module).values())):
            return None
    return re.sub(r" at 0x[0-9a-f]+", "", repr(nnx.graphdef(model)))


def program_cache_for(identity: str | None, devices: Sequence[Any], *ingredients: object) -> ProgramCache | None:
    """The cache of a model's programs, in "programs" beside those that JAX keeps.

    Args:
        identity: of the model (``model_identity``).
        devices: that they run on.
        ingredients: all else that its programs depend on, and that has a ``repr`` which says it all.

    Returns:
        None for a model that is not known, where JAX keeps nothing either, where others could write too, and for
        several processes, which would have to agree on what to compile.
    """
    root = jax.config.jax_compilation_cache_dir
    if identity is None or not root or not jax.config.jax_enable_compilation_cache or jax.process_count() > 1:
        return None
    if SOURCE_DIGEST is None or not _is_ones_own(Path(root)):
        return None
    text = repr((SOURCE_DIGEST, _surroundings(devices), identity, ingredients))
    return ProgramCache(Path(root) / "programs" / hashlib.sha256(text.encode()).hexdigest()[:32], devices)


def _is_known(value: object) -> bool:
    """Whether a part of a model is data, or code of ``KNOWN_PACKAGES`` that its name stands for."""
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_known, value))
    if isinstance(value, dict):
        return all(map(_is_known, value.values()))
    code = value if isinstance(value, (type, FunctionType, BuiltinFunctionType)) else type(value)
    return (code.__module__ or "").partition(".")[0] in KNOWN_PACKAGES and "<" not in code.__qualname__


def _is_ones_own(path: Path) -> bool:
    """Whether this user alone can write there."""
    try:
        stat = path.stat()
    except OSError:
        return False
    return stat.st_uid == os.getuid() and not stat.st_mode & 0o022


def _last_used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # another process has dropped it
        return 0.0


def _surroundings(devices: Sequence[Any]) -> tuple[object, ...]:
    """What programs depend on besides this project, the model and the engine's settings."""
    settings = sorted((name, repr(value)) for name, value in jax.config.values.items() if "cache" not in name)
    variables = sorted(item for item in os.environ.items() if any(part in item[0] for part in VARIABLE_PARTS))
    installed = {(each.name, each.version) for each in distributions() if each.name}
    versions = sorted(each for each in installed if each[0].lower().startswith(VERSIONED_PREFIXES))
    where = devices[0].client.platform_version, jax.device_count(), [(d.id, d.device_kind) for d in devices]
    return versions, where, settings, variables


def source_digest(roots: Sequence[Path]) -> str | None:
    """Of the code under some directories; None if one of them shows none, as in an archive."""
    digest = hashlib.sha256()
    for root in roots:
        paths = sorted(path for path in root.rglob("*") if path.suffix in SOURCE_SUFFIXES)
        if not paths:
            return None
        for path in paths:
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


_this_thread = threading.local()


def _notice_hit(event: str, **_: Any) -> None:
    if event == "/jax/compilation_cache/cache_hits":
        _this_thread.is_hit = True


jax.monitoring.register_event_listener(_notice_hit)

# Now, since it is this code that runs, whatever becomes of the files meanwhile.
SOURCE_DIGEST = source_digest([Path(__import__(package).__path__[0]) for package in SOURCE_PACKAGES])
