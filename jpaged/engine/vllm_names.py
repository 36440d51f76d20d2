"""Arguments of vLLM's LLM: taken where they mean something here, otherwise refused with what to use instead."""

import argparse
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, Concatenate, NamedTuple, Self

from jpaged.config import EngineConfig
from jpaged.rules import settings_of

_ANY = object()


class _Translation(NamedTuple):
    """A name of vLLM that has a name here.

    Args:
        name: the name here.
        convert: its value here.
    """

    name: str
    convert: Callable[[Any], Any] = lambda value: value


class _Foreign(NamedTuple):
    """A name of vLLM that has none here.

    Args:
        instead: the thing to use.
        harmless: values that ask for nothing else than what is done here; ``_ANY`` is all of them.
    """

    instead: str
    harmless: tuple[Any, ...] = (None, False)


_TRANSLATIONS = {
    "gpu_memory_utilization": _Translation("memory_fraction"),
    "swap_space": _Translation("host_memory_bytes", lambda gib: int(gib * 2**30)),
    "num_gpu_blocks_override": _Translation("num_blocks", lambda count: None if count is None else count + 1),
    "preemption_mode": _Translation("preemption", lambda mode: "auto" if mode is None else mode),
    "enforce_eager": _Translation("warm_up", lambda is_eager: False if is_eager else None),
}

_REVISION = "name it as ORG/NAME@REVISION, or give the directory that hf download made"
_HUB = "hf download has it, HF_HOME says where the cache is, and HF_TOKEN has the token"
_SILENT = (_ANY,)

_FOREIGN = {
    "trust_remote_code": _Foreign(
        "no code of a checkpoint is ever run; jpaged/docs/models.md serves a module of yours"
    ),
    "tokenizer_mode": _Foreign("LLM.from_model takes a tokenizer of yours", ("auto",)),
    "skip_tokenizer_init": _Foreign("SamplingParams(detokenize=False) makes no text"),
    "revision": _Foreign(_REVISION, (None,)),
    "tokenizer_revision": _Foreign(_REVISION, (None,)),
    "code_revision": _Foreign("no code of a checkpoint is ever run", (None,)),
    "download_dir": _Foreign(_HUB, (None,)),
    "hf_token": _Foreign(_HUB, (None,)),
    "hf_overrides": _Foreign("LLM.from_model takes a ModelConfig", (None,)),
    "load_format": _Foreign("*.safetensors are read", ("auto", "safetensors")),
    "quantization": _Foreign("kv_cache_dtype has an 8-bit KV cache; weights are not quantised", (None,)),
    "cpu_offload_gb": _Foreign("weight_placement='host' keeps weights in host memory", (0, 0.0)),
    "kv_offloading_size": _Foreign("host_memory_bytes sizes the host pool", (None, 0)),
    "enable_chunked_prefill": _Foreign("long prompts are always computed in chunks", (None, True)),
    "max_seq_len_to_capture": _Foreign("all steps are compiled", _SILENT),
    "compilation_config": _Foreign("JAX compiles; warm_up says when", (None, 0)),
    "pipeline_parallel_size": _Foreign("tensor_parallel_size splits a model", (None, 1)),
    "data_parallel_size": _Foreign("start one LLM for each replica", (None, 1)),
    "enable_expert_parallel": _Foreign("tensor_parallel_size splits a model"),
    "distributed_executor_backend": _Foreign("jpaged.join_processes joins the processes", (None,)),
    "disable_custom_all_reduce": _Foreign("XLA reduces", _SILENT),
    "disable_log_stats": _Foreign("nothing is logged; LLM.stats has them", _SILENT),
    "disable_log_requests": _Foreign("nothing is logged", _SILENT),
    "enable_log_requests": _Foreign("nothing is logged", (None, False)),
    "speculative_config": _Foreign("there is no speculative decoding", (None,)),
    "enable_lora": _Foreign("there are no adapters: merge them into the checkpoint"),
    "max_logprobs": _Foreign("at most 20 alternatives are returned", tuple(range(21))),
    "limit_mm_per_prompt": _Foreign("prompts are text", (None,)),
    "task": _Foreign("models generate text", (None, "auto", "generate")),
    "runner": _Foreign("models generate text", (None, "auto", "generate")),
    "disable_sliding_window": _Foreign("the windows of the model are kept"),
    "scheduling_policy": _Foreign("priority is an argument of generate", ("fcfs", "priority")),
    "attention_backend": _Foreign("attention_implementation names the kernel", (None,)),
}

_VALUES = {"dtype": {"half": "float16", "float": "float32"}, "generation_config": {"vllm": "none"}}
"""Values of settings by vLLM's names."""


def to_own_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with names and values of vLLM replaced by those here.

    Raises:
        ValueError: a name of vLLM without a meaning here, or a setting given by both of its names.
    """
    own = {name: value for name, value in settings.items() if name not in _TRANSLATIONS and name not in _FOREIGN}
    for name, value in settings.items():
        if (translation := _TRANSLATIONS.get(name)) is not None:
            if translation.name in settings:
                raise ValueError(f"{name} is vLLM's name of {translation.name}: give one of them")
            own[translation.name] = translation.convert(value)
        elif (foreign := _FOREIGN.get(name)) is not None:
            is_harmless = _ANY in foreign.harmless or any(value is each or value == each for each in foreign.harmless)
            if not is_harmless:
                raise ValueError(f"{name}={value!r} is a setting of vLLM that jpaged has not: {foreign.instead}")
    for name, values in _VALUES.items():
        if isinstance(own.get(name), str):
            own[name] = values.get(own[name], own[name])
    return own


def takes_vllm_names[**P](method: Callable[Concatenate[Any, P], None]) -> Callable[Concatenate[Any, P], None]:
    """Let a constructor take the names of vLLM too."""

    @wraps(method)
    def construct(self: Any, *args: P.args, **settings: P.kwargs) -> None:
        method(self, *args, **to_own_names(settings))  # pyright: ignore[reportCallIssue] (the names that P has)

    return construct


class EngineArgs:
    """Arguments of ``LLM`` by name, kept for ``AsyncLLM.from_engine_args``.

    Args:
        model: as for ``LLM``.
        settings: other arguments of ``LLM``, which checks them.
    """

    def __init__(self, model: str | None = None, **settings: Any) -> None:
        self.settings = {"model": model, **settings}

    @staticmethod
    def add_cli_args[ParserT: argparse._ActionsContainer](parser: ParserT) -> ParserT:
        """Add an option for ``model`` and for each setting of the engine to a parser, or to a group of one."""
        parser.add_argument("--model", help="checkpoint directory, or ORG/NAME of the hub")
        for name, each in settings_of(EngineConfig).items():
            is_flag = each.rule.type is bool
            form: dict[str, Any] = {"action": argparse.BooleanOptionalAction} if is_flag else {"type": each.rule.type}
            help_ = f"{each.help} (default: {each.shown_default})".replace("%", "%%")
            parser.add_argument(f"--{name.replace('_', '-')}", default=each.default, help=help_, **form)
        return parser

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> Self:
        """The arguments that a parser with ``add_cli_args`` has read."""
        return cls(**{name: getattr(args, name) for name in ("model", *settings_of(EngineConfig))})


AsyncEngineArgs = EngineArgs
