"""The kinds of measurement, by name."""

from __future__ import annotations

from . import moe_layer
from .base import Choice, Suite, Task

__all__ = ["SUITES", "Choice", "Suite", "Task"]

SUITES: dict[str, Suite] = {suite.name: suite for suite in (moe_layer.SUITE,)}
