"""CachedDataset: training data read from a cache that `build_cache` filled."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .cache import CACHE_FILE, CLASSES_FILE, ROWS_FILE, read_info
from .dataset import to_model_range
from .feed import Batch, to_device


def is_cache(folder: str | os.PathLike) -> bool:
    """Whether a folder holds a cache."""
    return (Path(folder) / CACHE_FILE).is_file()


class CachedDataset:
    """Images or latents of a cache, read through memory maps: only what a step needs, and from memory where it fits.

    Args:
        folder: a complete cache.

    Raises:
        FileNotFoundError, ValueError: no cache, one that is damaged or not complete, or one without an image.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        place = Path(folder)
        self.info, progress = read_info(place)
        if progress.done < progress.files:
            raise ValueError(
                f"{place}: got a cache of {progress.done} of {progress.files} files; `dit-moe cache` goes on with it"
            )
        self.name, self.skipped = str(place), progress.skipped
        self._rows = np.load(place / ROWS_FILE, mmap_mode="r")
        expected = (self.info.files, *self.info.row_shape)
        if self._rows.shape != expected:
            raise ValueError(f"{place / ROWS_FILE}: got shape {self._rows.shape}, expected {expected}")
        class_ids = np.load(place / CLASSES_FILE)
        self._good = np.flatnonzero(class_ids >= 0)
        if not len(self._good):
            raise ValueError(f"{place}: none of its {progress.files} files could be read; the first: {self.skipped[0]}")
        self._class_ids = class_ids[self._good]

    def __len__(self) -> int:
        return len(self._good)

    @property
    def channels(self) -> int:
        """Channels of what the model sees."""
        return self.info.channels

    @property
    def image_size(self) -> int:
        """Height and width of what the model sees."""
        return self.info.size

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.info.class_names)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each class."""
        return self.info.class_names

    def identity(self) -> dict[str, Any]:
        """What was cached, wherever the cache lies."""
        return {"kind": self.info.kind, "digest": self.info.digest, "images": len(self), "encoder": self.info.encoder}

    def feed(self, device: torch.device) -> CachedFeed:
        """Batches for training, read as they are needed."""
        return CachedFeed(self, device)

    def rows(self, indices: Tensor, mirrored: Tensor) -> tuple[Tensor, Tensor]:
        """Stored rows (B, C', S, S) of images and their class ids (B,), on the CPU; latents mirrored as asked.

        Raises:
            ValueError: mirrored latents are wanted that were not cached.
        """
        chosen = indices.numpy()
        side = mirrored.numpy().astype(np.int64)
        if self.info.flips == 1:
            if self.info.kind == "latents" and side.any():
                raise ValueError(
                    f"{self.name}: got a wish for mirrored latents, but they were cached without: use no flip"
                )
            side[:] = 0
        rows = self._rows[self._good[chosen], side]
        return torch.from_numpy(rows), torch.from_numpy(self._class_ids[chosen])


class CachedFeed:
    """Batches of a cache: the host reads while the device computes the steps before.

    Args:
        data: the cache.
        device: where batches go.
    """

    index_device = torch.device("cpu")

    def __init__(self, data: CachedDataset, device: torch.device) -> None:
        self._data, self._device = data, device
        self.draws = data.info.kind == "latents"

    def batch(self, indices: Tensor, mirrored: Tensor, noise: Tensor | None) -> Batch:
        """As `Feed.batch`; latents are drawn from the autoencoder's distribution, as in the paper's training."""
        rows, class_ids = self._data.rows(indices, mirrored)
        x = to_device(rows, self._device)
        if noise is not None:
            mean, std = x.float().chunk(2, dim=1)
            x = torch.addcmul(mean, std, noise)
        else:
            x = to_model_range(x)
            if mirrored.any():
                x = torch.where(to_device(mirrored, self._device)[:, None, None, None], x.flip(3), x)
        return Batch(x, to_device(class_ids, self._device))
