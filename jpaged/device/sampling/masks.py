"""Logit biases and bans."""

from jaxtyping import Array, Float

from jpaged.device.sampling.columns import SampleInputs


def biased(logits: Float[Array, "rows vocab"], inputs: SampleInputs) -> Float[Array, "rows vocab"]:
    """The logits with what each row adds to some of its tokens'; -inf bans a token."""
    if inputs.bias_rows.shape[0] == 0:
        return logits
    return logits.at[inputs.bias_rows, inputs.bias_ids].add(inputs.bias_values, mode="drop")
