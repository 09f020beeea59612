"""self_attention: all tokens of an image among themselves, from packed queries, keys and values.

PyTorch's kernels do it, behind qk_norm where the model has that. On Hopper one kernel does both where no gradient is
wanted: normalised queries and keys never reach memory.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import backends, checks, reference_norm
from .cuda_impl.attention import TOKENS, WIDTHS
from .cuda_impl.grouped_gemm import DTYPES
from .cuda_impl.qk_norm import unsupported
from .library import define_op
from .qk_norm import check_weights, dtypes_of, qk_norm


def self_attention(
    qkv: Tensor, norm: tuple[Tensor, Tensor, Tensor, Tensor] | None = None, eps: float = 1e-6, *, backend: str = "auto"
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over all tokens of an image, with q and k normalised by `qk_norm` if norm is given.

    Args:
        qkv: (B, N, 3, H, d) float, queries, keys and values.
        norm: (d,) float each, qk_norm's q_weight, q_bias, k_weight and k_bias; None: q and k are taken as they are.
        eps: added to the norm's variance.
        backend: of the norm: "auto", "cuda", "triton" or "reference". "auto" and "cuda" take one kernel for all on
            Hopper in fp16 and bf16, with norm, where no gradient is wanted, N is a multiple of 128 and d is 64, 72 or
            88. Attention alone is always PyTorch's.

    Returns:
        (B, N, H * d), in autocast's dtype under autocast, else in qkv's.
    """
    if backend not in backends.BACKENDS:
        raise ValueError(f"backend: got {backend!r}, expected one of {backends.BACKENDS}")
    checks.check_float("qkv", qkv, 5)
    checks.check_shape("qkv", qkv, (*qkv.shape[:2], 3, *qkv.shape[3:]))
    if norm is not None and _fits(qkv, norm):
        check_weights(norm, "qkv", qkv)
        name = backends.resolve(backend, "attention", qkv.device, qkv.dtype)
        if name == "cuda":
            return _qk_norm_attention(qkv, *norm, eps, name).flatten(2)
    q_BNHd, k_BNHd, v_BNHd = qkv.unbind(2)
    if norm is not None:
        q_BNHd, k_BNHd = qk_norm(q_BNHd, k_BNHd, *norm, eps, backend=backend)
    if qkv.numel() == 0:  # PyTorch's attention fails on nothing, of which all gradients are nothing or zero
        return (q_BNHd + k_BNHd + v_BNHd).flatten(2)
    q_BHNd, k_BHNd, v_BHNd = (x_BNHd.transpose(1, 2) for x_BNHd in (q_BNHd, k_BNHd, v_BNHd))
    with _pytorchs_kernels(q_BHNd):
        out_BHNd = F.scaled_dot_product_attention(q_BHNd, k_BHNd, v_BHNd)
    return out_BHNd.transpose(1, 2).flatten(2)


def _fits(qkv: Tensor, norm: tuple[Tensor, ...]) -> bool:
    """Whether the one kernel could take these inputs, and no gradient is wanted."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (qkv, *norm)):
        return False
    if qkv.dtype not in DTYPES or qkv.shape[1] % TOKENS != 0 or qkv.shape[4] not in WIDTHS:
        return False
    return unsupported(qkv.dtype, dtypes_of(norm), checks.autocast_dtype(qkv), True) is None  # as qk_norm's own kernel


def _pytorchs_kernels(q: Tensor) -> AbstractContextManager:
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


def _impl(
    qkv: Tensor, q_weight: Tensor, q_bias: Tensor, k_weight: Tensor, k_bias: Tensor, eps: float, backend: str
) -> Tensor:
    if backend == "cuda":
        from .cuda_impl import attention as kernels

        return kernels.qk_norm_attention(qkv.contiguous(), [q_weight, q_bias, k_weight, k_bias], eps)
    return reference_norm.qk_norm_attention(qkv, q_weight, q_bias, k_weight, k_bias, eps)


def _fake(qkv: Tensor, *_: object) -> Tensor:
    images, tokens, _three, heads, width = qkv.shape
    return qkv.new_empty(images, tokens, heads, width)


_qk_norm_attention = define_op(
    "qk_norm_attention(Tensor qkv, Tensor q_weight, Tensor q_bias, Tensor k_weight, Tensor k_bias, float eps, "
    "str backend) -> Tensor",
    _impl,
    _fake,
)
