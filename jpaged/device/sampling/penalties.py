"""Penalties for tokens that a sequence has seen."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jpaged.device.sampling.columns import SampleInputs


def penalised(logits: Float[Array, "rows vocab"], inputs: SampleInputs) -> Float[Array, "rows vocab"]:
    """The logits after repetition (CTRL, arXiv:1909.05858, section 4.1), frequency and presence penalties."""
    if inputs.seen_rows.shape[0] == 0:
        return logits
    # One temporary holds both counts: bit 0 says "in the prompt", the bits above count occurrences in the output.
    # A token of the other kind goes to row num_rows, which is dropped.
    num_rows = logits.shape[0]
    prompt_rows = jnp.where(inputs.seen_is_output, num_rows, inputs.seen_rows)
    output_rows = jnp.where(inputs.seen_is_output, inputs.seen_rows, num_rows)
    seen = jnp.zeros(logits.shape, jnp.int32)
    seen = (
        seen.at[prompt_rows, inputs.seen_ids].set(1, mode="drop").at[output_rows, inputs.seen_ids].add(2, mode="drop")
    )
    num_generated = (seen >> 1).astype(jnp.float32)
    repetition = jnp.where(seen > 0, inputs.repetition_penalty[:, None], 1.0)
    logits = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits -= inputs.frequency_penalty[:, None] * num_generated
    return logits - inputs.presence_penalty[:, None] * (num_generated > 0).astype(jnp.float32)
