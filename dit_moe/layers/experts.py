"""GroupedExperts: all routed experts of a layer, as two stacked weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from dit_moe_kernels import RoutingPlan, expert_ffn
from torch import Tensor, nn

from .init import xavier_uniform_stacked_


class GroupedExperts(nn.Module):
    """E SwiGLU experts without bias, w2[e] @ (silu(gate) * up) with (gate, up) the two halves of w13[e] @ x.

    Args:
        hidden_size: D, width of a token.
        expert_hidden_size: F, hidden width of one expert.
        num_experts: E.
        backend: backend of the op, see `dit_moe_kernels.use_backend`.
        device, dtype: of the weights.
    """

    def __init__(
        self,
        hidden_size: int,
        expert_hidden_size: int,
        num_experts: int,
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.backend = backend
        w13_shape = (num_experts, 2 * expert_hidden_size, hidden_size)
        w2_shape = (num_experts, hidden_size, expert_hidden_size)
        self.w13 = nn.Parameter(torch.empty(w13_shape, device=device, dtype=dtype))
        self.w2 = nn.Parameter(torch.empty(w2_shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier uniform for each of an expert's three matrices."""
        xavier_uniform_stacked_(self.w13, parts=2)
        xavier_uniform_stacked_(self.w2)

    def forward(
        self,
        x_TD: Tensor,
        topk_weights_TK: Tensor,
        plan: RoutingPlan,
        beside: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """Send each token through its experts and sum their outputs by weight: (T, D) -> (T, D).

        `beside` computes what is to be added, the shared expert; experts that wait for other ranks do so meanwhile.
        """
        addend_TD = None if beside is None else beside()
        return expert_ffn(x_TD, self.w13, self.w2, topk_weights_TK, plan, addend=addend_TD, backend=self.backend)

    def extra_repr(self) -> str:
        num_experts, hidden_size, expert_hidden_size = self.w2.shape
        return f"hidden_size={hidden_size}, expert_hidden_size={expert_hidden_size}, num_experts={num_experts}"
