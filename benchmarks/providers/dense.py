"""Dense GELU MLPs that stand beside the routed layer: matched in FLOPs, or in parameters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cases import LayerShape
from ..problems import MoEProblem


def matched_width(shape: LayerShape, match: str) -> int:
    """Hidden width of a two-matrix MLP with the routed experts' FLOPs per token, or with all their parameters.

    Args:
        shape: the routed layer, whose experts have three matrices.
        match: "flops" or "params".
    """
    experts = shape.top_k if match == "flops" else shape.num_experts
    return 3 * shape.expert_hidden_size * experts // 2


class DenseMlp:
    """fc2(gelu(fc1(x))) in eager PyTorch, without biases, over a problem's tokens."""

    def __init__(self, problem: MoEProblem, match: str) -> None:
        width, hidden = problem.shape.hidden_size, matched_width(problem.shape, match)
        like = problem.x.detach()
        self.x, self.dout = problem.x, problem.dout
        self.fc1 = like.new_empty(hidden, width).normal_(std=width**-0.5).requires_grad_()
        self.fc2 = like.new_empty(width, hidden).normal_(std=hidden**-0.5).requires_grad_()

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        """What receives gradients."""
        return self.x, self.fc1, self.fc2

    def flops(self, mode: str) -> int:
        """Operations of one call."""
        forward = 2 * self.x.shape[0] * (self.fc1.numel() + self.fc2.numel())
        return forward if mode == "fwd" else 3 * forward

    def forward(self) -> Tensor:
        """(T, D) -> (T, D)."""
        return dense_mlp(self.x, self.fc1, self.fc2)


def dense_mlp(x: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
    """fc2(gelu(fc1(x))), the tanh form as in DiT."""
    return F.linear(F.gelu(F.linear(x, fc1), approximate="tanh"), fc2)


def dense_complaint(mlp: DenseMlp) -> str | None:
    """None if the MLP's output is finite and near its fp64 or fp32 value on a few tokens, else what is wrong."""
    tokens = slice(0, 128)
    wide = torch.float64 if mlp.x.dtype == torch.float32 else torch.float32
    with torch.no_grad():
        got = dense_mlp(mlp.x[tokens], mlp.fc1, mlp.fc2)
        wanted = dense_mlp(*(tensor.to(wide) for tensor in (mlp.x[tokens], mlp.fc1, mlp.fc2)))
    error = (got.to(wide) - wanted).norm() / wanted.norm()
    allowed = 1e-2 if mlp.x.dtype != torch.float32 else 1e-4
    return None if error <= allowed else f"output: relative error {error:.3g}, allowed {allowed:.3g}"
