"""Image folders with one subfolder per class."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from .dataset import ImageDataset

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def load_folder(
    folder: str | os.PathLike, image_size: int, *, channels: int = 3, max_bytes: int = 8 * 2**30
) -> ImageDataset:
    """Read a folder's images into memory: scaled on the shorter side, then cropped in the middle to a square.

    Files that cannot be read as images are skipped and told in `ImageDataset.skipped`.

    Args:
        folder: holds one subfolder per class; classes are numbered in the order of the subfolders' names.
        image_size: height and width of the images wanted.
        channels: 3 for colour, 1 for grey.
        max_bytes: limit on the size of the decoded images.

    Raises:
        FileNotFoundError, NotADirectoryError: the folder is not there.
        ValueError: no class or no readable image, an argument out of range, or more images than max_bytes hold.
    """
    root = Path(folder)
    if channels not in (1, 3):
        raise ValueError(f"channels: got {channels}, expected 1 or 3")
    if image_size < 1:
        raise ValueError(f"image_size: got {image_size}, expected at least 1")
    files, class_names = list_images(root)
    needed = len(files) * channels * image_size**2
    if needed > max_bytes:
        raise ValueError(
            f"{root}: {len(files)} images take {needed / 2**30:.1f} GiB in memory, expected at most "
            f"{max_bytes / 2**30:.1f} GiB; choose a smaller image size"
        )
    return _read(root, files, class_names, image_size, channels)


def list_images(root: Path) -> tuple[list[tuple[Path, int]], tuple[str, ...]]:
    """The image files of a folder with their class ids, in a fixed order, and the class names.

    Raises:
        FileNotFoundError, NotADirectoryError: the folder is not there.
        ValueError: it holds no images.
    """
    if not root.exists():
        raise FileNotFoundError(f"image folder {root} is not there")
    if not root.is_dir():
        raise NotADirectoryError(f"{root} is a file, expected a folder with one subfolder per class")
    class_names = tuple(sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")))
    files = [(path, label) for label, name in enumerate(class_names) for path in _image_files(root / name)]
    if not files:
        raise ValueError(f"{root}: found no images, expected one subfolder per class with files ending in {EXTENSIONS}")
    return files, class_names


def _image_files(folder: Path) -> Iterator[Path]:
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file())
    return (path for path in found if not path.name.startswith("."))


def _read(
    root: Path, files: list[tuple[Path, int]], class_names: tuple[str, ...], image_size: int, channels: int
) -> ImageDataset:
    images = np.empty((len(files), channels, image_size, image_size), dtype=np.uint8)
    class_ids: list[int] = []
    skipped: list[str] = []
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        decoded = pool.map(lambda file: decode_image(file[0], image_size, channels), files)
        for (path, label), image in zip(files, decoded, strict=True):
            if isinstance(image, str):
                skipped.append(f"{path.relative_to(root)}: {image}")
                continue
            images[len(class_ids)] = image
            class_ids.append(label)
    if not class_ids:
        raise ValueError(f"{root}: none of its {len(files)} images can be read; the first: {skipped[0]}")
    labels = torch.tensor(class_ids, dtype=torch.int64)
    return ImageDataset(str(root), torch.from_numpy(images[: len(labels)]), labels, class_names, tuple(skipped))


def decode_image(path: Path, image_size: int, channels: int) -> np.ndarray | str:
    """(C, S, S) uint8 pixels of a file, or why it cannot be read."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            image: Image.Image = file
            # Transparent pixels show white, not whatever colour the file keeps below them.
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                layer = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
            picture = ImageOps.exif_transpose(image).convert("RGB" if channels == 3 else "L")
            square = ImageOps.fit(picture, (image_size, image_size), Image.Resampling.BICUBIC)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what Pillow raises on bad files
        return f"{type(error).__name__}: {error}"
    return np.asarray(square).reshape(image_size, image_size, channels).transpose(2, 0, 1)
