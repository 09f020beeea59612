"""adaLN-Zero: the condition shifts, scales and gates every sub-layer (DiT, arXiv 2212.09748, section 3.2)."""

from __future__ import annotations

from typing import NamedTuple

from dit_moe_kernels import RoutedRows, combine_norm_modulate, norm_modulate, residual_norm_modulate
from torch import Tensor, nn

from .init import zero_

NORM_EPS = 1e-6  # of every LayerNorm in the official models


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


class Residual(NamedTuple):
    """Tokens as a residual stream and a gated branch not yet added, which the next norm does in its own pass.

    stream: (B, N, D).
    gate: (B, D), of each image.
    branch: (B, N, D), what a sub-layer made of the tokens, or the rows that a routed layer has not combined.
    """

    stream: Tensor
    gate: Tensor
    branch: Tensor | RoutedRows

    def total(self) -> Tensor:
        """The tokens (B, N, D): stream + gate * branch."""
        branch = self.branch
        if isinstance(branch, RoutedRows):
            branch = branch.combined().view(self.stream.shape)
        return self.stream + self.gate[:, None] * branch


def modulated_norm(tokens: Tensor | Residual, shift_BD: Tensor, scale_BD: Tensor) -> tuple[Tensor, Tensor]:
    """The residual stream with all branches added, and its LayerNorm under each image's shift and scale.

    Args:
        tokens: (B, N, D) float, or a stream with its last branch.
        shift_BD, scale_BD: (B, D) float.

    Returns:
        Two (B, N, D). Under autocast the second is in autocast's dtype, as products take it; a stream in fp32 stays so.
    """
    if isinstance(tokens, Residual):
        stream, gate, branch = tokens
        if isinstance(branch, RoutedRows):
            return combine_norm_modulate(stream, gate, branch, shift_BD, scale_BD, NORM_EPS)
        return residual_norm_modulate(stream, gate, branch, shift_BD, scale_BD, NORM_EPS)
    return tokens, norm_modulate(tokens, shift_BD, scale_BD, NORM_EPS)
