"""The order in which training visits the images: shuffled each epoch, and known from seed and step alone."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class BatchOrder:
    """Image indices of any training step, so that a resumed run continues as if it had never stopped.

    Each epoch is a fresh shuffle without repetition; images that do not fill its last batch wait for the next epoch.

    Args:
        num_images: images to choose from.
        batch_size: images per step, 1 to num_images.
        seed: at least 0.
        device: where the indices are wanted; they travel once per epoch.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int, device: torch.device | str = "cpu") -> None:
        if not 1 <= batch_size <= num_images:
            raise ValueError(f"batch_size: got {batch_size}, expected 1 to the number of images, {num_images}")
        if seed < 0:
            raise ValueError(f"seed: got {seed}, expected 0 or more")
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.device = torch.device(device)
        self.steps_per_epoch = num_images // batch_size
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def indices(self, step: int) -> Tensor:
        """(batch_size,) int64 on the device: the images of a step, counted from 0."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            shuffle = np.random.default_rng([self.seed, epoch]).permutation(self.num_images)
            order = torch.from_numpy(shuffle)
            if self.device.type == "cuda":
                order = order.pin_memory()  # a copy from other memory would wait for the GPU
            self._order = order.to(self.device, non_blocking=True)
            self._epoch = epoch
        return self._order[position * self.batch_size : (position + 1) * self.batch_size]
