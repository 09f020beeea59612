"""count_routing: add one layer's expert choices to running histograms over images, steps and positions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import backends, checks, reference
from .library import define_op


class RoutingCounts(NamedTuple):
    """Running histograms of expert choices: int32, contiguous, on one device.

    I images, L layers, S sampling steps, N tokens of an image, E experts; G groups of images that follow each other.

    image_counts: (I, L, E) choices of each image.
    step_counts: (G, L, S, E) choices at each sampling step.
    patch_counts: (G, L, N, E) choices of each token position.
    step_patch_counts: (S, L, N, E) choices of each position at each step, or None.
    """

    image_counts: Tensor
    step_counts: Tensor
    patch_counts: Tensor
    step_patch_counts: Tensor | None


def count_routing(
    topk_ids: Tensor,
    layer: int,
    cursor: Tensor,
    counts: RoutingCounts,
    *,
    images_per_group: int,
    first_part: int = 0,
    num_parts: int = 1,
    backend: str = "auto",
) -> None:
    """Count every choice of one layer's call in all the histograms at once, without a host sync.

    The batch holds whole images of N tokens, in one or more parts of B images each, as guidance doubles a batch. Which
    images these are and at which step is read on the device, so that one captured CUDA graph serves every step. Sums
    of integers do not depend on their order: the result is the same in every run.

    Args:
        topk_ids: (R * N, K) int32 or int64, the chosen experts; ids outside [0, E), such as -1, are not counted.
        layer: 0 to L - 1.
        cursor: (3,) int32, [step, number of the batch's first image, B]. What it places outside the histograms is not
            counted: it cannot be checked without waiting for the device.
        counts: the histograms, changed in place.
        images_per_group: image i belongs to group i // images_per_group.
        first_part, num_parts: count rows first_part * B to (first_part + num_parts) * B - 1 of the R images; row r is
            image r % B of the batch.
        backend: "auto", "triton" or "reference".

    Raises:
        TypeError, ValueError: wrong dtypes, shapes or devices.
    """
    _check(topk_ids, layer, cursor, counts, images_per_group)
    if first_part < 0 or num_parts < 1:
        raise ValueError(f"first_part, num_parts: got {first_part}, {num_parts}, expected at least 0 and 1")
    name = backends.resolve(backend, "counting", topk_ids.device.type, torch.float32)
    _count_routing(topk_ids, cursor, *counts, layer, images_per_group, first_part, num_parts, name)


def _check(topk_ids: Tensor, layer: int, cursor: Tensor, counts: RoutingCounts, images_per_group: int) -> None:
    checks.check_ids("topk_ids", topk_ids)
    num_images, num_layers, num_experts = counts.image_counts.shape
    num_groups, _, num_steps, _ = counts.step_counts.shape
    num_tokens = counts.patch_counts.shape[2]
    expected = {
        "step_counts": (num_groups, num_layers, num_steps, num_experts),
        "patch_counts": (num_groups, num_layers, num_tokens, num_experts),
        "step_patch_counts": (num_steps, num_layers, num_tokens, num_experts),
    }
    for name, tensor in [("cursor", cursor), *counts._asdict().items()]:
        if tensor is None and name == "step_patch_counts":
            continue
        if tensor.dtype != torch.int32 or not tensor.is_contiguous():
            raise TypeError(f"{name}: got {tensor.dtype}, strides {tensor.stride()}, expected contiguous int32")
        checks.check_same_device(name, tensor, "topk_ids", topk_ids)
        checks.check_shape(name, tensor, (3,) if name == "cursor" else expected.get(name, tuple(tensor.shape)))
    if topk_ids.ndim != 2 or topk_ids.shape[0] % num_tokens:
        raise ValueError(f"topk_ids: got shape {tuple(topk_ids.shape)}, expected (whole images of {num_tokens}, K)")
    if not 0 <= layer < num_layers:
        raise ValueError(f"layer: got {layer}, expected 0 to {num_layers - 1}")
    if images_per_group < 1 or images_per_group * num_groups < num_images:
        raise ValueError(
            f"images_per_group: got {images_per_group} for {num_groups} groups, expected room for {num_images} images"
        )


def _count_routing_impl(
    topk_ids: Tensor,
    cursor: Tensor,
    image_counts: Tensor,
    step_counts: Tensor,
    patch_counts: Tensor,
    step_patch_counts: Tensor | None,
    layer: int,
    images_per_group: int,
    first_part: int,
    num_parts: int,
    backend: str,
) -> None:
    histograms = (image_counts, step_counts, patch_counts, step_patch_counts)
    where = (layer, images_per_group, first_part, num_parts)
    if backend == "triton":
        from .triton_impl import counting

        counting.count_routing(topk_ids.contiguous(), cursor, *histograms, *where)
    else:
        reference.count_routing(topk_ids, cursor, *histograms, *where)


def _count_routing_fake(*args: object) -> None:
    return None


_count_routing = define_op(
    "count_routing(Tensor topk_ids, Tensor cursor, Tensor(a!) image_counts, Tensor(b!) step_counts,"
    " Tensor(c!) patch_counts, Tensor(d!)? step_patch_counts, int layer, int images_per_group, int first_part,"
    " int num_parts, str backend) -> ()",
    _count_routing_impl,
    _count_routing_fake,
)
