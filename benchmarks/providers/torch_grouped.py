"""PyTorch's own grouped product, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine import Unavailable
from ..problems import MoEProblem
from .base import Layer, problem_weights, same_layout

GroupedMM = Callable[..., Tensor]


def grouped_mm() -> GroupedMM:
    """The public function where this torch has it, else the private one.

    Raises:
        Unavailable: this torch has neither.
    """
    found = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if found is None:
        raise Unavailable(f"torch {torch.__version__} has no grouped_mm")
    return found


class TorchGrouped:
    """Sort by expert, grouped_mm for both products, sum each token's rows; no host sync."""

    def __init__(self, name: str, compiled: bool) -> None:
        self.name, self._compiled = name, compiled

    def availability(self, device: str) -> str | None:
        """Needs a torch with a grouped product, and for its fast path a Hopper GPU or newer."""
        try:
            grouped_mm()
        except Unavailable as reason:
            return str(reason)
        return None

    def build(self, problem: MoEProblem) -> Layer:
        """A function over the problem's tensors, compiled for their exact shapes if asked."""
        layer = _layer
        if self._compiled:
            if problem.x.dtype != torch.bfloat16:
                raise Unavailable(f"compiled grouped_mm: got {problem.x.dtype}, expected torch.bfloat16")
            torch._dynamo.reset()  # other shapes of earlier tasks would count against the limit of recompilations
            layer = torch.compile(_layer, dynamic=False, fullgraph=True)
        arguments = (problem.gate, problem.w13, problem.w2, problem.shape.top_k)
        return Layer(lambda x: layer(x, *arguments), problem_weights(problem), same_layout)


def _layer(x: Tensor, gate: Tensor, w13: Tensor, w2: Tensor, top_k: int) -> Tensor:
    product = grouped_mm()
    probs = F.linear(x.float(), gate.float()).softmax(dim=-1)
    topk_weights, topk_ids = probs.topk(top_k, dim=-1)
    sorted_ids, row_to_slot = topk_ids.flatten().sort(stable=True)
    slot_to_row = torch.empty_like(row_to_slot)
    slot_to_row[row_to_slot] = torch.arange(row_to_slot.shape[0], device=x.device)
    experts = torch.arange(gate.shape[0], device=x.device)
    ends = torch.searchsorted(sorted_ids, experts, right=True).int()
    rows = x.index_select(0, row_to_slot // top_k)
    gate_half, up_half = product(rows, w13.transpose(-2, -1), offs=ends).chunk(2, dim=-1)
    y = product(F.silu(gate_half) * up_half, w2.transpose(-2, -1), offs=ends)
    y = y.index_select(0, slot_to_row).view(x.shape[0], top_k, -1)
    return (y * topk_weights[..., None]).sum(dim=1).to(x.dtype)
