"""load_dataset: a data set by name or path, at a size that the model's patches divide."""

from __future__ import annotations

import os
from pathlib import Path

from .bundled import BUNDLED, load_bundled
from .cached import CachedDataset, is_cache
from .dataset import ImageDataset
from .folders import load_folder


def load_dataset(
    source: str | os.PathLike, *, image_size: int | None = None, patch_size: int = 1, channels: int | None = None
) -> ImageDataset | CachedDataset:
    """Load bundled images by name, a folder's by path, or open a cache that `dit-moe cache` made.

    Args:
        source: "mnist", "digits", "emoji", a folder with one subfolder per class (also as "./mnist" and the like), or
            a cache's folder.
        image_size: height and width wanted; None keeps the bundled images' own. Folders need one; a cache has its own.
        patch_size: images are padded at their borders to a multiple of it; a cache's must be one.
        channels: 1 or 3 for a folder's images; None means 3. Bundled images and caches keep their own.

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: not there, or not as described.
        DataUnavailableError: the package with the images is not installed.
    """
    if patch_size < 1:
        raise ValueError(f"patch_size: got {patch_size}, expected at least 1")
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size: got {image_size}, expected at least 1")
    if str(source) not in BUNDLED and is_cache(source):
        return _open_cache(source, image_size, patch_size, channels)
    if str(source) in BUNDLED:
        data = load_bundled(str(source))
        if channels not in (None, data.channels):
            raise ValueError(f"channels: got {channels}, expected {data.channels} as {data.name} has")
        data = data if image_size is None else data.resized(image_size)
    elif not Path(source).exists():
        raise FileNotFoundError(f"data: got {str(source)!r}, expected one of {sorted(BUNDLED)} or a folder that exists")
    elif image_size is None:
        raise ValueError("image_size: got none, expected one for the images of a folder")
    else:
        data = load_folder(source, image_size, channels=3 if channels is None else channels)
    return data.padded_to_multiple(patch_size)


def _open_cache(
    source: str | os.PathLike, image_size: int | None, patch_size: int, channels: int | None
) -> CachedDataset:
    cache = CachedDataset(source)
    for name, wanted, held in (
        ("image_size", image_size, cache.info.image_size),
        ("channels", channels, cache.channels),
    ):
        if wanted not in (None, held):
            raise ValueError(f"{name}: got {wanted}, expected {held} as the cache {source} has")
    if cache.image_size % patch_size:
        raise ValueError(f"patch_size: got {patch_size}, expected a divisor of {cache.image_size}, the cache's size")
    return cache
