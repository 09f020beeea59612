"""adaLN-Zero: the condition shifts, scales and gates every sub-layer (DiT, arXiv 2212.09748, section 3.2)."""

from __future__ import annotations

from torch import Tensor, nn

from .init import zero_


class Modulation(nn.Module):
    """A Linear that starts at zero: several vectors of width D from the activated condition.

    The SiLU before it is the same for every layer of a model, so the caller applies it once for all; the official
    models have it as adaLN_modulation.0, hence the Linear's name, adaLN_modulation.1.

    Args:
        hidden_size: D.
        num_vectors: V, how many vectors.
    """

    def __init__(self, hidden_size: int, num_vectors: int) -> None:
        super().__init__()
        self.num_vectors = num_vectors
        self.add_module("1", nn.Linear(hidden_size, num_vectors * hidden_size))
        self.reset_parameters()

    @property
    def linear(self) -> nn.Linear:
        """The only child."""
        return self.get_submodule("1")  # type: ignore[return-value]

    def reset_parameters(self) -> None:
        """Zero: no shift, no scale, and a closed gate."""
        zero_(self)

    def forward(self, activated_BD: Tensor) -> Tensor:
        """silu(condition) (B, D) -> (B, V, D)."""
        return self.linear(activated_BD).unflatten(1, (self.num_vectors, -1))


def modulate(x_BND: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    """Scale and shift each image's tokens: x * (1 + scale) + shift."""
    return x_BND * (1 + scale_BD[:, None]) + shift_BD[:, None]
