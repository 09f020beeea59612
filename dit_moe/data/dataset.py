"""ImageDataset: labelled 8-bit images of one size, small enough to lie on the training device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .feed import Batch, to_device


@dataclass(frozen=True)
class ImageDataset:
    """Labelled square images in memory.

    Args:
        name: what the data is called in messages.
        images: (N, C, S, S) uint8, C = 1 (grey) or 3 (RGB).
        class_ids: (N,) int64 in 0 to len(class_names) - 1.
        class_names: name of each class.
        skipped: files that could not be read, with the reason.

    Raises:
        TypeError, ValueError: wrong dtype, shape or ids, or no image.
    """

    name: str
    images: Tensor
    class_ids: Tensor
    class_names: tuple[str, ...]
    skipped: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.class_ids.dtype != torch.int64:
            raise TypeError(f"got dtypes {self.images.dtype} and {self.class_ids.dtype}, expected uint8 and int64")
        shape = tuple(self.images.shape)
        if len(shape) != 4 or shape[1] not in (1, 3) or shape[2] != shape[3]:
            raise ValueError(f"images: got shape {shape}, expected (N, 1 or 3, S, S)")
        if not shape[0]:
            raise ValueError(f"{self.name}: got no images, expected at least one")
        if tuple(self.class_ids.shape) != shape[:1]:
            raise ValueError(f"class_ids: got shape {tuple(self.class_ids.shape)}, expected ({shape[0]},)")
        low, high = (int(bound) for bound in self.class_ids.aminmax())
        if low < 0 or high >= len(self.class_names):
            raise ValueError(f"class_ids: got values {low} to {high}, expected 0 to {len(self.class_names) - 1}")

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def channels(self) -> int:
        """1 for grey images, 3 for colour."""
        return self.images.shape[1]

    @property
    def image_size(self) -> int:
        """Height and width of each image."""
        return self.images.shape[2]

    @property
    def num_classes(self) -> int:
        """Number of classes, with or without images."""
        return len(self.class_names)

    def to(self, device: torch.device | str) -> ImageDataset:
        """The same images on another device."""
        return replace(self, images=self.images.to(device), class_ids=self.class_ids.to(device))

    def identity(self) -> dict[str, Any]:
        """Name, number and sum of all pixels."""
        return {"name": self.name, "images": len(self), "sum": int(self.images.sum(dtype=torch.int64))}

    def feed(self, device: torch.device) -> ImageFeed:
        """Batches for training, from all images on the device."""
        return ImageFeed(self, device)

    def resized(self, image_size: int) -> ImageDataset:
        """The same images at another size, by antialiased bilinear interpolation."""
        if image_size == self.image_size:
            return self
        scaled = [
            F.interpolate(part.float(), (image_size, image_size), mode="bilinear", antialias=True)
            for part in self.images.split(256)
        ]
        return replace(self, images=torch.cat(scaled).round().clamp(0, 255).to(torch.uint8))

    def padded_to_multiple(self, patch_size: int) -> ImageDataset:
        """Images whose size is a multiple of the patch size, by repeating the border pixels evenly on all sides."""
        missing = -self.image_size % patch_size
        if not missing:
            return self
        before, after = missing // 2, missing - missing // 2
        padded = F.pad(self.images.float(), (before, after, before, after), mode="replicate")
        return replace(self, images=padded.to(torch.uint8))


class ImageFeed:
    """Batches of images that lie on the device as bytes.

    Args:
        data: the images.
        device: where they go.
    """

    draws = False

    def __init__(self, data: ImageDataset, device: torch.device) -> None:
        self._data, self.index_device = data.to(device), device

    def batch(self, indices: Tensor, mirrored: Tensor, noise: Tensor | None = None) -> Batch:
        """As `Feed.batch`; without mirrored images nothing is mirrored on the device either."""
        x = to_model_range(self._data.images[indices])
        if mirrored.any():
            x = torch.where(to_device(mirrored, self.index_device)[:, None, None, None], x.flip(3), x)
        return Batch(x, self._data.class_ids[indices])


def to_model_range(images: Tensor) -> Tensor:
    """8-bit images as a pixel-space model sees them: 0 is -1, 255 is 1.

    Args:
        images: (B, C, S, S) uint8.

    Returns:
        (B, C, S, S) fp32; `dit_moe.images.to_uint8` turns it back exactly.
    """
    return images.float().div_(127.5).sub_(1)
