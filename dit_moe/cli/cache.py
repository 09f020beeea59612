"""`dit-moe cache`: an image folder's latents or pixels, computed once for training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..data.cache import CacheProgress, build_cache
from ..vae import load_codec
from .common import DeviceOption, Precision, VaeOption, reported_errors, resolve_device

_SKIPPED_SHOWN = 5


def cache(
    data: Annotated[Path, typer.Option(help="Folder with one subfolder of images per class.")],
    out: Annotated[Path, typer.Option(help="Folder of the cache; give the same one again to go on.")],
    image_size: Annotated[int, typer.Option(min=1, help="Scale and crop images to this size.")],
    vae: VaeOption = None,
    flip: Annotated[bool, typer.Option(help="Cache mirrored images' latents too.")] = True,
    grey: Annotated[bool, typer.Option("--grey", help="Grey pixels; not for latents.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Images encoded at once.")] = 32,
    dtype: Annotated[Precision, typer.Option(help="Arithmetic of the autoencoder.")] = Precision.fp32,
    device: DeviceOption = "auto",
) -> None:
    """Cache a folder's latents (with --vae) or pixels in memory-mapped arrays, which `dit-moe train --data` reads.

    A command that was interrupted goes on where it was. Files that cannot be read are skipped, counted and named.
    """
    console = Console()
    with reported_errors():
        target = resolve_device(device)
        if grey and vae is not None:
            raise ValueError("grey: got it together with a VAE, which takes colour")
        codec = None if vae is None else load_codec(vae, target, dtype.torch_dtype)

        def encode(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            assert codec is not None
            return codec.moments(pixels.to(target), batch_size)

        with _progress(console) as progress:
            task = progress.add_task("caching", total=None, skipped=0)

            def show(state: CacheProgress) -> None:
                progress.update(task, completed=state.done, total=state.files, skipped=len(state.skipped))

            done = build_cache(
                data, out, image_size, encode=None if codec is None else encode,
                encoder="" if vae is None else vae.name,
                flip=flip, channels=1 if grey else 3, batch_size=batch_size, on_progress=show,
            )  # fmt: skip
    what = "pixels" if vae is None else "latents"
    console.print(f"{what} of {done.files - len(done.skipped):,} images: {out}", highlight=False, soft_wrap=True)
    if done.skipped:
        console.print(f"skipped {len(done.skipped)} files that cannot be read as images:", style="yellow")
        for line in done.skipped[:_SKIPPED_SHOWN]:
            console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("skipped {task.fields[skipped]}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
