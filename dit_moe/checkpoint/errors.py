"""The error of everything that is wrong with a checkpoint, and how long lists of keys are shown in it."""

from __future__ import annotations

from collections.abc import Sequence

MAX_LISTED = 20


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, is refused for safety, or does not fit the model."""


def listed(items: Sequence[str]) -> str:
    """The items joined by commas; beyond MAX_LISTED only their number is told."""
    shown = ", ".join(items[:MAX_LISTED])
    return shown if len(items) <= MAX_LISTED else f"{shown}, ... ({len(items)} in all)"
