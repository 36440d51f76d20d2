"""Model families in flax.nnx, and Hugging Face checkpoints read into them."""

from jpaged.models.config import ModelConfig
from jpaged.models.llama import LlamaConfig, LlamaForCausalLM
from jpaged.models.registry import SUPPORTED_ARCHITECTURES, load_config, random_model
from jpaged.models.rope import Rope

__all__ = [
    "SUPPORTED_ARCHITECTURES",
    "LlamaConfig",
    "LlamaForCausalLM",
    "ModelConfig",
    "Rope",
    "load_config",
    "random_model",
]
