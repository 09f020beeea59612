"""Plain PyTorch reference of every op: any device, any float dtype, differentiable by autograd.

These functions are the executable specification, the tests' oracle and the fallback where no kernel can run. Shape
suffixes: T tokens, K top_k, N = T*K rows (slots, sorted by expert), E experts, D model width, F expert width,
I/O a GEMM's input/output width. A slot is t*K + k; a row is its place after sorting by expert. 16-bit products
accumulate in fp32 inside torch.matmul; sums over the K choices and activations are computed in fp32 (fp64 for fp64).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums and activations are computed: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def router_logits(x_TD: Tensor, gate_ED: Tensor) -> Tensor:
    """Scores of all experts, product and result in fp32 (fp64 for fp64): x_TD -> logits_TE."""
    wide = accumulation_dtype(torch.promote_types(x_TD.dtype, gate_ED.dtype))
    return x_TD.to(wide) @ gate_ED.to(wide).T


def router_gradients(
    dlogits_TE: Tensor, x_TD: Tensor, gate_ED: Tensor, addend_TD: Tensor | None, wants_dx: bool, wants_dgate: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of router_logits for x_TD, with an addend, and gate_ED, each where wanted; in the logits' dtype."""
    wide = dlogits_TE.dtype
    dx_TD = dlogits_TE @ gate_ED.to(wide) if wants_dx else None
    if dx_TD is not None and addend_TD is not None:
        dx_TD += addend_TD
    dgate_ED = (dlogits_TE.T @ x_TD.to(wide)).to(gate_ED.dtype) if wants_dgate else None
    return None if dx_TD is None else dx_TD.to(x_TD.dtype), dgate_ED


def topk_softmax(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax over all experts, then the top_k largest without renormalisation (paper section 2.2).

    Equal probabilities are taken in the order of expert ids; NaN counts as larger than any number.

    Returns:
        topk_weights_TK, topk_ids_TK (int32) in descending order of probability, probs_TE.
    """
    probs_TE = logits_TE.softmax(dim=-1)
    ids_TK = probs_TE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    return probs_TE.gather(1, ids_TK), ids_TK.int(), probs_TE


def topk_softmax_backward(
    dweights_TK: Tensor | None, dprobs_TE: Tensor | None, topk_ids_TK: Tensor, probs_TE: Tensor
) -> Tensor:
    """Gradient for the logits: with g = dprobs plus dweights scattered to their experts, p * (g - sum_e p_e g_e)."""
    g_TE = torch.zeros_like(probs_TE) if dprobs_TE is None else dprobs_TE
    if dweights_TK is not None:
        g_TE = g_TE.scatter_add(1, topk_ids_TK.long(), dweights_TK)
    return probs_TE * (g_TE - (probs_TE * g_TE).sum(-1, keepdim=True))


def routing_plan(topk_ids_TK: Tensor, num_experts: int, tile_rows: int) -> tuple[Tensor, ...]:
    """Sort slots by expert, stably; see `dit_moe_kernels.RoutingPlan` for the six int32 tensors returned."""
    num_slots, device = topk_ids_TK.numel(), topk_ids_TK.device
    ids_N = topk_ids_TK.reshape(-1).long()
    routed_N = (ids_N >= 0) & (ids_N < num_experts)
    key_N = torch.where(routed_N, ids_N, num_experts)  # unrouted slots sort behind the last expert
    row_to_slot_N = key_N.argsort(stable=True)
    slot_to_row_N = torch.empty_like(row_to_slot_N)
    slot_to_row_N[row_to_slot_N] = torch.arange(num_slots, device=device)
    slot_to_row_N = torch.where(routed_N, slot_to_row_N, -1)
    row_to_slot_N = torch.where(routed_N[row_to_slot_N], row_to_slot_N, -1)

    experts = torch.arange(num_experts, device=device)
    tokens_per_expert_E = (key_N[:, None] == experts).sum(0)
    offsets = F.pad(tokens_per_expert_E.cumsum(0), (1, 0))

    # Tile schedule: every expert's rows cut into tiles of tile_rows; unused entries of the upper bound hold expert -1.
    tiles_E = (tokens_per_expert_E + tile_rows - 1) // tile_rows
    tile_ends_E = tiles_E.cumsum(0)
    tile = torch.arange(max_tiles(num_slots, num_experts, tile_rows), device=device)
    tile_expert = torch.searchsorted(tile_ends_E, tile, right=True)
    used = tile_expert < num_experts
    owner = tile_expert.clamp(max=num_experts - 1)
    tile_row = offsets[owner] + (tile - (tile_ends_E - tiles_E)[owner]) * tile_rows
    tile_expert, tile_row = torch.where(used, tile_expert, -1), torch.where(used, tile_row, 0)
    plan = (tokens_per_expert_E, offsets, row_to_slot_N, slot_to_row_N, tile_expert, tile_row)
    return tuple(part.int() for part in plan)


def balance(probs_TE: Tensor, tokens_per_expert_E: Tensor, scale: float) -> Tensor:
    """scale * sum_i count_i * sum_t p_i(t), the balance loss (Switch Transformer, equation 4)."""
    if scale == 0:
        return probs_TE.new_zeros(())
    return scale * (tokens_per_expert_E.to(probs_TE.dtype) * probs_TE.sum(0)).sum()


def route(x_TD: Tensor, gate_ED: Tensor, top_k: int, tile_rows: int, balance_scale: float) -> tuple[Tensor, ...]:
    """router_logits, topk_softmax and routing_plan: weights_TK, ids_TK, probs_TE, the balance loss, the plan's six."""
    weights_TK, ids_TK, probs_TE = topk_softmax(router_logits(x_TD, gate_ED), top_k)
    plan = routing_plan(ids_TK, gate_ED.shape[0], tile_rows)
    return weights_TK, ids_TK, probs_TE, balance(probs_TE, plan[0], balance_scale), *plan


def max_tiles(num_rows: int, num_experts: int, tile_rows: int) -> int:
    """Upper bound on the number of row tiles, whatever the routing: each expert ends at most one partial tile."""
    return -(-num_rows // tile_rows) + min(num_experts, num_rows) - (1 if num_rows else 0)


def permute(x_TD: Tensor, row_to_slot_N: Tensor, top_k: int) -> Tensor:
    """Copy each routed slot's token to its row: x_TD -> x_ND; rows without a slot are zero."""
    token_N = row_to_slot_N.clamp(min=0).long() // top_k
    return x_TD[token_N].masked_fill((row_to_slot_N < 0)[:, None], 0)


def unpermute(
    y_ND: Tensor, topk_weights_TK: Tensor | None, slot_to_row_N: Tensor, top_k: int, addend_TD: Tensor | None = None
) -> Tensor:
    """Sum each token's rows over its K slots, weighted if weights are given: y_ND -> y_TD; unrouted slots add zero.

    The addend is added to the sum before the rounding to y's dtype.
    """
    wide = accumulation_dtype(y_ND.dtype)
    rows_TK = slot_to_row_N.view(-1, top_k)
    y_TKD = y_ND.new_zeros(rows_TK.shape[0], top_k, y_ND.shape[1], dtype=wide)
    if y_ND.shape[0]:
        y_TKD = y_ND[rows_TK.clamp(min=0).long()].to(wide)
    if topk_weights_TK is not None:
        y_TKD = y_TKD * topk_weights_TK.to(wide)[:, :, None]
    # where, not a product: an unrouted slot's clamped row may hold anything
    total_TD = torch.where((rows_TK >= 0)[:, :, None], y_TKD, 0).sum(1)
    if addend_TD is not None:
        total_TD = total_TD + addend_TD.to(wide)
    return total_TD.to(y_ND.dtype)


def unpermute_backward(
    dout_TD: Tensor, y_ND: Tensor, topk_weights_TK: Tensor, row_to_slot_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the weighted `unpermute`: dy[row] = w * dout[token], dw[slot] = <dout[token], y[row]>."""
    wide = accumulation_dtype(y_ND.dtype)
    used_N = row_to_slot_N >= 0
    slot_N = row_to_slot_N.clamp(min=0).long()
    dout_ND = dout_TD[slot_N // topk_weights_TK.shape[1]].to(wide)
    dy_ND = torch.where(used_N[:, None], dout_ND * topk_weights_TK.to(wide).reshape(-1)[slot_N, None], 0)
    dots_N = torch.where(used_N, (dout_ND * y_ND.to(wide)).sum(1), 0)
    dweights = torch.zeros_like(topk_weights_TK, dtype=wide).view(-1).index_add(0, slot_N, dots_N)
    return dy_ND.to(y_ND.dtype), dweights.view_as(topk_weights_TK).to(topk_weights_TK.dtype)


def grouped_gemm(x_NI: Tensor, w_EOI: Tensor, expert_offsets: Tensor) -> Tensor:
    """Multiply each expert's rows by its weight: out[r] = w[e(r)] @ x[r]; rows past expert_offsets[-1] are zero."""
    return _per_expert(expert_offsets, x_NI, lambda e, rows: x_NI[rows] @ w_EOI[e].T, w_EOI.shape[1])


def grouped_gemm_dx(dout_NO: Tensor, w_EOI: Tensor, expert_offsets: Tensor) -> Tensor:
    """Gradient of `grouped_gemm` for its input: dx[r] = w[e(r)]^T @ dout[r]."""
    return _per_expert(expert_offsets, dout_NO, lambda e, rows: dout_NO[rows] @ w_EOI[e], w_EOI.shape[2])


def grouped_gemm_dw(dout_NO: Tensor, x_NI: Tensor, expert_offsets: Tensor) -> Tensor:
    """Gradient of `grouped_gemm` for its weights: dw[e] = sum over its rows of dout[r] x[r]^T; zero if empty."""
    return torch.stack([dout_NO[rows].T @ x_NI[rows] for rows in _expert_slices(expert_offsets)])


def _per_expert(expert_offsets: Tensor, rows_N: Tensor, product: Callable[[int, slice], Tensor], width: int) -> Tensor:
    slices = _expert_slices(expert_offsets)
    parts = [product(e, rows) for e, rows in enumerate(slices)]
    return torch.cat([*parts, rows_N.new_zeros(rows_N.shape[0] - slices[-1].stop, width)])


def _expert_slices(expert_offsets: Tensor) -> list[slice]:
    bounds = expert_offsets.tolist()
    return [slice(start, stop) for start, stop in zip(bounds[:-1], bounds[1:], strict=True)]


def swiglu(h_N2F: Tensor) -> Tensor:
    """silu(gate) * up, where gate is the first half of the columns and up the second (Shazeer 2020, eq. 6)."""
    gate_NF, up_NF = h_N2F.to(accumulation_dtype(h_N2F.dtype)).chunk(2, dim=-1)
    return (F.silu(gate_NF) * up_NF).to(h_N2F.dtype)


def swiglu_backward(dout_NF: Tensor, h_N2F: Tensor) -> Tensor:
    """Gradient of `swiglu`: dgate = dout * up * s * (1 + gate * (1 - s)), dup = dout * gate * s, s = sigmoid(gate)."""
    wide = accumulation_dtype(h_N2F.dtype)
    gate_NF, up_NF = h_N2F.to(wide).chunk(2, dim=-1)
    s_NF, dout_NF = gate_NF.sigmoid(), dout_NF.to(wide)
    dgate_NF = dout_NF * up_NF * s_NF * (1 + gate_NF * (1 - s_NF))
    return torch.cat([dgate_NF, dout_NF * gate_NF * s_NF], dim=-1).to(h_N2F.dtype)


def linear_swiglu(x_TD: Tensor, w13_2FD: Tensor) -> tuple[Tensor, Tensor]:
    """swiglu(h), where h = x w13^T, whose first half of columns is the gate; also returns h."""
    h_T2F = F.linear(x_TD, w13_2FD)
    return swiglu(h_T2F), h_T2F


def expert_rows(
    x_TD: Tensor, w13_E2FD: Tensor, w2_EDF: Tensor, expert_offsets: Tensor, row_to_slot_N: Tensor, top_k: int
) -> tuple[Tensor, Tensor]:
    """permute, w13, SwiGLU, w2: y_ND, sorted by expert; also returns the pre-activations h_N2F."""
    h_N2F = grouped_gemm(permute(x_TD, row_to_slot_N, top_k), w13_E2FD, expert_offsets)
    return grouped_gemm(swiglu(h_N2F), w2_EDF, expert_offsets), h_N2F


def expert_ffn(
    x_TD: Tensor,
    w13_E2FD: Tensor,
    w2_EDF: Tensor,
    topk_weights_TK: Tensor,
    expert_offsets: Tensor,
    row_to_slot_N: Tensor,
    slot_to_row_N: Tensor,
    addend_TD: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`expert_rows`, weighted unpermute; also returns the pre-activations h_N2F."""
    top_k = topk_weights_TK.shape[1]
    y_ND, h_N2F = expert_rows(x_TD, w13_E2FD, w2_EDF, expert_offsets, row_to_slot_N, top_k)
    return unpermute(y_ND, topk_weights_TK, slot_to_row_N, top_k, addend_TD), h_N2F


def expert_ffn_backward(
    dout_TD: Tensor,
    h_N2F: Tensor,
    x_TD: Tensor,
    w13_E2FD: Tensor,
    w2_EDF: Tensor,
    topk_weights_TK: Tensor,
    expert_offsets: Tensor,
    row_to_slot_N: Tensor,
    slot_to_row_N: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `expert_ffn` for x's rows, w13, w2 and the router weights, recomputing all but h.

    The router weight's gradient <dout, w2 a> equals <w2^T dout, a>, so the output rows need not be kept.
    """
    wide, top_k = accumulation_dtype(x_TD.dtype), topk_weights_TK.shape[1]
    slot_N = row_to_slot_N.clamp(min=0).long()
    weight_N1 = topk_weights_TK.reshape(-1)[slot_N, None].to(wide)
    a_NF, dout_ND = swiglu(h_N2F), permute(dout_TD, row_to_slot_N, top_k)
    g_NF = grouped_gemm_dx(dout_ND, w2_EDF, expert_offsets)

    dots_N = torch.where(row_to_slot_N >= 0, (g_NF.to(wide) * a_NF.to(wide)).sum(1), 0)
    dweights_TK = torch.zeros_like(topk_weights_TK, dtype=wide).view(-1).index_add(0, slot_N, dots_N)
    dw2_EDF = grouped_gemm_dw((dout_ND.to(wide) * weight_N1).to(x_TD.dtype), a_NF, expert_offsets)
    dh_N2F = swiglu_backward((g_NF.to(wide) * weight_N1).to(x_TD.dtype), h_N2F)
    dw13_E2FD = grouped_gemm_dw(dh_N2F, permute(x_TD, row_to_slot_N, top_k), expert_offsets)
    dx_ND = grouped_gemm_dx(dh_N2F, w13_E2FD, expert_offsets)
    return dx_ND, dw13_E2FD, dw2_EDF, dweights_TK.view_as(topk_weights_TK).to(topk_weights_TK.dtype)


def count_routing(
    topk_ids: Tensor,
    cursor: Tensor,
    image_counts_ILE: Tensor,
    step_counts_GLSE: Tensor,
    patch_counts_GLNE: Tensor,
    step_patch_counts_SLNE: Tensor | None,
    layer: int,
    images_per_group: int,
    first_part: int,
    num_parts: int,
) -> None:
    """Add each choice to its cell of every histogram, in place; see `dit_moe_kernels.count_routing`."""
    num_images, num_layers, num_experts = image_counts_ILE.shape
    num_steps, num_tokens = step_counts_GLSE.shape[2], patch_counts_GLNE.shape[2]
    ids_RNK = topk_ids.long().view(topk_ids.shape[0] // num_tokens, num_tokens, topk_ids.shape[1])
    step, first_image, batch = cursor.long().unbind()
    row_R11 = torch.arange(ids_RNK.shape[0], device=topk_ids.device)[:, None, None]
    token_N1 = torch.arange(num_tokens, device=topk_ids.device)[:, None]
    image_R11 = first_image + row_R11 % batch.clamp(min=1)
    group_R11 = image_R11 // images_per_group
    counted_RNK = (row_R11 >= first_part * batch) & (row_R11 < (first_part + num_parts) * batch)
    counted_RNK = counted_RNK & (image_R11 >= 0) & (image_R11 < num_images) & (step >= 0) & (step < num_steps)
    counted_RNK = counted_RNK & (ids_RNK >= 0) & (ids_RNK < num_experts)

    def add(counts: Tensor, cells: Tensor) -> None:
        # No shape may depend on the data: what does not count adds zero to the first cell.
        cells = torch.where(counted_RNK, cells * num_experts + ids_RNK, 0).reshape(-1)
        counts.view(-1).index_add_(0, cells, counted_RNK.reshape(-1).to(counts.dtype))

    add(image_counts_ILE, image_R11 * num_layers + layer)
    add(step_counts_GLSE, (group_R11 * num_layers + layer) * num_steps + step)
    add(patch_counts_GLNE, (group_R11 * num_layers + layer) * num_tokens + token_N1)
    if step_patch_counts_SLNE is not None:
        add(step_patch_counts_SLNE, (step * num_layers + layer) * num_tokens + token_N1)
