"""Multi-head self-attention of DiT."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from dit_moe_kernels import qk_norm
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

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
        q_BNHd, k_BNHd, v_BNHd = self.qkv(x_BND).unflatten(2, (3, self.num_heads, self.head_dim)).unbind(2)
        if self.q_norm is not None and self.k_norm is not None:
            weights = self.q_norm.weight, self.q_norm.bias, self.k_norm.weight, self.k_norm.bias
            q_BNHd, k_BNHd = qk_norm(q_BNHd, k_BNHd, *weights, NORM_EPS)
        q_BHNd, k_BHNd, v_BHNd = (x_BNHd.transpose(1, 2) for x_BNHd in (q_BNHd, k_BNHd, v_BNHd))
        with _attention_kernels(q_BNHd):
            out_BHNd = F.scaled_dot_product_attention(q_BHNd, k_BHNd, v_BHNd)
        return self.proj(out_BHNd.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"


def _attention_kernels(q: Tensor) -> AbstractContextManager:
    """Prefer cuDNN's kernel where no gradient is wanted: at head widths 64 to 88 it was measured fastest on Hopper.

    What the user has switched off stays off. With a gradient PyTorch's own order holds: cuDNN's backward need not give
    the same bits twice. So it does under torch.compile, which cannot trace a look at the user's switches.
    """
    if not q.is_cuda or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return nullcontext()
    enabled = {
        SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.cudnn_sdp_enabled(),
        SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled(),
        SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled(),
        SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled(),
    }
    return sdpa_kernel([kernel for kernel, usable in enabled.items() if usable], set_priority=True)
