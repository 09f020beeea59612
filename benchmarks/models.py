"""Whole models to measure: a preset, the same with a per-expert loop, and its dense twins."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from dit_moe_kernels import availability, use_backend
from torch import Tensor, nn

from dit_moe import DiT, DiTConfig, MoEFeedForward, MoEOutput, model_config
from dit_moe.flops import count_parameters, flops, macs

from .cases import TINY_CASE
from .engine import Unavailable
from .providers.loop import routed_loop
from .timing import Clock

PROVIDERS = (
    "ours-cuda",
    "ours-triton",
    "ours-triton-compiled",
    "loop",
    "dense-same-name",
    "dense-same-name-compiled",
    "dense-flops",
    "dense-params",
)
DEFAULT_PROVIDERS = tuple(name for name in PROVIDERS if not name.endswith("-compiled"))
_PIXELS_PER_LATENT = 8
_WIDTH_MULTIPLE = 64
_Module = TypeVar("_Module", bound=nn.Module)


def split_case(case: str) -> tuple[str, int]:
    """A case's model and image side in pixels: "XL/2-8E2A@512" -> ("XL/2-8E2A", 512); 256 unless said."""
    name, _, pixels = case.partition("@")
    return name, int(pixels or 256)


def moe_config(case: str) -> DiTConfig:
    """Configuration of the DiT-MoE that a case names."""
    name, pixels = split_case(case)
    if name == TINY_CASE:
        return DiTConfig(
            input_size=pixels // 32,
            hidden_size=32,
            depth=2,
            num_heads=2,
            mlp_ratio=2.0,
            num_experts=4,
            num_classes=10,
        )
    return model_config(f"DiT-MoE-{name}", input_size=pixels // _PIXELS_PER_LATENT)


def dense_config(config: DiTConfig, match: str) -> DiTConfig:
    """A dense DiT of the same depth and width.

    Args:
        config: the DiT-MoE.
        match: "same-name" for the DiT of the same size, whose MLP is 4 times as wide as a token; "flops" or "params"
            for the MLP width at which the whole model needs the same operations or has the same parameters, rounded
            to a multiple of 64, because products of odd widths are slow.
    """
    dense = replace(config, num_experts=0, mlp_ratio=4.0)
    if match == "same-name":
        return dense
    count: Callable[[DiTConfig], int] = macs if match == "flops" else count_parameters
    wider = replace(dense, mlp_ratio=5.0)
    per_unit = (count(wider) - count(dense)) / (wider.ffn_hidden_size - dense.ffn_hidden_size)
    units = dense.ffn_hidden_size + (count(config) - count(dense)) / per_unit
    aligned = max(round(units / _WIDTH_MULTIPLE), 1) * _WIDTH_MULTIPLE
    # half a unit more, so that the product with hidden_size rounds down to the wanted width
    return replace(dense, mlp_ratio=(aligned + 0.5) / config.hidden_size)


@dataclass(frozen=True)
class Model:
    """A model ready to run.

    Args:
        module: on its device.
        flops: operations of one forward of one image.
        inside: context to run it in, which selects a backend.
    """

    module: nn.Module
    flops: int
    inside: Callable[[], AbstractContextManager]

    @property
    def held_bytes(self) -> int:
        """Bytes of the parameters."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self.module.parameters())


class ModelShop:
    """Builds the models of one case; those that are the same DiT-MoE share its parameters.

    Args:
        case: such as "XL/2-8E2A@512".
        device: "cuda" or "cpu".
        dtype: of the parameters.
        depth: blocks to build instead of the preset's, for checks.
    """

    def __init__(self, case: str, device: str, dtype: torch.dtype, depth: int | None = None) -> None:
        self.config = moe_config(case)
        if depth is not None:
            self.config = replace(self.config, depth=depth)
        self._device, self._dtype = device, dtype
        self._moe: DiT | None = None

    @property
    def moe(self) -> DiT:
        """The DiT-MoE itself."""
        if self._moe is None:
            self._moe = fresh_model(self.config, self._device, self._dtype)
        return self._moe

    def build(self, provider: str) -> Model:
        """The model of a provider.

        Raises:
            Unavailable: it cannot run on this device.
        """
        name, compiled = provider.removesuffix("-compiled"), provider.endswith("-compiled")
        if name.startswith("dense-"):
            config = dense_config(self.config, name.removeprefix("dense-"))
            # Plain operations, which torch.compile can fuse, instead of our ops around attention.
            plain = partial(use_backend, "reference")
            model = Model(fresh_model(config, self._device, self._dtype), flops(config), plain)
        elif name == "loop":
            model = Model(with_loop(self.moe), flops(self.config), partial(use_backend, "reference"))
        else:
            backend = name.removeprefix("ours-")
            reason = availability(backend, self._device)
            if reason is not None:
                raise Unavailable(reason)
            # The CUDA kernels cover the routed layers alone: with them the model is what "auto" makes of it.
            asked = "auto" if backend == "cuda" else backend
            model = Model(self.moe, flops(self.config), partial(use_backend, asked))
        if not compiled:
            return model
        torch._dynamo.reset()  # earlier tasks' shapes would count against the limit of recompilations
        module = _sharing_copy(model.module)  # the original stays as it is
        module.compile(dynamic=False)
        return replace(model, module=module)


def fresh_model(config: DiTConfig, device: str, dtype: torch.dtype) -> DiT:
    """A model with its usual initial weights, but small random ones in place of zero ones, so that nothing is idle."""
    with torch.device("meta"):
        model = DiT(config)
    model = model.to(dtype).to_empty(device=device)
    model.reset_parameters()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(std=0.02)
    return model


def random_forward(model: DiT, batch: int, clock: Clock, generator: torch.Generator) -> Callable[[], Any]:
    """One forward of random images without gradients, as a CUDA graph on a GPU."""
    config, dtype, device = model.config, next(model.parameters()).dtype, generator.device
    shape = (batch, config.in_channels, config.input_size, config.input_size)
    x = torch.randn(shape, device=device, generator=generator).to(dtype)
    t = torch.rand(batch, device=device, generator=generator)
    y = torch.arange(batch, device=device) % config.num_classes
    inputs = (x, t, y)
    call = torch.no_grad()(partial(model, *inputs))
    if device.type == "cpu":
        return call
    replay = clock.capture([call])

    def forward(held: tuple[Tensor, ...] = inputs) -> None:  # the graph reads them where they lie
        replay()

    return forward


def with_loop(model: DiT) -> nn.Module:
    """A copy of a DiT-MoE, sharing its parameters, whose routed experts run one after the other."""
    shared = _sharing_copy(model)
    for block in shared.blocks:
        assert isinstance(block.moe, MoEFeedForward)
        block.register_module("moe", LoopMoE(block.moe))
    return shared


def _sharing_copy(module: _Module) -> _Module:
    """A copy of a module with the same parameters."""
    return copy.deepcopy(module, {id(parameter): parameter for parameter in module.parameters()})


class LoopMoE(nn.Module):
    """The routed layer in the manner of the official code, over the weights of a `MoEFeedForward`."""

    def __init__(self, moe: MoEFeedForward) -> None:
        super().__init__()
        self.top_k, self.balance_alpha, self.shared_experts = moe.gate.top_k, moe.balance_alpha, moe.shared_experts
        self.gate = moe.gate.weight
        w1, w3 = moe.experts.w13.detach().chunk(2, dim=1)
        stacks = (w1, w3, moe.experts.w2.detach())
        self.weights = nn.ParameterList(nn.Parameter(stack[e]) for e in range(w1.shape[0]) for stack in stacks)

    def forward(self, x: Tensor) -> MoEOutput:
        """(..., D) -> the layer's output."""
        x_TD = x.reshape(-1, x.shape[-1])
        experts = [list(self.weights[e : e + 3]) for e in range(0, len(self.weights), 3)]
        probs = F.linear(x_TD.float(), self.gate.float()).softmax(dim=-1)
        out, counts = routed_loop(x_TD, probs, self.top_k, experts)
        if self.shared_experts is not None:
            out = out + self.shared_experts(x_TD)
        return MoEOutput(out.view(x.shape), counts.int(), probs, self.top_k, self.balance_alpha)
