"""The models of the paper (table 1) and their dense twins, by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from .config import DiTConfig
from .model import DiT

# size: depth, hidden_size, num_heads, and whether the official DiT-MoE of this size normalises queries and keys
_SIZES = {
    "S": (12, 384, 6, False),
    "B": (12, 768, 12, False),
    "L": (24, 1024, 16, False),
    "XL": (28, 1152, 16, True),
    "G": (40, 1408, 16, True),
}


def _preset_configs() -> dict[str, DiTConfig]:
    configs = {}
    for size, (depth, hidden_size, num_heads, qk_norm) in _SIZES.items():
        shape: dict[str, Any] = {"depth": depth, "hidden_size": hidden_size, "num_heads": num_heads}
        configs[f"DiT-{size}/2"] = DiTConfig(**shape, num_experts=0)
        for num_experts in (8, 16):
            configs[f"DiT-MoE-{size}/2-{num_experts}E2A"] = DiTConfig(**shape, num_experts=num_experts, qk_norm=qk_norm)
    return configs


_CONFIGS = _preset_configs()


def model_config(name: str, **overrides: Any) -> DiTConfig:
    """The configuration of a preset, with some fields replaced.

    Args:
        name: such as "DiT-MoE-XL/2-8E2A" (8 experts, 2 active per token) or the dense "DiT-XL/2"; 256 x 256 pixels,
            that is input_size 32 behind an autoencoder of factor 8.
        overrides: fields of `DiTConfig`, such as input_size=64 for 512 x 512 pixels.

    Raises:
        ValueError: the name is no preset, or a field is unknown or out of range.
    """
    if name not in _CONFIGS:
        raise ValueError(f"model name: got {name!r}, expected one of {sorted(_CONFIGS)}")
    return DiTConfig.from_dict({**_CONFIGS[name].to_dict(), **overrides})


def _build(name: str, **overrides: Any) -> DiT:
    return DiT(model_config(name, **overrides))


DiT_models: dict[str, Callable[..., DiT]] = {name: partial(_build, name) for name in _CONFIGS}
"""Name -> function of DiTConfig overrides that builds the model with fresh weights."""
