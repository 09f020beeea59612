"""Recomputation of blocks in the backward pass: less memory for about a third more arithmetic in these blocks."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from dit_moe_kernels import current_backend, use_backend
from torch import nn
from torch.utils.checkpoint import checkpoint


class _Recomputed:
    """Mixed in before a block's class: forward keeps only its inputs and is run again by the backward pass."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        plain = super().forward  # type: ignore[misc]
        if not torch.is_grad_enabled():
            return plain(*args, **kwargs)
        # The backward pass of a GPU has a thread of its own, where use_backend() of this one does not hold.
        backend = current_backend()

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), use_backend(backend)

        # Nothing random happens in a block, and reading the generator's state would wait for the device.
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        if not torch.compiler.is_compiling():
            options["context_fn"] = contexts
        return checkpoint(plain, *args, **options, **kwargs)


def recompute(blocks: nn.ModuleList, count: int) -> None:
    """Let `count` of the blocks, evenly spread, recompute their activations; the others stay or become plain.

    Args:
        blocks: changed in place: a chosen block's class becomes a subclass of itself, so that its parameters' names,
            its hooks and copies of it stay right. To be called before the blocks are sharded.
        count: 0 to the number of blocks.

    Raises:
        ValueError: count out of range.
    """
    if not 0 <= count <= len(blocks):
        raise ValueError(f"recompute_blocks: got {count}, expected 0 to the model's {len(blocks)} blocks")
    for index, block in enumerate(blocks):
        chosen = (index + 1) * count // len(blocks) > index * count // len(blocks)
        cls = type(block)
        if issubclass(cls, _Recomputed) and not chosen:
            block.__class__ = cls.__mro__[2]
        elif chosen and not issubclass(cls, _Recomputed):
            block.__class__ = type(f"Recomputed{cls.__name__}", (_Recomputed, cls), {})
