"""Launches of csrc/norm_modulate.cu; same meaning as the functions of these names in triton_impl.

Tokens (B, N, D) are contiguous, and so is each image's vector in (B, D), of whatever stride between images.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .launch import launch


def unsupported(stream: torch.dtype, others: tuple[torch.dtype, ...]) -> str | None:
    """Why the kernels cannot take this mixture of dtypes, or None if they can.

    Args:
        stream: of x, and of x + gate * y.
        others: of the branch, of the images' vectors and of the modulated output.
    """
    return _unsupported(stream, others)


# As in backends.py: Dynamo need not trace what depends on dtypes alone.
unsupported._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _unsupported(stream: torch.dtype, others: tuple[torch.dtype, ...]) -> str | None:
    branch, *more = set(others)
    if not more and (branch == stream or (stream == torch.float32 and branch.itemsize == 2)):
        return None
    return (
        f"got a stream in {stream} among {sorted(map(str, set(others)))}, expected one dtype throughout, or an fp32 "
        "stream and one dtype of 16 bits for all else"
    )


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
) -> Tensor:
    """Normalise and modulate x, or x + gate * y, which is then written to `total`."""
    out = torch.empty_like(x, dtype=dtype)
    strides = 0 if gate is None else gate.stride(0), shift.stride(0), scale.stride(0)
    launch("norm_modulate", (x, gate, y, shift, scale, total, out), (*x.shape, *strides, eps), x, (x.dtype, dtype))
    return out
