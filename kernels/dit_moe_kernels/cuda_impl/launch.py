"""The one way into the compiled module: from tensors to addresses, on their device and its current stream.

Tensors are CUDA tensors of the current device, which library.py sets, already checked, and contiguous where no stride
is handed over. Nothing waits for the work, so all of it can be captured in a CUDA graph.

Some kernels can run beside the grouped product launched right before them, on the multiprocessors that its last tiles
leave idle (`beside`). Such a kernel reads nothing that the product writes. Nor may its results lie in memory that the
product still reads: tensors that the product takes are kept until the next kernel, which waits for both, is launched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import KernelError
from . import extension

ALIGNMENT = 16  # bytes: where the kernels that load whole words want every matrix, and every row in it


def launch(
    op: str,
    tensors: tuple[Tensor | None, ...],
    sizes: tuple[int | float, ...],
    like: Tensor,
    dtypes: tuple[torch.dtype, ...] | None = None,
) -> None:
    """Call a function of the compiled module on the current stream of the device of `like`.

    Args:
        op: the function's name.
        tensors: whose addresses come first; None is the null address.
        sizes: the numbers that follow.
        like: a tensor on the device.
        dtypes: what stands between the sizes and the stream; None means the dtype of `like`.
    """
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    codes = [dtype_code(dtype) for dtype in ((like.dtype,) if dtypes is None else dtypes)]
    # The stream's bare handle, as Triton asks for it: torch.cuda.current_stream makes an object around it each time.
    stream = torch._C._cuda_getCurrentRawStream(like.get_device())
    try:
        _function(op)(*addresses, *sizes, *codes, stream)
    except RuntimeError as error:
        raise KernelError(str(error)) from error


def aligned(matrix: Tensor) -> Tensor:
    """The matrix at an address that the kernels can read: only a view into another tensor may need the copy."""
    return matrix.clone() if matrix.data_ptr() % ALIGNMENT else matrix


@functools.cache
def _function(op: str) -> Callable[..., None]:
    return getattr(extension(), op)


@functools.cache
def dtype_code(dtype: torch.dtype) -> int:
    """The compiled module's number for a dtype."""
    module = extension()
    return {torch.float32: module.FLOAT32, torch.float16: module.FLOAT16, torch.bfloat16: module.BFLOAT16}[dtype]
