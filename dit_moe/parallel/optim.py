"""Optimiser and gradient norm over parameters that are spread over different meshes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .state import local_tensor, num_shards


def optimizer_groups(parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """Parameter groups for a torch optimiser, one for each mesh: its fused and foreach updates cannot mix meshes.

    The groups come in the order in which their first parameters do, each keeping the given order.
    """
    groups: dict[object, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    return [{"params": group} for group in groups.values()]


@torch.no_grad()
def clip_grad_norm_(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients by min(1, max_norm / norm), the norm being that of the whole model's gradient.

    As torch's function of the same name, for parameters spread over any meshes. Where there are such it is a collective
    call of all ranks, with one sum over them; it never waits for the device.

    Returns:
        () fp32, the norm before clipping, the same on every rank; 0 where no parameter has a gradient.
    """
    kinds: dict[int, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            kinds.setdefault(_copies(parameter), []).append(local_tensor(parameter.grad))
    if not kinds:
        return torch.zeros(())
    square = torch.stack([_square(grads) / copies for copies, grads in kinds.items()]).sum()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(square)
    norm = square.sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for grads in kinds.values():
        torch._foreach_mul_(grads, factor)
    return norm


def _copies(parameter: Tensor) -> int:
    """How many ranks hold the same part of a parameter."""
    return dist.get_world_size() // num_shards(parameter) if dist.is_initialized() else 1


def _square(tensors: list[Tensor]) -> Tensor:
    """Sum of the squares of all elements, in fp32 at least."""
    norms = torch.stack(torch._foreach_norm(tensors, 2.0))
    return norms.to(torch.promote_types(norms.dtype, torch.float32)).square().sum()
