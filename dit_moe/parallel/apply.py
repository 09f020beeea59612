"""parallelize: spread a model over the ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from ..model import DiT
from .config import ParallelConfig


def parallelize(
    model: DiT, config: ParallelConfig, device: torch.device | str, *, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Move a model to this rank's device and spread it over the ranks: a collective call, before the optimiser is made.

    All ranks start from rank 0's weights. A model on the meta device gets fresh ones, block by block, so that no rank
    ever holds the whole. Parameter names stay as they are (inside DDP's wrapper: see `unwrap`); parameters that are
    spread become DTensors of the full shape. Autocast stays the caller's: `dtype` only says what to gather in.

    Args:
        model: a whole model, of the same configuration on every rank; changed in place.
        config: how to spread it.
        device: this rank's device.
        dtype: with "fsdp", in which the parameters of the blocks are gathered and used, bf16 under bf16 autocast; the
            routers, the embeddings and the final layer stay in fp32, and gradients are averaged in fp32.

    Returns:
        The model itself, or the DistributedDataParallel around it.

    Raises:
        ValueError: ranks or experts cannot be shared out so.
        RuntimeError: torch.distributed is not initialised where data_parallel is not "none".
    """
    device = torch.device(device)
    config.check_experts(model.config.num_experts)
    if config.data_parallel == "none":
        if dist.is_initialized():
            config.check_ranks(dist.get_world_size())
        if any(tensor.is_meta for tensor in model.parameters()):
            model.to_empty(device=device)
            model.reset_parameters()
        return model.to(device)
    if not dist.is_initialized():
        raise RuntimeError(f"data_parallel {config.data_parallel!r} needs torch.distributed.init_process_group first")
    from .spread import spread  # torch's DTensor and FSDP take a second to import

    return spread(model, config, device, dtype)


def unwrap(model: nn.Module) -> DiT:
    """The model inside what `parallelize` returned.

    Raises:
        TypeError: there is no DiT inside.
    """
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    if not isinstance(inner, DiT):
        raise TypeError(f"model: got {type(inner).__name__}, expected a DiT or DistributedDataParallel around one")
    return inner
