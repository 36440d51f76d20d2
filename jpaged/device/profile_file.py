"""The file of a machine's profile, kept beside the compiled programs: the next start reads it and measures nothing."""

import dataclasses
import hashlib
import logging
import os
import platform
import tempfile
from pathlib import Path

import jax
import numpy as np

from jpaged.config import EngineConfig
from jpaged.contract.profile import MachineProfile, from_json, to_json
from jpaged.device.step.program_cache import is_ones_own
from jpaged.device.target import target_of
from jpaged.models import ModelConfig

log = logging.getLogger(__name__)

_NO_RATES = (
    "num_blocks", "memory_fraction", "max_model_len", "enable_prefix_caching", "seed", "max_burst", "preemption",
    "num_host_blocks", "host_memory_bytes", "generation_config",
)  # fmt: skip
"""Settings that no rate depends on."""

_VERSION = 2
"""Goes up whenever a rate is measured in another way, so that no kept profile has rates of the old way."""


def profile_path(
    model_config: ModelConfig, config: EngineConfig, dtype: np.dtype, attention: str, mesh: jax.sharding.Mesh
) -> Path | None:
    """Find the place of the profile of one machine, model and settings.

    Args:
        model_config: the model's shape.
        config: the engine's settings.
        dtype: dtype of weights and activations.
        attention: name of the attention implementation.
        mesh: the devices.

    Returns:
        The file, which may not exist. None where programs are not kept, in a directory that other users can write to,
        and for several processes, which measure together.
    """
    root = jax.config.jax_compilation_cache_dir
    if not root or not target_of(mesh).keeps_programs or jax.process_count() > 1 or not is_ones_own(Path(root)):
        return None
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in _NO_RATES}
    devices = [device.device_kind for device in mesh.devices.flat]
    text = repr((_VERSION, platform.node(), devices, model_config, settings, str(dtype), attention))
    return Path(root) / "profiles" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def load_profile(path: Path | None) -> MachineProfile | None:
    """Read a profile; None without a file of this user's that holds one."""
    if path is None or not (is_ones_own(path.parent) and is_ones_own(path)):
        return None
    try:
        return from_json(path.read_text())
    except (OSError, ValueError) as error:
        log.warning("%s is measured again: %s", path, error)
        return None


def save_profile(path: Path | None, profile: MachineProfile) -> None:
    """Keep a profile. A failure costs a warning, and the next start measures again."""
    if path is None:
        return
    unfinished = None
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        file, unfinished = tempfile.mkstemp(dir=path.parent)
        with open(file, "w") as opened:
            opened.write(to_json(profile))
        os.replace(unfinished, path)
    except OSError as error:
        if unfinished is not None:
            Path(unfinished).unlink(missing_ok=True)
        log.warning("the profile of this machine was not kept: %s", error)
