"""Routing plan: a stable counting sort of slots by expert in three launches, with no atomics and no host sync.

1. every block of slots counts its experts; 2. one program turns the counts into offsets, for experts and for blocks
within an expert, and writes the tile schedule; 3. every block places its slots in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import max_tiles
from . import common

_SCAN_BLOCKS = 64  # blocks of slots that the scan reads at a time
_TILE_BLOCK = 256  # schedule entries that the scan writes at a time


@triton.jit
def _expert_onehot(
    ids_ptr,
    slots,
    num_slots,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS_POW2: tl.constexpr,
):
    """(BLOCK, EXPERTS_POW2) int32: 1 where the slot chose the expert; a row of zeros for an unrouted slot."""
    ids = tl.load(ids_ptr + slots, mask=slots < num_slots, other=-1)
    experts = tl.arange(0, EXPERTS_POW2)
    return ((ids[:, None] == experts[None, :]) & (experts < NUM_EXPERTS)[None, :]).to(tl.int32)


@triton.jit(do_not_specialize=["num_slots"])
def _count_kernel(
    ids_ptr,  # (N,) int32 or int64
    counts_ptr,  # (num_blocks, E) int32
    num_slots,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS_POW2: tl.constexpr,
    BLOCK: tl.constexpr,
):
    slots = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    counts = tl.sum(_expert_onehot(ids_ptr, slots, num_slots, NUM_EXPERTS, EXPERTS_POW2), axis=0)
    experts = tl.arange(0, EXPERTS_POW2)
    tl.store(counts_ptr + tl.program_id(0) * NUM_EXPERTS + experts, counts, mask=experts < NUM_EXPERTS)


@triton.jit(do_not_specialize=["num_blocks", "num_tiles"])
def _scan_kernel(
    counts_ptr,  # (num_blocks, E) int32: in, counts; out, the first row of each block's slots of each expert
    tokens_per_expert_ptr,  # (E,) int32
    offsets_ptr,  # (E + 1,) int32
    tile_expert_ptr,  # (num_tiles,) int32
    tile_row_ptr,  # (num_tiles,) int32
    num_blocks,
    num_tiles,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS_POW2: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    SCAN_BLOCKS: tl.constexpr,
    TILE_BLOCK: tl.constexpr,
):
    experts = tl.arange(0, EXPERTS_POW2)
    valid = experts < NUM_EXPERTS
    totals = tl.zeros((EXPERTS_POW2,), dtype=tl.int32)
    for start in range(0, num_blocks, SCAN_BLOCKS):
        blocks = start + tl.arange(0, SCAN_BLOCKS)
        mask = (blocks < num_blocks)[:, None] & valid[None, :]
        totals += tl.sum(tl.load(counts_ptr + blocks[:, None] * NUM_EXPERTS + experts[None, :], mask=mask, other=0), 0)
    ends = tl.cumsum(totals, 0)
    starts = ends - totals
    tl.store(tokens_per_expert_ptr + experts, totals, mask=valid)
    tl.store(offsets_ptr + experts, starts, mask=valid)
    tl.store(offsets_ptr + NUM_EXPERTS, tl.sum(totals))

    base = starts
    for start in range(0, num_blocks, SCAN_BLOCKS):
        blocks = start + tl.arange(0, SCAN_BLOCKS)
        mask = (blocks < num_blocks)[:, None] & valid[None, :]
        ptrs = counts_ptr + blocks[:, None] * NUM_EXPERTS + experts[None, :]
        counts = tl.load(ptrs, mask=mask, other=0)
        tl.store(ptrs, base[None, :] + tl.cumsum(counts, 0) - counts, mask=mask)
        base += tl.sum(counts, 0)

    tiles_per_expert = (totals + TILE_ROWS - 1) // TILE_ROWS
    tile_ends = tl.cumsum(tiles_per_expert, 0)
    first_tiles = tile_ends - tiles_per_expert
    for start in range(0, num_tiles, TILE_BLOCK):
        tiles = start + tl.arange(0, TILE_BLOCK)
        owned = (tiles[:, None] >= first_tiles[None, :]) & (tiles[:, None] < tile_ends[None, :])
        expert = tl.sum(tl.where(owned, experts[None, :] + 1, 0), 1) - 1  # -1 where no expert owns the entry
        row = tl.sum(tl.where(owned, starts[None, :] + (tiles[:, None] - first_tiles[None, :]) * TILE_ROWS, 0), 1)
        tl.store(tile_expert_ptr + tiles, expert, mask=tiles < num_tiles)
        tl.store(tile_row_ptr + tiles, row, mask=tiles < num_tiles)


@triton.jit(do_not_specialize=["num_slots"])
def _place_kernel(
    ids_ptr,  # (N,) int32 or int64
    first_rows_ptr,  # (num_blocks, E) int32
    row_to_slot_ptr,  # (N,) int32
    slot_to_row_ptr,  # (N,) int32
    offsets_ptr,  # (E + 1,) int32
    num_slots,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS_POW2: tl.constexpr,
    BLOCK: tl.constexpr,
):
    slots = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    experts = tl.arange(0, EXPERTS_POW2)
    onehot = _expert_onehot(ids_ptr, slots, num_slots, NUM_EXPERTS, EXPERTS_POW2)
    first_rows = tl.load(first_rows_ptr + tl.program_id(0) * NUM_EXPERTS + experts, mask=experts < NUM_EXPERTS, other=0)
    rank = tl.cumsum(onehot, 0) - onehot
    routed = tl.sum(onehot, 1) > 0
    row = tl.where(routed, tl.sum((rank + first_rows[None, :]) * onehot, 1), -1)
    in_range = slots < num_slots
    tl.store(slot_to_row_ptr + slots, row, mask=in_range)
    tl.store(row_to_slot_ptr + row, slots, mask=routed)
    # The last rows, as many as there are unrouted slots, belong to nobody: each block clears its share.
    used = tl.load(offsets_ptr + NUM_EXPERTS)
    tl.store(row_to_slot_ptr + slots, tl.full((BLOCK,), -1, tl.int32), mask=in_range & (slots >= used))


def routing_plan(topk_ids: Tensor, num_experts: int, tile_rows: int) -> tuple[Tensor, ...]:
    """topk_ids (T, K) -> tokens_per_expert, expert_offsets, row_to_slot, slot_to_row, tile_expert, tile_row."""
    num_slots, device = topk_ids.numel(), topk_ids.device
    topk_ids = topk_ids.contiguous()
    experts_pow2 = common.next_power_of_2(num_experts)
    block = max(32, min(1024, 16384 // experts_pow2))
    num_blocks = common.cdiv(num_slots, block)
    num_tiles = max_tiles(num_slots, num_experts, tile_rows)

    sizes = (num_experts, num_experts + 1, num_slots, num_slots, num_tiles, num_tiles)
    plan = tuple(torch.empty(size, dtype=torch.int32, device=device) for size in sizes)
    tokens_per_expert, offsets, row_to_slot, slot_to_row, tile_expert, tile_row = plan
    counts = torch.empty(num_blocks, num_experts, dtype=torch.int32, device=device)
    experts = {"NUM_EXPERTS": num_experts, "EXPERTS_POW2": experts_pow2}
    if num_blocks:
        _count_kernel[(num_blocks,)](topk_ids, counts, num_slots, BLOCK=block, **experts)
    _scan_kernel[(1,)](
        counts,
        tokens_per_expert,
        offsets,
        tile_expert,
        tile_row,
        num_blocks,
        num_tiles,
        TILE_ROWS=tile_rows,
        SCAN_BLOCKS=_SCAN_BLOCKS,
        TILE_BLOCK=min(_TILE_BLOCK, 16384 // experts_pow2),
        **experts,
    )
    if num_blocks:
        _place_kernel[(num_blocks,)](
            topk_ids, counts, row_to_slot, slot_to_row, offsets, num_slots, BLOCK=block, **experts
        )
    return plan
