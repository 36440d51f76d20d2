"""Steps through the real GPU compiler, for a GPU that is not there: no step copies the pool."""

import math
import re
from fractions import Fraction

import jax
import pytest

from jpaged.device.backends import hopper
from jpaged.device.step.inputs import Bucket
from jpaged.models.layers import moe
from tests.support.gpu_aot import NUM_LAYERS, absent_h200, compiled, programs_on, why_no_compiler

pytestmark = [
    pytest.mark.skipif(why_no_compiler() is not None, reason=str(why_no_compiler())),
    pytest.mark.usefixtures("nothing_kept_by_jax"),  # it cannot be loaded for devices that are not there
]

HOST = {"kv_placement": "host"}


@pytest.fixture(scope="module")
def mesh():
    with absent_h200() as mesh:
        yield mesh


@pytest.mark.parametrize("bucket", [Bucket(16, 16), Bucket(512, 32)], ids=["decodes", "chunks"])
@pytest.mark.parametrize(
    ("shapes", "settings"),
    [
        ("llama3-8b", {}),
        ("llama3-8b", {"kv_cache_dtype": "int8"}),
        ("llama3-8b", {"kv_cache_dtype": "fp8"}),
        ("llama3-8b", HOST),
        ("llama3-8b", HOST | {"kv_cache_dtype": "int8"}),
        ("llama3-8b", HOST | {"kv_cache_dtype": "fp8"}),
        ("llama3-8b", HOST | {"offload_dtype": "int8"}),
        ("opt-6.7b", HOST),
        ("opt-6.7b", HOST | {"offload_cache": "activations", "kv_cache_dtype": "int8"}),
    ],
    ids=lambda value: "-".join(value.values()) or "device" if isinstance(value, dict) else value,
)
def test_no_step_copies_the_pool(mesh, shapes, settings, bucket, monkeypatch):
    """Both layers of an 8-bit block are streamed at once to decodes, and one after the other to chunks."""
    monkeypatch.setattr("jpaged.device.kv.layout.MOST_AT_ONCE", Fraction(1, 1 if bucket.is_decode else 2))
    is_streamed = "kv_placement" in settings
    programs = programs_on(mesh, shapes, 20_000, 2048 * is_streamed, **settings)
    pool_bytes = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(programs.abstract_cache()))
    memory = compiled(programs, "stream" if is_streamed else "forward", bucket).memory_analysis()
    assert memory.alias_size_in_bytes >= pool_bytes, "the donated pool is written in place"
    assert memory.temp_size_in_bytes < pool_bytes / 4


@pytest.mark.parametrize("shapes", ["llama3-8b", "opt-6.7b"])
def test_no_step_that_reads_shared_tokens_once_copies_the_pool(mesh, shapes):
    programs = programs_on(mesh, shapes, 20_000, 0)
    assert programs.least_shared_tokens < math.inf
    pool_bytes = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(programs.abstract_cache()))
    memory = compiled(programs, "shared", Bucket(32, 32)).memory_analysis()
    assert memory.alias_size_in_bytes >= pool_bytes, "the donated pool is written in place"
    assert memory.temp_size_in_bytes < pool_bytes / 4


@pytest.mark.parametrize("settings", [{}, {"kv_cache_dtype": "fp8"}], ids=["bf16", "fp8"])
def test_copies_of_blocks_take_no_memory_of_their_own(mesh, settings):
    programs = programs_on(mesh, "llama3-8b", 20_000, 0, **settings)
    pool_bytes = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(programs.abstract_cache()))
    memory = compiled(programs, "copy", 64).memory_analysis()
    assert memory.alias_size_in_bytes >= pool_bytes, "the donated pool is written in place"
    assert memory.temp_size_in_bytes < pool_bytes / 20_000, "less than one block"


@pytest.mark.parametrize(
    ("shapes", "bucket"),
    [("qwen3-30b-a3b", Bucket(4, 4)), ("gpt-oss-20b", Bucket(512, 32))],  # few tokens, and grouped products
)
def test_no_step_copies_the_weights_of_experts(mesh, shapes, bucket):
    programs = programs_on(mesh, shapes, 20_000, 0)
    experts = [x for x in jax.tree.leaves(programs.weights) if x.ndim == 4]
    memory = compiled(programs, "forward", bucket).memory_analysis()
    assert memory.temp_size_in_bytes < min(math.prod(x.shape) * x.dtype.itemsize for x in experts) / 4


def test_step_of_one_token_writes_no_products_of_elements(mesh):
    """XLA would write those of a row and a matrix to memory, and then sum them."""
    programs = programs_on(mesh, "qwen3-30b-a3b", 20_000, 0)
    memory = compiled(programs, "forward", Bucket(1, 1)).memory_analysis()
    projections = [x for x in jax.tree.leaves(programs.weights) if x.shape == (32 * 128, 2048)]
    assert len(projections) == NUM_LAYERS
    assert memory.temp_size_in_bytes < math.prod(projections[0].shape) * projections[0].dtype.itemsize / 4


def kernels_of_step(hlo: str) -> int:
    """The kernels of the computation that runs the layers: that with the most kernels of ours."""
    computations = re.split(r"^(?:ENTRY )?%[\w.-]+ \(.*$", hlo, flags=re.M)
    layers = max(computations, key=lambda text: text.count('custom_call_target="mosaic_gpu'))
    return len(re.findall(r" (?:fusion|custom-call|copy)\(", layers))


@pytest.mark.parametrize(
    ("shapes", "bucket", "num_saved"),
    [("llama3-8b", Bucket(16, 16), 1), ("qwen3-0.6b", Bucket(16, 16), 2), ("llama3-8b", Bucket(512, 32), 2)],
)
def test_norms_rope_and_write_are_one_kernel_of_each_layer(mesh, shapes, bucket, num_saved, monkeypatch):
    """Norms, rope and write, which XLA would spread over two or three kernels; it sums few tokens' products in them."""

    def compile_step() -> str:
        programs = programs_on(mesh, shapes, 20_000, 0)
        return compiled(programs, "forward", bucket).as_text()

    monkeypatch.setattr(hopper, "ROPE_KERNEL_TO", 512)
    hlo = compile_step()
    assert len(re.findall(r' custom-call\(.*op_name="[^"]*/rope_write/', hlo)) == NUM_LAYERS
    monkeypatch.setattr(hopper, "ROPE_KERNEL_TO", 0)
    assert kernels_of_step(compile_step()) - kernels_of_step(hlo) >= NUM_LAYERS * num_saved


@pytest.mark.parametrize("shapes", ["llama3-8b", "gemma3-27b"])
def test_a_large_step_adds_and_norms_in_two_kernels_a_layer(mesh, shapes):
    """Gemma 3 has four norms in a layer."""
    program = compiled(programs_on(mesh, shapes, 2_000, 0), "forward", Bucket(512, 32))
    kernels = [line for line in program.as_text().splitlines() if "custom-call(" in line and "/add_rms_norm/" in line]
    assert len(kernels) == 2 * NUM_LAYERS


def test_experts_of_one_token_are_not_sorted(mesh, monkeypatch):
    def compile_step() -> str:
        return compiled(programs_on(mesh, "qwen3-30b-a3b", 20_000, 0), "forward", Bucket(1, 1)).as_text()

    unsorted = compile_step()
    monkeypatch.setattr(moe, "groups_of_one_token", lambda experts: moe.groups_by_expert(experts[None], 128))
    assert kernels_of_step(compile_step()) - kernels_of_step(unsorted) >= NUM_LAYERS * 3
