"""What is a rank's own of a spread tensor, and whole tensors from all ranks' parts."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch.distributed as dist
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)  # the common types, known without the import of torch's DTensor in each call


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that is spread, sharing its memory; any other tensor as it is.

    What works element by element (averaged weights, an update) runs on these at full speed, whatever the meshes.
    """
    if type(tensor) in _PLAIN:
        return tensor
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def num_shards(tensor: Tensor) -> int:
    """Into how many different parts the ranks have cut a tensor; 1 for one that is not spread."""
    if type(tensor) in _PLAIN:
        return 1
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        return 1
    sizes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return math.prod(size for size, placement in sizes if placement.is_shard())


def full_state_dict(state: Mapping[str, Tensor], *, rank0_only: bool = True) -> dict[str, Tensor]:
    """Whole tensors in CPU memory, from a state whose tensors may be spread: a collective call.

    Args:
        state: the same names in the same order on every rank, such as `unwrap(model).state_dict()` or averages of it.
        rank0_only: give the result to rank 0 alone, and an empty one to the others.

    Returns:
        name -> tensor; one is gathered after the other, so a device needs room for a single whole one.
    """
    from torch.distributed.tensor import DTensor

    wanted = not rank0_only or not dist.is_initialized() or dist.get_rank() == 0
    full: dict[str, Tensor] = {}
    for name, tensor in state.items():
        tensor = tensor.detach()
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if wanted:
            full[name] = whole.to("cpu", copy=True).contiguous()
    return full
