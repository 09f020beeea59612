"""Launches of csrc/swiglu.cu: SwiGLU and its gradient on packed pre-activations [gate | up], fp32, fp16 or bf16."""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import launch


def swiglu(h_N2F: Tensor) -> Tensor:
    """h (N, 2F) -> (N, F)."""
    num_rows, width = h_N2F.shape[0], h_N2F.shape[1] // 2
    out_NF = h_N2F.new_empty(num_rows, width)
    launch("swiglu", (h_N2F, out_NF), (num_rows, width), h_N2F)
    return out_NF


def swiglu_backward(grad_NF: Tensor, h_N2F: Tensor) -> Tensor:
    """grad (N, F), h (N, 2F) -> dh (N, 2F)."""
    dh_N2F = torch.empty_like(h_N2F)
    launch("swiglu_backward", (grad_NF, h_N2F, dh_N2F), tuple(grad_NF.shape), h_N2F)
    return dh_N2F
