"""From a checkpoint, or a model in memory, to an engine that is ready."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from jpaged.config import EngineConfig, warm_up_word
from jpaged.device.kv.sizing import check_pools
from jpaged.device.processes import LeadingRunner, agree, follow, open_channel
from jpaged.device.runner import ModelRunner, check_settings
from jpaged.device.step.compile_cache import enable_compile_cache
from jpaged.device.step.program_cache import CODE_DIGEST
from jpaged.device.target import target_of
from jpaged.device.weights import check_host_weights
from jpaged.engine.detokenizer import Tokenizer
from jpaged.engine.loop import Engine
from jpaged.engine.sampling_defaults import read_sampling_defaults
from jpaged.engine.tokenizers import load_tokenizer
from jpaged.interrupts import InterruptsWait
from jpaged.models import ModelConfig, load_config, load_model
from jpaged.models.checkpoint.registry import abstract_model
from jpaged.models.contract import check_model, place
from jpaged.sharding import make_mesh

log = logging.getLogger(__name__)

Follow = Callable[[], None]
"""Does the work of a process that does not decide, until the deciding process ends."""


def load_checkpoint(
    path: Path,
    config: EngineConfig,
    tokenizer: Tokenizer | None = None,
    *,
    warm_up: str | bool | None,
    use_tqdm: bool,
) -> Engine | Follow:
    """Load a checkpoint directory and start an engine.

    Args:
        path: the directory.
        config: the engine's settings.
        tokenizer: a tokenizer other than the checkpoint's.
        warm_up: as for ``LLM``.
        use_tqdm: whether to show progress.

    Returns:
        The engine; in a process that does not decide, its work.

    Raises:
        ValueError: a setting out of range, a directory that is no checkpoint, or an architecture that is unknown.
    """
    with InterruptsWait() as interrupts:
        model_config = load_config(path)
        check_settings(model_config, config)
        interrupts.check()
        tokenizer = tokenizer or load_tokenizer(path)
        interrupts.check()
        defaults = read_sampling_defaults(path) if config.generation_config == "auto" else None
        if defaults and jax.process_index() == 0:
            names = ", ".join(f"{name}={value}" for name, value in defaults.items())
            log.info("requests that give no parameters take %s from generation_config.json", names)
        mesh = make_mesh(config.tensor_parallel_size)
        use_tqdm = use_tqdm and jax.process_index() == 0
        dtype = target_of(mesh).resolve_dtype(config.dtype, model_config.dtype)
        if jax.process_index() == 0 and (note := target_of(mesh).dtype_note(config.dtype, model_config.dtype)):
            log.info("%s", note)
        if config.weight_placement == "host":
            shapes = nnx.merge(*abstract_model(model_config, dtype, mesh))
            check_host_weights(shapes, model_config.num_layers, mesh)
        placement = config.weight_placement

        def load() -> nnx.Module:
            check_pools(model_config, config, dtype, mesh)
            return load_model(path, model_config, dtype, mesh, weight_placement=placement, use_tqdm=use_tqdm)

        options = {"warm_up": warm_up, "use_tqdm": use_tqdm, "sampling_defaults": defaults}
        return start_engine(load, model_config, config, mesh, tokenizer, **options)


def module_loader(
    model: Any, model_config: ModelConfig, config: EngineConfig, mesh: jax.sharding.Mesh
) -> Callable[[], Any]:
    """Check a module in memory.

    Returns:
        A function that copies the module to the devices, for ``start_engine``. The copy shares weights that are there
        already. The function drops the module, so that weights which no caller holds can be replaced.

    Raises:
        ValueError: the module breaks the contract of a model, or disagrees with a setting.
    """
    check_model(model, model_config, config.dtype, mesh)
    check_settings(model_config, replace(config, tensor_parallel_size=mesh.size))
    num_streamed = model_config.num_layers if config.weight_placement == "host" else 0
    if num_streamed:
        check_host_weights(model, num_streamed, mesh)
    held = [model]
    return lambda: place(held.pop(), mesh, num_streamed_layers=num_streamed)


def start_engine(
    load: Callable[[], Any],
    model_config: ModelConfig,
    config: EngineConfig,
    mesh: jax.sharding.Mesh,
    tokenizer: Tokenizer | None,
    *,
    warm_up: str | bool | None,
    use_tqdm: bool,
    sampling_defaults: Mapping[str, Any] | None = None,
) -> Engine | Follow:
    """Start an engine over a model.

    Args:
        load: makes the model, its weights on ``mesh``; the engine changes it.
        model_config: the model's configuration.
        config: the engine's settings.
        mesh: the devices.
        tokenizer: text <-> token ids, or None.
        warm_up: as in ``load_checkpoint``.
        use_tqdm: whether to show progress.
        sampling_defaults: as for ``Engine``.

    Returns:
        As ``load_checkpoint``.
    """
    enable_compile_cache()
    channel, word = open_channel(mesh), warm_up_word(warm_up)
    if word == "auto":
        word = "first" if target_of(mesh).warms_up else "none"
    with InterruptsWait():
        if channel is None:
            few = None if word == "first" else word == "all"
            runner = ModelRunner(load(), model_config, config, mesh, warm_up=few, use_tqdm=use_tqdm)
            engine = Engine(runner, config, tokenizer, sampling_defaults)
            runner.programs.background.start(runner)  # now, since it disturbs what the engine measures
            return engine
        # All processes run a step in the same size, so that no size may come later.
        options = {"channel": channel, "warm_up": word != "none", "use_tqdm": use_tqdm}
        try:
            agree(channel, code=CODE_DIGEST, config=config, model_config=model_config)
            if channel.is_leader:
                leading = LeadingRunner(load(), model_config, config, mesh, **options)
                return Engine(leading, config, tokenizer, sampling_defaults)
            return partial(follow, ModelRunner(load(), model_config, config, mesh, **options), channel)
        except BaseException:
            channel.close()  # or the other processes would wait
            raise
