"""Launches of csrc/permute.cu and csrc/unpermute.cu; same meaning as the functions of these names in reference.py.

Inputs are contiguous CUDA tensors of one device, already checked; matrices are fp32, fp16 or bf16. The work goes to
that device's current stream and nothing waits for it, so all of this can be captured in a CUDA graph.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from ..errors import KernelError
from . import extension


def permute(x_TD: Tensor, row_to_slot_N: Tensor, top_k: int) -> Tensor:
    """Copy each routed slot's token to its row: x_TD -> x_ND; rows without a slot are zero."""
    width = x_TD.shape[1]
    out_ND = x_TD.new_empty(row_to_slot_N.shape[0], width)
    _launch("permute", (x_TD, row_to_slot_N, out_ND), (out_ND.shape[0], width, top_k), x_TD)
    return out_ND


def unpermute(y_ND: Tensor, topk_weights_TK: Tensor | None, slot_to_row_N: Tensor, top_k: int) -> Tensor:
    """Sum each token's rows over its K slots, weighted if weights are given: y_ND -> y_TD; unrouted slots add zero."""
    num_tokens, width = slot_to_row_N.shape[0] // top_k, y_ND.shape[1]
    out_TD = y_ND.new_empty(num_tokens, width)
    _launch("unpermute", (y_ND, topk_weights_TK, slot_to_row_N, out_TD), (num_tokens, width, top_k), y_ND)
    return out_TD


def unpermute_backward(
    dout_TD: Tensor, y_ND: Tensor, topk_weights_TK: Tensor, row_to_slot_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the weighted `unpermute`: dy[row] = w * dout[token], dw[slot] = <dout[token], y[row]>."""
    dy_ND = torch.empty_like(y_ND)
    dweights_TK = torch.zeros_like(topk_weights_TK)  # the kernel goes by rows, and unrouted slots have none
    _launch(
        "unpermute_backward",
        (dout_TD, y_ND, topk_weights_TK, row_to_slot_N, dy_ND, dweights_TK),
        (*y_ND.shape, topk_weights_TK.shape[1]),
        y_ND,
    )
    return dy_ND, dweights_TK


def _launch(op: str, tensors: tuple[Tensor | None, ...], sizes: tuple[int, ...], like: Tensor) -> None:
    """Call a function of the compiled module on the device, in the dtype and on the current stream of `like`."""
    module = extension()
    dtype = {torch.float32: module.FLOAT32, torch.float16: module.FLOAT16, torch.bfloat16: module.BFLOAT16}[like.dtype]
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    device = like.get_device()
    on_device = nullcontext() if device == torch.cuda.current_device() else torch.cuda.device(device)
    with on_device:
        stream = torch.cuda.current_stream(device).cuda_stream
        try:
            getattr(module, op)(*addresses, *sizes, dtype, stream)
        except RuntimeError as error:
            raise KernelError(str(error)) from error
