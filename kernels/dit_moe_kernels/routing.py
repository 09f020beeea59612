"""make_routing_plan: from each token's chosen experts to the order in which the kernels visit the rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, checks, configs, reference
from .library import define_op


class RoutingPlan(NamedTuple):
    """Where each token's copies go. Built on the device; no shape depends on the routing, so graphs can be captured.

    A slot is one choice of one token, slot = token * top_k + k. A row is a slot's place after a stable sort by expert.
    Slots with id -1 are not routed: they have no row, and the last rows stay unused.

    Example: topk_ids = [[1, 0], [1, 2]] with 3 experts gives rows ordered expert 0: slot 1; expert 1: slots 0, 2;
    expert 2: slot 3, hence tokens_per_expert = [1, 2, 1], expert_offsets = [0, 1, 3, 4], row_to_slot = [1, 0, 2, 3],
    slot_to_row = [1, 0, 2, 3] and row_to_token = [0, 0, 1, 1].

    All tensors are int32 and contiguous:
        tokens_per_expert: (E,) rows of each expert.
        expert_offsets: (E+1,) first row of each expert; the last entry is the number of rows in use.
        row_to_slot: (N,) slot of each row, -1 for an unused row.
        slot_to_row: (N,) row of each slot, -1 for an unrouted slot.
        tile_expert: (S,) expert of each row tile, -1 for an unused entry; S is the upper bound over all routings.
        tile_row: (S,) first row of each tile.
    """

    tokens_per_expert: Tensor
    expert_offsets: Tensor
    row_to_slot: Tensor
    slot_to_row: Tensor
    tile_expert: Tensor
    tile_row: Tensor
    tile_rows: int
    top_k: int

    @property
    def num_experts(self) -> int:
        """E, the number of experts."""
        return self.tokens_per_expert.shape[0]

    @property
    def num_rows(self) -> int:
        """N = tokens * top_k, the number of slots and the upper bound on the rows in use."""
        return self.row_to_slot.shape[0]

    @property
    def row_to_token(self) -> Tensor:
        """(N,) int32 token of each row, -1 for an unused row."""
        return torch.div(self.row_to_slot, self.top_k, rounding_mode="floor")


def make_routing_plan(
    topk_ids: Tensor,
    num_experts: int,
    *,
    tile_rows: int | None = None,
    validate: bool | None = None,
    backend: str = "auto",
) -> RoutingPlan:
    """Sort the chosen (token, expert) pairs by expert, stably and without a host sync.

    Args:
        topk_ids: (T, K) int32 or int64, experts of each token; -1 means "not routed".
        num_experts: E.
        tile_rows: rows per GEMM tile (16, 32, 64 or 128); None chooses by the mean number of rows per expert.
        validate: check that ids are in [-1, E); this reads the ids back, so None checks on the CPU only. Unchecked ids
            outside [0, E) count as not routed.
        backend: "auto", "cuda" (at most 512 experts), "triton" or "reference".

    Returns:
        RoutingPlan for T * K slots.

    Raises:
        TypeError, ValueError: wrong dtype, shape, expert count, tile height or (if checked) ids.
    """
    checks.check_ids("topk_ids", topk_ids)
    if topk_ids.ndim != 2:
        raise ValueError(f"topk_ids: got shape {tuple(topk_ids.shape)}, expected (T, K)")
    top_k = topk_ids.shape[1]
    checks.check_top_k(top_k, num_experts)
    if tile_rows is None:
        tile_rows = configs.choose_tile_rows(topk_ids.numel(), num_experts)
    check_tile_rows(tile_rows)
    if validate or (validate is None and topk_ids.device.type == "cpu" and not torch.compiler.is_compiling()):
        _check_ids(topk_ids, num_experts)
    name = backends.resolve(backend, "routing", topk_ids.device.type, torch.float32, num_experts=num_experts)
    counts, offsets, row_to_slot, slot_to_row, *tiles = _routing_plan(topk_ids, num_experts, tile_rows, name)
    return RoutingPlan(counts, offsets, row_to_slot, slot_to_row, tiles[0], tiles[1], tile_rows, top_k)


def check_tile_rows(tile_rows: int) -> None:
    """One of the heights that the products know."""
    if tile_rows not in configs.TILE_ROWS:
        raise ValueError(f"tile_rows: got {tile_rows}, expected one of {configs.TILE_ROWS}")


def _check_ids(topk_ids: Tensor, num_experts: int) -> None:
    if topk_ids.numel() == 0:
        return
    low, high = (int(bound) for bound in topk_ids.aminmax())
    if low < -1 or high >= num_experts:
        raise ValueError(f"topk_ids: got values {low} to {high}, expected -1 to {num_experts - 1}")


def _routing_plan_impl(topk_ids: Tensor, num_experts: int, tile_rows: int, backend: str) -> tuple[Tensor, ...]:
    if backend == "triton":
        from .triton_impl import routing

        return routing.routing_plan(topk_ids, num_experts, tile_rows)
    if backend == "cuda":
        from .cuda_impl import routing as cuda_routing

        return cuda_routing.routing_plan(topk_ids, num_experts, tile_rows)
    return reference.routing_plan(topk_ids, num_experts, tile_rows)


def plan_fake(topk_ids: Tensor, num_experts: int, tile_rows: int, *_: Any) -> tuple[Tensor, ...]:
    """The plan's six tensors without their values."""
    num_slots = topk_ids.shape[0] * topk_ids.shape[1]
    tiles = reference.max_tiles(num_slots, num_experts, tile_rows)
    sizes = (num_experts, num_experts + 1, num_slots, num_slots, tiles, tiles)
    return tuple(topk_ids.new_empty(size, dtype=torch.int32) for size in sizes)


_routing_plan = define_op(
    "routing_plan(Tensor topk_ids, int num_experts, int tile_rows, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _routing_plan_impl,
    plan_fake,
)
