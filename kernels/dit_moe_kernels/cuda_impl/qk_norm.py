"""Launches of csrc/qk_norm.cu; same meaning as the functions of these names in triton_impl."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .launch import ALIGNMENT, aligned, launch

_MAX_WIDTH = 128


def fitting_width(width: int) -> bool:
    """Whether the kernels take heads of this width, as a plain bool where Dynamo's width is symbolic."""
    if width % 8 != 0 or width > _MAX_WIDTH:
        return False
    return True


def unsupported(dtype: torch.dtype, weights: tuple[torch.dtype, ...], result: torch.dtype, fitting: bool) -> str | None:
    """Why the kernels cannot take these dtypes or this width, or None if they can.

    Args:
        dtype: of queries and keys.
        weights: of weights and biases.
        result: of the normalised queries and keys.
        fitting: what `fitting_width` says.
    """
    if not fitting:
        return f"got heads of another width than a multiple of 8 up to {_MAX_WIDTH}"
    if result != dtype or len(set(weights)) != 1 or weights[0] not in (dtype, torch.float32):
        return (
            f"got queries and keys in {dtype}, weights in {sorted(map(str, set(weights)))} and a result in {result}; "
            "expected one dtype throughout, or weights in fp32"
        )
    return None


# As in backends.py: Dynamo need not trace what depends on constants alone.
unsupported._dynamo_marked_constant = True  # type: ignore[attr-defined]


def qk_norm(q: Tensor, k: Tensor, weights: list[Tensor], eps: float, q_out: Tensor, k_out: Tensor) -> None:
    """q, k (T, H, W) with neighbouring columns, two weights and biases (W,) -> q_out, k_out (T, H, W) contiguous."""
    q, k = _whole_words(q), _whole_words(k)
    q_weight, q_bias, k_weight, k_bias = (aligned(weight) for weight in weights)
    tensors = (q, k, q_weight, q_bias, k_weight, k_bias, q_out, k_out)
    launch("qk_norm", tensors, (*q.shape, *_strides(q), *_strides(k), eps), q, (q.dtype, q_weight.dtype))


def qk_norm_backward(
    dq_out: Tensor,
    dk_out: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    dq: Tensor,
    dk: Tensor,
) -> Tensor:
    """Write dq and dk (T, H, W), all gradients contiguous.

    Returns:
        (2, 2, W) fp32: gradients of q's weight and bias, then of k's.
    """
    q, k = _whole_words(q), _whole_words(k)
    num_tokens, heads, width = q.shape
    blocks = _num_blocks(num_tokens * heads, q)
    partials = q.new_empty(blocks, 2, 2, width, dtype=torch.float32)
    grads = aligned(dq_out), aligned(dk_out)
    tensors = (*grads, q, k, aligned(q_weight), aligned(k_weight), dq, dk, partials)
    sizes = (*q.shape, *_strides(q), *_strides(k), blocks, eps)
    launch("qk_norm_backward", tensors, sizes, q, (q.dtype, q_weight.dtype))
    return partials.sum(0)


def _strides(x: Tensor) -> tuple[int, int]:
    """Elements between tokens and between heads, 0 where there is but one: PyTorch's number means nothing there."""
    return x.stride(0) if x.shape[0] > 1 else 0, x.stride(1) if x.shape[1] > 1 else 0


def _whole_words(x: Tensor) -> Tensor:
    """Queries or keys whose rows the kernels can read: only odd strides or addresses need the copy."""
    chunk = ALIGNMENT // x.dtype.itemsize
    if x.data_ptr() % ALIGNMENT or any(stride % chunk for stride in _strides(x)):
        return x.clone(memory_format=torch.contiguous_format)
    return x


def _num_blocks(num_rows: int, like: Tensor) -> int:
    """Of the backward kernel, for queries and for keys each: all at once on the GPU, and none without rows."""
    rows_at_once = 64 // like.dtype.itemsize  # by a block, see csrc/qk_norm.cu
    resident = 3 if like.shape[-1] <= 96 else 2  # as many blocks have a multiprocessor's registers
    return min(-(-num_rows // rows_at_once), resident * _num_sms(like.get_device()) // 2)


@functools.cache
def _num_sms(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).multi_processor_count
