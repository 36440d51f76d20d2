"""The writer of the reference checkpoints beside this file, and of Hugging Face's results for them.

Run this script once, in an environment of its own, for a Python that PyTorch supports:

    pip install torch==2.13.0 transformers==5.23.0 && python tests/hf_reference/make.py [CASE ...]

Each case is a directory: a tiny random checkpoint from ``save_pretrained``, and ``reference.npz``. For every prompt
length L that file has ``prompt_L`` (ids), ``tokens_L`` (greedy), ``logprobs_L`` (of these tokens) and
``prompt_logprobs_L`` (of every prompt token but the first). transformers computes them in float32, by a prefill and
then one token at a time over its cache. So the results of "dynamic" and "longrope" depend on the prompt's length: a
cached key is rotated for max(prompt length, position + 1). ``jpaged.models.layers.rope`` defines both in the same way.
"""

import copy
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

PROMPT_LENS = (1, 2, 15, 16, 17, 31, 33, 70)
NUM_TOKENS = 40
MIN_MARGIN = (
    1e-3  # between the two best logits of every step: far above float32 noise, so that greedy tokens are unambiguous
)
MIN_DISTINCT = 8  # tokens of a continuation: a constant continuation would hide errors of position


@dataclass(frozen=True)
class Case:
    """A checkpoint: its model type, its differences from ``_SMALL``, and its storage.

    ``has_packed_experts`` stores the experts of gpt-oss in MXFP4.
    """

    model_type: str
    config: dict[str, Any]
    dtype: torch.dtype = torch.float32
    save: dict[str, Any] = field(default_factory=dict)
    has_packed_experts: bool = False


_SMALL = {
    "vocab_size": 131,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def _rope(rope_type: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **parameters}}


_OPT = {
    "vocab_size": 131,
    "hidden_size": 36,
    "ffn_dim": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 112,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}

_EXPERTS = {"head_dim": 12, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 20}

_GPT2 = {
    "vocab_size": 131,
    "n_embd": 36,
    "n_layer": 3,
    "n_head": 2,
    "n_positions": 112,
    "layer_norm_epsilon": 1e-3,
    "bos_token_id": None,
    "eos_token_id": None,
}

_GPT_OSS = {
    **_EXPERTS,
    "num_hidden_layers": 3,
    "num_local_experts": 6,
    "num_experts_per_tok": 3,
    "sliding_window": 24,
    "swiglu_limit": 1.5,
    **_rope("yarn", factor=4.0, original_max_position_embeddings=32, truncate=False),
}

CASES = {
    "llama_mha": Case(
        "llama", {"hidden_size": 36, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": None}
    ),
    "llama_gqa": Case("llama", {"num_hidden_layers": 3, "vocab_size": 97, "intermediate_size": 36}),
    "llama_bias": Case("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
    "llama_tied": Case(
        "llama",
        {
            "tie_word_embeddings": True,
            "hidden_size": 42,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "head_dim": 20,
            "eos_token_id": [130, 129],
        },
    ),
    "llama_sharded": Case("llama", {"head_dim": 12}, save={"max_shard_size": "30KB"}),
    "llama_linear": Case("llama", {"max_position_embeddings": 64, **_rope("linear", factor=2.0)}),
    "llama_dynamic": Case("llama", {"max_position_embeddings": 48, **_rope("dynamic", factor=3.0)}),
    "llama_yarn": Case("llama", _rope("yarn", factor=4.0, original_max_position_embeddings=32)),
    "llama_yarn_mscale": Case(
        "llama",
        _rope(
            "yarn",
            factor=2.0,
            original_max_position_embeddings=64,
            mscale=1.0,
            mscale_all_dim=0.5,
            beta_fast=8,
            beta_slow=2,
            truncate=False,
        ),
    ),
    "llama_longrope": Case(
        "llama",
        _rope(
            "longrope",
            short_factor=[1.0, 1.05, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6],
            long_factor=[1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 7.0, 8.0],
            original_max_position_embeddings=64,
            factor=2.0,
        ),
    ),
    "llama_llama3": Case(
        "llama",
        _rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
    ),
    "mistral": Case("mistral", {"sliding_window": 24, "head_dim": 12}, dtype=torch.float16),
    "qwen2": Case("qwen2", {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": None}),
    "qwen2_window": Case(
        "qwen2",
        {
            "num_hidden_layers": 3,
            "head_dim": None,
            "hidden_size": 48,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 24,
            "max_window_layers": 1,
            "intermediate_size": 20,
        },
    ),
    "qwen3": Case("qwen3", {"head_dim": 20, "num_attention_heads": 4, "num_key_value_heads": 1}, dtype=torch.bfloat16),
    "mixtral": Case(
        "mixtral",
        {**_EXPERTS, "num_local_experts": 7, "num_experts_per_tok": 2, "sliding_window": 24, "num_hidden_layers": 3},
        dtype=torch.bfloat16,
    ),
    "qwen2_moe": Case(
        "qwen2_moe",
        {
            **_EXPERTS,
            "num_hidden_layers": 5,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 12,
            "shared_expert_intermediate_size": 20,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "use_sliding_window": True,
            "sliding_window": 24,
            "max_window_layers": 4,
        },
        dtype=torch.bfloat16,
    ),
    "qwen3_moe": Case(
        "qwen3_moe",
        {**_EXPERTS, "num_experts": 9, "num_experts_per_tok": 3, "moe_intermediate_size": 12, "norm_topk_prob": True},
        dtype=torch.bfloat16,
    ),
    "gpt_oss": Case("gpt_oss", _GPT_OSS, dtype=torch.bfloat16),
    "gpt_oss_mxfp4": Case(
        "gpt_oss",
        {**_GPT_OSS, "intermediate_size": 64, "num_local_experts": 5, "num_experts_per_tok": 2},
        dtype=torch.bfloat16,
        has_packed_experts=True,
    ),
    "smollm3": Case(
        "smollm3",
        {
            "num_hidden_layers": 5,
            "intermediate_size": 20,
            "head_dim": 12,
            "no_rope_layers": [1, 0, 1, 1, 0],
            "use_sliding_window": True,
            "sliding_window": 24,
        },
        dtype=torch.bfloat16,
    ),
    "granite": Case(
        "granite",
        {
            "head_dim": 12,
            "attention_bias": True,
            "embedding_multiplier": 1.7,
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.7,
            "logits_scaling": 1.3,
        },
    ),
    "olmo2": Case("olmo2", {"hidden_size": 48, "num_key_value_heads": 1, "head_dim": None}, dtype=torch.bfloat16),
    "starcoder2": Case(
        "starcoder2",
        {"sliding_window": 24, "head_dim": 12, "norm_epsilon": 1e-3, "tie_word_embeddings": False},
        dtype=torch.float16,
    ),
    "gemma2": Case(
        "gemma2",
        {
            "num_hidden_layers": 3,
            "intermediate_size": 20,
            "head_dim": 12,
            "sliding_window": 24,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 2.5,
            "final_logit_softcapping": 6.0,
            "attention_bias": True,
            "tie_word_embeddings": False,
        },
    ),
    "gemma3": Case(
        "gemma3_text",
        {
            "num_hidden_layers": 5,
            "intermediate_size": 20,
            "num_key_value_heads": 1,
            "head_dim": 12,
            "sliding_window": 24,
            "layer_types": [
                "sliding_attention",
                "sliding_attention",
                "full_attention",
                "sliding_attention",
                "sliding_attention",
            ],
            "query_pre_attn_scalar": 9,
            "tie_word_embeddings": False,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
        dtype=torch.bfloat16,
    ),
    "phi3": Case("phi3", {"sliding_window": 24, "head_dim": None, "num_key_value_heads": 4}, dtype=torch.bfloat16),
    "phi3_longrope": Case(
        "phi3",
        {
            "hidden_size": 64,
            "num_key_value_heads": 1,
            "head_dim": None,
            "intermediate_size": 28,
            "original_max_position_embeddings": 64,
            **_rope(
                "longrope",
                short_factor=[1.0, 1.1, 1.2, 1.3, 1.4, 1.6],
                long_factor=[1.0, 1.5, 2.0, 3.0, 5.0, 8.0],
                partial_rotary_factor=0.75,
            ),
        },
        dtype=torch.float16,
    ),
    "gpt2": Case("gpt2", {**_GPT2, "tie_word_embeddings": False}, dtype=torch.float16),
    "gpt2_scaled": Case(
        "gpt2",
        {**_GPT2, "n_inner": 44, "scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
        dtype=torch.float16,
    ),
    "opt": Case("opt", _OPT),
    "opt_post_norm": Case("opt", {**_OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 20}),
}


def _randomise(model: torch.nn.Module, dtype: torch.dtype, seed: int) -> None:
    """Draw weights that are exact in ``dtype``, and so large that attention is not uniform and logits spread over nats.

    Only parameters are rounded. Buffers such as rotary frequencies stay float32, as in a loaded checkpoint.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("bias"):
            value = 0.15 * noise
        elif name.endswith("sinks"):
            value = noise
        elif "experts" in name:  # [experts, out, in], and gpt-oss [experts, in, out]
            value = 1.5 / math.sqrt(parameter.shape[1 if model.config.model_type == "gpt_oss" else 2]) * noise
        elif "norm" in name or ".ln_" in name:
            value = (0 if model.config.model_type.startswith("gemma") else 1) + 0.2 * noise  # Gemma adds 1
        elif "embed_positions" in name or "wpe" in name:
            value = 1.5 * noise
        elif "embed" in name or "wte" in name:
            value = 0.5 * noise
        else:
            fan_in = parameter.shape[0 if ".c_" in name and model.config.model_type == "gpt2" else 1]
            value = (3.0 if "lm_head" in name else 1.5) / math.sqrt(fan_in) * noise
        parameter.data.copy_(value.to(dtype))


def _pack_experts(model: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Give the experts of gpt-oss random weights that MXFP4 represents, and return their blocks and scales."""
    generator, packed = torch.Generator().manual_seed(seed), {}
    for name, parameter in model.named_parameters():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            num_experts, num_in, num_out = parameter.shape
            shape = (num_experts, num_out, num_in // 32)
            blocks = torch.randint(256, (*shape, 16), generator=generator, dtype=torch.uint8)
            scales = torch.randint(122, 126, shape, generator=generator, dtype=torch.uint8)  # 2**-5 to 2**-2
            parameter.data.copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
            packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    return packed


def _store_packed(packed: dict[str, torch.Tensor], path: Path) -> None:
    """Replace the experts of a checkpoint by their blocks and scales."""
    names = {name.rpartition("_")[0] for name in packed}
    tensors = {name: value for name, value in load_file(path / "model.safetensors").items() if name not in names}
    save_file(tensors | packed, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    del config["dtype"]  # as in the checkpoints of OpenAI
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")


@torch.no_grad()
def _continue(model: Any, prompt: torch.Tensor) -> tuple[dict[str, np.ndarray], float]:
    """Compute greedy tokens and log-probabilities, and the smallest margin."""
    model = copy.deepcopy(model)  # rope scalings keep state from one sequence to the next
    cache = DynamicCache(config=model.config)
    logits = model(prompt[None], past_key_values=cache, use_cache=True).logits[0]
    before = torch.log_softmax(logits[:-1], -1)
    tokens, logprobs, margin = [], [], math.inf
    for _ in range(NUM_TOKENS):
        best = torch.topk(logits[-1], 2).values
        margin = min(margin, float(best[0] - best[1]))
        token = int(torch.argmax(logits[-1]))
        tokens.append(token)
        logprobs.append(float(torch.log_softmax(logits[-1], -1)[token]))
        logits = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits[0]
    arrays = {
        "prompt": prompt.numpy().astype(np.int32),
        "tokens": np.array(tokens, np.int32),
        "logprobs": np.array(logprobs, np.float32),
        "prompt_logprobs": before.gather(1, prompt[1:, None])[:, 0].numpy(),
    }
    return arrays, margin


def _candidates(case: Case) -> Iterator[tuple[int, Any, dict[str, torch.Tensor]]]:
    """Yield float32 models for seeds 0, 1, ... and their packed tensors; weights are exact in the storage dtype."""
    values = case.config if case.model_type in ("opt", "gpt2") else _SMALL | case.config
    config = AutoConfig.for_model(case.model_type, **{k: v for k, v in values.items() if v is not None or "token" in k})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    for seed in range(1000):
        _randomise(model, case.dtype, seed)
        yield seed, model, _pack_experts(model, seed) if case.has_packed_experts else {}


def make(name: str, case: Case, root: Path) -> None:
    """Write one case, with the first seed whose continuations are unambiguous and varied."""
    for seed, model, packed in _candidates(case):
        generator = torch.Generator().manual_seed(seed)
        reference, margins, distinct = {}, [], []
        for length in PROMPT_LENS:
            prompt = torch.randint(model.config.vocab_size, (length,), generator=generator)
            arrays, margin = _continue(model, prompt)
            margins.append(margin)
            distinct.append(len(set(arrays["tokens"].tolist())))
            reference |= {f"{key}_{length}": value for key, value in arrays.items()}
            if margin < MIN_MARGIN or distinct[-1] < MIN_DISTINCT:
                break
        else:
            print(f"{name}: seed {seed}, smallest margin {min(margins):.1e}, fewest distinct tokens {min(distinct)}")
            model.to(case.dtype).save_pretrained(root / name, **case.save)
            if packed:
                _store_packed(packed, root / name)
            np.savez_compressed(root / name / "reference.npz", **reference)
            return
    raise RuntimeError(f"{name}: no seed gives unambiguous continuations")


if __name__ == "__main__":
    torch.set_num_threads(1)  # the models are tiny
    for chosen in sys.argv[1:] or CASES:
        make(chosen, CASES[chosen], Path(__file__).parent)
