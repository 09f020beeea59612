"""Which implementation runs an op: what is available and why not, and how `auto` chooses."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import torch

from .errors import BackendUnavailableError

logger = logging.getLogger("dit_moe_kernels")

BACKENDS = ("auto", "triton", "cuda", "reference")
ENV_BACKEND = "DIT_MOE_BACKEND"

# The order in which `auto` tries the backends of each op family on a GPU.
_PREFERENCE = {
    "router": ("cuda", "triton", "reference"),
    "routing": ("cuda", "triton", "reference"),
    "counting": ("triton", "reference"),
    "permute": ("cuda", "triton", "reference"),
    "grouped_gemm": ("cuda", "triton", "reference"),
    "swiglu": ("cuda", "triton", "reference"),
    "linear_swiglu": ("cuda", "triton", "reference"),
    "norm": ("cuda", "triton", "reference"),
    "attention": ("cuda", "triton", "reference"),
    "expert_ffn": ("cuda", "triton", "reference"),
    "routed_rows": ("cuda", "reference"),
    "updates": ("triton", "reference"),
}
_MAX_EXPERTS = {"router": 64, "routing": 512}  # of the CUDA kernels
# Families whose CUDA kernels ask for more than the others'.
_PRODUCTS = ("grouped_gemm", "linear_swiglu", "attention", "expert_ffn", "routed_rows")
_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_local = threading.local()  # .backend: what use_backend() set on this thread


class _Inputs(NamedTuple):
    """What the choice of a backend depends on, see `resolve`; many_experts: more than the CUDA kernels take."""

    family: str
    device: torch.device | str
    dtype: torch.dtype
    whole_chunks: bool = True
    many_experts: bool = False
    refusal: str | None = None


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Make `backend` the one that `backend="auto"` means on this thread, inside the with block.

    Args:
        backend: "auto", "triton", "cuda" or "reference".

    Raises:
        ValueError: the name is none of these.
    """
    _check_name(backend, "use_backend")
    previous = getattr(_local, "backend", None)
    _local.backend = backend
    try:
        yield
    finally:
        _local.backend = previous


def current_backend() -> str:
    """What `backend="auto"` means on this thread now: a name from `use_backend` or DIT_MOE_BACKEND, or "auto"."""
    chosen = getattr(_local, "backend", None) or "auto"
    return os.environ.get(ENV_BACKEND, "auto") if chosen == "auto" else chosen


def availability(backend: str, device: str = "cuda") -> str | None:
    """Say why `backend` cannot run on this kind of device, or return None if it can.

    Args:
        backend: "triton", "cuda" or "reference".
        device: a torch device type, "cuda" or "cpu".
    """
    if backend == "reference":
        return None
    if backend == "triton":
        return _triton_reason(device)
    if backend == "cuda":
        return _cuda_reason(device)
    raise ValueError(f"unknown backend: got {backend!r}, expected one of {BACKENDS[1:]}")


def op_families(backend: str) -> tuple[str, ...]:
    """The op families that `backend` implements, such as "permute" or "expert_ffn"."""
    return tuple(family for family, names in _PREFERENCE.items() if backend in names)


def cuda_build_info() -> dict[str, str] | None:
    """CUDA version ("cuda_version") and GPU architectures ("archs") of the compiled extension, None without it."""
    from . import cuda_impl

    return cuda_impl.extension().build_info() if cuda_impl.import_error() is None else None


def resolve(
    backend: str,
    family: str,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    whole_chunks: bool = True,
    num_experts: int = 0,
    refusal: str | None = None,
) -> str:
    """Turn a requested backend into the one that runs.

    Args:
        backend: the caller's argument; "auto" yields to `use_backend`, then DIT_MOE_BACKEND, then the best there is.
        family: the op family, a key of the preference table.
        device: of the inputs; a type of device does where kernels run on every GPU.
        dtype: of the inputs.
        whole_chunks: of the products' widths, what `whole_chunks` says.
        num_experts: E, where the CUDA kernels of the family have a bound on it.
        refusal: why the CUDA kernel cannot take these inputs, where only the op knows.

    Raises:
        ValueError: the name is unknown.
        BackendUnavailableError: a backend asked for by name cannot run this op on these inputs.
    """
    if backend == "auto":
        backend = getattr(_local, "backend", None) or "auto"
    many_experts = num_experts > _MAX_EXPERTS.get(family, num_experts)
    return _settle(backend, family, device, dtype, whole_chunks, many_experts, refusal)


def companion(backend: str, family: str, device: torch.device | str, dtype: torch.dtype) -> str:
    """The backend of an op that another op's backward takes: that of its forward if it implements it, else the best."""
    return backend if backend in _PREFERENCE[family] else _choose(_Inputs(family, device, dtype))


@functools.cache
def kernels(backend: str, module: str) -> ModuleType:
    """The module of this name in cuda_impl or triton_impl, for ops whose launches are the same there; imported now."""
    return importlib.import_module(f".{backend}_impl.{module}", __package__)


def whole_chunks(dtype: torch.dtype, *widths: int) -> bool:
    """Whether rows of these widths are whole multiples of 16 bytes, and not empty."""
    return all(width > 0 and width * dtype.itemsize % 16 == 0 for width in widths)


def _settle(backend: str, *of_inputs: Any) -> str:
    inputs = _Inputs(*of_inputs)  # made here: Dynamo hands constants to this function
    if backend == "auto":
        backend = os.environ.get(ENV_BACKEND, "auto")
        _check_name(backend, f"environment variable {ENV_BACKEND}")
    else:
        _check_name(backend, "backend")
    if backend == "auto":
        return _choose(inputs)
    reason = _reason_against(backend, inputs)
    if reason is not None:
        raise BackendUnavailableError(f"backend {backend!r} cannot run {inputs.family}: {reason}")
    return backend


# What torch.compiler.assume_constant_result sets, without its import of torch._dynamo (over a second): a lookup in the
# process's state that Dynamo need not trace.
_settle._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _choose(inputs: _Inputs) -> str:
    """The first backend of the preference list that can run; says once what was chosen and why."""
    family, device, dtype = inputs[:3]
    rejected: list[str] = []
    for candidate in _PREFERENCE[family]:
        reason = _reason_against(candidate, inputs)
        if reason is None:
            why = "; ".join(rejected) or "first choice"
            on_gpu = torch.device(device).type == "cuda"
            level = logging.WARNING if candidate == "reference" and on_gpu else logging.INFO
            logger.log(level, "%s on %s (%s): backend %s (%s)", family, device, dtype, candidate, why)
            return candidate
        rejected.append(f"not {candidate}: {reason}")
    raise AssertionError("reference always runs")


@functools.cache
def _reason_against(backend: str, inputs: _Inputs) -> str | None:
    family, device, dtype = inputs[:3]
    if backend not in _PREFERENCE[family]:
        return f"it implements only {sorted(f for f, names in _PREFERENCE.items() if backend in names)}"
    if backend != "reference" and dtype not in _KERNEL_DTYPES:
        return f"got {dtype}, expected one of {_KERNEL_DTYPES}"
    reason = availability(backend, torch.device(device).type)
    if reason is None and backend == "cuda" and inputs.refusal is not None:
        return inputs.refusal
    if reason is None and backend == "cuda" and family in _PRODUCTS:
        from .cuda_impl import grouped_gemm

        return grouped_gemm.unsupported(torch.device(device), dtype, inputs.whole_chunks)
    if reason is None and backend == "cuda" and family in _MAX_EXPERTS:
        if inputs.many_experts:
            return f"got more than {_MAX_EXPERTS[family]} experts"
        from .cuda_impl import routing

        return routing.unsupported(inputs.whole_chunks)
    return reason


def _check_name(name: str, where: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{where}: got {name!r}, expected one of {BACKENDS}")


def _triton_reason(device: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device == "cpu":
        if os.environ.get("TRITON_INTERPRET", "0") == "1":
            return None
        return "the tensors are on the CPU (set TRITON_INTERPRET=1 before the first use to interpret the kernels)"
    if device != "cuda":
        return f"got device {device!r}, expected 'cuda'"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return f"got compute capability {torch.cuda.get_device_capability()}, expected (8, 0) or newer"
    return None


def _cuda_reason(device: str) -> str | None:
    from . import cuda_impl

    if cuda_impl.import_error() is not None:
        return cuda_impl.import_error()
    if device != "cuda":
        return f"got device {device!r}, expected 'cuda'"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if torch.version.hip is not None:
        return "the extension is built for NVIDIA GPUs"
    return None
