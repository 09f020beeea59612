"""What the Triton launchers share: tensor descriptors, precision, device properties."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # triton < 3.4
    TensorDescriptor = None


def cdiv(a: int, b: int) -> int:
    """a / b rounded up; triton.cdiv, which also serves inside kernels, takes some microseconds of each launch."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Smallest power of two not below n >= 1; for triton.next_power_of_2 as above."""
    return 1 << (n - 1).bit_length()


@functools.cache
def capability(device_index: int) -> tuple[int, int]:
    """Compute capability of a GPU; (0, 0) for the CPU, where kernels are interpreted."""
    return (0, 0) if device_index < 0 else torch.cuda.get_device_capability(device_index)


@functools.cache
def num_sms(device_index: int) -> int:
    """Number of multiprocessors, the size of a persistent grid; 4 in the interpreter, so that its loop is exercised."""
    return 4 if device_index < 0 else torch.cuda.get_device_properties(device_index).multi_processor_count


def device_index(tensor: Tensor) -> int:
    """Index of the tensor's GPU, -1 for the CPU."""
    return tensor.device.index if tensor.is_cuda else -1


def supports_tma(*tensors: Tensor) -> bool:
    """Whether tensor descriptors can address these contiguous tensors here (Hopper or newer, 16-byte rows)."""
    if TensorDescriptor is None or torch.version.hip is not None or capability(device_index(tensors[0])) < (9, 0):
        return False
    return all(t.data_ptr() % 16 == 0 and t.shape[-1] * t.element_size() % 16 == 0 for t in tensors)


def input_precision(dtype: torch.dtype) -> str:
    """Triton's input_precision for a dot: fp32 follows torch.set_float32_matmul_precision, as torch.matmul does."""
    if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32:
        return "tf32"
    return "ieee"
