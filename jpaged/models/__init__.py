"""Model families in flax.nnx, and Hugging Face checkpoints read into them."""

from jpaged.models.config import ModelConfig, import_transformers
from jpaged.models.fused import fuse_projections
from jpaged.models.layers import fuse_norms
from jpaged.models.llama import LlamaConfig, LlamaForCausalLM
from jpaged.models.opt import OPTConfig, OPTForCausalLM
from jpaged.models.registry import SUPPORTED_ARCHITECTURES, load_config, load_model, random_model
from jpaged.models.rope import Rope
from jpaged.models.weights import save_checkpoint

__all__ = [
    "SUPPORTED_ARCHITECTURES",
    "LlamaConfig",
    "LlamaForCausalLM",
    "ModelConfig",
    "OPTConfig",
    "OPTForCausalLM",
    "Rope",
    "fuse_norms",
    "fuse_projections",
    "import_transformers",
    "load_config",
    "load_model",
    "random_model",
    "save_checkpoint",
]
