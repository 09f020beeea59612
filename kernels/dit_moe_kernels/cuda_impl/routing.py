"""Launches of csrc/router.cu, topk_softmax.cu and routing_plan.cu; same meaning as reference.py's functions.

x and gate are fp32, fp16 or bf16, of a width in whole words of 16 bytes; all the rest is fp32 and int32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import max_tiles
from . import extension
from .launch import ALIGNMENT, aligned, launch


def unsupported(whole_chunks: bool) -> str | None:
    """Why these kernels cannot run on the current GPU, None if they can.

    Args:
        whole_chunks: whether the rows of x and gate are whole multiples of 16 bytes.
    """
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return f"got compute capability {capability}, expected (8, 0) or newer"
    if not whole_chunks:
        return f"got a width that is no multiple of {ALIGNMENT} bytes"
    return None


def router_logits(x_TD: Tensor, gate_ED: Tensor) -> Tensor:
    """x_TD, gate_ED -> logits_TE fp32."""
    x_TD, gate_ED = operands(x_TD, gate_ED)
    sizes = (*x_TD.shape, gate_ED.shape[0])
    logits_TE = x_TD.new_empty(sizes[0], sizes[2], dtype=torch.float32)
    launch("router_logits", (x_TD, gate_ED, logits_TE), sizes, x_TD, (x_TD.dtype, gate_ED.dtype))
    return logits_TE


def router_gradients(
    dlogits_TE: Tensor,
    x_TD: Tensor,
    gate_ED: Tensor,
    rows_ND: Tensor | None,
    slot_to_row: Tensor | None,
    wants_dx: bool,
    wants_dgate: bool,
    *,
    beside: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of router_logits for x_TD, to which each token's rows are added, and gate_ED, where they are wanted.

    beside: see launch.py; x and gate are then `operands`.
    """
    dtype = gate_ED.dtype
    x_TD, gate_ED = operands(x_TD, gate_ED)
    top_k = 0 if slot_to_row is None else slot_to_row.shape[0] // max(x_TD.shape[0], 1)
    dx_TD = torch.empty_like(x_TD) if wants_dx else None
    dgate_ED = torch.empty_like(gate_ED) if wants_dgate else None
    parts = dlogits_TE.new_empty(extension().ROUTER_PARTS, *gate_ED.shape) if wants_dgate else None
    launch(
        "router_gradients",
        (dlogits_TE, x_TD, gate_ED, None if rows_ND is None else aligned(rows_ND), slot_to_row, dx_TD, dgate_ED, parts),
        (*x_TD.shape, gate_ED.shape[0], top_k, int(beside)),
        x_TD,
        (x_TD.dtype, gate_ED.dtype),
    )
    return dx_TD, None if dgate_ED is None else dgate_ED.to(dtype)


def topk_softmax(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """logits_TE -> topk_weights_TK, topk_ids_TK int32, probs_TE."""
    weights_TK = logits_TE.new_empty(logits_TE.shape[0], top_k)
    ids_TK = torch.empty_like(weights_TK, dtype=torch.int32)
    probs_TE = torch.empty_like(logits_TE)
    launch("topk_softmax", (logits_TE, weights_TK, ids_TK, probs_TE), (*logits_TE.shape, top_k), logits_TE, ())
    return weights_TK, ids_TK, probs_TE


def topk_softmax_backward(
    dweights_TK: Tensor | None, dprobs_TE: Tensor | None, ids_TK: Tensor, probs_TE: Tensor
) -> Tensor:
    """Gradient for the logits from those of topk_weights and probs, either of them optional."""
    dlogits_TE = torch.empty_like(probs_TE)
    grads = [None if grad is None else grad.contiguous() for grad in (dweights_TK, dprobs_TE)]
    sizes = (*probs_TE.shape, ids_TK.shape[1])
    launch("topk_softmax_backward", (*grads, ids_TK, probs_TE, dlogits_TE), sizes, probs_TE, ())
    return dlogits_TE


def routing_plan(topk_ids_TK: Tensor, num_experts: int, tile_rows: int) -> tuple[Tensor, ...]:
    """topk_ids_TK, int32 or int64 -> the plan's six tensors."""
    topk_ids_TK, num_slots = topk_ids_TK.contiguous(), topk_ids_TK.numel()
    plan, workspace = _plan_memory(topk_ids_TK, num_slots, num_experts, tile_rows)
    sizes = (topk_ids_TK.element_size(), num_slots, num_experts, tile_rows)
    launch("routing_plan", (topk_ids_TK, *plan, workspace), sizes, topk_ids_TK, ())
    return plan


def route(x_TD: Tensor, gate_ED: Tensor, top_k: int, tile_rows: int, balance_scale: float) -> tuple[Tensor, ...]:
    """x_TD, gate_ED -> topk_weights_TK, topk_ids_TK, probs_TE, balance loss (), and the plan's six tensors."""
    x_TD, gate_ED = operands(x_TD, gate_ED)
    (num_tokens, width), num_experts = x_TD.shape, gate_ED.shape[0]
    weights_TK = x_TD.new_empty(num_tokens, top_k, dtype=torch.float32)
    ids_TK = x_TD.new_empty(num_tokens, top_k, dtype=torch.int32)
    probs_TE = x_TD.new_empty(num_tokens, num_experts, dtype=torch.float32)
    balance = x_TD.new_empty((), dtype=torch.float32)
    plan, workspace = _plan_memory(x_TD, num_tokens * top_k, num_experts, tile_rows)
    launch(
        "route",
        (x_TD, gate_ED, weights_TK, ids_TK, probs_TE, balance, *plan, workspace),
        (num_tokens, width, num_experts, top_k, tile_rows, balance_scale),
        x_TD,
        (x_TD.dtype, gate_ED.dtype),
    )
    return weights_TK, ids_TK, probs_TE, balance, *plan


def operands(x_TD: Tensor, gate_ED: Tensor) -> tuple[Tensor, Tensor]:
    """x and gate where and as the router's kernel reads them; a gate in another dtype than x's is read as fp32."""
    if gate_ED.dtype != x_TD.dtype:
        gate_ED = gate_ED.float()
    return aligned(x_TD), aligned(gate_ED)


def _plan_memory(like: Tensor, num_slots: int, num_experts: int, tile_rows: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """The plan's six tensors and the kernels' workspace, not yet written."""
    tiles = max_tiles(num_slots, num_experts, tile_rows)
    sizes = (num_experts, num_experts + 1, num_slots, num_slots, tiles, tiles)
    plan = tuple(like.new_empty(size, dtype=torch.int32) for size in sizes)
    return plan, like.new_empty(extension().ROUTING_WORKSPACE, dtype=torch.uint8)
