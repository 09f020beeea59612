"""The `dit_moe` torch.library namespace: every op is declared here once, from Python.

An op is a schema, one implementation per device type, a fake (shapes and dtypes for torch.compile) and, where it is
differentiable, a backward formula made of other ops. Implementations receive the name of an already resolved backend as
their last argument, so that a backward runs on the backend of its forward, whatever thread autograd uses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "dit_moe"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def define_op(
    schema: str,
    impl: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Any:
    """Declare one op and return its overload.

    Args:
        schema: name and arguments in torch's schema language, without the namespace.
        impl: the implementation, for CPU and CUDA tensors alike.
        fake: computes empty outputs of the right shape and dtype from fake inputs.
        setup_context, backward: as in `torch.library.register_autograd`; None for an op without gradient.
    """
    name = schema.partition("(")[0]
    qualified = f"{NAMESPACE}::{name}"
    # pt2_compliant_tag: the op has a fake and no hidden state, so torch.compile may take it in a full graph.
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in ("cpu", "cuda"):
        _LIBRARY.impl(name, _guarded(impl, device), device.upper())
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_LIBRARY)
    return getattr(torch.ops.dit_moe, name).default


def _guarded(impl: Callable[..., Any], device: str) -> Callable[..., Any]:
    """Run an implementation on its tensors' GPU and without autocast: the public functions have chosen the dtypes."""

    @functools.wraps(impl)
    def run(*args: Any) -> Any:
        if device == "cuda":
            index = next(arg for arg in args if isinstance(arg, torch.Tensor)).get_device()
            if index != torch.cuda.current_device():  # Triton and CUDA launch on the current GPU
                with torch.cuda.device(index):
                    return run(*args)
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return impl(*args)
        return impl(*args)

    return run
