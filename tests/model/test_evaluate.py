"""Sampling for evaluation: resuming, sharing between ranks, seeding by index, merging."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dit_moe import DiT
from dit_moe.engine import SamplingEngine
from dit_moe.evaluate import (
    SamplingSettings,
    class_of,
    generator_of,
    merge_shards,
    rank_from_environment,
    sample_indices,
    sample_shards,
    weights_digest,
)
from dit_moe.images import read_npz, to_uint8
from tests.model.util import tiny_model

SETTINGS = SamplingSettings(11, steps=2, shard_size=4)


@pytest.fixture
def model() -> DiT:
    return tiny_model(in_channels=1)


def merged(
    folder: Path, model: DiT | SamplingEngine, settings: SamplingSettings = SETTINGS, **options: Any
) -> np.ndarray:
    sample_shards(model, folder, settings, **options)
    path = folder.with_suffix(".npz")
    assert merge_shards(folder, path) == settings.num_images
    with np.load(path) as file:
        return file["arr_0"]


def test_images_are_those_of_their_indices(tmp_path: Path, model: DiT) -> None:
    images = merged(tmp_path / "a", model)
    assert images.shape == (11, 8, 8, 3) and images.dtype == np.uint8
    for index in (0, 5, 10):
        alone = to_uint8(sample_indices(model, range(index, index + 1), SETTINGS))
        assert np.abs(images[index].astype(int) - alone[0]).max() <= 1  # another batch may round another way
    assert len({image.tobytes() for image in images}) == 11
    with np.load(tmp_path / "a.npz") as file:
        np.testing.assert_array_equal(file["arr_1"], np.arange(11) % 10)


@pytest.mark.parametrize("sampler", ["rf", "ddpm", "ddim"])
def test_ranks_and_batches_do_not_change_an_image(tmp_path: Path, sampler: str) -> None:
    model = tiny_model(in_channels=1).double()  # in float64, rounding does not reach the 8 bits
    eta = 0.5 if sampler == "ddim" else 0.0
    settings = SamplingSettings(10, sampler, 2, shard_size=3, eta=eta, classes="random", seed=7)
    one = merged(tmp_path / "one", model, settings)
    for rank in (2, 0, 1):
        sample_shards(model, tmp_path / "three", settings, rank=rank, world_size=3, batch_size=2)
    merge_shards(tmp_path / "three", tmp_path / "three.npz")
    assert (tmp_path / "three.npz").read_bytes() == (tmp_path / "one.npz").read_bytes()
    other = merged(tmp_path / "other", model, SamplingSettings(10, sampler, 2, shard_size=10, eta=eta, seed=8))
    assert not np.array_equal(other, one)


def test_shards_cover_every_index_once() -> None:
    for count, size in ((11, 4), (8, 4), (3, 4), (1, 1)):
        shards = SamplingSettings(count, shard_size=size).shards()
        assert [index for shard in shards for index in shard] == list(range(count))
        assert max(map(len, shards)) <= size


def test_a_stopped_run_goes_on(tmp_path: Path, model: DiT) -> None:
    class Stop(Exception):
        pass

    def stop_after_5(done: int, total: int) -> None:
        assert total == 11
        if done >= 5:
            raise Stop

    with pytest.raises(Stop):
        sample_shards(model, tmp_path / "a", SETTINGS, batch_size=1, on_progress=stop_after_5)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "settings.json",
        "shard-0000000-0000004.npz",
    ]
    first = (tmp_path / "a" / "shard-0000000-0000004.npz").stat().st_mtime_ns
    with pytest.raises(FileNotFoundError, match="7 of 11 images are not sampled yet, the first in shard-0000004"):
        merge_shards(tmp_path / "a", tmp_path / "a.npz")
    assert not (tmp_path / "a.npz").exists()
    progress: list[tuple[int, int]] = []
    sample_shards(model, tmp_path / "a", SETTINGS, batch_size=3, on_progress=lambda *args: progress.append(args))
    assert progress == [(3, 7), (4, 7), (7, 7)]
    assert (tmp_path / "a" / "shard-0000000-0000004.npz").stat().st_mtime_ns == first
    assert merge_shards(tmp_path / "a", tmp_path / "a.npz") == 11
    sample_shards(model, tmp_path / "a", SETTINGS, on_progress=lambda done, total: pytest.fail("nothing was to do"))


def test_a_folder_of_other_settings_is_refused(tmp_path: Path, model: DiT) -> None:
    sample_shards(model, tmp_path, SETTINGS, decoder="vae-a")
    with pytest.raises(ValueError, match="sampling.cfg_scale: 1.5 there, 2.0 now"):
        sample_shards(model, tmp_path, SamplingSettings(11, steps=2, shard_size=4, cfg_scale=2.0), decoder="vae-a")
    with pytest.raises(ValueError, match="decoder: vae-a there, none now"):
        sample_shards(model, tmp_path, SETTINGS)
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight.mul_(1.001)
    with pytest.raises(ValueError, match="weights: "):
        sample_shards(model, tmp_path, SETTINGS, decoder="vae-a")


def test_a_folder_of_an_older_release_goes_on(tmp_path: Path, model: DiT) -> None:
    sample_shards(model, tmp_path, SETTINGS)
    record = json.loads((tmp_path / "settings.json").read_text())
    for name in ("guidance_interval", "cfg_schedule"):
        del record["sampling"][name]
    (tmp_path / "settings.json").write_text(json.dumps(record))
    (tmp_path / "shard-0000004-0000008.npz").unlink()
    sample_shards(model, tmp_path, SETTINGS)
    assert merge_shards(tmp_path, tmp_path / "a.npz") == 11
    with pytest.raises(ValueError, match="sampling.cfg_schedule: 'constant' there, 'cosine' now"):
        sample_shards(model, tmp_path, replace(SETTINGS, cfg_schedule="cosine"))


def test_the_engine_gives_the_same_images(tmp_path: Path, model: DiT) -> None:
    settings = replace(SETTINGS, sampler="ddpm", guidance_interval=(0.1, 0.9), cfg_schedule="linear")
    engine = SamplingEngine(model, capture=False, precompute=False)
    images = merged(tmp_path / "engine", engine, settings)
    assert engine.mode == "static buffers"
    np.testing.assert_array_equal(images, merged(tmp_path / "stepwise", model, settings))


def test_decoder_makes_the_pixels(tmp_path: Path, model: DiT) -> None:
    def decode(latents: torch.Tensor) -> torch.Tensor:
        return latents.sign().repeat_interleave(2, 2).repeat_interleave(2, 3).expand(-1, 3, -1, -1)

    images = merged(tmp_path / "a", model, decode=decode)
    assert images.shape == (11, 16, 16, 3) and set(np.unique(images)) == {0, 255}


def test_nan_images_stop_the_run(tmp_path: Path, model: DiT) -> None:
    with torch.no_grad():
        model.final_layer.linear.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="4 of 4 images hold NaN"):
        sample_shards(model, tmp_path, SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]


def test_classes() -> None:
    balanced, drawn = SamplingSettings(1000), SamplingSettings(1000, classes="random")
    assert np.bincount([class_of(index, balanced, 10) for index in range(1000)]).tolist() == [100] * 10
    counts = np.bincount([class_of(index, drawn, 10) for index in range(5000)], minlength=10)
    assert len(counts) == 10 and counts.min() > 400 and counts.max() < 600
    other = SamplingSettings(1000, classes="random", seed=1)
    assert any(class_of(i, drawn, 10) != class_of(i, other, 10) for i in range(20))


def test_generators_differ_by_index_and_seed() -> None:
    draws = {
        torch.randn(4, generator=generator_of(index, seed)).numpy().tobytes() for index in range(50) for seed in (0, 1)
    }
    assert len(draws) == 100
    assert torch.equal(torch.randn(4, generator=generator_of(3, 5)), torch.randn(4, generator=generator_of(3, 5)))
    many = torch.cat([torch.randn(64, generator=generator_of(index, 0)) for index in range(500)])
    assert abs(many.mean().item()) < 0.02 and abs(many.std().item() - 1) < 0.02


def test_digest_sees_values_dtype_and_shape(model: DiT) -> None:
    first = weights_digest(model)
    assert first == weights_digest(model)
    assert first != weights_digest(model.half())


def test_rank_from_environment() -> None:
    assert rank_from_environment({"RANK": "3", "WORLD_SIZE": "8"}) == (3, 8)
    assert rank_from_environment({}) == (0, 1)


def test_a_shard_of_the_wrong_length_is_named(tmp_path: Path, model: DiT) -> None:
    sample_shards(model, tmp_path, SETTINGS)
    np.savez(tmp_path / "shard-0000004-0000008.npz", images=np.zeros((3, 8, 8, 1), np.uint8), class_ids=np.zeros(4))
    with pytest.raises(ValueError, match="shard-0000004-0000008.npz: got 3 images, expected 4"):
        merge_shards(tmp_path, tmp_path / "a.npz")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_images": 0}, "num_images: got 0"),
        ({"shard_size": 0}, "shard_size: got 0"),
        ({"seed": -1}, "seed: got -1"),
        ({"sampler": "euler"}, "sampler: got 'euler'"),
        ({"classes": "all"}, "classes: got 'all'"),
        ({"eta": 0.5}, "eta: got 0.5 with sampler 'rf'"),
        ({"clip": True}, "belong to 'ddpm' and 'ddim'"),
        ({"steps": "ddim10"}, "belong to 'ddpm' and 'ddim'"),
        ({"guidance_interval": (0.9, 0.1)}, "guidance_interval: got (0.9, 0.1)"),
        ({"cfg_schedule": "square"}, "cfg_schedule: got 'square'"),
    ],
)
def test_settings_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        SamplingSettings(**{"num_images": 4, **change})


def test_errors(tmp_path: Path, model: DiT) -> None:
    with pytest.raises(ValueError, match="batch_size: got 0"):
        sample_shards(model, tmp_path, SETTINGS, batch_size=0)
    with pytest.raises(ValueError, match="rank: got 2 of world_size 2"):
        sample_shards(model, tmp_path, SETTINGS, rank=2, world_size=2)
    with pytest.raises(FileNotFoundError, match="settings.json: not there"):
        merge_shards(tmp_path, tmp_path / "a.npz")


def test_npz_is_read_in_batches(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (7, 4, 5, 3), dtype=np.uint8)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", images, np.arange(7))
        batches = list(read_npz(tmp_path / "a.npz", 3))
        assert [len(batch) for batch in batches] == [3, 3, 1]
        np.testing.assert_array_equal(np.concatenate(batches), images)
    for arrays, message in (
        ({"mu": images}, "expected images as arr_0"),
        ({"arr_0": images.astype(np.float32)}, "arr_0 has dtype float32"),
        ({"arr_0": images[..., :1]}, "expected uint8 \\(N, H, W, 3\\)"),
    ):
        np.savez(tmp_path / "b.npz", **arrays)
        with pytest.raises(ValueError, match=message):
            list(read_npz(tmp_path / "b.npz"))
    (tmp_path / "c.npz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="not an .npz file"):
        list(read_npz(tmp_path / "c.npz"))
