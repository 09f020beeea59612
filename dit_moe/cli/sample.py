"""`dit-moe sample`: pictures from a checkpoint."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console

from ..engine import SamplingEngine
from ..evaluate import SamplingSettings, generator_of, sample_batch
from ..images import save_grid, save_npz, to_uint8
from ..runs import class_names_beside
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
)
from .sampling_options import (
    BatchSizeOption,
    CfgOption,
    CfgSchedule,
    CompileOption,
    GraphsOption,
    IntervalOption,
    SamplerOption,
    ScheduleOption,
    SeedOption,
    WeightsDtypeOption,
    load_engine,
    print_mode,
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
    sampler: SamplerOption = Sampler.rf,
    steps: StepsOption = None,
    cfg: CfgOption = 4.0,
    cfg_interval: IntervalOption = (0.0, 1.0),
    cfg_schedule: ScheduleOption = CfgSchedule.constant,
    vae: VaeOption = None,
    seed: SeedOption = 0,
    batch_size: BatchSizeOption = 64,
    dtype: WeightsDtypeOption = Precision.fp32,
    device: DeviceOption = "auto",
    backend: BackendOption = Backend.auto,
    graphs: GraphsOption = True,
    compile: CompileOption = False,
    num_heads: HeadsOption = None,
) -> None:
    """Sample images of given classes from a native or official checkpoint."""
    console = Console()
    with reported_errors(), chosen_backend(backend) as choices:
        for target in (out, npz):
            if target is not None and not target.parent.is_dir():
                raise ValueError(f"{target.parent} is no folder")
        engine = load_engine(ckpt, num_heads, device, dtype, graphs, compile)
        names = class_names_beside(ckpt)
        chosen = _class_ids(classes, names, engine.config.num_classes)
        ids = np.repeat(np.array(chosen, dtype=np.int64), n)
        settings = SamplingSettings(
            num_images=len(ids), sampler=sampler.value, steps=default_steps(sampler, steps), cfg_scale=cfg, seed=seed,
            guidance_interval=cfg_interval, cfg_schedule=cfg_schedule.value,
            clip=sampler is not Sampler.rf and vae is None,
        )  # fmt: skip
        codec = codec_for(engine.model, vae, engine.device)
        start = time.perf_counter()
        with console.status(f"sampling {len(ids)} images"):
            parts = [
                _sample_batch(engine, ids[first : first + batch_size], first, settings, codec)
                for first in range(0, len(ids), batch_size)
            ]
        images = np.concatenate(parts)
        print_choices(console, choices)
        print_mode(console, engine)
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
    engine: SamplingEngine, ids: np.ndarray, first: int, settings: SamplingSettings, codec: LatentCodec | None
) -> np.ndarray:
    """Images number `first` and on: their noise follows from seed and number, not from the batch."""
    generators = [generator_of(first + index, settings.seed) for index in range(len(ids))]
    out = sample_batch(engine, torch.from_numpy(ids), generators, settings)
    return to_uint8(out if codec is None else codec.decode(out))
