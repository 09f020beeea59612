"""What training asks of its data: batches by index, on the device, without waiting for it."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Batch(NamedTuple):
    """Images or latents (B, C, S, S) fp32 as the model sees them, and class ids (B,) int64, on the device."""

    x: Tensor
    class_ids: Tensor


class Feed(Protocol):
    """Batches of a data set on one device."""

    index_device: torch.device
    """Where `batch` wants its indices."""
    draws: bool
    """Whether `batch` wants noise: cached latents are distributions."""

    def batch(self, indices: Tensor, mirrored: Tensor, noise: Tensor | None) -> Batch:
        """The images of these indices.

        Args:
            indices: (B,) int64 on index_device.
            mirrored: (B,) bool on the CPU, which images to mirror.
            noise: (B, C, S, S) fp32 standard normal on the device where `draws`, else None.
        """


class TrainingData(Protocol):
    """Labelled images or latents of one size."""

    @property
    def name(self) -> str:
        """What the data is called in messages."""

    @property
    def channels(self) -> int:
        """C."""

    @property
    def image_size(self) -> int:
        """S, height and width."""

    @property
    def num_classes(self) -> int:
        """Class ids are less than this."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each class."""

    def __len__(self) -> int: ...

    def identity(self) -> dict[str, Any]:
        """What tells these data from others, for a run that goes on, as JSON can hold it."""

    def feed(self, device: torch.device) -> Feed:
        """Batches on a device."""


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on a device; from pinned memory, since a copy from other memory would wait for the GPU."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
