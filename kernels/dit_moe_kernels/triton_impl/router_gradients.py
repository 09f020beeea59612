"""Gradients of the router's scores, logits = x gate^T: for x, with the experts' part of it, and for the gate."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common
from .dot import _dot_two_levels
from .permute import _sum_rows

_BLOCK_R, _BLOCK_C = 16, 128  # tile of the gradient for x
_BLOCK_T = 32  # tokens of a step of the gradient for the gate
_PARTS = 64  # of the tokens, at most, which are added up side by side
_MOST_EXPERTS = 64  # of a tile


@triton.jit
def _add_product(
    a,  # (M, K) fp32
    b,  # (K, N) io dtype
    acc,  # (M, N) fp32
):
    """acc + a @ b with fp32's digits; the tensor core truncates, so it adds up K products at most by itself."""
    if b.dtype == tl.bfloat16:
        # A float is the sum of three bf16, and products of bf16 are exact.
        for _ in tl.static_range(3):
            digits = a.to(tl.bfloat16)
            acc = _dot_two_levels(digits, b, acc, "tf32x3")
            a -= digits.to(tl.float32)
    else:
        acc = _dot_two_levels(a, b.to(tl.float32), acc, "tf32x3")
    return acc


@triton.jit(do_not_specialize=["num_tokens"])
def _router_dx_kernel(
    dlogits_ptr,  # (T, E) fp32
    gate_ptr,  # (E, D) io dtype
    rows_ptr,  # (N, D) io dtype, or None if TOP_K is 0
    slot_to_row_ptr,  # (N,) int32, -1 for an unrouted slot
    dx_ptr,  # (T, D) io dtype
    num_tokens,
    D,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx[t] = the rows of t's slots + sum over e of dlogits[t, e] gate[e], in fp32, rounded once."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_range = tokens < num_tokens
    in_width = cols < D
    total = _sum_rows(rows_ptr, None, slot_to_row_ptr, tokens, in_range, cols, in_width, D, TOP_K, False)
    if dx_ptr.dtype.element_ty == tl.float32:  # so few products that those of the tensor cores would show
        for expert in range(NUM_EXPERTS):
            factor = tl.load(dlogits_ptr + tokens * NUM_EXPERTS + expert, mask=in_range, other=0.0)
            weight = tl.load(gate_ptr + expert * D + cols, mask=in_width, other=0.0).to(tl.float32)
            total += factor[:, None] * weight[None, :]
    else:
        for first in tl.static_range(0, NUM_EXPERTS, BLOCK_E):
            experts = first + tl.arange(0, BLOCK_E)
            exists = experts < NUM_EXPERTS
            places = dlogits_ptr + tokens[:, None] * NUM_EXPERTS + experts[None, :]
            dlogits = tl.load(places, mask=in_range[:, None] & exists[None, :], other=0.0)
            gate_mask = exists[:, None] & in_width[None, :]
            gate = tl.load(gate_ptr + experts[:, None] * D + cols[None, :], mask=gate_mask, other=0.0)
            total = _add_product(dlogits, gate, total)
    mask = in_range[:, None] & in_width[None, :]
    tl.store(dx_ptr + tokens[:, None] * D + cols[None, :], total.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tokens", "part_tokens"])
def _router_dgate_kernel(
    dlogits_ptr,  # (T, E) fp32
    x_ptr,  # (T, D) io dtype
    parts_ptr,  # (parts, E, D) fp32
    num_tokens,
    part_tokens,  # of a part, a multiple of BLOCK_T
    D,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """parts[p, e] = sum over the tokens t of part p of dlogits[t, e] x[t]."""
    part = tl.program_id(0)
    experts = tl.arange(0, BLOCK_E)
    if NUM_EXPERTS > BLOCK_E:
        experts += tl.program_id(2) * BLOCK_E
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = tl.zeros((BLOCK_E, BLOCK_C), dtype=tl.float32)
    for start in range(0, part_tokens, BLOCK_T):
        tokens = part.to(tl.int64) * part_tokens + start + tl.arange(0, BLOCK_T)
        in_range = tokens < num_tokens
        places = dlogits_ptr + tokens[None, :] * NUM_EXPERTS + experts[:, None]
        dlogits = tl.load(places, mask=in_range[None, :] & (experts < NUM_EXPERTS)[:, None], other=0.0)
        x_mask = in_range[:, None] & (cols < D)[None, :]
        x = tl.load(x_ptr + tokens[:, None] * D + cols[None, :], mask=x_mask, other=0.0)
        acc = _add_product(dlogits, x, acc)
    places = parts_ptr + (part.to(tl.int64) * NUM_EXPERTS + experts)[:, None] * D + cols[None, :]
    tl.store(places, acc, mask=(experts < NUM_EXPERTS)[:, None] & (cols < D)[None, :])


def router_gradients(
    dlogits: Tensor,
    x: Tensor,
    gate: Tensor,
    rows: Tensor | None,
    slot_to_row: Tensor | None,
    wants_dx: bool,
    wants_dgate: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of router_logits for x (T, D), to which each token's rows are added, and gate (E, D), where wanted.

    Products keep fp32's digits whatever torch.set_float32_matmul_precision says, as those of the scores do.
    """
    num_tokens, width = x.shape
    num_experts = gate.shape[0]
    dx = torch.empty_like(x) if wants_dx else None
    if dx is not None and dx.numel():
        top_k = 0 if rows is None or slot_to_row is None else slot_to_row.shape[0] // num_tokens
        _router_dx_kernel[(common.cdiv(num_tokens, _BLOCK_R), common.cdiv(width, _BLOCK_C))](
            dlogits,
            gate,
            rows,
            slot_to_row,
            dx,
            num_tokens,
            width,
            NUM_EXPERTS=num_experts,
            TOP_K=top_k,
            BLOCK_R=_BLOCK_R,
            BLOCK_E=_expert_block(num_experts),
            BLOCK_C=_BLOCK_C,
        )
    return dx, _gate_gradient(dlogits, x, gate) if wants_dgate else None


def _expert_block(num_experts: int) -> int:
    """Experts of a tile, no fewer than a product on the tensor cores needs."""
    return min(max(16, common.next_power_of_2(num_experts)), _MOST_EXPERTS)


def _gate_gradient(dlogits: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    num_tokens, num_experts = dlogits.shape
    part_tokens = common.cdiv(common.cdiv(num_tokens, _PARTS), _BLOCK_T) * _BLOCK_T
    num_parts = common.cdiv(num_tokens, max(part_tokens, 1))
    parts = dlogits.new_empty(num_parts, *gate.shape)
    if parts.numel():
        block_e = _expert_block(num_experts)
        grid = (num_parts, common.cdiv(gate.shape[1], _BLOCK_C), common.cdiv(num_experts, block_e))
        _router_dgate_kernel[grid](
            dlogits,
            x,
            parts,
            num_tokens,
            part_tokens,
            gate.shape[1],
            NUM_EXPERTS=num_experts,
            BLOCK_T=_BLOCK_T,
            BLOCK_E=block_e,
            BLOCK_C=_BLOCK_C,
            num_warps=4,
        )
    return parts.sum(0).to(gate.dtype)
