"""How our tensors are made of the tensors of the official release.

Our state dict has the official keys, with these exceptions (E experts, D model width, F expert width, Fs shared width):

    ours                                        official
    blocks.i.moe.experts.w13 (E, 2F, D)         moe.experts.e.gate_proj.weight, .up_proj.weight (F, D): rows 0..F, F..2F
    blocks.i.moe.experts.w2 (E, D, F)           moe.experts.e.down_proj.weight (D, F)
    blocks.i.moe.shared_experts.w13 (2Fs, D)    moe.shared_experts.gate_proj.weight, .up_proj.weight (Fs, D)
    blocks.i.moe.shared_experts.w2 (D, Fs)      moe.shared_experts.down_proj.weight (D, Fs)
    blocks.i.attn.{qkv,proj}.*                  attn.{Wqkv,out_proj}.* in the models with q/k LayerNorm (XL, G)

A GELU shared expert, shared_experts.{fc1,fc2}.{weight,bias}, is ours alone: the release has no keys for it.
Both attention layouts hold q, k, v rows in the same order, so no tensor is permuted: packing and unpacking only copy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

Index = tuple[int | slice, ...]

FLASH_MARK = ".attn.Wqkv.weight"
STACKED_MARK = ".moe.experts.w13"
_FLASH_NAMES = {"qkv": "Wqkv", "proj": "out_proj"}


@dataclass(frozen=True)
class Part:
    """One source tensor and the place it fills in one of our tensors; an empty index is the whole of it."""

    key: str
    index: Index = ()


def official_parts(name: str, shape: torch.Size, *, flash: bool) -> list[Part]:
    """The official tensors that make up our tensor `name`.

    Args:
        name: key of our state dict.
        shape: its shape.
        flash: whether attention has the names of the XL and G release (Wqkv, out_proj).
    """
    stem, _, leaf = name.rpartition(".")
    if stem.endswith(".moe.experts"):
        return [
            part for expert in range(shape[0]) for part in _swiglu_parts(f"{stem}.{expert}", leaf, shape[1:], expert)
        ]
    if stem.endswith(".moe.shared_experts"):
        return _swiglu_parts(stem, leaf, shape)
    head, _, layer = stem.rpartition(".")
    if flash and head.endswith(".attn") and layer in _FLASH_NAMES:
        return [Part(f"{head}.{_FLASH_NAMES[layer]}.{leaf}")]
    return [Part(name)]


def _swiglu_parts(stem: str, leaf: str, shape: torch.Size, *expert: int) -> list[Part]:
    """The one or two official matrices of a SwiGLU's w13 (gate rows first) or w2."""
    if leaf == "w2":
        return [Part(f"{stem}.down_proj.weight", (*expert,))]
    half = shape[0] // 2
    return [
        Part(f"{stem}.gate_proj.weight", (*expert, slice(0, half))),
        Part(f"{stem}.up_proj.weight", (*expert, slice(half, 2 * half))),
    ]
