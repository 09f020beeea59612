"""Batched products over experts padded to the fullest one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..problems import MoEProblem
from .base import Layer, problem_weights, same_layout

_MULTIPLE = 64  # capacities are rounded up to this, so that the products keep to aligned sizes


class Padded:
    """Capacity = rows of the fullest expert, read back from the GPU, so that no token is dropped; then two bmm."""

    name = "padded"

    def availability(self, device: str) -> str | None:
        """Always available."""
        return None

    def build(self, problem: MoEProblem) -> Layer:
        """A function over the problem's tensors."""
        shape = problem.shape

        def forward(x: Tensor) -> Tensor:
            tokens = x.shape[0]
            probs = F.linear(x.float(), problem.gate.float()).softmax(dim=-1)
            topk_weights, topk_ids = probs.topk(shape.top_k, dim=-1)
            ids = topk_ids.flatten()
            chosen = F.one_hot(ids, shape.num_experts)
            place = (chosen.cumsum(0) - chosen).gather(1, ids[:, None]).squeeze(1)
            capacity = -(-int(chosen.sum(0).max()) // _MULTIPLE) * _MULTIPLE  # waits for the GPU
            slot = ids * capacity + place
            token = torch.arange(ids.shape[0], device=x.device) // shape.top_k
            rows = x.new_zeros(shape.num_experts * capacity, x.shape[1]).index_copy(0, slot, x.index_select(0, token))
            rows = rows.view(shape.num_experts, capacity, -1)
            gate_half, up_half = torch.bmm(rows, problem.w13.transpose(1, 2)).chunk(2, dim=-1)
            y = torch.bmm(F.silu(gate_half) * up_half, problem.w2.transpose(1, 2)).flatten(0, 1)
            y = y.index_select(0, slot).view(tokens, shape.top_k, -1)
            return (y * topk_weights[..., None]).sum(dim=1).to(x.dtype)

        return Layer(forward, problem_weights(problem), same_layout)
