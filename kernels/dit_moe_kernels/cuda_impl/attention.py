"""The launch of csrc/sm90/attention.cu."""

from __future__ import annotations

from torch import Tensor

from .launch import aligned, launch

WIDTHS = (64, 72, 88)  # of a head, as the kernel is compiled for
TOKENS = 128  # of which it takes multiples


def qk_norm_attention(qkv_BN3Hd: Tensor, weights: list[Tensor], eps: float) -> Tensor:
    """qkv in fp16 or bf16, contiguous, and two weights and biases (d,) in its dtype or fp32 -> (B, N, H, d)."""
    images, tokens, _, heads, width = qkv_BN3Hd.shape
    out_BNHd = qkv_BN3Hd.new_empty(images, tokens, heads, width)
    tensors = (aligned(qkv_BN3Hd), *(weight.contiguous() for weight in weights), out_BNHd)
    sizes, dtypes = (images, tokens, heads, width, eps), (qkv_BN3Hd.dtype, weights[0].dtype)
    launch("qk_norm_attention", tensors, sizes, qkv_BN3Hd, dtypes)
    return out_BNHd
