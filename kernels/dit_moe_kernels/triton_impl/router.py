"""Router scores in fp32, softmax and top-k, and the softmax's gradient: a few tokens a program, all experts at once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common
from .dot import _dot_two_levels
from .router_gradients import router_gradients as router_gradients

_BLOCK_T = 32  # tokens of a program


@triton.jit(do_not_specialize=["T"])
def _router_logits_kernel(
    x_ptr,  # (T, D) io dtype
    gate_ptr,  # (E, D) io dtype
    logits_ptr,  # (T, E) fp32
    T,
    D,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.arange(0, BLOCK_E)
    acc = tl.zeros((BLOCK_T, BLOCK_E), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        x_mask = (tokens < T)[:, None] & (cols < D)[None, :]
        x = tl.load(x_ptr + tokens.to(tl.int64)[:, None] * D + cols[None, :], mask=x_mask, other=0.0)
        gate_mask = (experts < NUM_EXPERTS)[:, None] & (cols < D)[None, :]
        gate = tl.load(gate_ptr + experts[:, None] * D + cols[None, :], mask=gate_mask, other=0.0)
        if WIDEN:
            x, gate = x.to(tl.float32), gate.to(tl.float32)
        acc = _dot_two_levels(x, gate.T, acc, PRECISION)
    mask = (tokens < T)[:, None] & (experts < NUM_EXPERTS)[None, :]
    tl.store(logits_ptr + tokens.to(tl.int64)[:, None] * NUM_EXPERTS + experts[None, :], acc, mask=mask)


@triton.jit(do_not_specialize=["T"])
def _topk_softmax_kernel(
    logits_ptr,  # (T, E) fp32
    weights_ptr,  # (T, K) fp32
    ids_ptr,  # (T, K) int32
    probs_ptr,  # (T, E) fp32
    T,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    tokens = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    experts = tl.arange(0, BLOCK_E)
    in_range = tokens < T
    mask = in_range[:, None] & (experts < NUM_EXPERTS)[None, :]
    logits = tl.load(logits_ptr + tokens[:, None] * NUM_EXPERTS + experts[None, :], mask=mask, other=float("-inf"))
    logits = tl.where(in_range[:, None], logits, 0.0)
    exp = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    probs = exp / tl.sum(exp, axis=1)[:, None]
    tl.store(probs_ptr + tokens[:, None] * NUM_EXPERTS + experts[None, :], probs, mask=mask)

    # Scores order like probabilities, NaN above all; taken experts and padding drop out, so ids are distinct and valid.
    scores = tl.where(probs != probs, 2.0, probs)
    scores = tl.where((experts < NUM_EXPERTS)[None, :], scores, -1.0)
    for k in tl.static_range(TOP_K):
        best = tl.argmax(scores, axis=1, tie_break_left=True)
        chosen = experts[None, :] == best[:, None]
        weight = tl.sum(tl.where(chosen, probs, 0.0), axis=1)
        tl.store(weights_ptr + tokens * TOP_K + k, weight, mask=in_range)
        tl.store(ids_ptr + tokens * TOP_K + k, best.to(tl.int32), mask=in_range)
        scores = tl.where(chosen, -1.0, scores)


@triton.jit(do_not_specialize=["T"])
def _topk_softmax_backward_kernel(
    dweights_ptr,  # (T, K) fp32, or None
    dprobs_ptr,  # (T, E) fp32, or None
    ids_ptr,  # (T, K) int32
    probs_ptr,  # (T, E) fp32
    dlogits_ptr,  # (T, E) fp32
    T,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    HAS_DWEIGHTS: tl.constexpr,
    HAS_DPROBS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    tokens = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    experts = tl.arange(0, BLOCK_E)
    in_range = tokens < T
    mask = in_range[:, None] & (experts < NUM_EXPERTS)[None, :]
    places = tokens[:, None] * NUM_EXPERTS + experts[None, :]
    probs = tl.load(probs_ptr + places, mask=mask, other=0.0)
    grad = tl.zeros((BLOCK_T, BLOCK_E), dtype=tl.float32)
    if HAS_DPROBS:
        grad += tl.load(dprobs_ptr + places, mask=mask, other=0.0)
    if HAS_DWEIGHTS:
        for k in tl.static_range(TOP_K):
            expert = tl.load(ids_ptr + tokens * TOP_K + k, mask=in_range, other=-1)
            dweight = tl.load(dweights_ptr + tokens * TOP_K + k, mask=in_range, other=0.0)
            grad += tl.where(experts[None, :] == expert[:, None], dweight[:, None], 0.0)
    dlogits = probs * (grad - tl.sum(probs * grad, axis=1)[:, None])
    tl.store(dlogits_ptr + places, dlogits, mask=mask)


def router_logits(x: Tensor, gate: Tensor) -> Tensor:
    """x (T, D), gate (E, D) -> (T, E) fp32.

    Scores keep fp32's digits whatever torch.set_float32_matmul_precision says, since a rounded one can change a choice:
    fp32 as three tf32 products, 16 bits as they are, because their products are exact. The tensor core truncates where
    fp32 additions round, so it adds up 32 columns of these at most.
    """
    num_tokens, num_experts = x.shape[0], gate.shape[0]
    logits = torch.empty(num_tokens, num_experts, dtype=torch.float32, device=x.device)
    exact = x.dtype == gate.dtype != torch.float32
    if logits.numel():
        _router_logits_kernel[(common.cdiv(num_tokens, _BLOCK_T),)](
            x,
            gate,
            logits,
            num_tokens,
            x.shape[1],
            NUM_EXPERTS=num_experts,
            BLOCK_T=_BLOCK_T,
            BLOCK_E=max(16, common.next_power_of_2(num_experts)),
            BLOCK_D=32 if exact else 64,
            WIDEN=not exact,
            PRECISION="tf32x3",
            num_warps=4,
        )
    return logits


def topk_softmax(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """logits (T, E) -> topk_weights (T, K), topk_ids (T, K) int32, probs (T, E)."""
    num_tokens, num_experts = logits.shape
    weights = logits.new_empty(num_tokens, top_k)
    ids = logits.new_empty(num_tokens, top_k, dtype=torch.int32)
    probs = torch.empty_like(logits)
    if num_tokens:
        _topk_softmax_kernel[(common.cdiv(num_tokens, _BLOCK_T),)](
            logits,
            weights,
            ids,
            probs,
            num_tokens,
            NUM_EXPERTS=num_experts,
            TOP_K=top_k,
            BLOCK_T=_BLOCK_T,
            BLOCK_E=common.next_power_of_2(num_experts),
        )
    return weights, ids, probs


def topk_softmax_backward(dweights: Tensor | None, dprobs: Tensor | None, ids: Tensor, probs: Tensor) -> Tensor:
    """Gradient (T, E) for the logits from those of topk_weights (T, K) and probs (T, E), either of them optional."""
    num_tokens, num_experts = probs.shape
    dlogits = torch.empty_like(probs)
    if num_tokens:
        _topk_softmax_backward_kernel[(common.cdiv(num_tokens, _BLOCK_T),)](
            None if dweights is None else dweights.contiguous(),
            None if dprobs is None else dprobs.contiguous(),
            ids,
            probs,
            dlogits,
            num_tokens,
            NUM_EXPERTS=num_experts,
            TOP_K=ids.shape[1],
            HAS_DWEIGHTS=dweights is not None,
            HAS_DPROBS=dprobs is not None,
            BLOCK_T=_BLOCK_T,
            BLOCK_E=common.next_power_of_2(num_experts),
        )
    return dlogits
