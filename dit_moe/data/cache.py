"""Caches: an image folder's pixels or latents, computed once, in memory-mapped arrays that training reads from.

cache.json      what was cached and how, how many files are done, which could not be read
rows.npy        latents (N, flips, 2 C, S, S) fp16, mean and standard deviation; or pixels (N, 1, C, S, S) uint8
class_ids.npy   (N,) int64; -1 where the file could not be read
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoint.files import written_aside
from .dataset import to_model_range
from .folders import decode_image, list_images

CACHE_FILE, ROWS_FILE, CLASSES_FILE = "cache.json", "rows.npy", "class_ids.npy"
_FORMAT = 1
Encoder = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class CacheInfo:
    """What a cache holds.

    Args:
        kind: "latents" or "pixels".
        image_size: of the pixels.
        size, channels: of what the model sees.
        flips: 2 where every row has a mirrored twin, 1 where mirroring is left to the reader (pixels) or absent.
        encoder: name of the autoencoder; empty for pixels.
        files: number of rows.
        digest: of the files' names and sizes.
        class_names: name of each class.
    """

    kind: str
    image_size: int
    size: int
    channels: int
    flips: int
    encoder: str
    files: int
    digest: str
    class_names: tuple[str, ...]

    @property
    def row_shape(self) -> tuple[int, int, int, int]:
        """Shape of a row."""
        stored = 2 * self.channels if self.kind == "latents" else self.channels
        return (self.flips, stored, self.size, self.size)


@dataclass(frozen=True)
class CacheProgress:
    """How far a cache is: files done of all, and why some could not be read."""

    done: int
    files: int
    skipped: tuple[str, ...]


def build_cache(
    folder: str | os.PathLike,
    out: str | os.PathLike,
    image_size: int,
    *,
    encode: Encoder | None = None,
    encoder: str = "",
    flip: bool = True,
    channels: int = 3,
    batch_size: int = 32,
    save_every: int = 50,
    on_progress: Callable[[CacheProgress], object] | None = None,
) -> CacheProgress:
    """Fill a cache from an image folder, or go on where an interrupted call of the same kind stopped.

    Files that cannot be read as images are skipped and told. A kill at any moment loses the batches since the last
    save, which are done again.

    Args:
        folder: one subfolder per class, as in `load_folder`.
        out: the cache's folder.
        image_size: images are scaled on the shorter side and cropped to this square.
        encode: pixels (B, 3, H, W) fp32 in -1 to 1 -> mean and standard deviation of their latents, each
            (B, C, h, w); None caches the pixels.
        encoder: the autoencoder's name, which must be the same when a call goes on.
        flip: cache the latents of mirrored images too; pixels are mirrored when they are read.
        channels: 3 for colour, 1 for grey pixels.
        batch_size: files read and encoded at once.
        save_every: batches between saves of the progress.
        on_progress: called after each batch.

    Raises:
        FileNotFoundError, NotADirectoryError: the folder is not there.
        ValueError: no images, an argument out of range, or a cache of something else in `out`.
    """
    for name, value in (("image_size", image_size), ("batch_size", batch_size), ("save_every", save_every)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    root, place = Path(folder), Path(out)
    files, class_names = list_images(root)
    place.mkdir(parents=True, exist_ok=True)
    size, depth = image_size, channels
    if encode is not None:
        mean, _ = encode(torch.zeros(1, 3, image_size, image_size))
        depth, size = mean.shape[1], mean.shape[2]
    info = CacheInfo(
        kind="pixels" if encode is None else "latents", image_size=image_size, size=size, channels=depth,
        flips=2 if flip and encode is not None else 1, encoder=encoder, files=len(files),
        digest=_digest(root, files), class_names=class_names,
    )  # fmt: skip
    rows, class_ids, done, skipped = _open(place, info)
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:

        def read(start: int) -> list[Future]:
            batch = files[start : start + batch_size]
            return [
                pool.submit(decode_image, path, image_size, 3 if encode is not None else channels) for path, _ in batch
            ]

        coming = read(done)
        for number, start in enumerate(range(done, len(files), batch_size), start=1):
            decoded, coming = [future.result() for future in coming], read(start + batch_size)
            good = [index for index, image in enumerate(decoded) if not isinstance(image, str)]
            for index, image in enumerate(decoded):
                path, label = files[start + index]
                class_ids[start + index] = -1 if isinstance(image, str) else label
                if isinstance(image, str):
                    skipped.append(f"{path.relative_to(root)}: {image}")
            if good:
                pixels = torch.from_numpy(np.stack([decoded[index] for index in good]))
                rows[[start + index for index in good]] = _rows(pixels, info, encode)
            done = start + len(decoded)
            if number % save_every == 0 or done == len(files):
                rows.flush()
                class_ids.flush()
                _save(place, info, done, skipped)
            if on_progress is not None:
                on_progress(CacheProgress(done, len(files), tuple(skipped)))
    return CacheProgress(done, len(files), tuple(skipped))


def read_info(place: Path) -> tuple[CacheInfo, CacheProgress]:
    """What a cache holds, and how far it is.

    Raises:
        FileNotFoundError: there is no cache.
        ValueError: its cache.json is damaged or of another version.
    """
    path = place / CACHE_FILE
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format") != _FORMAT:
            raise ValueError(f"another format than {_FORMAT}")
        done, skipped = content.pop("done"), tuple(content.pop("skipped"))
        info = CacheInfo(**{**content, "class_names": tuple(content["class_names"])})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a cache of this version, or damaged: {type(error).__name__}: {error}") from error
    return info, CacheProgress(done, info.files, skipped)


def _rows(pixels: Tensor, info: CacheInfo, encode: Encoder | None) -> np.ndarray:
    """(n, *row_shape) for the bytes (n, C, H, W) of images."""
    if encode is None:
        return pixels[:, None].numpy()
    x = to_model_range(pixels)
    sides = [encode(x), encode(x.flip(3))] if info.flips == 2 else [encode(x)]
    latents = torch.stack([torch.cat(side, dim=1) for side in sides], dim=1)
    return latents.to("cpu", torch.float16).numpy()


def _open(place: Path, info: CacheInfo) -> tuple[np.memmap, np.memmap, int, list[str]]:
    """The arrays, new or of an interrupted call, with the number of rows done."""
    shapes = {ROWS_FILE: (info.files, *info.row_shape), CLASSES_FILE: (info.files,)}
    if not (place / CACHE_FILE).is_file():
        dtypes = {ROWS_FILE: np.float16 if info.kind == "latents" else np.uint8, CLASSES_FILE: np.int64}
        made = {
            name: np.lib.format.open_memmap(place / name, "w+", dtypes[name], shape) for name, shape in shapes.items()
        }
        _save(place, info, 0, [])
        return made[ROWS_FILE], made[CLASSES_FILE], 0, []
    found, progress = read_info(place)
    wanted = asdict(info)
    changed = [
        f"{name} was {value!r}, is {wanted[name]!r}"
        for name, value in asdict(found).items()
        if value != wanted[name] and name != "class_names"
    ]
    if changed:
        raise ValueError(f"{place} holds a cache of something else: {'; '.join(changed)}")
    rows, class_ids = (np.lib.format.open_memmap(place / name, "r+") for name in shapes)
    return rows, class_ids, progress.done, list(progress.skipped)


def _save(place: Path, info: CacheInfo, done: int, skipped: list[str]) -> None:
    content = {"format": _FORMAT, **asdict(info), "done": done, "skipped": skipped}
    with written_aside(place / CACHE_FILE) as aside:
        aside.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _digest(root: Path, files: list[tuple[Path, int]]) -> str:
    """Of names and sizes: enough to notice another folder, and quick for a million files."""
    digest = hashlib.sha256()
    for path, _ in files:
        digest.update(f"{path.relative_to(root)}\0{path.stat().st_size}\n".encode())
    return digest.hexdigest()[:32]
