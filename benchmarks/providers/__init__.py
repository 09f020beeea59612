"""Who is measured: every provider under the name that results carry."""

from __future__ import annotations

from .base import Layer, Provider
from .loop import Loop
from .megablocks import MegaBlocks
from .moe_ops import MoeOps
from .ours import Fused, Unfused
from .padded import Padded
from .sonicmoe import SonicMoE
from .stk import Stk
from .torch_grouped import TorchGrouped

__all__ = ["BASELINES", "Layer", "Provider", "layer_providers"]

BASELINES = ("gemm", "dense-flops", "dense-params")  # not routed layers: what they do instead is in their modules


def layer_providers() -> dict[str, Provider]:
    """The routed layers by name, in the order in which they are measured."""
    providers: list[Provider] = [
        Fused("ours-triton", backend="triton"),
        Unfused("ours-unfused", permute_backend="triton", backend="triton"),
        Fused("ours-cuda", "cuda", asked="auto"),
        TorchGrouped("torch-grouped-mm", compiled=False),
        TorchGrouped("torch-grouped-mm-compiled", compiled=True),
        Padded(),
        Loop(),
        Stk(),
        MegaBlocks(),
        MoeOps(),
        SonicMoE(),
    ]
    return {provider.name: provider for provider in providers}
