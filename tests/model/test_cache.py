"""Caches of latents and pixels: what they hold, broken files, interruptions, and training from them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dit_moe import DiT
from dit_moe.data import CachedDataset, build_cache, load_dataset, load_folder, to_model_range
from dit_moe.training import Trainer
from dit_moe.vae import LatentCodec

from .test_cli import TINY, fail, run
from .training_cases import CONFIG, SETTINGS


class StubAutoencoder(torch.nn.Module):
    """Latents that tell where they come from: means of 8 x 8 pixels, with a gradient to the right as third channel."""

    config = SimpleNamespace(latent_channels=4, in_channels=3)

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def encode(self, x: Tensor) -> SimpleNamespace:
        means = torch.nn.functional.avg_pool2d(x, 8)
        ramp = torch.linspace(0, 1, means.shape[3]).expand_as(means[:, :1])
        mean = torch.cat([means[:, :2], means[:, 2:] * ramp, ramp], 1)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=mean.abs() + 0.5))


CODEC = LatentCodec(StubAutoencoder(), scale=0.5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for name in ("ant", "bee"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(7):
            pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{index}.png")
    (tmp_path / "images" / "ant" / "3.png").write_bytes(b"\x89PNG nothing")
    return tmp_path / "images"


def expected_moments(pixels: Tensor) -> Tensor:
    dist = StubAutoencoder().encode(to_model_range(pixels)).latent_dist
    return torch.cat([dist.mean, dist.std], 1) * 0.5


def test_latents_of_both_sides(folder: Path, tmp_path: Path) -> None:
    states = []
    done = build_cache(folder, tmp_path / "c", 16, encode=CODEC.moments, batch_size=4, on_progress=states.append)
    assert (done.done, done.files) == (14, 14)
    assert len(done.skipped) == 1 and done.skipped[0].startswith("ant/3.png: ")
    assert [state.done for state in states] == [4, 8, 12, 14]
    data, images = CachedDataset(tmp_path / "c"), load_folder(folder, 16)
    assert (len(data), data.channels, data.image_size, data.class_names) == (13, 4, 2, ("ant", "bee"))
    indices = torch.tensor([12, 0, 5, 3])
    mirrored = torch.tensor([False, True, False, True])
    rows, class_ids = data.rows(indices, mirrored)
    pixels = images.images[indices]
    pixels = torch.where(mirrored[:, None, None, None], pixels.flip(3), pixels)
    assert torch.equal(class_ids, images.class_ids[indices])
    torch.testing.assert_close(rows.float(), expected_moments(pixels), rtol=1e-3, atol=1e-3)  # stored in fp16
    feed = data.feed(torch.device("cpu"))
    noise = torch.randn(4, 4, 2, 2)
    mean, std = expected_moments(pixels).chunk(2, 1)
    batch = feed.batch(indices, mirrored, noise)
    torch.testing.assert_close(batch.x, mean + std * noise, rtol=2e-3, atol=2e-3)
    assert feed.draws and batch.x.dtype == torch.float32


def test_pixels(folder: Path, tmp_path: Path) -> None:
    build_cache(folder, tmp_path / "c", 8, channels=1)
    data, images = load_dataset(tmp_path / "c"), load_folder(folder, 8, channels=1)
    indices, mirrored = torch.arange(13), torch.arange(13) % 2 == 0
    feeds = [source.feed(torch.device("cpu")) for source in (data, images)]
    batches = [feed.batch(indices, mirrored, None) for feed in feeds]
    assert torch.equal(batches[0].x, batches[1].x)
    assert torch.equal(batches[0].class_ids, batches[1].class_ids)
    assert not feeds[0].draws


def test_interrupted_cache_goes_on(folder: Path, tmp_path: Path) -> None:
    """Killed after a batch that was not saved yet; the rows before the last save are not encoded again."""
    build_cache(folder, tmp_path / "whole", 16, encode=CODEC.moments, batch_size=2)
    encoded = []

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        encoded.append(len(x))
        if len(encoded) == 8:  # one look at the shapes, then each batch twice
            raise KeyboardInterrupt
        return CODEC.moments(x)

    options: dict[str, Any] = {"encode": encode, "batch_size": 2, "save_every": 2}
    with pytest.raises(KeyboardInterrupt):
        build_cache(folder, tmp_path / "c", 16, **options)
    state = json.loads((tmp_path / "c" / "cache.json").read_text())
    assert (state["done"], len(state["skipped"])) == (4, 1)
    with pytest.raises(ValueError, match="a cache of 4 of 14 files"):
        CachedDataset(tmp_path / "c")
    encoded.clear()
    build_cache(folder, tmp_path / "c", 16, **{**options, "encode": CODEC.moments})
    for name in ("rows.npy", "class_ids.npy", "cache.json"):
        assert (tmp_path / "c" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    before = (tmp_path / "c" / "rows.npy").stat().st_mtime_ns
    build_cache(folder, tmp_path / "c", 16, **{**options, "encode": CODEC.moments})  # complete: nothing to do
    assert (tmp_path / "c" / "rows.npy").stat().st_mtime_ns == before


def test_cache_of_something_else_is_refused(folder: Path, tmp_path: Path) -> None:
    build_cache(folder, tmp_path / "c", 16, encode=CODEC.moments, encoder="a")
    with pytest.raises(ValueError, match="encoder was 'a', is 'b'"):
        build_cache(folder, tmp_path / "c", 16, encode=CODEC.moments, encoder="b")
    (folder / "bee" / "new.png").write_bytes((folder / "bee" / "0.png").read_bytes())
    with pytest.raises(ValueError, match="files was 14, is 15"):
        build_cache(folder, tmp_path / "c", 16, encode=CODEC.moments, encoder="a")
    with pytest.raises(ValueError, match="image_size: got 8, expected 16"):
        load_dataset(tmp_path / "c", image_size=8)
    with pytest.raises(ValueError, match="patch_size: got 4, expected a divisor of 2"):
        load_dataset(tmp_path / "c", patch_size=4)
    (tmp_path / "c" / "cache.json").write_text("{}")
    with pytest.raises(ValueError, match="not a cache of this version"):
        load_dataset(tmp_path / "c")


def test_unreadable_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "images" / "a" / "x.png").write_bytes(b"no")
    assert len(build_cache(tmp_path / "images", tmp_path / "c", 8).skipped) == 1
    with pytest.raises(ValueError, match="none of its 1 files could be read; the first: a/x.png"):
        CachedDataset(tmp_path / "c")


def test_mirrored_latents_must_be_there(folder: Path, tmp_path: Path) -> None:
    build_cache(folder, tmp_path / "c", 16, encode=CODEC.moments, flip=False)
    data = CachedDataset(tmp_path / "c")
    data.rows(torch.arange(2), torch.zeros(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="cached without"):
        data.rows(torch.arange(2), torch.ones(2, dtype=torch.bool))


def test_training_draws_latents_anew_and_repeatably(folder: Path, tmp_path: Path) -> None:
    build_cache(folder, tmp_path / "c", 16, encode=CODEC.moments)
    config = replace(CONFIG, in_channels=4, input_size=2, patch_size=1)
    settings = replace(SETTINGS, batch_size=4, flip=True, steps=6)
    seen: list[list[Tensor]] = []
    for _ in range(2):
        torch.manual_seed(0)
        trainer = Trainer(DiT(config), CachedDataset(tmp_path / "c"), settings)
        inputs: list[Tensor] = []
        trainer.model.register_forward_pre_hook(lambda module, args, inputs=inputs: inputs.append(args[0].clone()))
        trainer.run()
        seen.append(inputs)
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    # Three epochs of three steps: the same image comes back with other noise.
    assert len({tensor[0, 0, 0, 0].item() for tensor in seen[0]}) == 6


def test_commands(folder: Path, tmp_path: Path) -> None:
    text = run("cache", "--data", folder, "--out", tmp_path / "c", "--image-size", 8, "--device", "cpu")
    assert "pixels of 13 images" in text and "skipped 1 files" in text and "ant/3.png" in text
    text = run(
        "train", "--data", tmp_path / "c", "--out", tmp_path / "run", "--steps", 3, "--batch-size", 4, "--flip", *TINY
    )
    assert "13 images of 3 x 8 x 8, 2 classes" in text and "skipped 1 files" in text
    assert "expected 8 as the cache" in fail(
        "train", "--data", tmp_path / "c", "--image-size", 16, "--out", tmp_path / "x", "--steps", 1, *TINY
    )
