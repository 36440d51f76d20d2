"""Every default and every check of the engine's own settings."""

import math
from dataclasses import dataclass

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEFAULT_TOKEN_BUDGET = 2048


def _require(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise ValueError(f"{name}={value!r} is not valid: expected {expected}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Settings of one engine.

    Args:
        dtype: of weights, activations and KV: "float32", "bfloat16", "float16", or "auto": what the checkpoint is stored
            in on an accelerator, float32 on a CPU (which only emulates the shorter types).
        block_size: tokens per KV block.
        num_blocks: blocks in the pool, block 0 (padding) included; None takes what ``memory_fraction`` leaves.
        memory_fraction: of the device's memory, for weights, workspace and pool together.
        max_num_seqs: sequences in one step at most.
        max_num_batched_tokens: tokens in one step at most; None is 2048, or more if ``max_num_seqs`` is.
        max_model_len: tokens a sequence may reach; None is the checkpoint's own limit, or what the pool holds if less.
        enable_prefix_caching: share the KV of equal prompt prefixes across requests.
        seed: of the seeds drawn for requests without one.
        tensor_parallel_size: devices the model and its KV heads are spread over.
        attention_implementation: a name from ``pallas_kernels``; None takes the best one for the device.

    Raises:
        ValueError: a setting out of range, with the value and the range.
    """

    dtype: str = "auto"
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

    def __post_init__(self) -> None:
        _require(self.dtype in DTYPES, "dtype", self.dtype, "one of " + ", ".join(DTYPES))
        _require(_is_count(self.block_size) and 1 <= self.block_size <= 1024, "block_size", self.block_size, "an integer from 1 to 1024")
        _require(
            self.num_blocks is None or (_is_count(self.num_blocks) and self.num_blocks >= 2),
            "num_blocks", self.num_blocks, "None or an integer of 2 or more (block 0 holds padding)",
        )  # fmt: skip
        fraction = self.memory_fraction
        is_fraction = isinstance(fraction, int | float) and math.isfinite(fraction) and 0 < fraction <= 1
        _require(is_fraction, "memory_fraction", fraction, "a number in (0, 1]")
        _require(_is_count(self.max_num_seqs), "max_num_seqs", self.max_num_seqs, "an integer of 1 or more")
        for name in ("max_num_batched_tokens", "max_model_len"):
            value = getattr(self, name)
            _require(value is None or _is_count(value), name, value, "None or an integer of 1 or more")
        _require(_is_count(self.tensor_parallel_size), "tensor_parallel_size", self.tensor_parallel_size, "an integer of 1 or more")
        is_seed = isinstance(self.seed, int) and not isinstance(self.seed, bool) and 0 <= self.seed < 2**32
        _require(is_seed, "seed", self.seed, "an integer from 0 to 2**32 - 1")
        if self.max_num_batched_tokens is not None and self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is less than max_num_seqs={self.max_num_seqs}: "
                "every running sequence needs one token a step; raise the first or lower the second"
            )

    @property
    def token_budget(self) -> int:
        """``max_num_batched_tokens`` with its default filled in."""
        return self.max_num_batched_tokens or max(DEFAULT_TOKEN_BUDGET, self.max_num_seqs)
