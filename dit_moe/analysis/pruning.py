"""Which experts could be dropped or merged, and at which cost to their layer's output: reported, never done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from dit_moe_kernels import make_routing_plan
from torch import Tensor, nn

from ..layers import MoEFeedForward


@dataclass(frozen=True)
class ExpertProbe:
    """Experts' outputs on a sample of tokens. L layers, E experts; costs are root mean squares relative to the layer's
    whole output, shared expert included: 0.1 means that the output changes by a tenth of its length.

    tokens: sampled tokens of each layer.
    weight: (L, E) mean routing weight where the expert was chosen; NaN where it never was, as in the next two.
    output_norm: (L, E) mean length of the expert's output there, before its weight.
    drop_cost: (L, E) change of the layer's output if the expert's choices are left out.
    merge_cost: (L, E, E) change if the second expert answers the first one's choices, with their weights; 0 on the
        diagonal.
    """

    tokens: int
    weight: np.ndarray
    output_norm: np.ndarray
    drop_cost: np.ndarray
    merge_cost: np.ndarray

    def cheapest_merges(self) -> list[tuple[int, int, int, float]]:
        """For each layer the pair that costs least: (layer, expert left out, expert that stands in, cost)."""
        found = []
        for layer, costs in enumerate(self.merge_cost):
            if len(costs) < 2:
                continue
            apart = np.where(np.eye(len(costs), dtype=bool), np.inf, costs)
            gone, kept = np.unravel_index(np.argmin(apart), apart.shape)
            found.append((layer, int(gone), int(kept), float(apart[gone, kept])))
        return found


def probe_experts(
    model: nn.Module,
    sample: Callable[[], Any],
    *,
    num_images: int,
    num_calls: int,
    num_tokens: int = 512,
    seed: int = 0,
) -> ExpertProbe:
    """Keep some tokens of each `MoEFeedForward` while `sample` runs, and ask every expert about them.

    Args:
        model: holds the layers.
        sample: runs the model; each call of a layer holds whole images, the conditional ones first.
        num_images: conditional images in each call.
        num_calls: how often `sample` calls each layer, so that the tokens are spread over all steps.
        num_tokens: tokens to keep of each layer.
        seed: of their choice.

    Raises:
        ValueError: no such layers, or layers of different numbers of experts; or a layer was never called.
    """
    layers = [module for module in model.modules() if isinstance(module, MoEFeedForward)]
    if len({layer.gate.num_experts for layer in layers}) != 1:
        raise ValueError(f"model: got {len(layers)} MoEFeedForward layers, expected some, of one number of experts")
    generator = torch.Generator().manual_seed(seed)
    kept: list[list[tuple[Tensor, Tensor]]] = [[] for _ in layers]
    per_call = max(1, -(-num_tokens // num_calls))

    def keep(place: list[tuple[Tensor, Tensor]], args: tuple, kwargs: dict[str, Any]) -> None:
        inputs = dict(zip(("x", "router_x"), args, strict=False)) | kwargs
        x = inputs["x"].detach()
        router_x = x if inputs.get("router_x") is None else inputs["router_x"].detach()
        x_TD, router_TD = (tensor[:num_images].reshape(-1, tensor.shape[-1]) for tensor in (x, router_x))
        rows = torch.randint(x_TD.shape[0], (per_call,), generator=generator).to(x.device)
        place.append((x_TD[rows], router_TD[rows]))

    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs, place=place: keep(place, args, kwargs), with_kwargs=True
        )
        for layer, place in zip(layers, kept, strict=True)
    ]
    try:
        sample()
    finally:
        for hook in hooks:
            hook.remove()
    if not all(kept):
        raise ValueError("sample: it did not call every layer")
    with torch.no_grad():
        parts = [
            _probe_layer(layer, *(torch.cat(column)[:num_tokens] for column in zip(*pairs, strict=True)))
            for layer, pairs in zip(layers, kept, strict=True)
        ]
    weight, norm, drop, merge = (np.stack(column) for column in zip(*parts, strict=True))
    return ExpertProbe(min(num_tokens, per_call * num_calls), weight, norm, drop, merge)


def _probe_layer(layer: MoEFeedForward, x_TD: Tensor, router_TD: Tensor) -> tuple[np.ndarray, ...]:
    """weight (E,), output norm (E,), drop cost (E,), merge cost (E, E) of one layer on its tokens."""
    num_experts, tokens = layer.gate.num_experts, x_TD.shape[0]
    routing = layer.gate(router_TD)
    weight_TE = torch.zeros(tokens, num_experts, device=x_TD.device)
    weight_TE.scatter_(1, routing.topk_ids.long(), routing.topk_weights.float())
    chosen_TE = torch.zeros_like(weight_TE).scatter_(1, routing.topk_ids.long(), 1.0)
    ones_T1 = routing.topk_weights.new_ones(tokens, 1)
    outputs = []
    for expert in range(num_experts):
        ids_T1 = torch.full((tokens, 1), expert, dtype=torch.int32, device=x_TD.device)
        outputs.append(layer.experts(x_TD, ones_T1, make_routing_plan(ids_T1, num_experts, validate=False)).float())
    y_ETD = torch.stack(outputs)
    whole = layer(x_TD, router_TD).hidden.float().square().sum()
    squares_TE = weight_TE.square()
    choices_E = chosen_TE.sum(0)
    norm_E = (y_ETD.norm(dim=-1).T * chosen_TE).sum(0) / choices_E  # 0 / 0 is NaN: never chosen
    drop_E = ((y_ETD.square().sum(-1).T * squares_TE).sum(0) / whole).sqrt()
    merge_EE = torch.stack(
        [((y_ETD - y_TD).square().sum(-1) * squares_TE[:, e]).sum(-1).div(whole).sqrt() for e, y_TD in enumerate(y_ETD)]
    )
    results = (weight_TE.sum(0) / choices_E, norm_E, drop_E, merge_EE)
    return tuple(result.cpu().numpy() for result in results)
