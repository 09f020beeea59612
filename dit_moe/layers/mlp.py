"""Feed-forward layers that every token visits: the shared SwiGLU expert and the dense DiT's MLP."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from dit_moe_kernels import linear_swiglu
from torch import Tensor, nn

from .init import xavier_linear_, xavier_uniform_stacked_


class SwiGLU(nn.Module):
    """w2 @ (silu(gate) * up) without bias, with (gate, up) the two halves of w13 @ x (Shazeer 2020, equation 6).

    Args:
        hidden_size: D, width of a token.
        expert_hidden_size: Fs, hidden width.
        backend: backend of gate, up and activation, see `dit_moe_kernels.use_backend`.
        device, dtype: of the weights.
    """

    def __init__(
        self,
        hidden_size: int,
        expert_hidden_size: int,
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.backend = backend
        self.w13 = nn.Parameter(torch.empty(2 * expert_hidden_size, hidden_size, device=device, dtype=dtype))
        self.w2 = nn.Parameter(torch.empty(hidden_size, expert_hidden_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier uniform for each of the three matrices."""
        xavier_uniform_stacked_(self.w13, parts=2)
        xavier_uniform_stacked_(self.w2)

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        if x_TD.device != self.w13.device:
            raise ValueError(f"x: got device {x_TD.device}, expected {self.w13.device} as the weights have")
        if x_TD.dtype != self.w13.dtype and not torch.is_autocast_enabled(x_TD.device.type):
            raise TypeError(f"x: got dtype {x_TD.dtype}, expected {self.w13.dtype} as the weights have")
        return F.linear(linear_swiglu(x_TD, self.w13, backend=self.backend), self.w2)

    def extra_repr(self) -> str:
        return f"hidden_size={self.w2.shape[0]}, expert_hidden_size={self.w2.shape[1]}"


class Mlp(nn.Module):
    """fc2(gelu(fc1(x))) with the tanh form of GELU, the feed-forward layer of the dense DiT.

    Args:
        hidden_size: D, width of a token.
        mlp_hidden_size: hidden width.
        device, dtype: of the weights.
    """

    def __init__(
        self,
        hidden_size: int,
        mlp_hidden_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_hidden_size, device=device, dtype=dtype)
        self.fc2 = nn.Linear(mlp_hidden_size, hidden_size, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier uniform weights, zero biases."""
        xavier_linear_(self.fc1)
        xavier_linear_(self.fc2)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
