"""Tensors that are whole on each rank, and DTensors of which a rank holds a part: the same code for both."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..data.feed import to_device
from ..parallel import local_tensor, num_shards


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds: a DTensor's shard, or the tensor itself; shares the memory, without gradients."""
    # An update asks for a thousand of these, and waits for the host where it follows passes without a CUDA graph:
    # detaching a DTensor takes ten times as long as looking into it.
    local = local_tensor(tensor.detach() if torch.is_grad_enabled() else tensor)
    return local.detach() if local.requires_grad else local


@torch.no_grad()
def squared_norms(tensors: Sequence[Tensor]) -> Tensor:
    """The squared norm of each tensor as a whole, (len(tensors),) fp32, without waiting for the device.

    Where there are DTensors, all ranks must call it together: one sum over all of them, to which each part of a tensor
    counts as often as there are ranks that hold it.
    """
    norms = torch.stack(torch._foreach_norm([local_part(tensor) for tensor in tensors], 2, dtype=torch.float32))
    shards = [num_shards(tensor) for tensor in tensors]
    squares = norms.square()
    if max(shards) > 1:
        factors = torch.tensor([count / dist.get_world_size() for count in shards])
        squares = squares * to_device(factors, squares.device)
        dist.all_reduce(squares)
    return squares


def reshard(model: nn.Module) -> None:
    """Free parameters that FSDP has gathered and may use again: to be called before their parts are changed."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
