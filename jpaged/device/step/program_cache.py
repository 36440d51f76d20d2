"""Compiled programs kept between runs, found without tracing them again.

JAX's own cache finds a program by its lowered text, and lowering takes a second or two per program. This cache finds a
program by the ingredients of that text. These are the code of this project, the model's shape, and the compiler's
versions and settings. It keeps no program of a model with foreign code, and loads no file that another user may have
written.
"""

import hashlib
import logging
import math
import os
import pickle
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from importlib.metadata import distributions
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import Any

import jax
from flax import nnx
from jax._src import config as jax_config  # the only settings of JAX's own cache for one thread
from jax.experimental import serialize_executable

log = logging.getLogger(__name__)

SOURCE_PACKAGES = ("jpaged", "pallas_kernels")
SOURCE_SUFFIXES = (".py", ".json")
NO_SOURCES = ("cli", "server", "engine", "host", "docs", "llm.py", "async_llm.py")
"""Parts of these packages that no module of the device half imports: programs do not depend on them."""

KNOWN_PACKAGES = (*SOURCE_PACKAGES, "flax", "jax", "jaxlib", "numpy", "ml_dtypes", "builtins")
"""Packages whose code the cache identifies, by its content or its version."""

VERSIONED_PREFIXES = ("flax", "jax", "ml-dtypes", "ml_dtypes", "numpy", "nvidia-", "libtpu")
"""Prefixes of the distributions whose versions programs depend on."""

VARIABLE_PARTS = ("XLA", "LIBTPU", "MOSAIC", "NVIDIA")
"""Parts of the names of environment variables that programs may depend on."""

MOST_KEPT = 8
"""Number of kept caches, one for each model, settings and versions; the least recently used is deleted first."""


class ProgramCache:
    """The programs of one model under one set of settings, in a directory of their own.

    Args:
        directory: directory of the programs, created by the first save. Its neighbours are caches too.
        devices: devices of the programs.
    """

    def __init__(self, directory: Path, devices: Sequence[Any]) -> None:
        self._directory = directory
        self._devices = devices

    def load_all(self, keys: Sequence[tuple], threads: Executor) -> dict[tuple, jax.stages.Compiled]:
        """Load the programs of all keys that have one. This cache becomes the most recently used."""
        if not self._is_ones_own():
            return {}
        try:
            os.utime(self._directory)
        except OSError as error:  # a cache on a read-only disk still serves
            log.warning("%s cannot be marked as used: %s", self._directory, error)
        programs = zip(keys, threads.map(self.load, keys), strict=True)
        return {key: program for key, program in programs if program is not None}

    def has(self, key: tuple) -> bool:
        """Whether there is a file of a program, which may still fail to load."""
        return self._is_ones_own() and is_ones_own(self._path(key))

    def load(self, key: tuple) -> jax.stages.Compiled | None:
        """Load the program of a key, ready to run; None without a program that this process can use."""
        path = self._path(key)
        if not (self._is_ones_own() and is_ones_own(path)):
            return None
        try:
            parts = pickle.loads(path.read_bytes())
            return serialize_executable.deserialize_and_load(
                *parts, backend=self._devices[0].client, execution_devices=self._devices
            )
        except Exception as error:  # of many kinds: another version wrote the file, or a process ended before its end
            log.warning("%s cannot be loaded and is compiled again: %s", path, error)
            return None

    def save(self, key: tuple, program: jax.stages.Compiled) -> None:
        """Keep a program. A failure costs a warning, and the next run compiles the program again."""
        unfinished = None
        try:
            data = pickle.dumps(serialize_executable.serialize(program))
            self._make_room()
            file, unfinished = tempfile.mkstemp(dir=self._directory)
            with open(file, "wb") as opened:
                opened.write(data)
            os.replace(unfinished, self._path(key))
        except Exception as error:  # of many kinds: a full disk, or a program that no backend can serialise
            if unfinished is not None:
                Path(unfinished).unlink(missing_ok=True)
            log.warning("a compiled program was not kept: %s", error)

    def _make_room(self) -> None:
        """Create the directory, and delete its least recently used neighbours."""
        if self._directory.is_dir():
            return
        programs = self._directory.parent
        for path in (programs, self._directory):
            path.mkdir(mode=0o700, exist_ok=True)
        for path in sorted(programs.iterdir(), key=_last_used, reverse=True)[MOST_KEPT:]:
            shutil.rmtree(path, ignore_errors=True)

    def _is_ones_own(self) -> bool:
        programs = self._directory.parent
        return all(map(is_ones_own, (programs.parent, programs, self._directory)))

    def _path(self, key: tuple) -> Path:
        return self._directory / hashlib.sha256(repr(key).encode()).hexdigest()


def compile_program(
    lowered: jax.stages.Lowered, compiler_options: dict[str, Any] | None
) -> tuple[jax.stages.Compiled, bool]:
    """Compile a program, and say whether it can be saved.

    A program from JAX's own cache cannot be saved: XLA serialises a loaded program without all of its code. The copy
    fails when it runs, on CPUs with jaxlib 0.12.0.
    """
    _this_thread.is_hit = False
    program = lowered.compile(compiler_options=compiler_options)
    return program, not _this_thread.is_hit


@contextmanager
def unkept_by_jax() -> Iterator[None]:
    """Let JAX keep neither the programs that this thread compiles in the block, nor the kernels chosen for them."""
    with (
        jax_config.persistent_cache_min_compile_time_secs(math.inf),
        jax_config.persistent_cache_enable_xla_caches("none"),
    ):
        yield


def model_identity(model: nnx.Module) -> str | None:
    """Identify the computation of a model, without its weights; None if the model holds a user's own code."""
    for _, module in nnx.iter_modules(model):
        if not _is_known(type(module)) or not all(map(_is_known, vars(module).values())):
            return None
    return re.sub(r" at 0x[0-9a-f]+", "", repr(nnx.graphdef(model)))


def program_cache_for(identity: str | None, devices: Sequence[Any], *ingredients: object) -> ProgramCache | None:
    """Open the cache of a model's programs, in "programs" beside JAX's own cache.

    Args:
        identity: the model's identity (``model_identity``).
        devices: devices of the programs.
        ingredients: all other values that the programs depend on, each with a complete ``repr``.

    Returns:
        The cache. None for an unknown model, without a cache of JAX, and in a directory that other users can write to.
        None for several processes too, which would have to agree on the programs to compile.
    """
    root = jax.config.jax_compilation_cache_dir
    if identity is None or not root or not jax.config.jax_enable_compilation_cache or jax.process_count() > 1:
        return None
    if SOURCE_DIGEST is None or not is_ones_own(Path(root)):
        return None
    text = repr((SOURCE_DIGEST, _surroundings(devices), identity, ingredients))
    return ProgramCache(Path(root) / "programs" / hashlib.sha256(text.encode()).hexdigest()[:32], devices)


def _is_known(value: object) -> bool:
    """Whether a part of a model is data, or code of ``KNOWN_PACKAGES``, which its name identifies."""
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_known, value))
    if isinstance(value, dict):
        return all(map(_is_known, value.values()))
    code = value if isinstance(value, (type, FunctionType, BuiltinFunctionType)) else type(value)
    return (code.__module__ or "").partition(".")[0] in KNOWN_PACKAGES and "<" not in code.__qualname__


def is_ones_own(path: Path) -> bool:
    """Whether this user alone can write to the directory."""
    try:
        stat = path.stat()
    except OSError:
        return False
    return stat.st_uid == os.getuid() and not stat.st_mode & 0o022


def _last_used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # another process has deleted it
        return 0.0


def _surroundings(devices: Sequence[Any]) -> tuple[object, ...]:
    """Return the versions and settings of the compiler that programs depend on."""
    settings = sorted((name, repr(value)) for name, value in jax.config.values.items() if "cache" not in name)
    variables = sorted(item for item in os.environ.items() if any(part in item[0] for part in VARIABLE_PARTS))
    installed = {(each.name, each.version) for each in distributions() if each.name}
    versions = sorted(each for each in installed if each[0].lower().startswith(VERSIONED_PREFIXES))
    where = devices[0].client.platform_version, jax.device_count(), [(d.id, d.device_kind) for d in devices]
    return versions, where, settings, variables


def source_digest(roots: Sequence[Path], without: Sequence[str] = ()) -> str | None:
    """Hash the code under some directories; None if one of them has no files, as in an archive.

    Args:
        roots: the directories.
        without: directories and files of the roots that are left out.
    """
    digest = hashlib.sha256()
    for root in roots:
        paths = sorted(path for path in root.rglob("*") if path.suffix in SOURCE_SUFFIXES)
        paths = [path for path in paths if path.relative_to(root).parts[0] not in without]
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

# At import, since the loaded code runs even if the files change later.
_ROOTS = [Path(__import__(package).__path__[0]) for package in SOURCE_PACKAGES]
CODE_DIGEST = source_digest(_ROOTS)
"""Digest of all code: the processes of an engine have to agree on it."""
SOURCE_DIGEST = source_digest(_ROOTS, NO_SOURCES)
"""Digest of the code that programs depend on."""
