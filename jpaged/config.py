"""Every default and every check of the engine's own settings."""

import reprlib
from dataclasses import dataclass

DTYPES = ("auto", "float32", "bfloat16", "float16")
KV_CACHE_DTYPES = ("auto", "fp8", "int8")
DEFAULT_TOKEN_BUDGET = 2048
MAX_SEQS = 1 << 16
MAX_BATCHED_TOKENS = 1 << 20
MAX_SLOTS = 2**31 - 1
"""Slots of a pool are numbered in int32."""
MAX_BURST = 64
MAX_HOST_BYTES = 2**63 - 1
PREEMPTIONS = ("auto", "swap", "recompute")


def _require(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise ValueError(f"{name}={reprlib.repr(value)} is not valid: expected {expected}")


def _is_count(value: object, limit: int = MAX_SLOTS, *, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= limit


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Settings of one engine.

    Args:
        dtype: of weights, activations and KV: "float32", "bfloat16", "float16", or "auto": what the checkpoint is
            stored in on an accelerator, float32 on a CPU (which only emulates the shorter types).
        kv_cache_dtype: "auto" stores K and V in ``dtype``; "fp8" and "int8" store them in 8 bits with a scale for each
            block, layer and KV head, so that a pool of the same bytes holds twice the tokens.
        block_size: tokens per KV block.
        num_blocks: blocks in the pool, block 0 (padding) included; None takes what ``memory_fraction`` leaves.
        memory_fraction: of the memory JAX may take on the device, for weights, workspace and pool together.
        max_num_seqs: sequences in one step at most.
        max_num_batched_tokens: tokens in one step at most; None is 2048, or more if ``max_num_seqs`` is.
        max_model_len: tokens a sequence may reach; None is the checkpoint's own limit, or what the pool holds if less.
        enable_prefix_caching: share the KV of equal prompt prefixes across requests.
        seed: of the seeds drawn for requests without one.
        tensor_parallel_size: devices the model and its KV heads are spread over.
        attention_implementation: a name from ``pallas_kernels``; None takes the best one for the device.
        interpret: run the kernels of the implementation named in Pallas's interpreter, on any device and slowly.
        max_burst: decode steps that may run in a row before the host sees their tokens, while nobody could be admitted;
            who arrives waits for them, and tokens are streamed in groups of as many. None is 4 on an accelerator, where
            planning a step takes about as long as a small one runs, and 1 on a CPU.
        preemption: how KV that had to make room comes back: "swap" from the host pool (computed again when that is
            full), "recompute" from tokens, or "auto": whatever takes less time on this machine.
        num_host_blocks: blocks of the host pool, pinned memory for swapped KV and for prefixes evicted from the device;
            0 is none. None leaves it to ``host_memory_bytes``.
        host_memory_bytes: the same in bytes; give one of the two. None takes 4 GiB at most beside an accelerator, and
            nothing on a CPU (whose pool is host memory already) unless ``preemption`` is "swap". Of several hosts, on
            each.

    Raises:
        ValueError: a setting out of range, with the value and the range; settings that exclude each other.
    """

    dtype: str = "auto"
    kv_cache_dtype: str = "auto"
    block_size: int = 16
    num_blocks: int | None = None
    memory_fraction: float = 0.9
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    max_model_len: int | None = None
    enable_prefix_caching: bool = True
    seed: int = 0
    tensor_parallel_size: int = 1
    attention_implementation: str | None = None
    interpret: bool = False
    max_burst: int | None = None
    preemption: str = "auto"
    num_host_blocks: int | None = None
    host_memory_bytes: int | None = None

    def __post_init__(self) -> None:
        _require(self.dtype in DTYPES, "dtype", self.dtype, "one of " + ", ".join(DTYPES))
        is_known = isinstance(self.kv_cache_dtype, str) and self.kv_cache_dtype in KV_CACHE_DTYPES
        _require(is_known, "kv_cache_dtype", self.kv_cache_dtype, "one of " + ", ".join(KV_CACHE_DTYPES))
        _require(_is_count(self.block_size, 1024), "block_size", self.block_size, "an integer from 1 to 1024")
        max_blocks = MAX_SLOTS // self.block_size
        _require(
            self.num_blocks is None or (_is_count(self.num_blocks, max_blocks) and self.num_blocks >= 2),
            "num_blocks", self.num_blocks, f"None or an integer from 2 (block 0 holds padding) to {max_blocks}",
        )  # fmt: skip
        fraction = self.memory_fraction
        is_fraction = isinstance(fraction, int | float) and not isinstance(fraction, bool) and 0 < fraction <= 1
        _require(is_fraction, "memory_fraction", fraction, "a number in (0, 1]")
        _require(
            _is_count(self.max_num_seqs, MAX_SEQS),
            "max_num_seqs", self.max_num_seqs, f"an integer from 1 to {MAX_SEQS}",
        )  # fmt: skip
        for name, limit in (("max_num_batched_tokens", MAX_BATCHED_TOKENS), ("max_model_len", MAX_SLOTS)):
            value = getattr(self, name)
            _require(value is None or _is_count(value, limit), name, value, f"None or an integer from 1 to {limit}")
        _require(
            isinstance(self.enable_prefix_caching, bool),
            "enable_prefix_caching", self.enable_prefix_caching, "True or False",
        )  # fmt: skip
        is_seed = isinstance(self.seed, int) and not isinstance(self.seed, bool) and 0 <= self.seed < 2**32
        _require(is_seed, "seed", self.seed, "an integer from 0 to 2**32 - 1")
        burst = self.max_burst
        _require(
            burst is None or _is_count(burst, MAX_BURST),
            "max_burst", burst, f"None or an integer from 1 to {MAX_BURST}",
        )  # fmt: skip
        parts = self.tensor_parallel_size
        _require(_is_count(parts), "tensor_parallel_size", parts, "an integer of 1 or more")
        implementation = self.attention_implementation
        is_name = implementation is None or (isinstance(implementation, str) and implementation != "")
        _require(is_name, "attention_implementation", implementation, "None or a name from pallas_kernels")
        _require(isinstance(self.interpret, bool), "interpret", self.interpret, "True or False")
        self._check_host_pool()
        if self.max_num_batched_tokens is not None and self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is less than max_num_seqs={self.max_num_seqs}: "
                "every running sequence needs one token a step; raise the first or lower the second"
            )

    def _check_host_pool(self) -> None:
        is_known = isinstance(self.preemption, str) and self.preemption in PREEMPTIONS
        _require(is_known, "preemption", self.preemption, "one of " + ", ".join(PREEMPTIONS))
        for name, limit in (("num_host_blocks", MAX_SLOTS), ("host_memory_bytes", MAX_HOST_BYTES)):
            value = getattr(self, name)
            is_size = value is None or _is_count(value, limit, least=0)
            _require(is_size, name, value, f"None or an integer from 0 to {limit}")
        if self.num_host_blocks is not None and self.host_memory_bytes is not None:
            raise ValueError(
                f"num_host_blocks={self.num_host_blocks} and host_memory_bytes={self.host_memory_bytes} both size the "
                "host pool: give one of them"
            )
        if self.preemption == "swap" and 0 in (self.num_host_blocks, self.host_memory_bytes):
            raise ValueError(
                "preemption='swap' needs a host pool, and it is turned off: give num_host_blocks or host_memory_bytes "
                "more than 0, or another preemption"
            )

    @property
    def token_budget(self) -> int:
        """``max_num_batched_tokens`` with its default filled in."""
        return self.max_num_batched_tokens or max(DEFAULT_TOKEN_BUDGET, self.max_num_seqs)
