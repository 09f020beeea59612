"""Helpers of the model tests: tiny models, and oracles written from the paper's formulas."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_moe import DiT, DiTConfig, MoEFeedForward
from dit_moe.layers import Mlp

TINY = DiTConfig(
    input_size=8, hidden_size=32, depth=2, num_heads=2, num_experts=4, num_classes=10, class_dropout_prob=0.1
)


def randomize(module: nn.Module, scale: float = 0.2) -> nn.Module:
    """Replace every trainable parameter, zero ones too, by normal numbers, so that nothing is hidden by a zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=scale)
    return module


def tiny_model(**overrides: object) -> DiT:
    """A tiny model in eval mode with random weights everywhere."""
    config = DiTConfig.from_dict({**TINY.to_dict(), **overrides})
    return randomize(DiT(config)).eval()


def tiny_inputs(batch: int = 3, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """x, t, y for a tiny model."""
    return torch.randn(batch, 4, 8, 8, dtype=dtype), torch.rand(batch, dtype=dtype), torch.arange(batch) % 10


def naive_moe(moe: MoEFeedForward, x_TD: Tensor, router_x_TD: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, balance loss and counts by a loop over tokens and their choices, from the layer's parameters."""
    wide = torch.float64 if x_TD.dtype == torch.float64 else torch.float32
    num_experts, top_k = moe.gate.num_experts, moe.gate.top_k
    seen_TD = x_TD if router_x_TD is None else router_x_TD
    probs_TE = torch.softmax(seen_TD.to(wide) @ moe.gate.weight.to(wide).T, dim=1)
    counts = [0] * num_experts
    outputs = []
    for x_D, probs_E in zip(x_TD, probs_TE, strict=True):
        out_D = torch.zeros(x_D.shape, dtype=wide)
        for expert in probs_E.topk(top_k).indices.tolist():
            counts[expert] += 1
            out_D = out_D + probs_E[expert] * naive_swiglu(x_D, moe.experts.w13[expert], moe.experts.w2[expert]).to(
                wide
            )
        out_D = out_D.to(x_D.dtype)
        if isinstance(moe.shared_experts, Mlp):
            out_D = out_D + naive_mlp(moe.shared_experts, x_D)
        elif moe.shared_experts is not None:
            out_D = out_D + naive_swiglu(x_D, moe.shared_experts.w13, moe.shared_experts.w2)
        outputs.append(out_D)
    fractions = torch.tensor(counts, dtype=wide) * num_experts / (len(outputs) * top_k)
    return torch.stack(outputs), moe.balance_alpha * (fractions * probs_TE.mean(0)).sum(), torch.tensor(counts)


def naive_mlp(mlp: Mlp, x_D: Tensor) -> Tensor:
    """The dense DiT's MLP on one token, the tanh form of GELU written out."""
    z_F = mlp.fc1.weight @ x_D + mlp.fc1.bias
    gelu_F = 0.5 * z_F * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z_F + 0.044715 * z_F**3)))
    return mlp.fc2.weight @ gelu_F + mlp.fc2.bias


def naive_swiglu(x_D: Tensor, w13_2FD: Tensor, w2_DF: Tensor) -> Tensor:
    """One SwiGLU network on one token."""
    gate_FD, up_FD = w13_2FD.chunk(2)
    return w2_DF @ (F.silu(gate_FD @ x_D) * (up_FD @ x_D))
