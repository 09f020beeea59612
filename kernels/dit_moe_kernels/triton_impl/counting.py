"""count_routing: one program per block of an image's choices; all histograms in one pass over the ids.

Sums over a block are made in registers, so that the counters many blocks share get one atomic per block and expert.
Positions are shared by few images at a time: their counters take an atomic per choice. Integer sums have no order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import common


@triton.jit(do_not_specialize=["layer", "num_images", "num_steps", "images_per_group", "first_part", "num_parts"])
def _count_routing_kernel(
    ids_ptr,  # (R * N, K) int32 or int64
    cursor_ptr,  # (3,) int32: step, first image, B
    image_counts_ptr,  # (I, L, E) int32
    step_counts_ptr,  # (G, L, S, E) int32
    patch_counts_ptr,  # (G, L, N, E) int32
    step_patch_counts_ptr,  # (S, L, N, E) int32, or None
    layer,
    num_images,
    num_steps,
    images_per_group,
    first_part,
    num_parts,
    NUM_LAYERS: tl.constexpr,
    NUM_TOKENS: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    EXPERTS_POW2: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    step = tl.load(cursor_ptr).to(tl.int64)
    first_image = tl.load(cursor_ptr + 1)
    batch = tl.load(cursor_ptr + 2)
    image = (first_image + row % tl.maximum(batch, 1)).to(tl.int64)
    counted = (row >= first_part * batch) & (row < (first_part + num_parts) * batch)
    counted = counted & (image >= 0) & (image < num_images) & (step >= 0) & (step < num_steps)
    group = image // images_per_group

    slots = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_image = (slots < NUM_TOKENS * TOP_K) & counted
    ids = tl.load(ids_ptr + row * (NUM_TOKENS * TOP_K) + slots, mask=in_image, other=-1).to(tl.int32)
    valid = (ids >= 0) & (ids < NUM_EXPERTS)

    experts = tl.arange(0, EXPERTS_POW2)
    chosen = (ids[:, None] == experts[None, :]) & (experts < NUM_EXPERTS)[None, :]
    sums = tl.sum(chosen.to(tl.int32), axis=0)
    image_ptrs = image_counts_ptr + (image * NUM_LAYERS + layer) * NUM_EXPERTS + experts
    tl.atomic_add(image_ptrs, sums, mask=sums > 0, sem="relaxed")
    step_ptrs = step_counts_ptr + ((group * NUM_LAYERS + layer) * num_steps + step) * NUM_EXPERTS + experts
    tl.atomic_add(step_ptrs, sums, mask=sums > 0, sem="relaxed")

    cells = (slots // TOP_K) * NUM_EXPERTS + ids
    one = tl.full((BLOCK,), 1, tl.int32)
    layer_size = NUM_TOKENS * NUM_EXPERTS
    patch_ptrs = patch_counts_ptr + (group * NUM_LAYERS + layer) * layer_size + cells
    tl.atomic_add(patch_ptrs, one, mask=valid, sem="relaxed")
    if step_patch_counts_ptr is not None:
        step_patch_ptrs = step_patch_counts_ptr + (step * NUM_LAYERS + layer) * layer_size + cells
        tl.atomic_add(step_patch_ptrs, one, mask=valid, sem="relaxed")


def count_routing(
    topk_ids: Tensor,
    cursor: Tensor,
    image_counts: Tensor,
    step_counts: Tensor,
    patch_counts: Tensor,
    step_patch_counts: Tensor | None,
    layer: int,
    images_per_group: int,
    first_part: int,
    num_parts: int,
) -> None:
    """Add the choices topk_ids (R * N, K) of a layer to the histograms; see `dit_moe_kernels.count_routing`."""
    num_images, num_layers, num_experts = image_counts.shape
    num_steps, num_tokens, top_k = step_counts.shape[2], patch_counts.shape[2], topk_ids.shape[1]
    num_rows = topk_ids.shape[0] // num_tokens
    experts_pow2 = common.next_power_of_2(num_experts)
    # 8192 comparisons a program, in registers; a whole image of 256 tokens and two choices where experts are few.
    block = max(16, min(512, 8192 // experts_pow2, common.next_power_of_2(max(1, num_tokens * top_k))))
    if not topk_ids.numel():
        return
    _count_routing_kernel[(num_rows, common.cdiv(num_tokens * top_k, block))](
        topk_ids,
        cursor,
        image_counts,
        step_counts,
        patch_counts,
        step_patch_counts,
        layer,
        num_images,
        num_steps,
        images_per_group,
        first_part,
        num_parts,
        NUM_LAYERS=num_layers,
        NUM_TOKENS=num_tokens,
        NUM_EXPERTS=num_experts,
        TOP_K=top_k,
        EXPERTS_POW2=experts_pow2,
        BLOCK=block,
    )
