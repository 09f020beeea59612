"""Exact sizes of a model in closed form: parameters, activated parameters, multiply-accumulates and FLOPs.

The paper's "Gflops" (table 1) are GMACs of one image without the attention products QK^T and AV; `macs(config,
attention=False)` reproduces them. The dense DiT's published numbers are GMACs with these products.
"""

from __future__ import annotations

from .config import DiTConfig
from .layers.embed import NUM_TIME_FEATURES


def parameters_by_part(config: DiTConfig) -> dict[str, int]:
    """Number of parameters of each part of the model, the fixed position embeddings included.

    Returns:
        part -> parameters; the parts of all blocks are summed. "experts" are the routed ones, "mlp" is the dense DiT's.
    """
    width = config.hidden_size
    patch = config.patch_size**2
    gelu = config.is_moe and config.shared_expert == "gelu"
    block = {
        "attention": 4 * width * (width + 1) + (4 * config.head_dim if config.qk_norm else 0),
        "modulation": 6 * width * (width + 1),
        "router": config.num_experts * width,
        "experts": config.num_experts * expert_parameters(config),
        "shared_expert": _shared_expert_macs(config) + (config.shared_hidden_size + width if gelu else 0),
        "mlp": 0 if config.is_moe else 2 * width * config.ffn_hidden_size + config.ffn_hidden_size + width,
    }
    return {
        "patch_embed": width * (config.in_channels * patch + 1),
        "pos_embed": config.num_tokens * width,
        "time_embed": width * (NUM_TIME_FEATURES + 1) + width * (width + 1),
        "class_embed": (config.num_classes + 1) * width,
        **{part: config.depth * count for part, count in block.items()},
        "final_layer": 2 * width * (width + 1) + config.out_channels * patch * (width + 1),
    }


def expert_parameters(config: DiTConfig) -> int:
    """Parameters of one routed expert: three matrices of D x F."""
    return 3 * config.hidden_size * config.ffn_hidden_size if config.is_moe else 0


def _shared_expert_macs(config: DiTConfig) -> int:
    """Entries of its matrices, each used once per token: two of D x Fs in a GELU MLP, three in a SwiGLU."""
    return (2 if config.shared_expert == "gelu" else 3) * config.hidden_size * config.shared_hidden_size


def count_parameters(config: DiTConfig) -> int:
    """Number of parameters of the model, the fixed position embeddings included."""
    return sum(parameters_by_part(config).values())


def count_activated_parameters(config: DiTConfig) -> int:
    """Number of parameters that one token meets: all but those of the experts it does not visit."""
    idle_experts = config.num_experts - config.top_k if config.is_moe else 0
    return count_parameters(config) - config.depth * idle_experts * expert_parameters(config)


def macs_by_part(config: DiTConfig) -> dict[str, int]:
    """Multiply-accumulates of each part in one forward of one image: every matrix product, nothing elementwise.

    Returns:
        part -> multiply-accumulates; the parts of all blocks are summed. "attention_products" are QK^T and AV.
    """
    width, tokens = config.hidden_size, config.num_tokens
    patch = config.patch_size**2
    block = {
        "attention": tokens * 4 * width**2,
        "attention_products": 2 * tokens**2 * width,
        "modulation": 6 * width**2,  # once per image
        "router": tokens * config.num_experts * width,
        "experts": tokens * config.top_k * expert_parameters(config),
        "shared_expert": tokens * _shared_expert_macs(config),
        "mlp": 0 if config.is_moe else tokens * 2 * width * config.ffn_hidden_size,
    }
    return {
        "patch_embed": tokens * width * config.in_channels * patch,
        "time_embed": NUM_TIME_FEATURES * width + width**2,
        **{part: config.depth * count for part, count in block.items()},
        "final_layer": 2 * width**2 + tokens * width * config.out_channels * patch,
    }


def macs(config: DiTConfig, attention: bool = True) -> int:
    """Multiply-accumulates of one forward of one image.

    Args:
        config: the architecture.
        attention: count the products QK^T and AV too, which the DiT-MoE paper leaves out.
    """
    parts = macs_by_part(config)
    return sum(parts.values()) - (0 if attention else parts["attention_products"])


def flops(config: DiTConfig, attention: bool = True) -> int:
    """Floating-point operations of one forward of one image, two per multiply-accumulate."""
    return 2 * macs(config, attention)
