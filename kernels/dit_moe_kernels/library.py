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
        setup_context, backward: as in `torch.library.register_autograd`, called with all arguments in the schema's
            order; None for an op without gradient.
    """
    name = schema.partition("(")[0]
    qualified = f"{NAMESPACE}::{name}"
    # pt2_compliant_tag: the op has a fake and no hidden state, so torch.compile may take it in a full graph.
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in ("cpu", "cuda"):
        _LIBRARY.impl(name, _guarded(impl, device), device.upper())
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    op = getattr(torch.ops.dit_moe, name).default
    if setup_context is not None and backward is not None:
        _LIBRARY.impl(name, _differentiable(op, setup_context, backward), "Autograd", with_keyset=True)
    return op


def _differentiable(op: Any, setup_context: Callable[..., None], backward: Callable[..., Any]) -> Callable[..., Any]:
    """The op's kernel for the dispatcher's Autograd key, as `torch.library.register_autograd` makes it.

    That one looks up the defaults of arguments at each call, and for each argument the schema makes the list of all:
    35 us for the 13 of expert_ffn, a tenth of the host's time of a layer. These ops have no defaults.
    """

    def below(keyset: Any, args: tuple) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def forward(ctx: Any, *args_and_keyset: Any) -> Any:
        *args, keyset = args_and_keyset
        output = below(keyset, tuple(args))
        setup_context(ctx=ctx, inputs=tuple(args), output=output)
        return output

    def gradients(ctx: Any, *grads: Any) -> tuple:
        result = backward(ctx, *grads)
        return (*result, None) if isinstance(result, tuple) else (result, None)  # None is the keyset's

    methods = {"forward": staticmethod(forward), "backward": staticmethod(gradients)}
    function: Any = type(op._schema.name.partition("::")[2], (torch.autograd.Function,), methods)

    def run(keyset: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return function.apply(*args, keyset)
        return below(keyset, args)

    return run


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
