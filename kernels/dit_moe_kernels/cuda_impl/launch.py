"""The one way into the compiled module: from tensors to addresses, on their device and its current stream.

Tensors are contiguous CUDA tensors of one device, already checked. Nothing waits for the work, so all of it can be
captured in a CUDA graph.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from ..errors import KernelError
from . import extension


def launch(op: str, tensors: tuple[Tensor | None, ...], sizes: tuple[int, ...], like: Tensor) -> None:
    """Call a function of the compiled module on the device, in the dtype and on the current stream of `like`."""
    module = extension()
    dtype = {torch.float32: module.FLOAT32, torch.float16: module.FLOAT16, torch.bfloat16: module.BFLOAT16}[like.dtype]
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    device = like.get_device()
    on_device = nullcontext() if device == torch.cuda.current_device() else torch.cuda.device(device)
    with on_device:
        stream = torch.cuda.current_stream(device).cuda_stream
        try:
            getattr(module, op)(*addresses, *sizes, dtype, stream)
        except RuntimeError as error:
            raise KernelError(str(error)) from error
