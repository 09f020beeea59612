"""Multi-head self-attention of DiT."""

from __future__ import annotations

from dit_moe_kernels import self_attention
from torch import Tensor, nn

from .init import xavier_linear_
from .modulation import NORM_EPS


class Attention(nn.Module):
    """Self-attention over all tokens of an image, scaled by head_dim^-0.5, without mask or dropout.

    Args:
        hidden_size: D, width of a token.
        num_heads: heads of hidden_size / num_heads each.
        qk_norm: LayerNorm with affine weights over each head's queries and keys, as in DiT-MoE-XL and -G.
    """

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size: got {hidden_size}, expected a multiple of num_heads {num_heads}")
        head_dim = hidden_size // num_heads
        self.num_heads, self.head_dim = num_heads, head_dim
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm = nn.LayerNorm(head_dim, eps=NORM_EPS) if qk_norm else None
        self.k_norm = nn.LayerNorm(head_dim, eps=NORM_EPS) if qk_norm else None
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier uniform weights, zero biases."""
        xavier_linear_(self.qkv)
        xavier_linear_(self.proj)

    def forward(self, x_BND: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        qkv_BN3Hd = self.qkv(x_BND).unflatten(2, (3, self.num_heads, self.head_dim))
        norm = None
        if self.q_norm is not None and self.k_norm is not None:
            norm = self.q_norm.weight, self.q_norm.bias, self.k_norm.weight, self.k_norm.bias
        return self.proj(self_attention(qkv_BN3Hd, norm, NORM_EPS))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"
