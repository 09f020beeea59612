"""A tiny model and tiny data that the trainer's tests share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dit_moe import DiT, DiTConfig
from dit_moe.data import ImageDataset
from dit_moe.training import Trainer, TrainingSettings

CONFIG = DiTConfig(
    input_size=8, patch_size=4, in_channels=1, hidden_size=16, depth=2, num_heads=2, mlp_ratio=2.0, num_experts=4,
    num_shared_experts=1, num_classes=2, learn_sigma=False,
)  # fmt: skip
SETTINGS = TrainingSettings(steps=12, batch_size=8, learning_rate=3e-3, warmup_steps=2, schedule="cosine", seed=5)


def bars(count: int = 32) -> ImageDataset:
    """Two easy classes: the left or the right half is bright."""
    class_ids = torch.arange(count) % 2
    images = torch.zeros(count, 1, 8, 8, dtype=torch.uint8)
    images[class_ids == 0, :, :, :4] = 255
    images[class_ids == 1, :, :, 4:] = 255
    return ImageDataset("bars", images, class_ids, ("left", "right"))


def trainer(settings: TrainingSettings = SETTINGS, config: DiTConfig = CONFIG, **options: Any) -> Trainer:
    torch.manual_seed(0)
    return Trainer(DiT(config), bars(), settings, **options)


def shaken(run: Trainer, scale: float = 0.05) -> Trainer:
    """The same trainer, with weights that are not zero anywhere: a fresh model has hardly a gradient."""
    with torch.no_grad():
        for name, weight in run.optimizer.weights.items():
            weight.add_(torch.randn_like(weight) * scale)
            run.averages.tensors[name].copy_(weight)
    run.optimizer.copy_weights()
    return run


def weights(run: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in run.state().items()}


def first(run: Trainer) -> Tensor:
    return next(iter(run.parameters.values()))


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name
