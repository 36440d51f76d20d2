"""The engine's own settings: default, check and help of each."""

from dataclasses import dataclass
from typing import Any

from jpaged.rules import (
    FLAG,
    Rule,
    Setting,
    check_all,
    documented,
    integer,
    number,
    number_above,
    one_of,
    optional,
    setting,
)

DTYPES = ("auto", "float32", "bfloat16", "float16")
KV_CACHE_DTYPES = ("auto", "fp8", "int8")
PREEMPTIONS = ("auto", "swap", "recompute")
KV_PLACEMENTS = ("device", "auto", "host")
OFFLOAD_CACHES = ("auto", "kv", "activations")
OFFLOAD_DTYPES = ("auto", "int8")
WEIGHT_PLACEMENTS = ("device", "host")
GENERATION_CONFIGS = ("auto", "none")
WARM_UPS = ("auto", "all", "first", "none")
DEFAULT_NUM_ROWS = 256
DEFAULT_TOKEN_BUDGET = 2048
MOST_DEFAULT_ROWS = 1024
MOST_DEFAULT_TOKENS = 8192
MAX_SEQS = 1 << 16
MAX_BATCHED_TOKENS = 1 << 20
MAX_SLOTS = 2**31 - 1
"""Slots of a pool are numbered in int32."""
MAX_BURST = 64
LEAST_INTER_TOKEN_MS = 0.1
"""No step is shorter: its program takes as long to start."""

MAX_INTER_TOKEN_MS = 1e6
MAX_HOST_BYTES = 2**63 - 1

_NAME = Rule(str, lambda name: isinstance(name, str) and name != "", "a name from pallas_kernels")

WARM_UP = Setting(
    one_of(*WARM_UPS),
    "programs that are compiled before the first request: all, those of every size of a step; first, those of a few "
    "sizes, and the others in the background; none, each when a step first needs it; or auto, first on an accelerator "
    "and none on a CPU",
    name="warm_up",
    default="auto",
)
"""A setting of the start of an engine, which leaves nothing behind in it."""

_WARM_UP_FLAGS = {True: "all", False: "none", None: "auto"}


def warm_up_word(value: Any) -> str:
    """The word for a value of ``warm_up``; True, False and None stand for all, none and auto.

    Raises:
        ValueError: another value.
    """
    if value is None or isinstance(value, bool):
        return _WARM_UP_FLAGS[value]
    WARM_UP.rule.check(WARM_UP.name, value)
    return value


@documented
@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Settings of one engine.

    Raises:
        ValueError: a setting out of range, with the value and the range; settings that exclude each other.
    """

    dtype: str = setting(
        "auto",
        one_of(*DTYPES),
        "dtype of weights and activations; auto is the checkpoint's on an accelerator, bfloat16 for one in float32, "
        "and float32 on a CPU",
    )
    kv_cache_dtype: str = setting(
        "auto",
        one_of(*KV_CACHE_DTYPES),
        "dtype of the KV cache; auto is that of the weights, fp8 and int8 hold twice the tokens in as many bytes, with "
        "a scale for each block, layer and KV head",
    )
    block_size: int = setting(16, integer(1, 1024), "tokens in a KV block")
    num_blocks: int | None = setting(
        None,
        optional(integer(2, MAX_SLOTS)),
        "blocks in the KV cache, block 0 (padding) included",
        unset="what ``memory_fraction`` leaves",
    )
    memory_fraction: float = setting(
        0.9,
        number_above(0, 1),
        "fraction of the device memory that JAX may take, for weights, workspace and KV cache together",
    )
    max_num_seqs: int | None = setting(
        None,
        optional(integer(1, MAX_SEQS)),
        "most sequences in one step",
        unset=f"{DEFAULT_NUM_ROWS}; on an accelerator up to {MOST_DEFAULT_ROWS}, as many as its memory serves well",
    )
    max_num_batched_tokens: int | None = setting(
        None,
        optional(integer(1, MAX_BATCHED_TOKENS)),
        "most tokens in one step; longer prompts are computed in chunks",
        unset=f"{DEFAULT_TOKEN_BUDGET}, or ``max_num_seqs`` if more; up to {MOST_DEFAULT_TOKENS} on an accelerator",
    )
    max_inter_token_ms: float | None = setting(
        None,
        optional(number(LEAST_INTER_TOKEN_MS, MAX_INTER_TOKEN_MS)),
        "most milliseconds that a step with decodes should take: prompts beside them are computed in chunks as short "
        "as that, by the rates of the device, which are measured where there is a host pool and ``preemption`` is "
        "auto; otherwise, no effect",
        unset="100 on an accelerator, no bound on a CPU",
    )
    max_model_len: int | None = setting(
        None,
        optional(integer(1, MAX_SLOTS)),
        "most tokens of prompt and output together",
        unset="the model's own limit, or what the KV cache holds if that is less",
    )
    enable_prefix_caching: bool = setting(True, FLAG, "share the KV of equal prompt prefixes across requests")
    seed: int = setting(0, integer(0, 2**32 - 1), "seed of the seeds that requests without one get")
    tensor_parallel_size: int = setting(
        1, integer(1, MAX_SLOTS), "devices that the model and its KV heads are spread over"
    )
    attention_implementation: str | None = setting(
        None, optional(_NAME), "attention kernel", unset="the best one here; jpaged info names it"
    )
    interpret: bool = setting(
        False,
        FLAG,
        "run the attention kernel named in Pallas's interpreter, on any device: slow, to try what this machine cannot "
        "run",
    )
    max_burst: int | None = setting(
        None,
        optional(integer(1, MAX_BURST)),
        "most steps of a multi-step decode, which runs while no request can be admitted; tokens are streamed in groups "
        "of as many",
        unset="4 on an accelerator, 1 on a CPU, and 1 with KV or weights in host memory",
    )
    preemption: str = setting(
        "auto",
        one_of(*PREEMPTIONS),
        "how the KV of a preempted request comes back: swap from the host pool, recompute from its tokens, or auto, "
        "whichever is faster here",
    )
    num_host_blocks: int | None = setting(
        None,
        optional(integer(0, MAX_SLOTS)),
        "blocks of the host pool, host memory for preempted requests and for prefixes evicted from the device; 0 is "
        "no pool",
        unset="what ``host_memory_bytes`` holds",
    )
    host_memory_bytes: int | None = setting(
        None,
        optional(integer(0, MAX_HOST_BYTES)),
        "size of the host pool in bytes, on each host; give this or ``num_host_blocks``",
        unset="at most 4 GiB; none on a CPU unless ``preemption`` or ``kv_placement`` needs one",
    )
    kv_placement: str = setting(
        "device",
        one_of(*KV_PLACEMENTS),
        "memory of the KV that running requests attend to: device; host, which keeps full blocks in the host pool and "
        "streams them layer by layer in every step; or auto, which does so for requests that do not fit the device",
    )
    offload_cache: str = setting(
        "auto",
        one_of(*OFFLOAD_CACHES),
        "what blocks hold with kv_placement='host': kv; activations, from which every step computes K and V again, and "
        "which are half as large where every query head has its own K and V; or auto, the smaller, but kv in 8-bit "
        "pools",
    )
    offload_dtype: str = setting(
        "auto",
        one_of(*OFFLOAD_DTYPES),
        "dtype of the KV in the host pool: auto is that of the KV cache; int8 rounds blocks on their way to the host, "
        "with a scale for each block, layer and KV head, so that it holds twice the tokens of a 16-bit cache",
    )
    weight_placement: str = setting(
        "device",
        one_of(*WEIGHT_PLACEMENTS),
        "memory of the layers' weight matrices: device; or host, which streams them layer by layer in every step",
    )
    generation_config: str = setting(
        "auto",
        one_of(*GENERATION_CONFIGS),
        "sampling parameters of requests that give none: auto takes those that the checkpoint's "
        "generation_config.json names, none takes the defaults of jpaged alone",
    )

    def __post_init__(self) -> None:
        check_all(self)
        Rule(
            int,
            lambda x: x is None or x * self.block_size <= MAX_SLOTS,
            f"at most {MAX_SLOTS // self.block_size} blocks of {self.block_size} tokens",
        ).check("num_blocks", self.num_blocks)
        if self.max_num_batched_tokens is not None and self.max_num_batched_tokens < self.most_rows:
            by_default = " (the default)" if self.max_num_seqs is None else ""
            raise ValueError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is less than "
                f"max_num_seqs={self.most_rows}{by_default}: "
                "every running sequence needs one token a step; raise the first or lower the second"
            )
        if self.token_budget < self._least_token_budget:
            raise ValueError(
                f"max_num_batched_tokens={self.token_budget} with kv_cache_dtype={self.kv_cache_dtype!r}: expected at "
                f"least {self._least_token_budget}, a block of {self.block_size} prompt tokens beside "
                f"{self.most_rows - 1} decodes; raise it, or lower max_num_seqs or block_size"
            )
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
        if self.kv_placement != "device" and 0 in (self.num_host_blocks, self.host_memory_bytes):
            raise ValueError(
                f"kv_placement={self.kv_placement!r} needs a host pool, and it is turned off: give num_host_blocks or "
                "host_memory_bytes more than 0, or kv_placement='device'"
            )
        if self.weight_placement == "host" and (self.max_burst or 1) > 1:
            raise ValueError(
                f"max_burst={self.max_burst} with weight_placement='host': every step streams the weights, and a "
                "multi-step decode would save nothing; leave max_burst out"
            )

    @property
    def most_rows(self) -> int:
        """``max_num_seqs`` with the least of its defaults filled in."""
        return self.max_num_seqs or DEFAULT_NUM_ROWS

    @property
    def token_budget(self) -> int:
        """``max_num_batched_tokens`` with the least of its defaults filled in."""
        return self.max_num_batched_tokens or max(DEFAULT_TOKEN_BUDGET, self._least_token_budget)

    @property
    def _least_token_budget(self) -> int:
        """A token of each sequence. Prompts over an 8-bit pool are computed in whole blocks, and take one beside."""
        return self.most_rows + (self.block_size - 1 if self.kv_cache_dtype != "auto" else 0)
