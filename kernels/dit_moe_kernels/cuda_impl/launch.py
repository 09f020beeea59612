"""The one way into the compiled module: from tensors to addresses, on their device and its current stream.

Tensors are contiguous CUDA tensors of the current device, which library.py sets, already checked. Nothing waits for the
work, so all of it can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import KernelError
from . import extension


def launch(op: str, tensors: tuple[Tensor | None, ...], sizes: tuple[int, ...], like: Tensor) -> None:
    """Call a function of the compiled module in the dtype of `like`, on the current stream of its device."""
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    dtype = dtype_code(like.dtype)
    stream = torch.cuda.current_stream(like.device).cuda_stream
    try:
        getattr(extension(), op)(*addresses, *sizes, dtype, stream)
    except RuntimeError as error:
        raise KernelError(str(error)) from error


def dtype_code(dtype: torch.dtype) -> int:
    """The compiled module's number for a dtype."""
    module = extension()
    return {torch.float32: module.FLOAT32, torch.float16: module.FLOAT16, torch.bfloat16: module.BFLOAT16}[dtype]
