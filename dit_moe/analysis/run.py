"""Sample images only to watch the experts: resumable, with provenance."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..diffusion.gaussian import make_diffusion
from ..engine import SamplingEngine
from ..evaluate import SamplingSettings, class_of, sample_indices, weights_digest
from ..sampling import ddim_respacing
from .counts import ExpertCounts
from .pruning import ExpertProbe, probe_experts
from .recorder import record_experts

_SAVE_EVERY = 30.0  # seconds between saves of unfinished counts
_COMPARED = ("sampling", "model", "weights")  # what must be the same for a run to go on


def number_of_steps(settings: SamplingSettings) -> int:
    """Calls of the model for each image."""
    if settings.sampler == "rf":
        return int(settings.steps)
    steps = ddim_respacing(settings.steps) if settings.sampler == "ddim" else settings.steps
    return make_diffusion(steps).num_steps


def record_sampling(
    model: Any,
    settings: SamplingSettings,
    path: str | os.PathLike,
    *,
    batch_size: int = 64,
    num_groups: int = 20,
    half: str = "conditional",
    step_patch: bool = False,
    backend: str = "auto",
    checkpoint: str = "",
    on_progress: Callable[[int, int], object] | None = None,
    on_images: Callable[[range, Tensor], object] | None = None,
) -> ExpertCounts:
    """Count the experts that a model's tokens choose while it samples; run again after a stop to go on.

    Image i has the noise and the class that `dit_moe.evaluate` gives it. The counts are saved to `path` every half
    minute and at the end, each time whole.

    Args:
        model: a DiT-MoE on its device, in the dtype to sample in.
        settings: what to sample.
        path: the .npz file; if it holds unfinished counts of the same settings, sampling goes on from there, and if
            they are finished they are returned.
        batch_size: images sampled at once.
        num_groups, half, step_patch, backend: as in `record_experts`.
        checkpoint: name of the weights, for the provenance.
        on_progress: called with (images done, images in all) at the start and after each batch.
        on_images: called with the indices and the model's output (B, C, H, W) of each batch.

    Raises:
        ValueError: arguments out of range, or the file holds other counts.
        IncompleteCountsError: calls of the model were missed.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, expected at least 1")
    path, config = Path(path), model.config
    engine = SamplingEngine(model)
    provenance = _provenance(model, settings, batch_size, checkpoint)
    with record_experts(
        model, settings.num_images, number_of_steps(settings), num_groups=num_groups, half=half, step_patch=step_patch,
        backend=backend,
    ) as recorder:  # fmt: skip
        if path.exists():
            before = _resumable(path, provenance, half, step_patch)
            if before.num_images == settings.num_images:
                return before
            recorder.restore(before)
        saved = time.monotonic()
        for start in range(recorder.num_done, settings.num_images, batch_size):
            if on_progress is not None:
                on_progress(start, settings.num_images)
            indices = range(start, min(start + batch_size, settings.num_images))
            class_ids = torch.tensor([class_of(index, settings, config.num_classes) for index in indices])
            with recorder.images(class_ids) as on_step:
                images = sample_indices(engine, indices, settings, on_step=on_step)
            if on_images is not None:
                on_images(indices, images)
            if start == 0 or time.monotonic() - saved > _SAVE_EVERY:
                counts = recorder.counts(provenance)
                counts.check_complete()  # after the first batch, not after hours
                counts.save(path)
                saved = time.monotonic()
        if on_progress is not None:
            on_progress(settings.num_images, settings.num_images)
        counts = recorder.counts(provenance)
    counts.check_complete()
    counts.save(path)
    return counts


def probe_sampling(
    model: Any, settings: SamplingSettings, *, num_images: int = 16, num_tokens: int = 512
) -> ExpertProbe:
    """Ask every expert about tokens of the first images, spread over all steps; see `probe_experts`."""
    indices = range(min(num_images, settings.num_images))
    return probe_experts(
        model,
        lambda: sample_indices(model, indices, settings),
        num_images=len(indices),
        num_calls=number_of_steps(settings),
        num_tokens=num_tokens,
        seed=settings.seed,
    )


def _provenance(model: Any, settings: SamplingSettings, batch_size: int, checkpoint: str) -> dict[str, Any]:
    device = next(model.parameters()).device
    return {
        "sampling": _as_json(settings),
        "model": model.config.to_dict(),
        "weights": weights_digest(model),
        "checkpoint": checkpoint,
        "batch_size": batch_size,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        "torch": torch.__version__,
        "dit_moe": _version(),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def _as_json(settings: SamplingSettings) -> dict[str, Any]:
    """What fixes the images, as a file gives it back."""
    fields = {key: value for key, value in asdict(settings).items() if key != "shard_size"}
    return json.loads(json.dumps(fields))


def _version() -> str:
    try:
        return metadata.version("dit-moe")
    except metadata.PackageNotFoundError:
        return "not installed"


def _resumable(path: Path, provenance: dict[str, Any], half: str, step_patch: bool) -> ExpertCounts:
    counts = ExpertCounts.load(path)
    found = dict(counts.provenance)
    # Counts of an older release lack what was added to the settings since, and were made with its defaults.
    found["sampling"] = _as_json(SamplingSettings(**found.get("sampling", {"num_images": counts.num_images})))
    changed = [
        f"{key}: {found.get(key)} there, {provenance[key]} now"
        for key in _COMPARED
        if found.get(key) != provenance[key]
    ]
    for key, there, now in (
        ("half", counts.half, half),
        ("step_patch", counts.step_patches is not None, step_patch),
    ):
        if there != now:
            changed.append(f"{key}: {there} there, {now} now")
    if changed:
        raise ValueError(f"{path} holds counts of other settings ({'; '.join(changed)}); take another folder")
    return counts
