"""State dicts in the official layouts for the checkpoint tests: the golden ones, and fresh ones written from the names
of the release, independently of dit_moe.checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "data" / "golden"


def golden_arrays(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, object]]:
    """The state dict in official keys, the other arrays, and the configuration of a golden file."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files if key != "meta"}
        meta = json.loads(str(file["meta"]))
    state = {key.removeprefix("state/"): value for key, value in arrays.items() if key.startswith("state/")}
    return state, {key: value for key, value in arrays.items() if not key.startswith("state/")}, meta


def official_state(
    width: int = 32,
    depth: int = 2,
    experts: int = 4,
    shared: int = 2,
    head_dim: int | None = None,
    ratio: float = 4,
    tokens: int = 16,
    classes: int = 10,
    out_channels: int = 8,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """A random DiT-MoE in official keys; with head_dim in the XL/G layout; experts=0 is Meta's dense DiT."""
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, tokens, width),
        "x_embedder.proj.weight": (width, 4, 2, 2),
        "x_embedder.proj.bias": (width,),
        **_linear("t_embedder.mlp.0", width, 256),
        **_linear("t_embedder.mlp.2", width, width),
        "y_embedder.embedding_table.weight": (classes + 1, width),
        **_linear("final_layer.linear", 4 * out_channels, width),
        **_linear("final_layer.adaLN_modulation.1", 2 * width, width),
    }
    hidden = int(width * ratio)
    for i in range(depth):
        block = f"blocks.{i}"
        qkv, out = ("Wqkv", "out_proj") if head_dim else ("qkv", "proj")
        shapes |= _linear(f"{block}.attn.{qkv}", 3 * width, width) | _linear(f"{block}.attn.{out}", width, width)
        shapes |= _linear(f"{block}.adaLN_modulation.1", 6 * width, width)
        for norm in ("q_norm", "k_norm") if head_dim else ():
            shapes |= {f"{block}.attn.{norm}.{leaf}": (head_dim,) for leaf in ("weight", "bias")}
        if not experts:
            shapes |= _linear(f"{block}.mlp.fc1", hidden, width) | _linear(f"{block}.mlp.fc2", width, hidden)
            continue
        shapes[f"{block}.moe.gate.weight"] = (experts, width)
        for e in range(experts):
            shapes |= _swiglu(f"{block}.moe.experts.{e}", width, hidden)
        if shared:
            shapes |= _swiglu(f"{block}.moe.shared_experts", width, shared * width)
    return {key: (torch.randn(shape) * 0.1).to(dtype) for key, shape in shapes.items()}


def _linear(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def _swiglu(name: str, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{name}.gate_proj.weight": (hidden, width),
        f"{name}.up_proj.weight": (hidden, width),
        f"{name}.down_proj.weight": (width, hidden),
    }


def assert_same_bytes(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Same keys, shapes, dtypes and bits (NaN included)."""
    assert got.keys() == expected.keys()
    for key, tensor in expected.items():
        assert got[key].shape == tensor.shape and got[key].dtype == tensor.dtype, key
        assert torch.equal(bits(got[key]), bits(tensor)), key


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)
