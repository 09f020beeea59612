"""stk: the block-sparse products under MegaBlocks (PyPI stanford-stk), with routing in plain PyTorch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ..problems import MoEProblem
from .base import Layer, missing_package

BLOCK = 128


def flat_weights(problem: MoEProblem) -> dict[str, Tensor]:
    """Copies of the weights as MegaBlocks stacks them: gate, up and down, each (E * F, D)."""
    w1, w3 = (half.flatten(0, 1).clone() for half in problem.w13.detach().chunk(2, dim=1))
    w2 = problem.w2.detach().transpose(1, 2).flatten(0, 1).clone()
    return {"w1": w1.requires_grad_(), "w3": w3.requires_grad_(), "w2": w2.requires_grad_()}


def stack_grads(grads: Mapping[str, Tensor], num_experts: int) -> dict[str, Tensor]:
    """Gradients of `flat_weights` in the problem's layout."""
    w1, w3, w2 = (grads[name].unflatten(0, (num_experts, -1)) for name in ("w1", "w3", "w2"))
    return {"gate": grads["gate"], "w13": torch.cat([w1, w3], dim=1), "w2": w2.transpose(1, 2)}


class Stk:
    """Rows of each expert padded to blocks of 128; the hidden layer is a block-sparse matrix with E * F columns."""

    name = "stk"

    def availability(self, device: str) -> str | None:
        """Needs the package and a GPU."""
        return missing_package("stk.backend", "stanford-stk", device)

    def build(self, problem: MoEProblem) -> Layer:
        """A function over copies of the problem's weights."""
        import stk
        import stk.ops

        shape, flat = problem.shape, flat_weights(problem)

        def forward(x: Tensor) -> Tensor:
            probs = F.linear(x.float(), problem.gate.float()).softmax(dim=-1)
            topk_weights, topk_ids = probs.topk(shape.top_k, dim=-1)
            slot_to_row, padded_ends = _padded_rows(topk_ids.flatten(), shape.num_experts)
            total = int(padded_ends[-1])  # waits for the GPU
            token = torch.arange(topk_ids.numel(), device=x.device) // shape.top_k
            rows = x.new_zeros(total, x.shape[1]).index_copy(0, slot_to_row, x.index_select(0, token))
            pattern = _pattern(padded_ends, total, shape.expert_hidden_size, shape.num_experts, x.dtype)
            topology = stk.Matrix(*pattern)
            gate_half = stk.ops.sdd(rows, flat["w1"].t(), topology)
            up_half = stk.ops.sdd(rows, flat["w3"].t(), topology)
            size, _, *indices = pattern
            hidden = stk.Matrix(size, F.silu(gate_half.data) * up_half.data, *indices)
            y = stk.ops.dsd(hidden, flat["w2"]).index_select(0, slot_to_row)
            return (y.view(x.shape[0], shape.top_k, -1) * topk_weights[..., None]).sum(dim=1).to(x.dtype)

        return Layer(forward, {"gate": problem.gate, **flat}, lambda grads: stack_grads(grads, shape.num_experts))


def _padded_rows(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Row of each slot when every expert's rows start at a multiple of BLOCK, and each expert's padded end."""
    chosen = F.one_hot(ids, num_experts)
    counts = chosen.sum(0)
    padded = (counts + BLOCK - 1) // BLOCK * BLOCK
    ends = padded.cumsum(0)
    rank = (chosen.cumsum(0) - chosen).gather(1, ids[:, None]).squeeze(1)
    return (ends - padded)[ids] + rank, ends


def _pattern(padded_ends: Tensor, total: int, hidden: int, num_experts: int, dtype: torch.dtype) -> tuple:
    """Arguments of the stk.Matrix whose row block r holds the F columns of its expert, without values.

    Block numbers are int32 where stk itself makes int16: from Triton 3.2 on its kernels multiply them by the block size
    without widening, so that int16 wraps from column 32768 on (seen: wrong results, then an illegal access).
    """
    device, block_rows, per_row = padded_ends.device, total // BLOCK, hidden // BLOCK
    starts = torch.arange(block_rows, device=device) * BLOCK
    expert = torch.searchsorted(padded_ends, starts, right=True)
    columns = (expert[:, None] * per_row + torch.arange(per_row, device=device)).flatten()
    rows = torch.arange(block_rows, device=device).repeat_interleave(per_row)
    offsets = torch.arange(block_rows + 1, device=device) * per_row
    columns_sorted, order = columns.sort(stable=True)
    ends_t = torch.searchsorted(columns_sorted, torch.arange(num_experts * per_row, device=device), right=True)
    return (
        (total, num_experts * hidden),
        torch.empty(columns.numel(), BLOCK, BLOCK, dtype=dtype, device="meta"),
        rows.int(),
        columns.int(),
        offsets.int(),
        rows[order].int(),
        F.pad(ends_t, (1, 0)).int(),
        order.int(),
    )
