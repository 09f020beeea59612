"""What the ranks run: each function is called on every rank, and its results are compared by the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from dit_moe_kernels import make_routing_plan, router_logits, topk_softmax
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dit_moe import DiT, DiTConfig
from dit_moe.layers import Routing
from dit_moe.parallel import (
    ParallelConfig,
    clip_grad_norm_,
    full_state_dict,
    local_tensor,
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
    """Whole gradients by name after one backward; the weight makes up for uneven shares."""
    loss, balance, _ = losses_of(model, share)
    (loss * weight + balance).backward()
    named = unwrap(model).named_parameters()
    return full_state_dict({name: parameter.grad for name, parameter in named if parameter.grad is not None})


def to_two_experts(model: DiT, experts: tuple[int, int]) -> DiT:
    """Make every router choose these two for every token."""
    for block in model.blocks:
        block.moe.gate = ChoiceOf(block.moe.gate, experts)
    return model


class ChoiceOf(nn.Module):
    """A router whose logits of all experts but two are lowered out of reach."""

    def __init__(self, gate: nn.Module, experts: tuple[int, int]) -> None:
        super().__init__()
        self.weight, self.num_experts, self.top_k = gate.weight, gate.num_experts, gate.top_k
        self.register_buffer("penalty", torch.full((gate.num_experts,), -1e3), persistent=False)
        self.penalty[list(experts)] = 0

    def forward(self, x_TD: Tensor) -> Routing:
        logits_TE = router_logits(x_TD, self.weight) + self.penalty
        weights_TK, ids_TK, probs_TE = topk_softmax(logits_TE, self.top_k)
        return Routing(weights_TK, ids_TK, probs_TE, make_routing_plan(ids_TK, self.num_experts))


def uneven_share(rank: int, num_ranks: int, sizes: tuple[int, ...]) -> tuple[tuple[Tensor, ...], float]:
    """A share of an uneven batch, and what its mean loss weighs among the ranks' means."""
    start = sum(sizes[:rank])
    share = tuple(part[start : start + sizes[rank]] for part in batch_of(0, sum(sizes)))
    return share, sizes[rank] * num_ranks / sum(sizes)


def uneven_gradients(rank: int, num_ranks: int, folder: Path) -> dict[str, Any]:
    """Gradients where rank 0 has more images than the others."""
    share, weight = uneven_share(rank, num_ranks, (5, 3, 1, 2)[:num_ranks])
    return {
        f"{config.data_parallel}, {config.expert_parallel}": gradients_of(
            parallelize(fresh_model(), config, "cpu"), share, weight
        )
        for config in (DDP, FSDP, DDP_EP2, FSDP_EP2)
    }


def one_sided_gradients(rank: int, num_ranks: int, folder: Path) -> dict[tuple, Any]:
    """Gradients where all tokens go to two experts: of one rank, whichever, and of two."""
    share, _ = uneven_share(rank, num_ranks, (2,) * num_ranks)
    return {
        (config.data_parallel, experts): gradients_of(
            parallelize(to_two_experts(fresh_model(), experts), config, "cpu"), share
        )
        for config in (DDP_EP2, FSDP_EP2)
        for experts in ((0, 1), (2, 3), (1, 2))
    }


def idle_rank(rank: int, num_ranks: int, folder: Path) -> dict[str, Any]:
    """A layer whose last rank has no tokens: this rank's output and gradients, and the experts' whole gradients."""
    model = parallelize(fresh_model(), DDP_EP2, "cpu")
    moe = unwrap(model).blocks[0].moe
    x_TD = layer_tokens()[: 0 if rank == num_ranks - 1 else None].requires_grad_()
    out = moe(x_TD)
    (out.hidden.square().sum() + out.balance_loss).backward()
    experts = full_state_dict({"w13": moe.experts.w13.grad, "w2": moe.experts.w2.grad})
    own = {"hidden": out.hidden.detach(), "x": x_TD.grad, "balance": out.balance_loss.detach()}
    return {"own": own, "counts": out.tokens_per_expert, "experts": experts}


def layer_tokens() -> Tensor:
    return torch.randn(7, CONFIG.hidden_size, generator=torch.Generator().manual_seed(3))


def checkpointed_gradients(rank: int, num_ranks: int, folder: Path) -> dict[str, Any]:
    """Gradients where each routed layer is computed again in the backward pass, exchanges and all."""
    model = parallelize(fresh_model(), FSDP_EP2, "cpu")
    for block in unwrap(model).blocks:
        forward = block.moe.forward
        block.moe.forward = lambda x, forward=forward: checkpoint(forward, x, use_reentrant=False)
    return gradients_of(model, uneven_share(rank, num_ranks, (4,) * num_ranks)[0])


def bf16_losses(rank: int, num_ranks: int, folder: Path) -> dict[str, Any]:
    """Outputs under bf16 autocast with parameters gathered in bf16, and what the router was given."""
    model = parallelize(fresh_model(), FSDP_EP2, "cpu", dtype=torch.bfloat16)
    seen: dict[str, Any] = {}
    gate = unwrap(model).blocks[0].moe.gate
    gate.register_forward_pre_hook(lambda module, args: seen.update(router=module.weight.dtype))
    x, t, y, _ = uneven_share(rank, num_ranks, (4,) * num_ranks)[0]
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, t, y)
    out.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {**seen, "out": out.detach(), "gradients": full_state_dict(gradients)}


def local_balance(rank: int, num_ranks: int, folder: Path) -> dict[str, Any]:
    """Balance loss and counts where each rank takes them over its own tokens."""
    model = parallelize(fresh_model(), ParallelConfig("ddp", 2, global_balance=False), "cpu")
    _, balance, counts = losses_of(model, uneven_share(rank, num_ranks, (4,) * num_ranks)[0])
    return {"balance": balance.detach(), "counts": counts}


def starts(rank: int, num_ranks: int, folder: Path) -> dict[str, Any]:
    """Weights after parallelize, where the ranks' models differ, and where they have no weights yet."""
    found = {}
    for config in (DDP, FSDP_EP2):
        model = parallelize(fresh_model(seed=rank), config, "cpu")
        found[f"differing, {config.data_parallel}"] = full_state_dict(unwrap(model).state_dict(), rank0_only=False)
        torch.manual_seed(rank)
        with torch.device("meta"):
            model = DiT(CONFIG)
        model = parallelize(model, config, "cpu")
        found[f"meta, {config.data_parallel}"] = full_state_dict(unwrap(model).state_dict(), rank0_only=False)
    return found


def norms(rank: int, num_ranks: int, folder: Path) -> dict[str, Any]:
    """Norm and clipped gradients."""
    found = {}
    for config in (DDP, FSDP, DDP_EP2, FSDP_EP2):
        model = parallelize(fresh_model(), config, "cpu")
        gradients_of(model, uneven_share(rank, num_ranks, (2,) * num_ranks)[0])
        norm = clip_grad_norm_(model.parameters(), 0.01)
        again = clip_grad_norm_(model.parameters(), 1e9)
        found[f"{config.data_parallel}, {config.expert_parallel}"] = (float(norm), float(again))
    return found


def saved(rank: int, num_ranks: int, folder: Path) -> None:
    """Write sharded checkpoints of the same model, spread in several ways."""
    for config in (FSDP_EP2, DDP_EP2, FSDP):
        model = parallelize(fresh_model(), config, "cpu")
        dcp.save({"model": unwrap(model).state_dict()}, checkpoint_id=folder.parent / _checkpoint_name(config))


def loaded(rank: int, num_ranks: int, folder: Path) -> dict[str, Any]:
    """Read each of them into models of other weights, spread in every way that fits the ranks."""
    found = {}
    for written in (FSDP_EP2, DDP_EP2, FSDP):
        for config in (DDP, FSDP, ParallelConfig("fsdp", num_ranks), ParallelConfig("ddp", num_ranks)):
            state = unwrap(parallelize(fresh_model(seed=1), config, "cpu")).state_dict()
            dcp.load({"model": state}, checkpoint_id=folder.parent / _checkpoint_name(written))
            found[f"{written.data_parallel}, {written.expert_parallel} -> {config}"] = full_state_dict(state)
    return found


def counted(rank: int, num_ranks: int, folder: Path) -> dict[str, Any]:
    """Bytes of this rank's parameters, and of the rows that one step gives to all-to-alls."""
    found = {}
    for config in (DDP, FSDP, DDP_EP2, FSDP_EP2):
        model = parallelize(fresh_model(), config, "cpu")
        parts = [local_tensor(parameter) for parameter in model.parameters()]
        rows: list[int] = []
        exchange = dist.all_to_all_single

        def count(received: Tensor, sent: Tensor, *args: Any, exchange=exchange, rows=rows, **options: Any) -> Any:
            if sent.is_floating_point():
                rows.append(sent.nbytes)
            return exchange(received, sent, *args, **options)

        with patch.object(dist, "all_to_all_single", count):
            loss, balance, _ = losses_of(model, uneven_share(rank, num_ranks, (4,) * num_ranks)[0])
            (loss + balance).backward()
        found[f"{config.data_parallel}, {config.expert_parallel}"] = (sum(part.nbytes for part in parts), sum(rows))
    return found


def _checkpoint_name(config: ParallelConfig) -> str:
    return f"{config.data_parallel}-{config.expert_parallel}"


def trained_ddp(rank: int, num_ranks: int, folder: Path) -> dict[str, Any]:
    return train(parallelize(fresh_model(), DDP, "cpu"), rank, num_ranks)


def trained_fsdp(rank: int, num_ranks: int, folder: Path) -> dict[str, Any]:
    return train(parallelize(fresh_model(), FSDP, "cpu"), rank, num_ranks)


def trained_ddp_ep2(rank: int, num_ranks: int, folder: Path) -> dict[str, Any]:
    return train(parallelize(fresh_model(), DDP_EP2, "cpu"), rank, num_ranks)


def trained_fsdp_ep2(rank: int, num_ranks: int, folder: Path) -> dict[str, Any]:
    return train(parallelize(fresh_model(), FSDP_EP2, "cpu"), rank, num_ranks)


def trained_fsdp_ep4(rank: int, num_ranks: int, folder: Path) -> dict[str, Any]:
    return train(parallelize(fresh_model(), ParallelConfig("fsdp", 4), "cpu"), rank, num_ranks)
