"""adaLN-Zero: the condition shifts, scales and gates every sub-layer (DiT, arXiv 2212.09748, section 3.2)."""

from __future__ import annotations

from torch import Tensor, nn

from .init import zero_


class Modulation(nn.Sequential):
    """SiLU and a Linear that starts at zero: several vectors of width D from the condition.

    Args:
        hidden_size: D.
        num_vectors: how many vectors.
    """

    def __init__(self, hidden_size: int, num_vectors: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(hidden_size, num_vectors * hidden_size))
        self.num_vectors = num_vectors
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero: no shift, no scale, and a closed gate."""
        zero_(self)

    def forward(self, c_BD: Tensor) -> tuple[Tensor, ...]:
        """(B, D) -> num_vectors tensors of (B, 1, D), to be broadcast over an image's tokens."""
        return super().forward(c_BD).unsqueeze(1).chunk(self.num_vectors, dim=2)


def modulate(x_BND: Tensor, shift_B1D: Tensor, scale_B1D: Tensor) -> Tensor:
    """Scale and shift each image's tokens: x * (1 + scale) + shift."""
    return x_BND * (1 + scale_B1D) + shift_B1D
