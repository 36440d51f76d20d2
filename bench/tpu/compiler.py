"""The real TPU compiler, for absent chips: the attention kernel compiled for one device of a generation.

It needs libtpu (``pip install 'jpaged[tpu-aot]'``), and no TPU.
"""

import importlib.util
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import block_pool_shape
from pallas_kernels.block_pool import is_quantized
from pallas_kernels.chips.tpu import chip_of
from pallas_kernels.paged_attention.call import Batch, Call, Heads, KvLayer, Scoring
from pallas_kernels.paged_attention.tpu import LaneLayout, attend_tpu, lane_layout, write_and_attend_tpu
from pallas_kernels.paged_attention.tpu.batch import plan_launch
from pallas_kernels.paged_attention.tpu.launch import Launch

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "7x": "tpu7x:2x2x1"}
"""Generation -> the smallest topology that the compiler describes."""

CHIP_CONFIGS = {"v4": {"chip_config_name": "megacore"}}
"""Options of a generation whose TPUs run two TensorCores as one device, which the compiler would keep apart."""

NO_MACHINE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
"""Answers that libtpu would otherwise wait for from the cloud's metadata server, and permission for several processes
to compile.
"""

LAYER = 1
"""The layer attended. The first one would have no offset."""

type Shape = tuple[tuple[int, ...], Any]
"""An array's shape and type."""


def why_no_compiler() -> str | None:
    """The reason why nothing can be compiled for TPUs here; None if it can."""
    if importlib.util.find_spec("libtpu") is None:
        return "no libtpu: pip install 'jpaged[tpu-aot]'"
    return None


@cache
def mesh_of(generation: str) -> Mesh:
    """One device of a generation."""
    return mesh_in(TOPOLOGIES[generation], 1, "chip", **CHIP_CONFIGS.get(generation, {}))


def mesh_in(topology_name: str, num_devices: int, axis: str, **of_chip: str) -> Mesh:
    """The first devices of a topology, as libtpu names it."""
    for name, value in NO_MACHINE.items():
        os.environ.setdefault(name, value)
    topology = topologies.get_topology_desc(platform="tpu", topology_name=topology_name, **of_chip)
    return Mesh(np.array(topology.devices[:num_devices]), (axis,))


def trace_for(
    generation: str, function: Callable[..., Any], *shapes: Shape | None, donate: tuple[int, ...] = ()
) -> Any:
    """Trace a function of arrays of these shapes and types for one device of a generation."""
    mesh = mesh_of(generation)
    sharding = NamedSharding(mesh, PartitionSpec())
    arguments = [None if x is None else jax.ShapeDtypeStruct(*x, sharding=sharding) for x in shapes]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(function, donate_argnums=donate).lower(*arguments)


def compile_for(
    generation: str, function: Callable[..., Any], *shapes: Shape | None, donate: tuple[int, ...] = ()
) -> Any:
    """Compile a function of arrays of these shapes and types for one device of a generation."""
    return trace_for(generation, function, *shapes, donate=donate).compile()


@dataclass(frozen=True)
class Case:
    """The attention of one batch, with everything that its program depends on.

    Args:
        pool_tokens: slots of a layer of the pool.
        max_blocks: entries of a block table.
        has_options: whether every option of scores is set.
        is_fused: whether the kernel that attends also writes K and V of the batch, which are decodes.
    """

    generation: str
    head_dim: int
    group: int
    block_size: int
    pool_dtype: jnp.dtype
    num_tokens: int
    num_seqs: int
    q_dtype: Any = jnp.bfloat16
    max_blocks: int = 512
    num_kv_heads: int = 8
    num_layers: int = 8
    pool_tokens: int = 16 * 1024
    has_options: bool = False
    is_fused: bool = False

    def __str__(self) -> str:
        return (
            f"{self.generation}-d{self.head_dim}-g{self.group}-b{self.block_size}-{self.pool_dtype.name}"
            f"-{self.num_tokens}x{self.num_seqs}" + ("-options" if self.has_options else "")
        )

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads * self.group

    @property
    def layout(self) -> LaneLayout:
        return lane_layout(self.num_kv_heads, self.head_dim)

    @property
    def q(self) -> Shape:
        return (self.num_tokens, self.num_heads, self.head_dim), self.q_dtype

    @property
    def pool(self) -> Shape:
        num_blocks, layout = self.pool_tokens // self.block_size, self.layout
        axes = num_blocks, self.num_layers, layout.num_kv_heads, self.block_size, layout.head_dim
        return block_pool_shape(*axes), self.pool_dtype

    @property
    def rows(self) -> tuple[Shape, Shape, Shape]:
        num_seqs = self.num_seqs
        return ((num_seqs, self.max_blocks), jnp.int32), ((num_seqs,), jnp.int32), ((num_seqs + 1,), jnp.int32)

    @property
    def scoring(self) -> Scoring:
        window, soft_cap = (1000, 30.0) if self.has_options else (None, None)
        return Scoring(self.head_dim**-0.5, window, soft_cap)


def launch_of(case: Case) -> Launch:
    """The launch that a case's program makes."""
    q, pool, *rows = (jax.ShapeDtypeStruct(*shape) for shape in (case.q, case.pool, *case.rows))
    heads = Heads(q, q) if case.has_options else Heads()  # pyright: ignore[reportArgumentType]
    call = Call(q=q, kv=KvLayer(pool, LAYER), batch=Batch(*rows), scoring=case.scoring, heads=heads)  # pyright: ignore[reportArgumentType]
    return plan_launch(call, case.layout, None, chip_of(case.generation), is_fused=case.is_fused)


def trace_attention(case: Case) -> Any:
    """Trace the attention of a case for its generation, without the layers around it.

    Raises:
        NotImplementedError: the kernel refuses the case.
    """

    def call_of(q, pool, kv_scales, rows, heads):
        kv = KvLayer(pool, LAYER, kv_scales)
        return Call(q=q, kv=kv, batch=Batch(*rows), scoring=case.scoring, heads=Heads(*heads))

    def attend(q, pool, tables, kv_lens, cu_q_lens, alibi_slopes, sinks, kv_scales):
        call = call_of(q, pool, kv_scales, (tables, kv_lens, cu_q_lens), (alibi_slopes, sinks))
        return attend_tpu(call, num_kv_heads=case.num_kv_heads)

    def write_and_attend(q, pool, tables, kv_lens, cu_q_lens, alibi_slopes, sinks, k, v):
        call = call_of(q, pool, None, (tables, kv_lens, cu_q_lens), (alibi_slopes, sinks))
        return write_and_attend_tpu(call, k, v, is_decode=True)

    pool_shape, _ = case.pool
    per_head = ((case.num_heads,), jnp.float32) if case.has_options else None
    arguments = (
        case.q,
        case.pool,
        *case.rows,
        per_head,
        per_head,
    )
    if case.is_fused:
        new = (case.num_tokens, case.num_kv_heads, case.head_dim), case.q_dtype
        return trace_for(case.generation, write_and_attend, *arguments, new, new, donate=(1,))
    scales = (pool_shape[:4], jnp.float32) if is_quantized(case.pool_dtype) else None
    return trace_for(case.generation, attend, *arguments, scales)


def kernel_vmem_bytes(compiled: Any) -> int:
    """VMEM that the compiler gave the attention kernel of a compiled program.

    The kernel's memory begins where the buffers end that XLA keeps in VMEM.
    """
    lines = compiled.as_text().splitlines()
    (call,) = (line for line in lines if "%paged_attention" in line and "tpu_custom_call" in line)
    (begin, _), (offset, used) = (
        map(int, re.findall(rf'"{field}":\[\{{"memory_space":"1","offset":"(\d+)","size":"(\d+)"', call)[0])
        for field in ("scoped_memory_configs", "used_scoped_memory_configs")
    )
    return offset + used - begin
