"""DiT-MoE: diffusion transformers with a mixture of experts, on the kernels of `dit_moe_kernels`."""

from .checkpoint import CheckpointError, export_state_dict, load_checkpoint, load_model, save_model
from .config import DiTConfig
from .engine import SamplingEngine
from .layers import MoEFeedForward, MoEOutput
from .model import DiT, MoEAux
from .presets import DiT_models, model_config
from .sampling import sample_ddim, sample_ddpm, sample_rectified_flow

__all__ = [
    "CheckpointError",
    "DiT",
    "DiTConfig",
    "DiT_models",
    "MoEAux",
    "MoEFeedForward",
    "MoEOutput",
    "SamplingEngine",
    "export_state_dict",
    "load_checkpoint",
    "load_model",
    "model_config",
    "sample_ddim",
    "sample_ddpm",
    "sample_rectified_flow",
    "save_model",
]
