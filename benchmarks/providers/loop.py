"""One expert after the other, as DiT-MoE's official code does it; our own writing, for there is no licence to copy."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ..problems import MoEProblem
from .base import Layer


class Loop:
    """Three products an expert. Inference sorts the rows and reads the counts back; training masks rows per expert."""

    name = "loop"

    def availability(self, device: str) -> str | None:
        """Always available."""
        return None

    def build(self, problem: MoEProblem) -> Layer:
        """Separate gate, up and down weights per expert, as the official state dict has them."""
        w1, w3 = problem.w13.detach().chunk(2, dim=1)
        weights = {"gate": problem.gate}
        for expert in range(problem.shape.num_experts):
            for name, stacked in (("w1", w1), ("w3", w3), ("w2", problem.w2.detach())):
                weights[f"{name}.{expert}"] = stacked[expert].clone().requires_grad_()
        experts = [[weights[f"{name}.{e}"] for name in ("w1", "w3", "w2")] for e in range(problem.shape.num_experts)]

        def forward(x: Tensor) -> Tensor:
            probs = F.linear(x.float(), problem.gate.float()).softmax(dim=-1)
            return routed_loop(x, probs, problem.shape.top_k, experts)[0]

        return Layer(forward, weights, _stack)


def routed_loop(x: Tensor, probs: Tensor, top_k: int, experts: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
    """The routed experts, by one path for inference and another for training.

    Args:
        x: (T, D), tokens.
        probs: (T, E) fp32, the router's softmax.
        top_k: K.
        experts: gate, up and down weights of each expert.

    Returns:
        (T, D) output, and (E,) rows of each expert.
    """
    topk_weights, topk_ids = probs.topk(top_k, dim=-1, sorted=False)
    layer = _train if torch.is_grad_enabled() else _infer
    return layer(x, topk_weights, topk_ids, experts), topk_ids.flatten().bincount(minlength=len(experts))


def _expert(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, w1)) * F.linear(x, w3), w2)


def _train(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, experts: list[list[Tensor]]) -> Tensor:
    tokens, top_k = topk_ids.shape
    rows, ids = x.repeat_interleave(top_k, dim=0), topk_ids.flatten()
    y = torch.empty(rows.shape, dtype=torch.float32, device=x.device)
    for expert, weights in enumerate(experts):
        mask = ids == expert
        y[mask] = _expert(rows[mask], *weights).float()
    return (y.view(tokens, top_k, -1) * topk_weights[..., None]).sum(dim=1).to(x.dtype)


def _infer(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, experts: list[list[Tensor]]) -> Tensor:
    order = topk_ids.flatten().argsort()
    counts = topk_ids.flatten().bincount(minlength=len(experts)).cpu().tolist()  # waits for the GPU
    tokens, scale = order // topk_ids.shape[1], topk_weights.flatten()[order, None].to(x.dtype)
    out, begin = torch.zeros_like(x), 0
    for count, weights in zip(counts, experts, strict=True):
        if count:
            chosen = tokens[begin : begin + count]
            y = _expert(x[chosen], *weights) * scale[begin : begin + count]
            out.scatter_reduce_(0, chosen[:, None].expand_as(y), y, reduce="sum")
        begin += count
    return out


def _stack(grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    experts = range(sum(name.startswith("w2.") for name in grads))
    w13 = [torch.cat([grads[f"w1.{e}"], grads[f"w3.{e}"]]) for e in experts]
    return {
        "gate": grads["gate"],
        "w13": torch.stack(w13),
        "w2": torch.stack([grads[f"w2.{e}"] for e in experts]),
    }
