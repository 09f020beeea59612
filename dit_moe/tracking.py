"""Watching a run: TensorBoard, utilisation of the GPU's arithmetic, and grids of samples by the averaged weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .config import DiTConfig
from .flops import flops
from .images import make_grid, save_png, to_uint8
from .sampling import sample_ddim, sample_rectified_flow
from .training import Trainer, TrainingReport
from .vae import LatentCodec

# Dense bf16 TFLOP/s of the manufacturer's data sheets, by a part of the name that CUDA gives.
_PEAK_TFLOPS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "A100": 312, "L40S": 362}


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """FLOP/s of a GPU's tensor cores in bf16; None for other arithmetic, for a CPU, and for GPUs not known here.

    Args:
        device: the GPU.
        dtype: of the training settings.
    """
    if device.type != "cuda" or dtype == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak * 1e12 for part, peak in _PEAK_TFLOPS.items() if part in name), None)


def utilisation(config: DiTConfig, images_per_second: float, peak: float) -> float:
    """Share of the peak that training's own arithmetic takes (MFU): three forwards an image, recomputation not counted.

    Args:
        config: of the model.
        images_per_second: over all GPUs.
        peak: FLOP/s of all GPUs together.
    """
    return 3 * flops(config) * images_per_second / peak


class TensorBoardLog:
    """A run's reports and grids for TensorBoard.

    Args:
        folder: for the event files.
        config: of the model.
        peak: FLOP/s of all devices together; None leaves out the utilisation.
        step: steps done already; what an earlier run logged of later ones is hidden.

    Raises:
        ImportError: tensorboard is not installed.
    """

    def __init__(self, folder: str | os.PathLike, config: DiTConfig, peak: float | None = None, step: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("logging to TensorBoard needs its package: pip install tensorboard") from error
        self.config, self.peak = config, peak
        self._writer: Any = SummaryWriter(os.fspath(folder), purge_step=step + 1)

    def report(self, report: TrainingReport) -> None:
        """Add a report: losses, norm, rate, throughput, and each layer's load and entropy."""
        scalars = {
            "loss/diffusion": report.loss,
            "loss/balance": report.balance_loss,
            "optimiser/gradient norm": report.grad_norm,
            "optimiser/learning rate": report.learning_rate,
            "speed/images per second": report.images_per_second,
        }
        if self.peak is not None:
            scalars["speed/model FLOPs utilisation"] = utilisation(self.config, report.images_per_second, self.peak)
        for layer, (loads, entropy) in enumerate(zip(report.expert_load, report.expert_entropy, strict=True)):
            scalars[f"entropy/layer {layer:02d}"] = entropy
            for expert, load in enumerate(loads):
                scalars[f"load of layer {layer:02d}/expert {expert:02d}"] = load
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, report.step)

    def grid(self, image: np.ndarray, step: int) -> None:
        """Add a grid of samples, (H, W, C) uint8."""
        self._writer.add_image("samples", image, step, dataformats="HWC")

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class GridSampler:
    """Draws the same samples again and again as training goes on: one row a class, the noise always the same.

    Args:
        folder: for step-N.png.
        num_classes: rows, the first classes of the data.
        images_per_class: columns.
        steps: sampling steps.
        cfg_scale: guidance; without class dropout in training it must be 1.
        codec: autoencoder of latents; None for pixels.
        seed: of the noise.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        num_classes: int = 8,
        images_per_class: int = 8,
        *,
        steps: int = 50,
        cfg_scale: float = 4.0,
        codec: LatentCodec | None = None,
        seed: int = 0,
    ) -> None:
        for name, value in (("num_classes", num_classes), ("images_per_class", images_per_class), ("steps", steps)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        self.folder = Path(folder)
        self.rows, self.columns, self.steps, self.cfg_scale = num_classes, images_per_class, steps, cfg_scale
        self.codec, self.seed = codec, seed

    def draw(self, trainer: Trainer) -> np.ndarray | None:
        """Sample with the averaged weights; the first rank writes the grid and gets it, the others None.

        With several ranks all must call it together.
        """
        config = trainer.config
        class_ids = torch.arange(min(self.rows, trainer.data.num_classes)).repeat_interleave(self.columns)
        shape = (len(class_ids), config.in_channels, config.input_size, config.input_size)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(self.seed))
        with trainer.averaged_weights() as model:
            x = self._sample(model, noise.to(trainer.device), class_ids.to(trainer.device), trainer.settings.objective)
        if trainer.rank:
            return None
        pixels = x if self.codec is None else self.codec.decode(x)
        grid = make_grid(to_uint8(pixels), self.columns, scale=max(1, 64 // pixels.shape[3]))
        self.folder.mkdir(parents=True, exist_ok=True)
        save_png(self.folder / f"step-{trainer.step:08d}.png", grid)
        return grid

    def _sample(self, model: torch.nn.Module, noise: Tensor, class_ids: Tensor, objective: str) -> Tensor:
        if objective == "rf":
            return sample_rectified_flow(model, noise, class_ids, self.steps, self.cfg_scale)
        return sample_ddim(model, noise, class_ids, self.steps, self.cfg_scale, clip=self.codec is None)
