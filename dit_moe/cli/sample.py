"""`dit-moe sample`: pictures from a checkpoint."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console

from ..checkpoint import load_checkpoint
from ..evaluate import SAMPLERS, SamplingSettings, generator_of
from ..images import save_grid, save_npz, to_uint8
from ..model import DiT
from ..runs import class_names_beside
from ..sampling import draw_noise
from ..vae import LatentCodec
from .common import (
    Backend,
    BackendOption,
    CheckpointOption,
    DeviceOption,
    HeadsOption,
    Precision,
    Sampler,
    StepsOption,
    VaeOption,
    chosen_backend,
    codec_for,
    default_steps,
    print_choices,
    reported_errors,
    resolve_device,
)

_ALL_CLASSES_UP_TO = 20
_SMALLEST_SHOWN = 56  # pixels: smaller images are enlarged in the grid


def sample(
    ckpt: CheckpointOption,
    classes: Annotated[
        list[str] | None, typer.Option("--class", help="Class id or name; may be given several times.")
    ] = None,
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="Images of each class.")] = 8,
    out: Annotated[Path, typer.Option(help="Picture grid to write, one row a class.")] = Path("samples.png"),
    npz: Annotated[Path | None, typer.Option(help="Also write the images in ADM's .npz format.")] = None,
    sampler: Annotated[Sampler, typer.Option(help="rf for models trained with rectified flow.")] = Sampler.rf,
    steps: StepsOption = None,
    cfg: Annotated[float, typer.Option(help="Guidance; 1 is none.")] = 4.0,
    vae: VaeOption = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images sampled at once.")] = 64,
    dtype: Annotated[Precision, typer.Option(help="Dtype of the weights.")] = Precision.fp32,
    device: DeviceOption = "auto",
    backend: BackendOption = Backend.auto,
    num_heads: HeadsOption = None,
) -> None:
    """Sample images of given classes from a native or official checkpoint."""
    console = Console()
    with reported_errors(), chosen_backend(backend) as choices:
        for target in (out, npz):
            if target is not None and not target.parent.is_dir():
                raise ValueError(f"{target.parent} is no folder")
        place = resolve_device(device)
        model = load_checkpoint(ckpt, num_heads, device=place, dtype=dtype.torch_dtype)
        names = class_names_beside(ckpt)
        chosen = _class_ids(classes, names, model.config.num_classes)
        ids = np.repeat(np.array(chosen, dtype=np.int64), n)
        settings = SamplingSettings(
            num_images=len(ids), sampler=sampler.value, steps=default_steps(sampler, steps), cfg_scale=cfg, seed=seed,
            clip=sampler is not Sampler.rf and vae is None,
        )  # fmt: skip
        codec = codec_for(model, vae, place)
        start = time.perf_counter()
        with console.status(f"sampling {len(ids)} images"):
            parts = [
                _sample_batch(model, ids[first : first + batch_size], first, settings, codec)
                for first in range(0, len(ids), batch_size)
            ]
        images = np.concatenate(parts)
        print_choices(console, choices)
        save_grid(out, images, n, scale=max(1, _SMALLEST_SHOWN // images.shape[1]))
        written = [str(out)]
        if npz is not None:
            save_npz(npz, [images], len(images), ids)
            written.append(str(npz))
        rows = ", ".join(names[label] if label < len(names) else str(label) for label in chosen)
        seconds = time.perf_counter() - start
        console.print(f"{len(images)} images in {seconds:.1f} s; rows: {rows}", highlight=False, markup=False)
        console.print(f"written: {', '.join(written)}", highlight=False, markup=False, soft_wrap=True)


def _class_ids(chosen: list[str] | None, names: tuple[str, ...], num_classes: int) -> list[int]:
    if not chosen:
        if num_classes > _ALL_CLASSES_UP_TO:
            raise ValueError(f"--class: got none, expected some of the model's {num_classes} classes")
        return list(range(num_classes))
    return [_class_id(text, names, num_classes) for text in chosen]


def _class_id(text: str, names: tuple[str, ...], num_classes: int) -> int:
    if text in names:
        return names.index(text)
    if text.isdecimal() and int(text) < num_classes:
        return int(text)
    known = f" or one of {', '.join(names)}" if names and num_classes <= _ALL_CLASSES_UP_TO else ""
    raise ValueError(f"--class: got {text!r}, expected 0 to {num_classes - 1}{known}")


def _sample_batch(
    model: DiT, ids: np.ndarray, first: int, settings: SamplingSettings, codec: LatentCodec | None
) -> np.ndarray:
    """Images number `first` and on: their noise follows from seed and number, not from the batch."""
    config, device = model.config, next(model.parameters()).device
    generators = [generator_of(first + index, settings.seed) for index in range(len(ids))]
    noise = draw_noise((len(ids), config.in_channels, config.input_size, config.input_size), generators, device=device)
    options: dict[str, Any] = {}
    if settings.sampler != "rf":
        options = {"generator": generators, "clip": settings.clip}
    class_ids = torch.from_numpy(ids).to(device)
    out = SAMPLERS[settings.sampler](model, noise, class_ids, settings.steps, settings.cfg_scale, **options)
    return to_uint8(out if codec is None else codec.decode(out))
