"""MegaBlocks' dropless MLP (PyPI megablocks), with a stand-in for its CUDA extension where that is not built."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from ..problems import MoEProblem
from .base import Layer, missing_package
from .stk import flat_weights, stack_grads

_EXTENSION = "megablocks_ops"


class MegaBlocks:
    """`megablocks.layers.dmoe.ParallelDroplessMLP` with gated experts and its block-sparse products.

    Its own router is replaced by an fp32 one, as all providers have. Its Arguments refuse the block-sparse products
    with Triton 3.2 or newer; the alternative needs another extension, so the refusal is passed over, block numbers are
    widened (see `stk._pattern`), and the check of the results decides.
    """

    name = "megablocks"

    def availability(self, device: str) -> str | None:
        """Needs megablocks, stanford-stk and a GPU."""
        return missing_package("megablocks", "megablocks", device) or missing_package(
            "stk.backend", "stanford-stk", device
        )

    @property
    def note(self) -> str:
        """Said in the status of its rows."""
        remarks = ["int32 block numbers"]
        if isinstance(sys.modules.get(_EXTENSION), _StandIn):
            remarks.append("torch stand-in for megablocks_ops")
        return ", ".join(remarks)

    def build(self, problem: MoEProblem) -> Layer:
        """The module over copies of the problem's weights."""
        if importlib.util.find_spec(_EXTENSION) is None:
            sys.modules[_EXTENSION] = _StandIn()

        shape, flat = problem.shape, flat_weights(problem)
        experts = _dropless_mlp(problem)
        parameters = {name: torch.nn.Parameter(weight.detach()) for name, weight in flat.items()}
        experts.mlp.w1, experts.mlp.v1, experts.mlp.w2 = parameters.values()

        def forward(x: Tensor) -> Tensor:
            probs = F.linear(x.float(), problem.gate.float()).softmax(dim=-1)
            topk_weights, topk_ids = probs.topk(shape.top_k, dim=-1)
            return experts(x, probs, topk_weights.to(x.dtype), topk_ids)

        return Layer(forward, {"gate": problem.gate, **parameters}, lambda grads: stack_grads(grads, shape.num_experts))


def _dropless_mlp(problem: MoEProblem):
    import stk
    from megablocks.layers.dmoe import ParallelDroplessMLP

    class WideIndices(ParallelDroplessMLP):
        """The layer with int32 block numbers."""

        def topology(self, x: Tensor, padded_bins: Tensor):
            """The block pattern of the hidden layer."""
            narrow = super().topology(x, padded_bins)
            return stk.Matrix(
                narrow.size(),
                narrow.data,
                narrow.row_indices.int(),
                narrow.column_indices.int(),
                narrow.offsets,
                narrow.column_indices_t.int(),
                narrow.offsets_t,
                narrow.block_offsets_t,
            )

    return WideIndices(_arguments(problem))


def _arguments(problem: MoEProblem):
    from megablocks.layers.arguments import Arguments

    class Settings(Arguments):
        """Arguments without the check of Triton's version."""

        def __post_init__(self) -> None:
            self.shared_expert_hidden_size = self.ffn_hidden_size

    return Settings(
        hidden_size=problem.shape.hidden_size,
        ffn_hidden_size=problem.shape.expert_hidden_size,
        bias=False,
        return_bias=False,
        activation_fn=F.silu,
        moe_num_experts=problem.shape.num_experts,
        moe_top_k=problem.shape.top_k,
        moe_loss_weight=0.0,
        mlp_type="glu",
        mlp_impl="sparse",
        fp16=problem.x.dtype == torch.float16,
        bf16=problem.x.dtype == torch.bfloat16,
        device=problem.x.device,
    )


class _StandIn(ModuleType):
    """The five functions of the extension that the dropless layer calls, in PyTorch; each fills its last argument."""

    def __init__(self) -> None:
        super().__init__(_EXTENSION)
        self.__spec__ = importlib.util.spec_from_loader(_EXTENSION, loader=None)

    @staticmethod
    def sort(x: Tensor, end_bit: int, x_out: Tensor, iota_out: Tensor) -> None:
        """Sort by the low end_bit bits; the values are smaller than that anyway."""
        values, order = x.sort(stable=True)
        x_out.copy_(values)
        iota_out.copy_(order)

    @staticmethod
    def histogram(x: Tensor, num_bins: int) -> Tensor:
        """Occurrences of 0 to num_bins - 1, without a host sync."""
        ends = torch.searchsorted(x.sort().values, torch.arange(num_bins, device=x.device, dtype=x.dtype), right=True)
        return torch.diff(ends, prepend=ends.new_zeros(1)).int()

    @staticmethod
    def inclusive_cumsum(x: Tensor, dim: int, out: Tensor) -> None:
        """Running sum."""
        out.copy_(x.cumsum(dim))

    @staticmethod
    def exclusive_cumsum(x: Tensor, dim: int, out: Tensor) -> None:
        """Running sum of what comes before."""
        out.copy_(x.cumsum(dim) - x)

    @staticmethod
    def indices(padded_bins: Tensor, block_size: int, block_rows: int, block_columns: int, out: Tensor) -> None:
        """Column blocks of every row block: those of the expert that owns the row."""
        starts = torch.arange(block_rows, device=out.device, dtype=padded_bins.dtype) * block_size
        expert = torch.searchsorted(padded_bins, starts, right=True)
        columns = expert[:, None] * block_columns + torch.arange(block_columns, device=out.device)
        out.copy_(columns.flatten())
