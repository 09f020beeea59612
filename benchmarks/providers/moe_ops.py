"""moe-ops: pure Triton permute, TMA grouped product and unpermute (PyPI moe-ops); SwiGLU in eager PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..problems import MoEProblem
from .base import Layer, missing_package, problem_weights, same_layout


class MoeOps:
    """Its own top-k softmax normalises over the chosen experts only, so the router here is plain PyTorch."""

    name = "moe-ops"

    def availability(self, device: str) -> str | None:
        """Needs the package and a GPU."""
        return missing_package("moe_ops", "moe-ops", device)

    def build(self, problem: MoEProblem) -> Layer:
        """A function over the problem's tensors."""
        import moe_ops

        shape = problem.shape

        def forward(x: Tensor) -> Tensor:
            probs = F.linear(x.float(), problem.gate.float()).softmax(dim=-1)
            topk_weights, topk_ids = probs.topk(shape.top_k, dim=-1)
            rows, row_map, offsets = moe_ops.permute(x, topk_ids.int(), E=shape.num_experts)
            gate_half, up_half = moe_ops.grouped_gemm(rows, problem.w13, offsets, trans_b=True).chunk(2, dim=-1)
            y = moe_ops.grouped_gemm(F.silu(gate_half) * up_half, problem.w2, offsets, trans_b=True)
            return moe_ops.unpermute(y, row_map, topk_weights, num_tokens=x.shape[0], num_topK=shape.top_k)

        return Layer(forward, problem_weights(problem), same_layout)
