"""The reader of safetensors into sharded arrays, and the writer of a model's weights as a checkpoint."""

import json
import logging
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import save_file

from jpaged.interrupts import InterruptsWait
from jpaged.models.checkpoint.config import ModelConfig
from jpaged.models.checkpoint.joined import Joined
from jpaged.models.checkpoint.stored import DTYPES, PACKED, StoredTensor, open_tensors
from jpaged.models.layers.common import Dtype
from jpaged.models.layers.fused import QKV, allocation_order, separate_params
from jpaged.models.layers.kv_copies import AXIS, KVCopies
from jpaged.models.layers.spelling import Index, Spelling, Whole, spelling_in
from jpaged.progress import counted
from jpaged.sharding import is_on_host, moved

log = logging.getLogger(__name__)

_PROJECTION = "lm_head.weight"

_EMBEDDINGS = "embed_tokens.weight", "wte.weight"
"""Last parts of the embedding's name, to which the projection is tied."""

_BUFFERS = ".inv_freq", ".cos_cached", ".sin_cached", ".masked_bias", ".attn.bias", ".position_ids"
"""Endings of tensors that follow from the configuration, so that a model computes them."""

_LAYER_MODULES = frozenset(
    (
        "c_attn", "c_fc", "c_proj", "down_proj", "experts", "fc1", "fc2", "final_layer_norm", "gate",
        "gate_proj", "gate_up_proj", "input_layernorm", "k_norm", "k_proj", "ln_1", "ln_2", "o_proj",
        "out_proj", "post_attention_layernorm", "post_feedforward_layernorm", "pre_feedforward_layernorm",
        "q_norm", "q_proj", "qkv_proj", "router", "self_attn_layer_norm", "shared_expert_gate", "sinks",
        "up_proj", "v_proj", "w1", "w2", "w3",
    )
)  # fmt: skip
"""Modules and parameters that any architecture has in its layers, by their name in checkpoints."""


def _module(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path[:-1]))


def _spellings(path: tuple[Any, ...], metadata: dict[str, Any], ndim: int) -> tuple[Spelling, ...]:
    """Return the ways in which checkpoints store the parameter at ``path``.

    PyTorch's projections are [out, in], and ours are [in, out].
    """
    if (spellings := metadata.get("spellings")) is not None:
        return spellings
    leaf = "weight" if path[-1] in ("kernel", "scale", "embedding") else path[-1]
    return (Whole(leaf, (1, 0) if path[-1] == "kernel" else tuple(range(ndim))),)


def load_state(
    path: Path,
    state: nnx.State,
    copies: KVCopies,
    *,
    joined: Sequence[Joined] = (),
    renamed: Sequence[tuple[str, str]] = (),
    use_tqdm: bool = True,
) -> nnx.State:
    """Fill ``state`` (variables that hold shapes and shardings) from the checkpoint directory ``path``.

    Each device gets its own slice only, in the stored dtype, and transposes and converts that slice. Meanwhile the
    slices of the next parameter are read. All names and shapes are checked before the first byte is read.

    Args:
        path: Hugging Face checkpoint directory.
        state: the model's parameters.
        copies: copies of KV heads.
        joined: projections that the checkpoint stores joined; each device reads its slice of each part.
        renamed: parts of names in some checkpoints, and what the parameters have in their place.
        use_tqdm: whether to show a progress bar.

    Raises:
        ValueError: a file is missing or damaged, or its tensors differ from ``state``.
    """
    flat = allocation_order(nnx.to_flat_state(state))
    with ExitStack() as stack:
        stored = open_tensors(path, stack)
        for projection in joined:
            projection.split(stored)
        _complete_names(flat, stored, renamed)
        chosen = _check_tensors(path, flat, stored, copies)
        num_bytes = [sum(stored[name].num_bytes for name in names) for _, names in chosen]
        total = sum(num_bytes)
        label = {"label": "Loading weights", "unit": "B", "is_shown": use_tqdm}
        count = stack.enter_context(counted("loading", total, **label))
        interrupts = stack.enter_context(InterruptsWait())
        params = [
            _Param(spelling, _module(where), {name: stored[name].slices for name in names}, variable, copies)
            for (where, variable), (spelling, names) in zip(flat, chosen, strict=True)
        ]
        reader = stack.enter_context(ThreadPoolExecutor(1))
        started, loaded = monotonic(), []
        ahead = reader.submit(params[0].read)
        for i, param in enumerate(params):
            interrupts.check()
            parts = ahead.result()
            if i + 1 < len(params):
                ahead = reader.submit(params[i + 1].read)
            loaded.append((flat[i][0], param.variable.replace(param.send(parts))))
            count(num_bytes[i])
        seconds = max(monotonic() - started, 1e-9)
        log.info("%.3g GB of weights were read in %.3g s: %.3g GB/s", total / 1e9, seconds, total / 1e9 / seconds)
    return nnx.from_flat_state(loaded)


def stored_dtype(path: Path) -> str:
    """Return the dtype of most elements of a checkpoint, from the file headers; float32 without safetensors.

    Raises:
        ValueError: a file is missing or damaged, or most elements have an unsupported dtype.
    """
    if not any(path.glob("*.safetensors*")):
        return "float32"
    sizes: Counter[str] = Counter()
    with ExitStack() as stack:
        for tensor in open_tensors(path, stack).values():
            sizes[tensor.dtype] += tensor.size
    sizes.pop(PACKED, None)  # the numbers become those of the other weights
    dtype = max(sizes, key=sizes.__getitem__, default="F32")
    if dtype not in DTYPES:
        raise ValueError(
            f"{path}: the weights are stored as {dtype}, which is not supported: expected one of {', '.join(DTYPES)}"
        )
    return DTYPES[dtype]


def is_untied(path: Path) -> bool:
    """Whether a checkpoint stores an output projection other than its embedding.

    Rows are compared until two differ, so that an untied projection is found at once.

    Raises:
        ValueError: a file is missing or damaged.
    """
    if not any(path.glob("*.safetensors*")):
        return False
    with ExitStack() as stack:
        stored = open_tensors(path, stack)
        embedding = next((tensor for name, tensor in stored.items() if name.endswith(_EMBEDDINGS)), None)
        projection = stored.get(_PROJECTION)
        if embedding is None or projection is None:
            return False
        if embedding.shape != projection.shape:
            return True
        num_rows, step = embedding.shape[0], 4096
        rows = [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]
        return not all(np.array_equal(embedding.slices[some], projection.slices[some]) for some in rows)


def save_checkpoint(model: Any, config: ModelConfig, path: str | Path, *, dtype: Dtype | None = None) -> None:
    """Write ``config.json`` and ``model.safetensors`` in the form that transformers and ``load_model`` read.

    Args:
        model: model of a class in this package.
        config: configuration of the model.
        path: directory, created if it does not exist; existing files of these names are replaced.
        dtype: dtype of the stored weights; None keeps the model's own.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for where, tensor, metadata in separate_params(model):
        if where[-2] in QKV.parts[1:] or AXIS in metadata.get("logical_axes", ()):
            count = max(tensor.shape[-1] // (config.num_kv_heads * config.head_dim), 1)
            tensor = KVCopies(count, config.head_dim).drop(tensor)
        tensor = tensor.astype(tensor.dtype if dtype is None else jnp.dtype(dtype))
        spelling = _spellings(where, metadata, tensor.ndim)[0]
        written = spelling.write(_module(where), tensor)
        tensors |= {name: np.ascontiguousarray(value) for name, value in written.items()}
    for projection in config.joined:
        projection.join(tensors)
    stored_dtype = next(iter(tensors.values())).dtype.name
    text = json.dumps(replace(config, dtype=stored_dtype).to_hf(), indent=2)
    (path / "config.json").write_text(text + "\n", encoding="utf-8")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def _check_tensors(
    path: Path, flat: list[tuple[Any, Any]], stored: dict[str, StoredTensor], copies: KVCopies
) -> list[tuple[Spelling, tuple[str, ...]]]:
    """Check that ``stored`` holds every parameter of ``flat``, in its shape, and no other weights of its layers.

    A tied embedding may be stored under the name of the projection alone: safetensors' save_model keeps one of two
    names.

    Returns:
        for each parameter, the spelling that the checkpoint uses, and the names of the tensors.
    """
    chosen: list[tuple[Spelling, tuple[str, ...]]] = []
    expected: dict[str, tuple[int, ...]] = {}
    packed: set[str] = set()
    for where, variable in flat:
        module, shape = _module(where), copies.shape_without(variable.shape, variable.logical_axes)
        spelling = spelling_in(_spellings(where, variable.get_metadata(), len(shape)), module, shape, stored)
        shapes = spelling.shapes(module, shape)
        chosen.append((spelling, tuple(shapes)))
        expected |= shapes
        packed |= shapes.keys() if spelling.decode else set()
    if _PROJECTION in stored and _PROJECTION not in expected:
        projection, embedding = stored.pop(_PROJECTION), next(name for name in expected if name.endswith(_EMBEDDINGS))
        stored.setdefault(embedding, projection)
    if missing := sorted(expected.keys() - stored.keys()):
        raise ValueError(
            f"{path}: {len(missing)} of {len(expected)} tensors are missing from the safetensors files, "
            f"the first is {missing[0]!r}: the download is incomplete or config.json belongs to another model"
        )
    _check_unread(path, stored, expected)
    for name, shape in expected.items():
        tensor = stored[name]
        if tensor.shape != shape:
            raise ValueError(
                f"{tensor.file}: {name} has shape {list(tensor.shape)}, but config.json makes it {list(shape)}: "
                "one of the two belongs to another model"
            )
        dtypes = (PACKED,) if name in packed else tuple(DTYPES)
        if tensor.dtype not in dtypes:
            raise ValueError(
                f"{tensor.file}: {name} is stored as {tensor.dtype}, which is not supported: "
                f"expected one of {', '.join(dtypes)}"
            )
    return chosen


def _complete_names(
    flat: list[tuple[Any, Any]], stored: dict[str, StoredTensor], renamed: Sequence[tuple[str, str]]
) -> None:
    """Give tensors the names of the parameters. Those of a bare decoder lack the first part of the name."""
    modules = {_module(where) for where, _ in flat}
    prefixes = ("", *sorted({module.partition(".")[0] + "." for module in modules if "." in module}))
    for name in [name for name in stored if not _is_in(name, modules)]:
        current = name
        for old, new in renamed:
            current = current.replace(old, new, 1)
        whole = next((prefix + current for prefix in prefixes if _is_in(prefix + current, modules)), name)
        stored[whole] = stored.pop(name)


def _is_in(name: str, modules: set[str]) -> bool:
    """Whether a tensor belongs to one of some modules: its name starts with that of the module."""
    parts = name.split(".")
    return any(".".join(parts[:end]) in modules for end in range(1, len(parts)))


def _check_unread(path: Path, stored: dict[str, StoredTensor], expected: dict[str, Any]) -> None:
    """Warn of tensors that no architecture reads.

    Raises:
        ValueError: some architecture has such a tensor in its layers, or the model has its module. The model that
            config.json describes computes something else without that tensor.
    """
    unread = sorted(name for name in stored.keys() - expected.keys() if not name.endswith(_BUFFERS))
    layers = tuple({prefix for name in expected if (prefix := _layers_prefix(name))})
    modules = {name.rpartition(".")[0] for name in (*expected, _PROJECTION)}
    needed = [
        name
        for name in unread
        if name.rpartition(".")[0] in modules
        or (name.startswith(layers) and not _LAYER_MODULES.isdisjoint(name.split(".")))
    ]
    if needed:
        raise ValueError(
            f"{stored[needed[0]].file}: {len(needed)} tensors are not part of the model that config.json "
            f"describes, the first is {needed[0]!r}: correct config.json or remove them"
        )
    if unread:
        shown = ", ".join(unread[:3]) + (", ..." if len(unread) > 3 else "")
        log.warning("%s: %d tensors are not part of the model and are not read: %s", path, len(unread), shown)


def _layers_prefix(name: str) -> str:
    """Return the part of a parameter's name before the number of its layer; "" outside of layers."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), 0)
    return "".join(f"{part}." for part in parts[:number])


class _Param(NamedTuple):
    """A parameter to be loaded.

    If KV heads are copied, each device gets the whole tensor, which is small: the projections of few KV heads.
    """

    spelling: Spelling
    module: str
    slices: dict[str, Any]
    variable: Any
    copies: KVCopies

    def read(self) -> dict[Index | None, np.ndarray]:
        """Read the part of each device from the files."""
        read, piece = self.spelling.read, self.slices.__getitem__
        indices = set(self._placed().addressable_devices_indices_map(self._assembled_shape()).values())
        return {index: read(self.module, self._shape(), piece, index) for index in indices if index is not None}

    def send(self, parts: dict[Index | None, np.ndarray]) -> jax.Array:
        """Send each device its part; the device transposes and converts it. The call blocks: parts cannot pile up."""
        spelling, dtype, copied = self.spelling, self.variable.dtype, self._copied()
        sharding = self._sharding()
        array = jax.make_array_from_callback(self._assembled_shape(), self._placed(), parts.__getitem__)
        if spelling.axes != tuple(range(array.ndim)) or spelling.decode or copied or array.dtype != dtype:
            array = _convert(array, spelling, dtype, sharding, self.copies, copied)
        return moved(jax.block_until_ready(array), to_host=is_on_host(self.variable.get_value()))

    def _shape(self) -> tuple[int, ...]:
        return self.copies.shape_without(self.variable.shape, self.variable.logical_axes)

    def _assembled_shape(self) -> tuple[int, ...]:
        return self.spelling.assembled_shape(self._shape())

    def _copied(self) -> tuple[str | None, ...]:
        axes = self.variable.logical_axes
        return axes if self.copies.is_copied(axes) else ()

    def _sharding(self) -> NamedSharding:
        return moved(self.variable.get_value(), to_host=False).sharding

    def _placed(self) -> NamedSharding:
        sharding = self._sharding()
        spec = P(*(_padded(sharding.spec, len(self._shape()))[axis] for axis in self.spelling.axes))
        if self.spelling.decode:  # other axes are split after decoding: a part may start within a block of numbers
            spec = P(spec[0])
        return NamedSharding(sharding.mesh, P() if self._copied() else spec)


def _padded(spec: P, ndim: int) -> tuple[Any, ...]:
    return (*spec, *(None,) * (ndim - len(spec)))


@partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _convert(
    array: jax.Array,
    spelling: Spelling,
    dtype: Any,
    sharding: NamedSharding,
    copies: KVCopies,
    copied: tuple[str | None, ...],
) -> jax.Array:
    array = spelling.decode(array, dtype) if spelling.decode else array
    array = array.transpose(spelling.axes).astype(dtype)
    return jax.lax.with_sharding_constraint(copies.make(array, copied), sharding)
