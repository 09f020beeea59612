"""TopKRouter: choose the experts of each token."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from dit_moe_kernels import Routing, route
from torch import Tensor, nn


class TopKRouter(nn.Module):
    """Softmax over all experts in fp32, of which each token takes the top_k largest (arXiv 2407.11633, section 2).

    Args:
        hidden_size: D, width of a token.
        num_experts: E.
        top_k: K, experts per token.
        backend: backend of the ops, see `dit_moe_kernels.use_backend`.
        device, dtype: of the weight.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k: got {top_k}, expected 1 to num_experts = {num_experts}")
        self.num_experts, self.top_k, self.backend = num_experts, top_k, backend
        # Called with the topk_ids of every call, inside compiled code and CUDA graphs too: see dit_moe.analysis.
        self.observer: Callable[[Tensor], object] | None = None
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming uniform with a = sqrt(5), as torch initialises a Linear."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x_TD: Tensor) -> Routing:
        """Route (T, D) tokens of any float dtype; the logits are computed in fp32, also under autocast.

        The balance loss has the factor 1, and is None where no gradient is recorded, since sampling does not want it.
        """
        alpha = 1.0 if torch.is_grad_enabled() else None
        routing = route(x_TD, self.weight, self.top_k, balance_alpha=alpha, backend=self.backend)
        if self.observer is not None:
            self.observer(routing.topk_ids)
        return routing

    def extra_repr(self) -> str:
        return f"hidden_size={self.weight.shape[1]}, num_experts={self.num_experts}, top_k={self.top_k}"
