"""The model of a scenario, and engines over it."""

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np

from bench import UsageError
from bench.report import CONFIGS
from bench.workloads import LOWEST_TOKEN_ID
from jpaged import LLM, EngineConfig
from jpaged.device.kv.layout import pool_layout
from jpaged.device.target import choose_backend, target_of
from jpaged.llm import DEMO_MODEL
from jpaged.models import ModelConfig, load_config, load_model, random_model
from jpaged.sharding import make_mesh

BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Shapes:
    """A model to serve.

    Args:
        name: its name in result files.
        model_config: its shape.
        path: directory of its config.json, and of its weights if it is trained.
        is_trained: whether the weights are the checkpoint's, not random.
    """

    name: str
    model_config: ModelConfig
    path: Path
    is_trained: bool

    def choose_lengths(self, asked: list[int] | None, usual: list[int]) -> list[int]:
        """The lengths asked for, or else the usual ones: half of the context of trained weights, which is fixed."""
        return asked or ([self.model_config.max_model_len // 2] if self.is_trained else usual)

    def with_context(self, max_model_len: int) -> "Shapes":
        """The same shapes with positions for such contexts.

        Raises:
            UsageError: trained weights have no further positions.
        """
        if max_model_len <= self.model_config.max_model_len:
            return self
        if self.is_trained:
            raise UsageError(
                f"contexts of {max_model_len:,} tokens exceed the {self.model_config.max_model_len:,} of {self.name}: "
                "give shorter ones, or --random-weights"
            )
        num_layers = self.model_config.num_layers
        changed = _load(self.path, max_position_embeddings=max_model_len, num_hidden_layers=num_layers)
        return replace(self, model_config=changed)

    def start(self, config: EngineConfig, *, warm_up: bool = False) -> LLM:
        """Make an LLM on one device.

        Args:
            config: its settings.
            warm_up: compile its programs now, instead of when they are first needed.

        Raises:
            UsageError: settings that the model or this machine cannot meet.
        """
        mesh = make_mesh()
        dtype = target_of(mesh).resolve_dtype(config.dtype, self.model_config.dtype)
        try:
            # No name holds the model: the runner joins its projections, and the single ones would stay.
            return LLM.from_model(
                self._weights(dtype, mesh, config.weight_placement),
                self.model_config,
                config,
                mesh=mesh,
                warm_up=warm_up,
                use_tqdm=False,
            )
        except ValueError as error:
            raise UsageError(str(error)) from error

    def _weights(self, dtype: Any, mesh: jax.sharding.Mesh, placement: str) -> Any:
        if self.is_trained:
            return load_model(self.path, self.model_config, dtype, mesh, use_tqdm=False, weight_placement=placement)
        return random_model(self.model_config, dtype, mesh, 0, weight_placement=placement)

    def kv_block_bytes(self, kv_cache_dtype: str) -> int:
        """Bytes of K and V of a block, with the scales of 8-bit ones."""
        mesh, config = make_mesh(), EngineConfig(kv_cache_dtype=kv_cache_dtype, block_size=BLOCK_SIZE)
        dtype = target_of(mesh).resolve_dtype(config.dtype, self.model_config.dtype)
        backend = choose_backend(self.model_config, config, dtype, mesh)
        return pool_layout(self.model_config, config, dtype, backend).block_bytes

    def prompt(self, num_tokens: int, seed: int) -> list[int]:
        """Random token ids."""
        rng = np.random.default_rng(seed)
        return rng.integers(LOWEST_TOKEN_ID, self.model_config.vocab_size, num_tokens).tolist()


def read_shapes(args: argparse.Namespace) -> Shapes:
    """The model that the options name.

    Raises:
        UsageError: no model, or fewer layers of a trained one.
    """
    if args.random_weights is None:
        if args.num_layers is not None:
            raise UsageError("--num-layers needs --random-weights: a trained model keeps its layers")
        return Shapes("demo", load_config(DEMO_MODEL), DEMO_MODEL, is_trained=True)
    preset = CONFIGS / args.random_weights
    path = preset if preset.is_dir() else Path(args.random_weights)
    changes = {} if args.num_layers is None else {"num_hidden_layers": args.num_layers}
    name = path.name if args.num_layers is None else f"{path.name}_{args.num_layers}layers"
    return Shapes(name, _load(path, **changes), path, is_trained=False)


def _load(path: Path, **changes: int) -> ModelConfig:
    """Load a config.json with some of its fields changed.

    Raises:
        UsageError: no model, or values that no model has.
    """
    try:
        load_config(path)  # its errors name the path
        with TemporaryDirectory() as directory:
            fields = json.loads((path / "config.json").read_text())
            (Path(directory) / "config.json").write_text(json.dumps(fields | changes))
            return load_config(directory)
    except ValueError as error:
        raise UsageError(str(error)) from error


def settings_of(llm: LLM) -> dict[str, Any]:
    """Settings and sizes of an engine, for the result file."""
    runner = llm.engine.runner
    config = runner.config
    settings = {name: getattr(config, name) for name in config.__dataclass_fields__}
    memory = runner.mesh.devices.flat[0].memory_stats() or {}
    return {
        "dtype": str(runner.dtype),
        "weight_bytes": runner.weight_bytes,
        "bytes_per_block": runner.bytes_per_block,
        "peak_device_bytes": memory.get("peak_bytes_in_use"),
        "settings": settings | {"num_blocks": runner.num_blocks, "num_host_blocks": runner.num_host_blocks},
    }
