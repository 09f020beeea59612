"""What the ranks run: each function is called on every rank, and its results are compared by the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dit_moe import DiT, DiTConfig
from dit_moe.parallel import (
    ParallelConfig,
    clip_grad_norm_,
    full_state_dict,
    optimizer_groups,
    parallelize,
    unwrap,
)

CONFIG = DiTConfig(
    input_size=8, patch_size=2, in_channels=2, hidden_size=32, depth=2, num_heads=2, mlp_ratio=2.0, num_experts=4,
    num_shared_experts=1, num_classes=4, class_dropout_prob=0.0, learn_sigma=False, qk_norm=True,
)  # fmt: skip
STEPS, BATCH, CLIP = 50, 8, 0.5

DDP = ParallelConfig("ddp")
FSDP = ParallelConfig("fsdp")
DDP_EP2 = ParallelConfig("ddp", expert_parallel=2)
FSDP_EP2 = ParallelConfig("fsdp", expert_parallel=2)


def fresh_model(config: DiTConfig = CONFIG, seed: int = 0) -> DiT:
    """Random everywhere: a new model predicts zero and has hardly a gradient."""
    torch.manual_seed(seed)
    model = DiT(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "pos_embed":
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.train()


def batch_of(step: int, size: int = BATCH) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noisy images, times, class ids and targets of the whole batch of a step."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, 2, 8, 8, generator=generator)
    t = torch.rand(size, generator=generator)
    y = torch.randint(4, (size,), generator=generator)
    return x, t, y, torch.tanh(x.flip(3) + y.view(-1, 1, 1, 1))


def losses_of(model: nn.Module, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean error, balance loss and tokens_per_expert."""
    x, t, y, target = batch
    out, aux = model(x, t, y, return_aux=True)
    return (out - target).square().mean(), aux.balance_loss, aux.tokens_per_expert


def train(model: nn.Module, rank: int, num_ranks: int, steps: int = STEPS) -> dict[str, Any]:
    """AdamW on this rank's share of each batch; means over the ranks of what a run reports.

    A large eps, since an element whose gradient is zero but for rounding (the bias of k_norm) else moves by it.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(optimizer_groups(trained), lr=1e-3, eps=1e-5, weight_decay=0.1, fused=True)
    seen: dict[str, list[Any]] = {"loss": [], "balance": [], "norm": [], "counts": []}
    for step in range(steps):
        share = [part.chunk(num_ranks)[rank] for part in batch_of(step)]
        loss, balance, counts = losses_of(model, tuple(share))
        (loss + balance).backward()
        norm = clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        means = torch.stack([loss.detach(), balance.detach()])
        if num_ranks > 1:
            dist.all_reduce(means)
        seen["loss"].append(float(means[0]) / num_ranks)
        seen["balance"].append(float(means[1]) / num_ranks)
        seen["norm"].append(float(norm))
        seen["counts"].append(counts.clone())
    return {**seen, "weights": full_state_dict(unwrap(model).state_dict())}


def gradients_of(model: nn.Module, share: tuple[Tensor, ...], weight: float = 1.0) -> dict[str, Tensor]:
    """Whole gradients by name after one backward, weighted where the ranks' shares are uneven."""
    loss, balance, _ = losses_of(model, share)
    (loss * weight + balance).backward()
    named = unwrap(model).named_parameters()
    return full_state_dict({name: parameter.grad for name, parameter in named if parameter.grad is not None})


def trained_one(rank: int, num_ranks: int, folder: Path) -> dict[str, Any]:
    return train(fresh_model(), 0, 1)


def trained_ddp(rank: int, num_ranks: int, folder: Path) -> dict[str, Any]:
    return train(parallelize(fresh_model(), DDP, "cpu"), rank, num_ranks)


def trained_fsdp(rank: int, num_ranks: int, folder: Path) -> dict[str, Any]:
    return train(parallelize(fresh_model(), FSDP, "cpu"), rank, num_ranks)


def trained_ddp_ep2(rank: int, num_ranks: int, folder: Path) -> dict[str, Any]:
    return train(parallelize(fresh_model(), DDP_EP2, "cpu"), rank, num_ranks)


def trained_fsdp_ep2(rank: int, num_ranks: int, folder: Path) -> dict[str, Any]:
    return train(parallelize(fresh_model(), FSDP_EP2, "cpu"), rank, num_ranks)
