"""Validators of user input; each raises ValueError or TypeError with what it got and what it expected."""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_float(name: str, tensor: Tensor, ndim: int) -> None:
    """A floating-point tensor with `ndim` dimensions."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, expected a Tensor")
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: got dtype {tensor.dtype}, expected one of {FLOAT_DTYPES}")
    if tensor.ndim != ndim:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {ndim} dimensions")


def check_ids(name: str, tensor: Tensor) -> None:
    """An int32 or int64 tensor."""
    if not isinstance(tensor, Tensor) or tensor.dtype not in (torch.int32, torch.int64):
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name}: got {got}, expected an int32 or int64 Tensor")


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    """Exactly this shape."""
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {expected}")


def check_like(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Same device and dtype as another tensor."""
    check_same_device(name, tensor, other_name, other)
    if tensor.dtype != other.dtype:
        raise TypeError(f"{name}: got dtype {tensor.dtype}, expected {other.dtype} as {other_name} has")


def check_same_product_dtype(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Same device, and same dtype once autocast (if it is on) has cast both."""
    check_same_device(name, tensor, other_name, other)
    if autocast_dtype(tensor) != autocast_dtype(other):
        check_like(name, tensor, other_name, other)


def check_same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Same device as another tensor."""
    if tensor.device != other.device:
        raise ValueError(f"{name}: got device {tensor.device}, expected {other.device} as {other_name} has")


def check_top_k(top_k: int, num_experts: int) -> None:
    """1 <= top_k <= num_experts."""
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k: got {top_k}, expected 1 to num_experts = {num_experts}")


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which a product with this tensor runs: autocast's where autocast is on, else the tensor's own."""
    return product_dtype(tensor.device.type, tensor.dtype)


def product_dtype(device: str, dtype: torch.dtype) -> torch.dtype:
    """The same for any tensor of this device type and dtype."""
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device) and dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return dtype
