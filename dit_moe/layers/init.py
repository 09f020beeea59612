"""Weight initialisation shared by the layers."""

from __future__ import annotations

import math

from torch import Tensor, nn


def xavier_uniform_stacked_(weight: Tensor, parts: int = 1) -> None:
    """Xavier uniform, in place, for a weight that stacks several matrices.

    Each matrix gets the bound of its own shape (Glorot & Bengio 2010, equation 16), as if it were a separate Linear.

    Args:
        weight: (..., parts * O, I) float; leading dimensions count matrices.
        parts: how many matrices of (O, I) lie one above the other in the last two dimensions.
    """
    fan_out, fan_in = weight.shape[-2] // parts, weight.shape[-1]
    bound = math.sqrt(6 / (fan_in + fan_out))
    nn.init.uniform_(weight, -bound, bound)


def normal_(weight: Tensor, std: float) -> None:
    """Normal of a standard deviation, in place.

    Nothing happens on the meta device, where PyTorch would only import torch._dynamo for it, which takes a second.
    """
    if not weight.is_meta:
        nn.init.normal_(weight, std=std)


def xavier_linear_(linear: nn.Linear) -> None:
    """Xavier uniform weight and zero bias, in place."""
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)


def zero_(module: nn.Module) -> None:
    """Zero every parameter, in place."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)


def reset_all_parameters(module: nn.Module) -> None:
    """Fresh values for all parameters of a module, for instance after `to_empty` of one built on the meta device."""
    # Children come after their parents in modules(): reversed, each parent has the last word on its children.
    for part in reversed(list(module.modules())):
        reset = getattr(part, "reset_parameters", None)
        if reset is not None:
            reset()
