"""The layers of DiT and DiT-MoE."""

from .attention import Attention
from .embed import LabelEmbedder, PatchEmbed, TimestepEmbedder, sincos_pos_embed, timestep_features
from .experts import GroupedExperts
from .mlp import Mlp, SwiGLU
from .modulation import Modulation, Residual, modulated_norm
from .moe import MoEFeedForward, MoEOutput
from .router import Routing, TopKRouter

__all__ = [
    "Attention",
    "GroupedExperts",
    "LabelEmbedder",
    "MoEFeedForward",
    "MoEOutput",
    "Mlp",
    "Modulation",
    "PatchEmbed",
    "Residual",
    "Routing",
    "SwiGLU",
    "TimestepEmbedder",
    "TopKRouter",
    "modulated_norm",
    "sincos_pos_embed",
    "timestep_features",
]
