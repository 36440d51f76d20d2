"""The planner's predictions of decode steps over KV on the host, for comparison with those measured."""

from typing import Any

from bench.offload.shapes import BLOCK_SIZE, Shapes
from jpaged.contract.profile import MachineProfile
from jpaged.host.offload.profile import layer_s
from jpaged.host.offload.split import Schedule, decode_layer_s, layer_stream, split_decode


def predict_steps(
    profile: MachineProfile, shapes: Shapes, kv_block_bytes: int, itemsize: int, num_blocks: list[int]
) -> dict[str, Any]:
    """Predict milliseconds of a decode step by the share of tokens whose K and V are computed from activations.

    Args:
        profile: rates of the machine, those of projections included.
        shapes: the model.
        kv_block_bytes: bytes of K and V of a block, over all layers.
        itemsize: bytes of an element of activations on the host.
        num_blocks: full blocks on the host of each row.

    Returns:
        "kv_ms" transfers all K and V, "activations_ms" computes all. "planned_ms" and "paper_ms" have the best share of
        the pipelined and of the paper's schedule, which "planned_share" and "paper_share" name.
    """
    model = shapes.model_config
    num_tokens = sum(num_blocks) * BLOCK_SIZE
    num_elements = 2 * model.num_layers * model.num_kv_heads * model.head_dim * BLOCK_SIZE
    stream = layer_stream(
        hidden_size=model.hidden_size,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        layer_s=layer_s(profile, num_tokens),
        kv_itemsize=kv_block_bytes / num_elements,
        activation_itemsize=itemsize,
    )

    def step_ms(num_recomputed: int, schedule: Schedule) -> float:
        return 1e3 * model.num_layers * decode_layer_s(profile, stream, num_tokens, num_recomputed, schedule)

    predicted: dict[str, Any] = {
        "kv_ms": step_ms(0, "pipelined"),
        "activations_ms": step_ms(num_tokens, "pipelined"),
    }
    schedules: dict[str, Schedule] = {"planned": "pipelined", "paper": "paper"}
    for name, schedule in schedules.items():
        split = split_decode(profile, stream, num_blocks, block_size=BLOCK_SIZE, schedule=schedule)
        predicted[f"{name}_ms"] = 1e3 * model.num_layers * split.seconds
        predicted[f"{name}_share"] = sum(split.num_recomputed_blocks) / sum(num_blocks)
    return predicted
