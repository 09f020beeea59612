"""Plain PyTorch reference of the norms around attention and experts, and of their gradients.

Shape suffixes: B images, N (or M) tokens of an image, H heads, d width of a head, D model width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import accumulation_dtype


def norm_modulate(x_BND: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """LayerNorm without weights, then * (1 + scale) + shift of each token's image, returned in dtype."""
    normed_BND = F.layer_norm(x_BND, x_BND.shape[-1:], eps=eps)
    return (normed_BND * (1 + scale_BD[:, None]) + shift_BD[:, None]).to(dtype)


def residual_norm_modulate(
    x_BND: Tensor, gate_BD: Tensor, y_BND: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """x + gate * y, and what `norm_modulate` makes of it."""
    sum_BND = x_BND + gate_BD[:, None] * y_BND
    return sum_BND, norm_modulate(sum_BND, shift_BD, scale_BD, eps, dtype)


def norm_modulate_backward(
    dout_BND: Tensor, x_BND: Tensor, scale_BD: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for x, shift and scale in the accumulation dtype."""
    wide = accumulation_dtype(x_BND.dtype)
    normed_BND, rstd_BN1 = _normalise(x_BND.to(wide), eps)
    dout_BND = dout_BND.to(wide)
    dx_BND = _normalise_backward(dout_BND * (1 + scale_BD[:, None].to(wide)), normed_BND, rstd_BN1)
    return dx_BND, dout_BND.sum(1), (dout_BND * normed_BND).sum(1)


def residual_norm_modulate_backward(
    dsum_BND: Tensor, dout_BND: Tensor, sum_BND: Tensor, gate_BD: Tensor, y_BND: Tensor, scale_BD: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients for x, gate, y, shift and scale in the accumulation dtype, from the sum x + gate * y."""
    dx_BND, dshift_BD, dscale_BD = norm_modulate_backward(dout_BND, sum_BND, scale_BD, eps)
    dx_BND = dx_BND + dsum_BND
    return dx_BND, (dx_BND * y_BND).sum(1), dx_BND * gate_BD[:, None], dshift_BD, dscale_BD


def _normalise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Each row less its mean, over its standard deviation; and the inverse of the latter."""
    rstd = (x.var(-1, correction=0, keepdim=True) + eps).rsqrt()
    return (x - x.mean(-1, keepdim=True)) * rstd, rstd


def _normalise_backward(dnormed: Tensor, normed: Tensor, rstd: Tensor) -> Tensor:
    """Gradient of `_normalise`'s first result for x."""
    along = (dnormed * normed).mean(-1, keepdim=True)
    return (dnormed - dnormed.mean(-1, keepdim=True) - normed * along) * rstd


def qk_norm(
    q_BNHd: Tensor,
    k_BNHd: Tensor,
    q_weight_d: Tensor,
    q_bias_d: Tensor,
    k_weight_d: Tensor,
    k_bias_d: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """LayerNorm of each head's query and key, returned in dtype."""
    width = q_BNHd.shape[-1:]
    q_BNHd = F.layer_norm(q_BNHd, width, q_weight_d, q_bias_d, eps)
    return q_BNHd.to(dtype), F.layer_norm(k_BNHd, width, k_weight_d, k_bias_d, eps).to(dtype)


def qk_norm_attention(
    qkv_BN3Hd: Tensor,
    q_weight_d: Tensor,
    q_bias_d: Tensor,
    k_weight_d: Tensor,
    k_bias_d: Tensor,
    eps: float,
) -> Tensor:
    """Attention of normalised queries and keys, scores and their softmax in the accumulation dtype: (B, N, H, d)."""
    q_BNHd, k_BNHd, v_BNHd = qkv_BN3Hd.unbind(2)
    dtype, wide = qkv_BN3Hd.dtype, accumulation_dtype(qkv_BN3Hd.dtype)
    q_BNHd, k_BNHd = qk_norm(q_BNHd, k_BNHd, q_weight_d, q_bias_d, k_weight_d, k_bias_d, eps, dtype)
    scores_BHNM = torch.einsum("bnhd,bmhd->bhnm", q_BNHd.to(wide), k_BNHd.to(wide)) * q_BNHd.shape[-1] ** -0.5
    return torch.einsum("bhnm,bmhd->bnhd", scores_BHNM.softmax(-1).to(dtype), v_BNHd).contiguous()


def qk_norm_backward(
    dq_out_BNHd: Tensor,
    dk_out_BNHd: Tensor,
    q_BNHd: Tensor,
    k_BNHd: Tensor,
    q_weight_d: Tensor,
    k_weight_d: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for q and k, and those of q's weight and bias and of k's as (2, 2, d), in the accumulation dtype."""
    wide = accumulation_dtype(q_BNHd.dtype)
    inputs, of_weights = [], []
    for dout, x, weight in ((dq_out_BNHd, q_BNHd, q_weight_d), (dk_out_BNHd, k_BNHd, k_weight_d)):
        dout = dout.to(wide)
        normed, rstd = _normalise(x.to(wide), eps)
        inputs.append(_normalise_backward(dout * weight, normed, rstd))
        of_weights.append(torch.stack([(dout * normed).sum((0, 1, 2)), dout.sum((0, 1, 2))]))
    return inputs[0], inputs[1], torch.stack(of_weights)
