"""The directory of compiled programs, which are kept between runs."""

import os
from pathlib import Path

import jax


def default_compile_cache_dir() -> Path:
    """Return ``$XDG_CACHE_HOME/jpaged/xla``, or the same under ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jpaged" / "xla"


def enable_compile_cache() -> Path | None:
    """Turn on JAX's persistent compilation cache in a directory that only this user can enter.

    A configured directory (``jax_compilation_cache_dir``) stays as it is.

    Returns:
        The directory in use; None if it cannot be created: nothing is kept then.
    """
    configured = jax.config.jax_compilation_cache_dir
    if configured:
        return Path(configured)
    path = default_compile_cache_dir()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.stat().st_uid != os.getuid():  # programs are loaded from here: no other user may write them
            return None
        path.chmod(0o700)
    except OSError:
        return None
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    return path
