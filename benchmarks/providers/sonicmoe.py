"""SonicMoE: fused CuTe kernels for Hopper (PyPI sonic-moe); its first call compiles for minutes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..problems import MoEProblem
from .base import Layer, missing_package


class SonicMoE:
    """Softmax over all experts before the top-K, not renormalised; gate and up rows interleaved, its default layout."""

    name = "sonicmoe"

    def availability(self, device: str) -> str | None:
        """Needs the package, with quack-kernels and nvidia-cutlass-dsl, and a Hopper GPU."""
        return missing_package("sonicmoe", "sonic-moe", device) or missing_package("quack", "quack-kernels", device)

    def build(self, problem: MoEProblem) -> Layer:
        """A function over copies of the problem's weights."""
        import sonicmoe
        from sonicmoe.enums import ActivationType

        shape = problem.shape
        halves = problem.w13.detach().chunk(2, dim=1)
        w13 = torch.stack(halves, dim=2).flatten(1, 2).contiguous().requires_grad_()
        weights = {"gate": problem.gate, "w13": w13, "w2": problem.w2}

        def forward(x: Tensor) -> Tensor:
            out, _logits, _counts = sonicmoe.moe_TC_softmax_topk_layer(
                x,
                problem.gate,
                w13.permute(1, 2, 0),
                None,
                problem.w2.permute(1, 2, 0),
                None,
                shape.top_k,
                torch.cuda.current_stream().cuda_stream,
                ActivationType.SWIGLU,
                is_inference_mode_enabled=not torch.is_grad_enabled(),
                is_softmax_over_topk=False,
                norm_topk_probs=False,
            )
            return out

        return Layer(forward, weights, _deinterleave)


def _deinterleave(grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    pairs = grads["w13"].unflatten(1, (-1, 2))
    return {"gate": grads["gate"], "w13": torch.cat(pairs.unbind(2), dim=1), "w2": grads["w2"]}
