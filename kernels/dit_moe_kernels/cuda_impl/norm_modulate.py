"""Launches of csrc/norm_modulate.cu and csrc/norm_modulate_backward.cu; same meaning as triton_impl's functions.

Tokens (B, N, D) are contiguous, and so is each image's vector in (B, D), of whatever stride between images.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import launch

_PART_TOKENS = 8  # of an image: shorter parts would write more of their sums than they read
_TARGET_COLUMNS = 1 << 19  # of all parts together, at most: what Hopper's multiprocessors hold at once in 16 bits


def unsupported(stream: torch.dtype, others: tuple[torch.dtype, ...]) -> str | None:
    """Why the kernels cannot take this mixture of dtypes, or None if they can.

    Args:
        stream: of x, and of x + gate * y.
        others: of the branch, of the images' vectors and of the modulated output.
    """
    branch, *more = set(others)
    if not more and (branch == stream or (stream == torch.float32 and branch.itemsize == 2)):
        return None
    return (
        f"got a stream in {stream} among {sorted(map(str, set(others)))}, expected one dtype throughout, or an fp32 "
        "stream and one dtype of 16 bits for all else"
    )


# As in backends.py: Dynamo need not trace what depends on dtypes alone.
unsupported._dynamo_marked_constant = True  # type: ignore[attr-defined]


def norm_modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    dtype: torch.dtype,
    *,
    gate: Tensor | None = None,
    y: Tensor | None = None,
    total: Tensor | None = None,
    weights: Tensor | None = None,
    slot_to_row: Tensor | None = None,
    addend: Tensor | None = None,
) -> Tensor:
    """Normalise and modulate x, or x + gate * y, which is then written to `total`.

    With slot_to_row, y are an expert layer's rows, combined on the way with weights (T, K) fp32 and addend.
    """
    out = torch.empty_like(x, dtype=dtype)
    strides = 0 if gate is None else gate.stride(0), shift.stride(0), scale.stride(0)
    top_k = 0 if weights is None else weights.shape[1]
    tensors = (x, gate, y, weights, addend, slot_to_row, shift, scale, total, out)
    launch("norm_modulate", tensors, (*x.shape, top_k, *strides, eps), x, (x.dtype, dtype))
    return out


def norm_modulate_backward(
    dout: Tensor,
    x: Tensor,
    scale: Tensor,
    eps: float,
    dx: Tensor,
    dshift: Tensor,
    dscale: Tensor,
    *,
    dsum: Tensor | None = None,
    gate: Tensor | None = None,
    y: Tensor | None = None,
    dy: Tensor | None = None,
    dgate: Tensor | None = None,
) -> None:
    """Write the gradients of `norm_modulate`; with a residual, x is its `total`."""
    parts = num_parts(*x.shape)
    statistics = x.new_empty(*x.shape[:2], 4, dtype=torch.float32)
    partials = x.new_empty(x.shape[0], parts, 2 if y is None else 3, x.shape[2], dtype=torch.float32)
    tensors = (dout, dsum, x, gate, y, scale, dx, dy, dshift, dscale, dgate, statistics, partials)
    strides = 0 if gate is None else gate.stride(0), scale.stride(0)
    launch("norm_modulate_backward", tensors, (*x.shape, *strides, parts, eps), x, (x.dtype, dout.dtype))


def num_parts(num_images: int, num_tokens: int, width: int) -> int:
    """In how many parts an image's tokens are summed: enough to fill the GPU with them, none without tokens."""
    most = max(1, _TARGET_COLUMNS // max(1, num_images * width))
    part_tokens = max(_PART_TOKENS, -(-num_tokens // most))
    return -(-num_tokens // part_tokens)
