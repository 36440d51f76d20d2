"""Pages of activations: blocks that hold the inputs of a layer in place of K and V, for twice the tokens.

All functions take the cache as one layer (``KVCache.as_layers``). In a page, the inputs of the first ``block_size``
tokens lie in the place of K, and those of the others in the place of V. The features of an input are laid out as those
of the heads of K. So inputs have as many features as K has.
"""

from jaxtyping import Array, Float, Int

from jpaged.device.kv.pool import KVCache
from pallas_kernels.block_pool.layout import as_sides, shape_of


def write_inputs(layers: KVCache, slots: Int[Array, " tokens"], inputs: Float[Array, "tokens hidden_size"]) -> KVCache:
    """Store the inputs of each token at its slot of the pages: ``page * 2 * block_size + offset``."""
    shape = shape_of(layers.pool)
    sides, offsets = slots // shape.block_size, slots % shape.block_size
    by_head = inputs.astype(layers.pool.dtype).reshape(len(inputs), shape.num_kv_heads, shape.head_dim)
    written = as_sides(layers.pool).at[sides, :, offsets].set(by_head, mode="drop")
    return KVCache(written.reshape(layers.pool.shape))


def read_inputs(layers: KVCache, first: int, num_pages: int) -> Float[Array, "inputs hidden_size"]:
    """The inputs of all tokens of some neighbouring pages."""
    shape = shape_of(layers.pool)
    sides = as_sides(layers.pool)[2 * first : 2 * (first + num_pages)]
    return sides.swapaxes(1, 2).reshape(-1, shape.num_kv_heads * shape.head_dim)
