"""Tile choices of the Triton kernels: frozen configs and the deterministic heuristic that picks one.

No autotuning at run time: the first call of a shape is as right and as fast as the thousandth. The tables hold what
measured best (docs/performance.md); `benchmarks/tune.py` times candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

TILE_ROWS = (16, 32, 64, 128)  # heights of a GEMM tile that a routing plan may be cut into


@dataclass(frozen=True)
class GemmConfig:
    """Tile and pipeline of a grouped GEMM; its height is the routing plan's tile_rows, except for the weight gradient.

    Attributes:
        block_m: tile height of the weight gradient; unused elsewhere.
        block_n, block_k: width of the accumulator tile (gate and up together for SwiGLU), depth of a main-loop step.
        num_warps, num_stages: Triton's warps per program and pipeline stages.
        group_m: row tiles that sweep the columns together, for L2 reuse.
        persistent: one program per multiprocessor that loops over tiles.
        use_tma: load weights and sorted rows through tensor descriptors where the GPU has them.
        gather: read tokens through the routing inside the first product; False copies them to sorted rows beforehand,
            where tensor descriptors gain more than the copy costs.
        max_registers: cap per thread, so that two programs fit a multiprocessor; None leaves it to the compiler.
    """

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    block_m: int = 128
    persistent: bool = False
    use_tma: bool = True
    gather: bool = True
    max_registers: int | None = None


def choose_tile_rows(num_rows: int, num_experts: int) -> int:
    """Tile height for the mean number of rows per expert: full 128-row tiles as soon as experts fill them."""
    mean = num_rows / max(num_experts, 1)
    for rows in TILE_ROWS[:-1]:
        if mean <= rows:
            return rows
    return TILE_ROWS[-1]


def gemm_config(epilogue: str, tile_rows: int, dtype: torch.dtype, capability: tuple[int, int]) -> GemmConfig:
    """Config of the grouped GEMM.

    Args:
        epilogue: "store", "swiglu" or "dswiglu".
        tile_rows: the routing plan's tile height.
        dtype: of the inputs.
        capability: the GPU's compute capability; (0, 0) for the interpreter.
    """
    if dtype == torch.float32:
        return _FLOAT32
    if tile_rows < 128:
        return GemmConfig(block_n=128, block_k=64, num_warps=4, num_stages=4)
    if capability >= (9, 0):
        return _HOPPER[epilogue]
    return GemmConfig(block_n=128, block_k=32, num_warps=8 if epilogue == "dswiglu" else 4, num_stages=4)


def dw_config(dtype: torch.dtype, capability: tuple[int, int]) -> GemmConfig:
    """Config of the weight gradient, for inputs of `dtype` on a GPU of this capability."""
    if dtype == torch.float32:
        return _FLOAT32
    if capability >= (9, 0):
        return _HOPPER["dw"]
    return GemmConfig(block_m=128, block_n=128, block_k=32, num_warps=8, num_stages=3)


# Exact fp32 products run outside the tensor cores; deeper steps than 16 spill registers.
_FLOAT32 = GemmConfig(block_m=64, block_n=64, block_k=16, num_warps=8, num_stages=2)

_HOPPER = {
    "store": GemmConfig(block_n=256, block_k=64, num_warps=8, num_stages=3, persistent=True),
    "swiglu": GemmConfig(block_n=256, block_k=64, num_warps=8, num_stages=4, persistent=True, gather=False),
    "dswiglu": GemmConfig(block_n=128, block_k=64, num_warps=8, num_stages=3, max_registers=128),
    "dw": GemmConfig(block_m=128, block_n=256, block_k=64, num_warps=8, num_stages=4, group_m=16),
}
