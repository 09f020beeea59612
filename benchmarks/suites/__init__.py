"""The kinds of measurement, by name."""

from __future__ import annotations

from . import grouped_gemm, memory, model, moe_layer, permute, startup
from .base import Choice, Suite, Task

__all__ = ["SUITES", "Choice", "Suite", "Task"]

SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        permute.SUITE,
        grouped_gemm.SUITE,
        moe_layer.SUITE,
        model.MODEL,
        model.TRAINING,
        memory.SUITE,
        startup.SUITE,
    )
}
