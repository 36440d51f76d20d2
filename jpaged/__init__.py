"""PagedAttention for JAX: a KV cache in blocks, and a serving engine over it.

Public names load on first use, so that the host half (``jpaged.host``) and ``jpaged --help`` need no JAX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jpaged.async_llm import AsyncLLM
    from jpaged.config import EngineConfig
    from jpaged.device.kv.pool import KVCache
    from jpaged.device.processes import join_processes
    from jpaged.engine.vllm_names import AsyncEngineArgs, EngineArgs
    from jpaged.host.blocks.manager import BlockManager, OutOfBlocks
    from jpaged.llm import LLM, PinnedPrefix
    from jpaged.request import (
        BeamSearchParams,
        CompletionDelta,
        CompletionOutput,
        FinishReason,
        Logprob,
        RequestOutput,
        RequestOutputKind,
        SamplingParams,
    )

_HOMES = {
    "LLM": "jpaged.llm",
    "AsyncEngineArgs": "jpaged.engine.vllm_names",
    "AsyncLLM": "jpaged.async_llm",
    "BeamSearchParams": "jpaged.request",
    "BlockManager": "jpaged.host.blocks.manager",
    "CompletionDelta": "jpaged.request",
    "CompletionOutput": "jpaged.request",
    "EngineArgs": "jpaged.engine.vllm_names",
    "EngineConfig": "jpaged.config",
    "FinishReason": "jpaged.request",
    "KVCache": "jpaged.device.kv.pool",
    "Logprob": "jpaged.request",
    "OutOfBlocks": "jpaged.host.blocks.manager",
    "PinnedPrefix": "jpaged.llm",
    "RequestOutput": "jpaged.request",
    "RequestOutputKind": "jpaged.request",
    "SamplingParams": "jpaged.request",
    "join_processes": "jpaged.device.processes",
}

__all__ = [
    "LLM",
    "AsyncEngineArgs",
    "AsyncLLM",
    "BeamSearchParams",
    "BlockManager",
    "CompletionDelta",
    "CompletionOutput",
    "EngineArgs",
    "EngineConfig",
    "FinishReason",
    "KVCache",
    "Logprob",
    "OutOfBlocks",
    "PinnedPrefix",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "join_processes",
]


if not TYPE_CHECKING:  # a type checker that saw this function would accept every name

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'jpaged' has no attribute {name!r}")
        return getattr(import_module(_HOMES[name]), name)
