"""Tile choices of the Triton kernels: frozen configs and the deterministic heuristic that picks one."""

from __future__ import annotations

TILE_ROWS = (16, 32, 64, 128)  # heights of a GEMM tile that a routing plan may be cut into


def choose_tile_rows(num_rows: int, num_experts: int) -> int:
    """Tile height for the mean number of rows per expert: full 128-row tiles as soon as experts fill them."""
    mean = num_rows / max(num_experts, 1)
    for rows in TILE_ROWS[:-1]:
        if mean <= rows:
            return rows
    return TILE_ROWS[-1]
