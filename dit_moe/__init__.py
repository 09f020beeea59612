"""DiT-MoE: diffusion transformers with a mixture of experts, on the kernels of `dit_moe_kernels`."""

from .config import DiTConfig
from .layers import MoEFeedForward, MoEOutput
from .model import DiT, MoEAux
from .presets import DiT_models, model_config

__all__ = [
    "DiT",
    "DiTConfig",
    "DiT_models",
    "MoEAux",
    "MoEFeedForward",
    "MoEOutput",
    "model_config",
]
