"""The number of blocks that fit: from the devices' memory, the weights, and the workspace of a step."""

import os
from collections.abc import Callable
from fractions import Fraction
from typing import Protocol

import jax
from jax.sharding import Mesh

from jpaged.config import EngineConfig
from jpaged.contract.layer_groups import LayerGroups
from jpaged.device.backends import Backend
from jpaged.device.kv.host_pool import num_host_blocks_for
from jpaged.device.kv.layout import (
    grouping_of,
    host_layout,
    is_narrowed,
    keeps_activations,
    layers_at_once,
    pool_layout,
    share_on_host,
)
from jpaged.device.kv.streaming import most_blocks_on_host, window_for
from jpaged.device.target import Target, choose_backend, target_of
from jpaged.models import ModelConfig
from pallas_kernels import block_pool_shape
from pallas_kernels.block_pool.tpu import MOST_SLOTS, why_no_slots

GUESSED_WORKSPACE = 1 / 32
"""Share of an accelerator's memory that a step takes besides weights and pool, until its programs say how much."""


class SizedPrograms(Protocol):
    """Programs whose shapes depend on the size of the pool and on the longest context."""

    target: Target
    bytes_per_block: int
    max_model_len: int
    groups: LayerGroups

    @property
    def most_blocks(self) -> int: ...
    def workspace_bytes(self) -> int: ...
    def resize(self, num_blocks: int, max_model_len: int) -> None: ...


class PoolSizer:
    """Chooses the number of blocks of a pool, and the longest context that the pool holds.

    A step's workspace is known once programs are compiled, whose shapes depend on the size of the pool. So ``guess``
    guesses the workspace, and ``correct`` asks the compiled programs.

    Args:
        programs: resized by this class alone.
        config: the engine's settings.
        mesh: the devices.
        weight_bytes: bytes of the weights, over all devices.
        least: the least of a number over all processes.
    """

    def __init__(
        self,
        programs: SizedPrograms,
        config: EngineConfig,
        mesh: Mesh,
        *,
        weight_bytes: int,
        least: Callable[[int], int] = lambda number: number,
    ):
        self._programs = programs
        self._config = config
        self._mesh = mesh
        self._target = programs.target
        self._weight_bytes = weight_bytes
        self._least = least

    def guess(self) -> int | None:
        """Size the pool as asked, or such that a step's workspace should fit beside it.

        Returns:
            The bytes left for the workspace, over all devices; None if ``correct`` has nothing to correct.

        Raises:
            ValueError: the blocks asked for, or two blocks, do not fit; or the context asked for does not.
        """
        programs, wanted = self._programs, self._config.num_blocks
        if wanted is not None:
            check_blocks_fit(wanted, programs.bytes_per_block, self._mesh, self._target)
            self._resize(wanted)
            return None
        if not self._target.has_own_memory:
            self._resize(self._require(self._num_blocks_beside(0)))
            return None
        guessed_bytes = self._least(int(available_bytes(self._mesh, self._target) * GUESSED_WORKSPACE))
        num_blocks = self._num_blocks_beside(guessed_bytes)
        if num_blocks > programs.most_blocks:
            self._resize(num_blocks)
            return guessed_bytes
        # A guess refuses no context: ask the programs of the largest pool there could be.
        programs.resize(max(2, self._num_blocks_beside(0)), programs.max_model_len)
        self.correct(0)
        return None

    def correct(self, guessed_bytes: int) -> bool:
        """Shrink the pool if a step takes more than was guessed.

        Returns:
            Whether it does.

        Raises:
            ValueError: as ``guess``.
        """
        workspace_bytes = self._programs.workspace_bytes() * self._mesh.size
        needed = -self._least(-workspace_bytes)  # the most over all processes
        if needed <= guessed_bytes:
            return False
        self._resize(self._require(self._num_blocks_beside(needed)))
        return True

    def _num_blocks_beside(self, reserved_bytes: int) -> int:
        most_blocks = self._programs.most_blocks
        return self._least(
            num_blocks_that_fit(
                self._programs.bytes_per_block,
                self._mesh,
                self._target,
                self._config.memory_fraction,
                reserved_bytes=reserved_bytes,
                least_blocks=most_blocks + 1,
                useful_blocks=self._config.most_rows * most_blocks + 1,
            )
        )

    def _require(self, num_blocks: int) -> int:
        if num_blocks < 2:
            remedy = (
                "raise memory_fraction, or lower max_num_batched_tokens"
                if self._target.has_own_memory
                else "give num_blocks"
            )
            raise ValueError(
                f"no memory for a KV cache: one block takes {self._programs.bytes_per_block:,} bytes, and "
                f"memory_fraction={self._config.memory_fraction} leaves less than two after {self._weight_bytes:,} "
                f"bytes of weights and a step's workspace: {remedy}"
            )
        return num_blocks

    def _resize(self, num_blocks: int) -> None:
        """Resize the programs. A default context shrinks to the pool; one asked for must fit the memory."""
        config, max_model_len = self._config, self._programs.max_model_len
        if config.kv_placement != "device":  # contexts may be longer than the pool
            self._programs.resize(num_blocks, max_model_len)
            return
        groups = self._programs.groups
        held = groups.most_tokens(num_blocks - 1, config.block_size, config.token_budget)
        if held == 0:
            raise ValueError(
                f"num_blocks={num_blocks} is too few: a token takes a block in each of {len(groups)} layer groups, and "
                f"block 0 is padding; give {len(groups) + 1} or more, or raise memory_fraction"
            )
        if held < max_model_len and config.max_model_len is None:
            max_model_len = held
        elif held < max_model_len and config.num_blocks is None:
            raise ValueError(
                f"max_model_len={max_model_len} does not fit: memory for {num_blocks} blocks of {config.block_size} "
                f"holds {held} tokens; lower max_model_len, raise memory_fraction or give num_blocks"
            )
        self._programs.resize(num_blocks, max_model_len)


def check_pools(model: ModelConfig, config: EngineConfig, dtype: jax.typing.DTypeLike, mesh: Mesh) -> None:
    """Check, before weights are loaded, that memory could hold the pools and the context that the settings ask for.

    Args:
        model: shape of the model.
        config: the engine's settings.
        dtype: type of the activations.
        mesh: the devices.

    Raises:
        ValueError: a pool or a context that does not fit, even if weights and workspace took no memory.
    """
    target, backend = target_of(mesh), choose_backend(model, config, dtype, mesh)
    layout = pool_layout(model, config, dtype, backend)
    bytes_per_block = layout.block_bytes
    max_model_len = config.max_model_len or model.max_model_len
    groups = grouping_of(model, config).groups
    most_blocks = groups.num_blocks(max_model_len, config.block_size, config.token_budget)
    useful_blocks = config.most_rows * most_blocks
    local_bytes = host_layout(layout, config).block_bytes * len(mesh.local_devices) // mesh.size
    num_host_blocks = num_host_blocks_for(config, target, local_bytes, useful_blocks=useful_blocks)
    if config.num_blocks is not None:
        check_blocks_fit(config.num_blocks, bytes_per_block, mesh, target)
    num_blocks = config.num_blocks or num_blocks_that_fit(
        bytes_per_block,
        mesh,
        target,
        config.memory_fraction,
        reserved_bytes=0,
        least_blocks=most_blocks + 1,
        useful_blocks=useful_blocks + 1,
    )
    if config.kv_placement != "device":
        check_way_to_stream(model, config, dtype, target, backend, num_host_blocks)
        share, at_once = share_on_host(layout, config), layers_at_once(layout, config, backend)
        check_streamed_context(model, config, num_blocks, num_host_blocks, share, at_once)


def check_way_to_stream(
    model: ModelConfig,
    config: EngineConfig,
    dtype: jax.typing.DTypeLike,
    target: Target,
    backend: Backend,
    num_host_blocks: int,
) -> None:
    """Check that programs of a backend can stream blocks of a model's pool, by callbacks or by DMA.

    Args:
        model: shape of the model.
        config: the engine's settings, with ``kv_placement`` other than "device".
        dtype: type of the activations.
        target: target of the devices.
        backend: the backend.
        num_host_blocks: blocks of the host pool.

    Raises:
        ValueError: they cannot.
    """
    if not backend.streams_by_dma:
        if target.calls_back:
            return
        reason = f"programs here cannot call back, so the backend pallas_tpu streams, but {backend.name} does not;"
    elif num_host_blocks > MOST_SLOTS:
        reason = f"the backend pallas_tpu streams {MOST_SLOTS} blocks at most, not num_host_blocks={num_host_blocks};"
    elif keeps_activations(model, config):
        reason = "the backend pallas_tpu streams no activations; use offload_cache='kv', or"
    elif is_narrowed(config):
        reason = "the backend pallas_tpu streams blocks as they are; use offload_dtype='auto', or"
    else:
        layout = pool_layout(model, config, dtype, backend)
        shape = block_pool_shape(1, layout.num_layers, layout.num_kv_heads, layout.block_size, layout.head_dim)
        if (why := why_no_slots(shape, layout.dtype)) is None:
            return
        reason = f"the backend pallas_tpu does not stream {why};"
    raise ValueError(f"kv_placement={config.kv_placement!r} cannot be had: {reason} use kv_placement='device'")


def check_streamed_context(
    model: ModelConfig, config: EngineConfig, num_blocks: int, num_host_blocks: int, share: Fraction, at_once: int
) -> None:
    """Check that both pools together hold the context asked for.

    Args:
        model: shape of the model.
        config: the engine's settings, with ``kv_placement`` other than "device".
        num_blocks: blocks of the device's pool.
        num_host_blocks: blocks of the host pool.
        share, at_once: ``share`` and ``layers_at_once`` of ``window_for``.

    Raises:
        ValueError: no block can be streamed, or ``max_model_len`` is longer than what the pools hold.
    """
    with_pages = keeps_activations(model, config)
    sizes = num_host_blocks, num_blocks, len(model.layer_specs)
    window = window_for(*sizes, with_pages=with_pages, share=share, layers_at_once=at_once)
    on_host = most_blocks_on_host(window, num_host_blocks, num_blocks, with_pages=with_pages)
    if on_host == 0:
        raise ValueError(
            f"num_blocks={num_blocks} is too few for kv_placement={config.kv_placement!r}: the window for streamed "
            f"blocks, a part of the pool, would be {window.num_blocks} blocks of {window.num_layers} layers, and holds "
            "no block; raise num_blocks or memory_fraction"
        )
    on_device = num_blocks - 1 - window.num_blocks
    held = (on_device + on_host) * config.block_size
    if config.max_model_len is not None and config.max_model_len - 1 > held:  # the last token is never stored
        raise ValueError(
            f"max_model_len={config.max_model_len} does not fit with kv_placement={config.kv_placement!r}: "
            f"{on_device} of {num_blocks} blocks on the device, the others being padding and the window for streamed "
            f"blocks, and {on_host} of {num_host_blocks} on the host, as many as one step streams, hold {held} tokens "
            f"in blocks of {config.block_size}; lower max_model_len, or raise num_blocks, num_host_blocks or "
            "host_memory_bytes"
        )


def available_bytes(mesh: Mesh, target: Target, memory_fraction: float = 1.0) -> int:
    """Bytes that may still be allocated, over all devices of a mesh, if a fraction of each may be used.

    The memory of a device without its own is the machine's, whatever else runs there. Devices of other processes do not
    report here. Each is taken to have as much left as the fullest device of this process.

    Raises:
        ValueError: a device does not report its memory.
    """
    if not target.has_own_memory:
        return int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * memory_fraction)
    left = []
    for device in mesh.devices.flat:
        if device.process_index != jax.process_index():
            continue
        stats = device.memory_stats()
        if not stats or "bytes_limit" not in stats:
            raise ValueError(f"{device} does not report its memory: give num_blocks")
        left.append(int(stats["bytes_limit"] * memory_fraction) - stats["bytes_in_use"])
    return min(left) * mesh.size


def check_blocks_fit(num_blocks: int, bytes_per_block: int, mesh: Mesh, target: Target) -> None:
    """Check the size of a pool that the settings ask for.

    Raises:
        ValueError: more blocks than the devices' memory holds.
    """
    left = available_bytes(mesh, target)
    if num_blocks * bytes_per_block > left:
        raise ValueError(
            f"num_blocks={num_blocks} x {bytes_per_block:,} bytes do not fit in the {left:,} bytes there are: "
            f"at most {left // bytes_per_block} would"
        )


def num_blocks_that_fit(
    bytes_per_block: int,
    mesh: Mesh,
    target: Target,
    memory_fraction: float,
    *,
    reserved_bytes: int,
    least_blocks: int,
    useful_blocks: int,
) -> int:
    """The number of blocks that a pool may have; less than 2 if there is no memory for one.

    Args:
        bytes_per_block: bytes of one block, over all devices.
        mesh: the devices of the pool.
        target: their target.
        memory_fraction: share of each device's memory, for everything.
        reserved_bytes: bytes needed besides, over all devices; the machine's own memory is taken to hold them.
        least_blocks: fewer are given only if no more fit.
        useful_blocks: more of them in the machine's own memory would only delay the start.
    """
    budget = available_bytes(mesh, target, memory_fraction)
    if target.pool_bytes is not None:
        return min(min(budget, target.pool_bytes) // bytes_per_block, useful_blocks)
    num_blocks = (budget - reserved_bytes) // bytes_per_block
    # The number is a shape of every program: a few bytes more or less must not make kept programs useless.
    rounded = num_blocks - num_blocks % max(num_blocks // 64, 1)
    return max(rounded, min(num_blocks, least_blocks))
