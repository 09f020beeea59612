"""Model output as pictures: 8-bit pixels, grids as PNG, and batches in ADM's .npz format."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Iterable, Iterator
from typing import IO

import numpy as np
import torch
from torch import Tensor

from .checkpoint.files import written_aside


def to_uint8(pixels: Tensor) -> np.ndarray:
    """Pixels of a model as 8-bit images: -1 is 0, 1 is 255, values outside are clipped.

    Args:
        pixels: (B, C, H, W) float on any device.
    Returns:
        (B, H, W, C) uint8.
    Raises:
        ValueError: not four dimensions, or values that are not finite.
        TypeError: not a floating-point dtype.
    """
    if pixels.ndim != 4:
        raise ValueError(f"pixels: got shape {tuple(pixels.shape)}, expected (B, C, H, W)")
    if not pixels.is_floating_point():
        raise TypeError(f"pixels: got dtype {pixels.dtype}, expected a floating-point dtype")
    pixels = pixels.detach().float()
    broken = int((~pixels.isfinite()).flatten(1).any(1).sum()) if pixels.numel() else 0
    if broken:
        raise ValueError(
            f"pixels: {broken} of {pixels.shape[0]} images hold NaN or infinite values; was the model trained for this "
            "sampler (rectified flow or DDPM), and is its dtype wide enough?"
        )
    # Adding 128, not 127.5, makes the cut to an integer round to the nearest.
    return (pixels * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def make_grid(
    images: np.ndarray, columns: int | None = None, *, padding: int = 2, background: int = 255, scale: int = 1
) -> np.ndarray:
    """Images side by side, row by row.

    Args:
        images: (B, H, W, C) uint8 with 1 or 3 channels, B >= 1.
        columns: images in a row; None makes the grid about square.
        padding: pixels between images and around them.
        background: value of the padding, 0 to 255, and of cells without an image.
        scale: each pixel becomes a square of this side, so that tiny images can be seen.
    Returns:
        (height, width, C) uint8.
    Raises:
        ValueError, TypeError: an argument out of range or of the wrong shape or dtype.
    """
    _check_images(images)
    count, height, width, channels = images.shape
    if count < 1:
        raise ValueError("images: got none, expected at least one")
    columns = math.ceil(math.sqrt(count)) if columns is None else columns
    for name, value, least in (("columns", columns, 1), ("padding", padding, 0), ("scale", scale, 1)):
        if value < least:
            raise ValueError(f"{name}: got {value}, expected at least {least}")
    if not 0 <= background <= 255:
        raise ValueError(f"background: got {background}, expected 0 to 255")
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    height, width = height * scale + padding, width * scale + padding
    rows = math.ceil(count / columns)
    grid = np.full((rows * height + padding, columns * width + padding, channels), background, dtype=np.uint8)
    for index, image in enumerate(images):
        top, left = padding + index // columns * height, padding + index % columns * width
        grid[top : top + height - padding, left : left + width - padding] = image
    return grid


def save_png(path: str | os.PathLike, image: np.ndarray) -> None:
    """Write one image as PNG; the file appears only when it is whole.

    Args:
        path: the file to write; its folder must exist.
        image: (H, W, C) uint8, C = 1 (grey) or 3 (RGB).
    Raises:
        ValueError, TypeError: an image of the wrong shape or dtype.
        ImportError: pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("writing PNG files needs the package pillow: pip install pillow") from error
    _check_images(image[None])
    with written_aside(path) as aside:
        Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(aside, format="PNG")


def save_grid(path: str | os.PathLike, images: np.ndarray, columns: int | None = None, *, scale: int = 1) -> None:
    """Write images (B, H, W, C) uint8 as one PNG grid; arguments and errors as in make_grid and save_png."""
    save_png(path, make_grid(images, columns, scale=scale))


def save_npz(
    path: str | os.PathLike, batches: Iterable[np.ndarray], count: int, class_ids: np.ndarray | None = None
) -> None:
    """Write images in the format that ADM's evaluation reads, one batch in memory at a time.

    The file holds `arr_0`, (count, H, W, 3) uint8 (grey images are written thrice), and with class ids `arr_1`,
    (count,) int64. It is written beside `path` and renamed when whole.

    Args:
        path: the file to write; its folder must exist.
        batches: arrays (n, H, W, C) uint8 of one size, C = 1 or 3.
        count: number of images in all batches together, at least 1.
        class_ids: (count,) int.
    Raises:
        ValueError, TypeError: arrays of the wrong shape or dtype, or another number of images than `count`.
    """
    if count < 1:
        raise ValueError(f"count: got {count}, expected at least 1")
    if class_ids is not None and class_ids.shape != (count,):
        raise ValueError(f"class_ids: got shape {class_ids.shape}, expected ({count},)")
    with written_aside(path) as aside, zipfile.ZipFile(aside, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            _write_images(file, batches, count)
        if class_ids is not None:
            with archive.open("arr_1.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, class_ids.astype(np.int64), allow_pickle=False)


def read_npz(path: str | os.PathLike, batch_size: int = 256) -> Iterator[np.ndarray]:
    """The images of a file in ADM's format, one batch in memory at a time.

    Args:
        path: an .npz file with `arr_0`, (N, H, W, 3) uint8.
        batch_size: images in each batch but perhaps the last, at least 1.
    Yields:
        (n, H, W, 3) uint8.
    Raises:
        ValueError: not such a file, or a shorter one than its header says.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, expected at least 1")
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: not an .npz file") from error
    with archive:
        if "arr_0.npy" not in archive.namelist():
            raise ValueError(f"{path}: got arrays {sorted(archive.namelist())}, expected images as arr_0")
        with archive.open("arr_0.npy") as file:
            count, *size = _read_header(file, path)
            for start in range(0, count, batch_size):
                shape = (min(batch_size, count - start), *size)
                data = file.read(math.prod(shape))
                if len(data) != math.prod(shape):
                    raise ValueError(f"{path}: ends after fewer than its {count} images")
                yield np.frombuffer(data, dtype=np.uint8).reshape(shape)


def _read_header(file: IO[bytes], path: str | os.PathLike) -> tuple[int, ...]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read(file)
    if dtype != np.uint8 or fortran_order or len(shape) != 4 or shape[3] != 3:
        raise ValueError(f"{path}: arr_0 has dtype {dtype} and shape {shape}, expected uint8 (N, H, W, 3)")
    return shape


def _write_images(file: IO[bytes], batches: Iterable[np.ndarray], count: int) -> None:
    size: tuple[int, int] | None = None
    written = 0
    for batch in batches:
        _check_images(batch)
        if size is None:
            size = batch.shape[1:3]
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, *size, 3)}
            np.lib.format.write_array_header_1_0(file, header)
        if batch.shape[1:3] != size:
            raise ValueError(f"batches: got images of {batch.shape[1:3]}, expected {size} as the first")
        written += batch.shape[0]
        rgb = batch if batch.shape[3] == 3 else batch.repeat(3, axis=3)
        file.write(np.ascontiguousarray(rgb).tobytes())
    if written != count:
        raise ValueError(f"batches: got {written} images, expected count = {count}")


def _check_images(images: np.ndarray) -> None:
    if images.dtype != np.uint8:
        raise TypeError(f"images: got dtype {images.dtype}, expected uint8")
    if images.ndim != 4 or images.shape[3] not in (1, 3):
        raise ValueError(f"images: got shape {images.shape}, expected (B, H, W, 1) or (B, H, W, 3)")
