"""How a model is spread over ranks, one block after another."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from ..layers import MoEFeedForward
from ..layers.init import reset_all_parameters
from ..model import DiT, DiTBlock
from .config import ParallelConfig
from .experts import ShardedExperts
from .mesh import Meshes, make_meshes


def spread(model: DiT, config: ParallelConfig, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """`parallelize` for more than one rank: each block is moved, made equal on all ranks and spread before the next."""
    meshes = make_meshes(config, device.type, dist.get_world_size())
    for block in cast(list[DiTBlock], list(model.blocks)):
        _settle(block, device)
        if block.is_moe:
            _spread_moe(block.moe, config, meshes)
        if config.data_parallel == "fsdp":
            _shard_block(block, config, meshes, dtype)
    for child in model.children():
        if child is not model.blocks:
            _settle(child, device)
    _settle_pos_embed(model, device)
    if config.data_parallel == "fsdp":
        fully_shard(model, mesh=meshes.all, mp_policy=_policy(torch.float32))
        return model
    return _replicate(model, device)


def _settle(module: nn.Module, device: torch.device) -> None:
    """Move to the device, with fresh values if there were none, and take over rank 0's."""
    if any(tensor.is_meta for tensor in module.parameters()):
        module.to_empty(device=device)
        reset_all_parameters(module)
    module.to(device)
    for tensor in module.parameters():
        dist.broadcast(tensor.detach(), 0)


def _settle_pos_embed(model: DiT, device: torch.device) -> None:
    if model.pos_embed.is_meta:
        model.pos_embed = nn.Parameter(torch.empty_like(model.pos_embed, device=device), requires_grad=False)
        model.reset_pos_embed()
    model.pos_embed.data = model.pos_embed.data.to(device)
    dist.broadcast(model.pos_embed.detach(), 0)


def _spread_moe(moe: MoEFeedForward, config: ParallelConfig, meshes: Meshes) -> None:
    if config.global_balance:
        moe.count_group = meshes.all.get_group()
    if config.expert_parallel == 1:
        return
    data_group = None
    if config.data_parallel == "ddp" and meshes.data.size() > 1:
        data_group = meshes.data.get_group()
    moe.experts = ShardedExperts(
        moe.experts, meshes.expert, grad_scale=1 / config.expert_parallel, grad_group=data_group
    )


def _replicate(model: DiT, device: torch.device) -> DistributedDataParallel:
    """DDP, which leaves the experts that are spread to `ShardedExperts`."""
    spread_names = [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, spread_names)
    devices = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)


def _shard_block(block: DiTBlock, config: ParallelConfig, meshes: Meshes, dtype: torch.dtype) -> None:
    """FSDP2 of one block, inner modules first: each call gathers together what the calls before have not taken."""

    def shard(module: nn.Module, over: DeviceMesh, dtype: torch.dtype, first_dim: int = 0) -> None:
        fully_shard(
            module,
            mesh=over,
            reshard_after_forward=config.reshard_after_forward,
            shard_placement_fn=_even_placement(over.size(), first_dim),
            mp_policy=_policy(dtype),
        )

    if block.is_moe:
        if dtype != torch.float32:
            shard(block.moe.gate, meshes.all, torch.float32)  # the router decides in fp32
        if config.expert_parallel > 1:
            shard(block.moe.experts, meshes.data, dtype, first_dim=1)  # the first is cut over the expert mesh
    shard(block.adaLN_modulation, meshes.all, dtype)  # the model runs those of all blocks before the first block
    shard(block, meshes.all, dtype)


def _policy(dtype: torch.dtype) -> MixedPrecisionPolicy:
    # Inputs are not cast: under autocast the residual stream stays in fp32, as on one device.
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)


def _even_placement(num_ranks: int, first_dim: int) -> Callable[[nn.Parameter], Shard | None]:
    """Cut stacked experts along the first dimension that the ranks divide, so that none gets an empty part.

    Other parameters keep FSDP's way, the first dimension, even or not.
    """

    def placement(parameter: nn.Parameter) -> Shard | None:
        if parameter.ndim != 3:
            return None
        for dim in range(first_dim, 3):
            if parameter.shape[dim] % num_ranks == 0:
                return Shard(dim)
        raise ValueError(
            f"data_parallel 'fsdp': got experts of shape {tuple(parameter.shape)}, expected a size among "
            f"{tuple(parameter.shape[first_dim:])} that the {num_ranks} ranks divide"
        )

    return placement
