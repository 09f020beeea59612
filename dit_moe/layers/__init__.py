"""The layers of DiT and DiT-MoE."""

from .attention import Attention
from .embed import LabelEmbedder, PatchEmbed, TimestepEmbedder, sincos_pos_embed, timestep_features
from .experts import GroupedExperts
from .mlp import Mlp, SwiGLU
from .moe import MoEFeedForward, MoEOutput
from .router import Routing, TopKRouter

__all__ = [
    "Attention",
    "GroupedExperts",
    "LabelEmbedder",
    "MoEFeedForward",
    "MoEOutput",
    "Mlp",
    "PatchEmbed",
    "Routing",
    "SwiGLU",
    "TimestepEmbedder",
    "TopKRouter",
    "sincos_pos_embed",
    "timestep_features",
]
