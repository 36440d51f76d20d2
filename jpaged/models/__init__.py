"""Model families in flax.nnx, and Hugging Face checkpoints read into them."""

from jpaged.models.checkpoint.config import ModelConfig, import_transformers
from jpaged.models.checkpoint.registry import SUPPORTED_ARCHITECTURES, load_config, load_model, random_model
from jpaged.models.checkpoint.weights import save_checkpoint
from jpaged.models.contract import CausalLM
from jpaged.models.families.llama import LlamaConfig, LlamaForCausalLM
from jpaged.models.families.opt import OPTConfig, OPTForCausalLM
from jpaged.models.layers.common import fuse_norms
from jpaged.models.layers.fused import fuse_projections
from jpaged.models.layers.rope import Rope
from jpaged.models.spec import LayerSpec

__all__ = [
    "SUPPORTED_ARCHITECTURES",
    "CausalLM",
    "LayerSpec",
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
