"""Parameters that are whole on each rank, and DTensors of which a rank holds a part: the same code for both."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds: a DTensor's shard, or the tensor itself; shares the memory, without gradients."""
    part = tensor.detach()
    return part.to_local() if isinstance(part, DTensor) else part


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor; for a DTensor all ranks must call it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def squared_norms(tensors: Sequence[Tensor]) -> Tensor:
    """The squared norm of each tensor as a whole, one (len(tensors),) fp32 tensor, without waiting for the device.

    For DTensors all ranks must call it together: one reduction for all tensors that are sharded in the same way.
    """
    norms = torch.stack(torch._foreach_norm([local_part(tensor) for tensor in tensors], 2, dtype=torch.float32))
    squares = norms.square()
    groups: dict[tuple, list[int]] = {}
    for index, tensor in enumerate(tensors):
        if isinstance(tensor, DTensor):
            groups.setdefault((tensor.device_mesh, tensor.placements), []).append(index)
    for (mesh, placements), indices in groups.items():
        sharded = [dim for dim, placement in enumerate(placements) if not placement.is_replicate()]
        chosen = squares if len(indices) == len(tensors) else torch.stack([squares[i] for i in indices])
        for dim in sharded:
            dist.all_reduce(chosen, group=mesh.get_group(dim))
        if chosen is not squares:
            parts = list(squares.unbind())
            for index, value in zip(indices, chosen.unbind(), strict=True):
                parts[index] = value
            squares = torch.stack(parts)
    return squares
