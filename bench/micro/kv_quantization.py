"""Divergence of next-token distributions over 8-bit pools from the distributions over an unquantised pool.

    python -m bench kv-quantization
    python -m bench kv-quantization --files 8

Runs the model in the package over held-out files of Python's library. Each file's first tokens are a prompt, written
in one piece; the later tokens are written one by one, as decodes are. Blocks that come back from the host rounded are
exact until they are full, and rounded in every step from then on. Prints the mean Kullback-Leibler divergence in nats,
and the capacity of a pool of the same bytes. Writes ``bench/results/kv_quantization.json``.

A pool of activations needs as many KV heads as query heads. The model in the package has fewer. There it has each KV
head once for each query head that shares the head, which changes no distribution.
"""

import argparse
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32
from tokenizers import Tokenizer

from bench.report import Table, save, start_report
from jpaged.config import EngineConfig
from jpaged.demo.corpus import Corpus, read_source_files
from jpaged.device.backends import Rows
from jpaged.device.kv.attend import PagedAttend
from jpaged.device.kv.layout import PoolLayout, is_narrowed, kv_dtype, pool_layout
from jpaged.device.kv.narrow import narrow_bits, widen_bits
from jpaged.device.kv.pool import KVCache
from jpaged.device.kv.stream import Window
from jpaged.device.kv.streaming import RecomputingAttend
from jpaged.device.target import BACKENDS
from jpaged.llm import DEMO_MODEL
from jpaged.models import ModelConfig, load_config, load_model, random_model
from jpaged.sharding import make_mesh

BLOCK_SIZE = 16
SERVED_LAYERS, SERVED_HEADS, SERVED_KV_HEADS, SERVED_HEAD_DIM = 32, 32, 8, 128
"""Layers of Llama-3-8B, for the capacity of a pool; a pool of activations has a KV head for each head."""


@dataclass(frozen=True, slots=True)
class Pool:
    """One kind of pool, by the engine's settings.

    Args:
        kv_cache_dtype: type of the blocks.
        offload_cache: "activations" for blocks of activations, "kv" for others.
        offload_dtype: type of the blocks on the host.
    """

    kv_cache_dtype: str = "auto"
    offload_cache: str = "kv"
    offload_dtype: str = "auto"

    @property
    def has_pages(self) -> bool:
        """Whether blocks hold activations."""
        return self.offload_cache == "activations"

    @property
    def settings(self) -> EngineConfig:
        """The settings of the engine."""
        placement = "host" if self.has_pages else "device"
        return EngineConfig(block_size=BLOCK_SIZE, kv_placement=placement, **asdict(self))

    @property
    def capacity(self) -> float:
        """Tokens that it holds, over tokens of K and V that a bfloat16 pool of the same bytes holds."""
        dtype = self.kv_cache_dtype if self.offload_dtype == "auto" else self.offload_dtype
        num_kv_heads = SERVED_HEADS if self.has_pages else SERVED_KV_HEADS
        # Activations lie in the place of K and V of half as many tokens.
        block_size = BLOCK_SIZE // 2 if self.has_pages else BLOCK_SIZE
        whole, small = (
            PoolLayout(SERVED_LAYERS, num_kv_heads, SERVED_HEAD_DIM, size, kv_dtype(setting, jnp.bfloat16))
            for size, setting in ((BLOCK_SIZE, "auto"), (block_size, dtype))
        )
        return whole.block_bytes / small.block_bytes


POOLS = {
    "fp8": Pool("fp8"),
    "int8": Pool("int8"),
    "fp8, activations": Pool("fp8", "activations"),
    "int8, activations": Pool("int8", "activations"),
    "int8 on the host": Pool(offload_dtype="int8"),
}


@dataclass(frozen=True, slots=True)
class Divergence:
    """Divergence of the distributions over one kind of pool.

    Args:
        mean: over all tokens, in nats.
        prompts, decodes: over the tokens of either kind.
        largest: greatest divergence at one token.
        same_best: share of tokens after which the likeliest next token is the same.
        capacity: tokens that a pool holds, over tokens that a bfloat16 pool of the same bytes holds.
    """

    mean: float
    prompts: float
    decodes: float
    largest: float
    same_best: float
    capacity: float


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--files", type=int, default=64, metavar="N", help="held-out files (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=192, metavar="N", help="tokens of prompt (default: %(default)s)")
    parser.add_argument("--decodes", type=int, default=32, metavar="N", help="decodes a file (default: %(default)s)")
    stdlib = Path(sysconfig.get_path("stdlib"))
    parser.add_argument("--stdlib", type=Path, default=stdlib, metavar="DIR", help="the library's files")


def run(args: argparse.Namespace) -> int:
    """Measure, print and save."""
    sequences = held_out_tokens(args.stdlib, args.files, args.prompt + args.decodes)
    divergences = measure(sequences, args.prompt)
    table = Table("pool", "mean KL", "prompts", "decodes", "largest", "same best", "capacity")
    rows: dict[str, list[Any]] = {name: list(asdict(found).values()) for name, found in divergences.items()}
    settings = {"files": len(sequences), "prompt_tokens": args.prompt, "decodes": args.decodes}
    report = start_report(args, **settings, pools={name: asdict(found) for name, found in divergences.items()})
    print(f"{table.text(rows)}\nwritten to {save('kv_quantization', report, args.out)}")
    return 0


def held_out_tokens(stdlib: Path, num_files: int, num_tokens: int) -> Int32[np.ndarray, "files tokens"]:
    """The first tokens of held-out files that have so many, in the order of their paths."""
    corpus = Corpus(read_source_files(stdlib), Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json")))
    files = [file for file in corpus.files if file.is_held_out]
    long_enough = (ids[:num_tokens] for ids in corpus.encode(files) if len(ids) >= num_tokens)
    sequences = [ids for ids, _ in zip(long_enough, range(num_files), strict=False)]
    if len(sequences) < num_files:
        raise ValueError(f"--files {num_files}: only {len(sequences)} held-out files have {num_tokens} tokens")
    return np.array(sequences, np.int32)


def measure(sequences: Int32[np.ndarray, "files tokens"], num_prompt: int) -> dict[str, Divergence]:
    """The divergence over each kind of pool.

    Args:
        sequences: token ids of each file.
        num_prompt: tokens that are written in one piece.
    """
    plain = Forced(Pool()).logprobs(sequences, num_prompt)
    quantized = {name: Forced(pool).logprobs(sequences, num_prompt) for name, pool in POOLS.items()}
    nats: dict[str, list[np.ndarray]] = {name: [] for name in POOLS}
    is_same: dict[str, list[np.ndarray]] = {name: [] for name in POOLS}
    for expected in plain:
        for name, steps in quantized.items():
            got = next(steps)
            nats[name].append(_divergence(expected, got))
            is_same[name].append(expected.argmax(axis=-1) == got.argmax(axis=-1))
    return {name: _summarise(name, nats[name], is_same[name]) for name in POOLS}


def _summarise(name: str, nats: list[np.ndarray], is_same: list[np.ndarray]) -> Divergence:
    """Summarise the numbers of each step, the first of which is all prompts."""
    every = np.concatenate(nats, axis=1)
    return Divergence(
        mean=float(every.mean()),
        prompts=float(nats[0].mean()),
        decodes=float(np.concatenate(nats[1:], axis=1).mean()),
        largest=float(every.max()),
        same_best=float(np.concatenate(is_same, axis=1).mean()),
        capacity=POOLS[name].capacity,
    )


def _divergence(
    expected: Float[np.ndarray, "files tokens vocab"], got: Float[np.ndarray, "files tokens vocab"]
) -> Float[np.ndarray, "files tokens"]:
    return (np.exp(expected) * (expected - got)).sum(axis=-1)


@partial(jax.jit, donate_argnums=0)
def _round(cache: KVCache, blocks: Int32[Array, " full"]) -> KVCache:
    """The cache with some blocks as they come back from the host."""
    narrow = narrow_bits(cache.gather(blocks), cache.pool.dtype)
    return cache.scatter(blocks, widen_bits(narrow, cache.pool))


class Forced:
    """The model in the package, fed with given tokens, over a pool of some kind.

    Args:
        pool: the kind of pool.
    """

    def __init__(self, pool: Pool):
        self._pool = pool
        self._config = load_config(DEMO_MODEL)
        model = load_model(DEMO_MODEL, self._config, "float32", make_mesh(), use_tqdm=False)
        if self._pool.has_pages:
            self._config, model = with_a_kv_head_for_each_query_head(self._config, model)
        self._graphdef, self._weights = nnx.split(model)
        self._backend = BACKENDS["xla"]("")
        self._step = self._make_step()

    def logprobs(
        self, sequences: Int32[np.ndarray, "files tokens"], num_prompt: int
    ) -> Iterator[Float[np.ndarray, "files some_tokens vocab"]]:
        """Log-probabilities after the tokens of the prompts, then after each later token.

        Args:
            sequences: token ids of each file.
            num_prompt: tokens that are written in one piece.
        """
        num_files, num_tokens = sequences.shape
        blocks = np.arange(num_files * -(-num_tokens // BLOCK_SIZE), dtype=np.int32)
        first = 1 + (_window_of(blocks.size, self._config).num_blocks if self._pool.has_pages else 0)
        layout = pool_layout(self._config, self._pool.settings, "float32", self._backend)
        cache, tables = layout.allocate(first + blocks.size), first + blocks.reshape(num_files, -1)
        for start, stop in [(0, num_prompt), *((n, n + 1) for n in range(num_prompt, num_tokens))]:
            cache, found = self._step(self._weights, cache, sequences[:, start:stop], tables, np.int32(start))
            if is_narrowed(self._pool.settings):
                cache = _round(cache, tables[:, : stop // BLOCK_SIZE].reshape(-1))
            yield np.asarray(found)

    def _make_step(self) -> Callable[..., tuple[KVCache, Array]]:
        def step(
            weights: Any,
            cache: KVCache,
            token_ids: Int32[Array, "files tokens"],
            tables: Int32[Array, "files blocks"],
            start: Array,
        ) -> tuple[KVCache, Float[Array, "files tokens vocab"]]:
            num_files, num_tokens = token_ids.shape
            positions = start + jnp.arange(num_tokens, dtype=jnp.int32)
            slots = tables[:, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
            lens = jnp.full(num_files, start + num_tokens)
            starts = num_tokens * jnp.arange(num_files + 1, dtype=jnp.int32)
            attend = self._attend(cache, Rows(slots.reshape(-1), tables, lens, starts))
            model: Any = nnx.merge(self._graphdef, weights)
            flat = jnp.tile(positions, num_files)
            hidden = model(token_ids.reshape(-1), flat, jnp.zeros_like(flat), attend)
            logprobs = jax.nn.log_softmax(model.logits(hidden))
            return attend.cache, logprobs.reshape(num_files, num_tokens, -1)

        return jax.jit(step, donate_argnums=1)

    def _attend(self, cache: KVCache, rows: Rows) -> PagedAttend:
        if not self._pool.has_pages:
            return PagedAttend(cache, rows, self._backend)
        num_pages = rows.block_tables.size
        stream = NoStream(_window_of(num_pages, self._config))
        starts = jnp.zeros(len(rows.kv_lens), jnp.int32)
        return RecomputingAttend(cache, rows, self._backend, stream, starts)


class NoStream:
    """The stream of a pool without blocks on the host.

    Args:
        window: the cells that K and V computed in a step fill.
    """

    def __init__(self, window: Window):
        self.window = window

    def start(self, cache: KVCache, layer: int, cells: range, *after: Array) -> tuple[KVCache, Array]:
        """Start no copies."""
        del layer, cells, after
        return cache, jnp.zeros(1, jnp.int32)

    def wait[T](self, cache: KVCache, layer: int, arrays: T, *after: Array) -> tuple[KVCache, T]:
        """Wait for none."""
        del layer, after
        return cache, arrays


def _window_of(num_pages: int, config: ModelConfig) -> Window:
    """The window for K and V of so many pages and of block 0, of two cells each."""
    return Window(-(-2 * (num_pages + 1) // config.num_layers), config.num_layers)


def with_a_kv_head_for_each_query_head(config: ModelConfig, model: nnx.Module) -> tuple[ModelConfig, nnx.Module]:
    """The same function with as many KV heads as query heads, equal ones beside each other."""
    copies, whole = config.num_heads // config.num_kv_heads, replace(config, num_kv_heads=config.num_heads)
    graphdef, like = nnx.split(random_model(whole, "float32", make_mesh(), 0))

    def repeated(kernel: Array, wider: Array) -> Array:
        if kernel.shape == wider.shape:
            return kernel
        by_head = kernel.reshape(len(kernel), config.num_kv_heads, -1)
        return jnp.repeat(by_head, copies, axis=1).reshape(wider.shape)

    return whole, nnx.merge(graphdef, jax.tree.map(repeated, nnx.state(model), like))
