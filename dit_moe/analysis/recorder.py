"""ExpertRecorder: watches the routers of a model while it samples, and counts on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from dit_moe_kernels import RoutingCounts, count_routing
from torch import Tensor, nn

from ..layers import TopKRouter
from .counts import ExpertCounts

HALVES = {"conditional": (0, 1), "unconditional": (1, 1), "both": (0, 2)}  # first part and number of parts
StepHook = Callable[[int, int, Tensor], None]


@dataclass(frozen=True)
class RecordSizes:
    """What a recorder has room for.

    Args:
        num_images: images in all, at least 1.
        num_steps: calls of the model for each image.
        num_layers: routed layers.
        num_tokens: tokens of an image.
        num_experts, top_k: of each layer.
        num_classes: classes; num_classes itself is the null class.
        num_groups: parts of equal size into which the images are cut, in their order, for resampling.

    Raises:
        ValueError: a size below 1, or counters that could overflow 32 bits.
    """

    num_images: int
    num_steps: int
    num_layers: int
    num_tokens: int
    num_experts: int
    top_k: int
    num_classes: int
    num_groups: int = 20

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        choices = 2 * self.top_k * max(
            self.num_tokens * self.num_steps,
            self.images_per_group * max(self.num_tokens, self.num_steps),
            self.num_images,
        )  # fmt: skip
        if choices >= 2**31:
            raise ValueError(f"num_images, num_groups: a counter could reach {choices}, expected less than 2^31")

    @property
    def images_per_group(self) -> int:
        """Images of each group but perhaps the last."""
        return -(-self.num_images // self.num_groups)

    def histograms(self, device: torch.device | str, step_patch: bool) -> RoutingCounts:
        """Empty histograms."""
        groups = -(-self.num_images // self.images_per_group)
        layers, steps, tokens, experts = self.num_layers, self.num_steps, self.num_tokens, self.num_experts

        def empty(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        return RoutingCounts(
            image_counts=empty(self.num_images, layers, experts),
            step_counts=empty(groups, layers, steps, experts),
            patch_counts=empty(groups, layers, tokens, experts),
            step_patch_counts=empty(steps, layers, tokens, experts) if step_patch else None,
        )


class ExpertRecorder:
    """Counts the experts that tokens choose, on the device and without waiting for it.

    `record_experts` makes one and attaches it to a model's routers. A router that is not ours takes part by calling
    `record(layer, topk_ids)` in its forward.

        with record_experts(model, num_images=1000, num_steps=50) as recorder:
            for noise, class_ids in batches:
                with recorder.images(class_ids) as on_step:
                    sample_rectified_flow(model, noise, class_ids, 50, cfg_scale=1.5, on_step=on_step)
        recorder.counts().save("counts.npz")

    The step and the images' numbers lie on the device, where the sampler's hook changes them: a CUDA graph of the
    model, captured while the recorder is attached, counts rightly at every replay.

    Args:
        sizes: room for the counts.
        device: of the model.
        half: which half of a guided batch [class, null] to count: "conditional", as the paper does, "unconditional" or
            "both". Without guidance there is only the conditional one.
        step_patch: also count positions at each step (S * L * N * E numbers of 4 bytes).
        backend: of the op `count_routing`.

    Raises:
        ValueError: an unknown half.
    """

    def __init__(
        self,
        sizes: RecordSizes,
        device: torch.device | str,
        *,
        half: str = "conditional",
        step_patch: bool = False,
        backend: str = "auto",
    ) -> None:
        if half not in HALVES:
            raise ValueError(f"half: got {half!r}, expected one of {tuple(HALVES)}")
        self.sizes, self.half, self.backend = sizes, half, backend
        self._histograms = sizes.histograms(device, step_patch)
        self._class_ids = torch.zeros(sizes.num_images, dtype=torch.int64, device=device)
        self._cursor = torch.zeros(3, dtype=torch.int32, device=device)  # step, first image, batch
        self._done = self._batch = self._step = 0
        self._broken = False

    @property
    def num_done(self) -> int:
        """Images counted so far."""
        return self._done

    @contextmanager
    def images(self, class_ids: Tensor) -> Iterator[StepHook]:
        """Count the next images while they are sampled inside the with block.

        Args:
            class_ids: (B,) int, on any device: the classes asked for, in the order of the batch.

        Yields:
            The hook to call after each step with (steps done, steps in all, state): the samplers' `on_step`.

        Raises:
            ValueError: more images than there is room for, or another number of steps than `sizes` says.
            RuntimeError: the hook was not called for every step; or images are being counted already.
        """
        batch = class_ids.shape[0]
        if self._done + batch > self.sizes.num_images:
            raise ValueError(f"class_ids: got {batch} more images after {self._done}, room for {self.sizes.num_images}")
        if self._batch or self._broken:
            raise RuntimeError("the recorder is inside another images() block, or one ended with an exception")
        self._class_ids[self._done : self._done + batch].copy_(class_ids, non_blocking=True)
        for place, value in zip(self._cursor, (0, self._done, batch), strict=True):
            place.fill_(value)
        self._batch, self._step, self._broken = batch, 0, True  # until the block ends well
        try:
            yield self._on_step
        finally:
            self._cursor[2].fill_(0)  # a batch of none: calls outside such blocks are not counted
            self._batch = 0
        if self._step != self.sizes.num_steps:
            raise RuntimeError(
                f"images(): the step hook was called up to step {self._step}, expected {self.sizes.num_steps}: pass it "
                "to the sampler as on_step"
            )
        self._broken = False
        self._done += batch

    def _on_step(self, done: int, steps: int, state: Any = None) -> None:
        """Move on to step `done` of `steps`."""
        if steps != self.sizes.num_steps or done != self._step + 1:
            raise ValueError(
                f"on_step: got step {done} of {steps}, expected {self._step + 1} of {self.sizes.num_steps}; was "
                "the hook used outside its images() block?"
            )
        self._step = done
        self._cursor[0].fill_(done)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing of what the device does inside the with block; capturing a CUDA graph in it is fine."""
        self._cursor[2].fill_(0)
        try:
            yield
        finally:
            self._cursor[2].fill_(self._batch)

    def record(self, layer: int, topk_ids: Tensor) -> None:
        """Count one call of one layer; called inside the model's forward, also while a CUDA graph captures it.

        Args:
            layer: 0 to num_layers - 1.
            topk_ids: (R * N, K) int32 or int64, experts of every token of R images, in the order of the batch; -1 for
                a choice that is not routed. Under guidance R is twice the batch, the class's half first.

        Raises:
            TypeError, ValueError: wrong dtype or shape.
        """
        first_part, num_parts = HALVES[self.half]
        if self._batch:
            rows, possible = topk_ids.shape[0], [n * self._batch * self.sizes.num_tokens for n in (1, 2)]
            if rows not in possible[first_part:]:
                raise ValueError(
                    f"topk_ids: got {rows} tokens, expected {' or '.join(map(str, possible[first_part:]))}: "
                    f"{self._batch} images of {self.sizes.num_tokens} tokens, {self.half}"
                )
        count_routing(
            topk_ids, layer, self._cursor, self._histograms, images_per_group=self.sizes.images_per_group,
            first_part=first_part, num_parts=num_parts, backend=self.backend,
        )  # fmt: skip

    def counts(self, provenance: dict[str, Any] | None = None) -> ExpertCounts:
        """What was counted so far, copied to the host; the recorder may go on.

        Raises:
            RuntimeError: an images() block is open or ended with an exception, so that some images are counted in part.
        """
        if self._broken:
            raise RuntimeError("counts: an images() block is open or ended with an exception")
        both = self._histograms.step_patch_counts
        return ExpertCounts(
            images=_on_host(self._histograms.image_counts[: self._done]),
            steps=_on_host(self._histograms.step_counts),
            patches=_on_host(self._histograms.patch_counts),
            step_patches=None if both is None else _on_host(both),
            class_ids=_on_host(self._class_ids[: self._done]),
            num_classes=self.sizes.num_classes,
            top_k=self.sizes.top_k,
            images_per_group=self.sizes.images_per_group,
            half=self.half,
            provenance=provenance or {},
        )

    def restore(self, counts: ExpertCounts) -> None:
        """Go on from counts that an equal recorder made.

        Raises:
            ValueError: counts of other sizes.
        """
        saved = {
            "image_counts": counts.images,
            "step_counts": counts.steps,
            "patch_counts": counts.patches,
            "step_patch_counts": counts.step_patches,
        }
        for name, array in saved.items():
            room = getattr(self._histograms, name)
            first = counts.num_images if name == "image_counts" else None
            expected = None if room is None else tuple(room[:first].shape)
            if (array is None) != (room is None) or (array is not None and array.shape != expected):
                raise ValueError(f"{name}: got {None if array is None else array.shape}, expected {expected}")
            if room is not None:
                room.zero_()[:first].copy_(torch.from_numpy(array))
        self._class_ids[: counts.num_images].copy_(torch.from_numpy(counts.class_ids))
        self._done, self._broken = counts.num_images, False


class LayerObserver:
    """What a router calls: counts its choices as those of one layer.

    Args:
        recorder: counts.
        layer: 0 to num_layers - 1.
    """

    def __init__(self, recorder: ExpertRecorder, layer: int) -> None:
        self.recorder, self.layer = recorder, layer

    def __call__(self, topk_ids: Tensor) -> None:
        """Count topk_ids (T, K)."""
        self.recorder.record(self.layer, topk_ids)

    def paused(self) -> AbstractContextManager[None]:
        """Count nothing inside the with block, whoever calls: for rehearsals before a capture."""
        return self.recorder.paused()


def _on_host(tensor: Tensor) -> np.ndarray:
    return tensor.to("cpu", copy=True).numpy()


@contextmanager
def record_experts(
    model: nn.Module,
    num_images: int,
    num_steps: int,
    *,
    num_tokens: int | None = None,
    num_classes: int | None = None,
    num_groups: int = 20,
    half: str = "conditional",
    step_patch: bool = False,
    backend: str = "auto",
) -> Iterator[ExpertRecorder]:
    """Record every `TopKRouter` of a model inside the with block, in the order of `model.modules()`.

    Args:
        model: a DiT, or any module that holds our routed layers.
        num_images: images that will be sampled.
        num_steps: sampling steps of each.
        num_tokens, num_classes: of the model; None reads them from model.config.
        num_groups, half, step_patch, backend: as in `RecordSizes` and `ExpertRecorder`.

    Raises:
        ValueError: no routers, routers of different sizes, or one that is being observed already.
    """
    routers = [module for module in model.modules() if isinstance(module, TopKRouter)]
    if not routers:
        raise ValueError("model: got no TopKRouter in it, expected a mixture-of-experts model")
    kinds = {(router.num_experts, router.top_k, router.weight.device) for router in routers}
    if len(kinds) > 1:
        raise ValueError(f"model: got routers of different (experts, top_k, device) {kinds}, expected one kind")
    if any(router.observer is not None for router in routers):
        raise ValueError("model: its routers have an observer already")
    num_experts, top_k, device = kinds.pop()
    config: Any = getattr(model, "config", None)
    sizes = RecordSizes(
        num_images=num_images,
        num_steps=num_steps,
        num_layers=len(routers),
        num_tokens=config.num_tokens if num_tokens is None else num_tokens,
        num_experts=num_experts,
        top_k=top_k,
        num_classes=config.num_classes if num_classes is None else num_classes,
        num_groups=num_groups,
    )
    recorder = ExpertRecorder(sizes, device, half=half, step_patch=step_patch, backend=backend)
    try:
        for layer, router in enumerate(routers):
            router.observer = LayerObserver(recorder, layer)
        yield recorder
    finally:
        for router in routers:
            router.observer = None
