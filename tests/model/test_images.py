"""8-bit conversion, grids, PNG and .npz files read back, and the autoencoder's scaling with a stand-in."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dit_moe.images import make_grid, save_grid, save_npz, save_png, to_uint8
from dit_moe.vae import LATENT_SCALE, LatentCodec, load_codec


def random_images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_to_uint8_rounds_and_clips(dtype: torch.dtype) -> None:
    values = np.concatenate([np.linspace(-1.21, 1.23, 97), [-1.0, 0.0, 1.0, -50.0, 50.0]])
    pixels = torch.tensor(values, dtype=dtype).view(1, 2, 3, 17)
    expected = np.clip(np.floor((values + 1) / 2 * 255 + 0.5), 0, 255).reshape(1, 2, 3, 17).transpose(0, 2, 3, 1)
    result = to_uint8(pixels)
    assert result.dtype == np.uint8 and result.shape == (1, 3, 17, 2)
    np.testing.assert_array_equal(result, expected)


def test_to_uint8_inverts_the_usual_scaling_of_every_value() -> None:
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    np.testing.assert_array_equal(to_uint8(pixels), images)


def test_to_uint8_names_broken_images() -> None:
    pixels = torch.zeros(3, 1, 2, 2)
    pixels[1, 0, 0, 0], pixels[2, 0, 1, 1] = float("nan"), float("inf")
    with pytest.raises(ValueError, match="2 of 3 images hold NaN"):
        to_uint8(pixels)
    with pytest.raises(ValueError, match="pixels: got shape"):
        to_uint8(pixels[0])
    with pytest.raises(TypeError, match="pixels: got dtype torch.int64"):
        to_uint8(torch.zeros(1, 1, 2, 2, dtype=torch.long))


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_places_each_image(channels: int) -> None:
    images = random_images(5, 4, 6, channels)
    grid = make_grid(images, 3, padding=2, background=7)
    assert grid.shape == (2 * 6 + 2, 3 * 8 + 2, channels)
    for index, image in enumerate(images):
        top, left = 2 + index // 3 * 6, 2 + index % 3 * 8
        np.testing.assert_array_equal(grid[top : top + 4, left : left + 6], image)
        grid[top : top + 4, left : left + 6] = 7
    assert (grid == 7).all()


def test_grid_scale_and_default_columns() -> None:
    images = random_images(7, 2, 2, 1)
    assert make_grid(images, padding=0).shape == (6, 6, 1)
    large = make_grid(images, 7, padding=0, scale=3)
    assert large.shape == (6, 42, 1)
    np.testing.assert_array_equal(large[::3, ::3], make_grid(images, 7, padding=0))
    np.testing.assert_array_equal(large[2::3, 2::3], make_grid(images, 7, padding=0))


@pytest.mark.parametrize("channels", [1, 3])
def test_png_reads_back(tmp_path: Path, channels: int) -> None:
    images = random_images(4, 5, 7, channels)
    save_png(tmp_path / "one.png", images[0])
    save_grid(tmp_path / "grid.png", images, 2, scale=2)
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "grid.png") as grid:
        assert one.format == "PNG" and one.mode == ("L" if channels == 1 else "RGB")
        np.testing.assert_array_equal(np.asarray(one).reshape(5, 7, channels), images[0])
        np.testing.assert_array_equal(np.asarray(grid).reshape(26, 34, channels), make_grid(images, 2, scale=2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.png", "one.png"]


def test_npz_is_what_numpy_reads(tmp_path: Path) -> None:
    images = random_images(7, 4, 6, 3)
    save_npz(tmp_path / "a.npz", (images[i : i + 3] for i in range(0, 7, 3)), 7, np.arange(7))
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        assert sorted(file.files) == ["arr_0", "arr_1"]
        np.testing.assert_array_equal(file["arr_0"], images)
        np.testing.assert_array_equal(file["arr_1"], np.arange(7))
    save_npz(tmp_path / "grey.npz", [images[..., :1]], 7)
    with np.load(tmp_path / "grey.npz", allow_pickle=False) as file:
        assert file.files == ["arr_0"]
        np.testing.assert_array_equal(file["arr_0"], images[..., :1].repeat(3, axis=3))


def test_failed_npz_leaves_the_old_file(tmp_path: Path) -> None:
    images = random_images(4, 4, 4, 3)
    save_npz(tmp_path / "a.npz", [images], 4)
    before = (tmp_path / "a.npz").read_bytes()
    for batches, count, message in (
        ([images], 5, "got 4 images, expected count = 5"),
        ([], 4, "got 0 images"),
        ([images[:2], random_images(2, 5, 4, 3)], 4, "expected \\(4, 4\\) as the first"),
    ):
        with pytest.raises(ValueError, match=message):
            save_npz(tmp_path / "a.npz", batches, count)
    assert (tmp_path / "a.npz").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda path: make_grid(random_images(0, 2, 2, 3)), ValueError, "images: got none"),
        (lambda path: make_grid(random_images(2, 2, 2, 4)), ValueError, "images: got shape"),
        (lambda path: make_grid(np.zeros((1, 2, 2, 3))), TypeError, "images: got dtype float64"),
        (lambda path: make_grid(random_images(2, 2, 2, 3), 0), ValueError, "columns: got 0"),
        (lambda path: make_grid(random_images(2, 2, 2, 3), scale=0), ValueError, "scale: got 0"),
        (lambda path: make_grid(random_images(2, 2, 2, 3), padding=-1), ValueError, "padding: got -1"),
        (lambda path: make_grid(random_images(2, 2, 2, 3), background=256), ValueError, "background: got 256"),
        (lambda path: save_png(path / "a.png", random_images(2, 2)), ValueError, "images: got shape"),
        (lambda path: save_npz(path / "a.npz", [], 0), ValueError, "count: got 0"),
        (lambda path: save_npz(path / "a.npz", [], 2, np.arange(3)), ValueError, "class_ids: got shape"),
    ],
)
def test_errors(tmp_path: Path, call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(tmp_path)
    assert not list(tmp_path.iterdir())


class FakeAutoencoder(nn.Module):
    """AutoencoderKL's interface around 'repeat each pixel 8 times'."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(latent_channels=4, in_channels=3)
        self.weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
        self.batches: list[int] = []

    def decode(self, z: Tensor) -> SimpleNamespace:
        assert z.dtype == self.weight.dtype
        self.batches.append(z.shape[0])
        return SimpleNamespace(sample=z[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3))

    def encode(self, x: Tensor) -> SimpleNamespace:
        latent = torch.cat([x, x[:, :1]], 1)[:, :, ::8, ::8]
        return SimpleNamespace(latent_dist=SimpleNamespace(sample=lambda generator: latent))


def test_codec_scales_and_splits_batches() -> None:
    autoencoder = FakeAutoencoder()
    codec = LatentCodec(autoencoder)
    pixels = torch.randint(-3, 4, (5, 3, 16, 16)).float() / 4
    pixels = pixels[:, :, ::8, ::8].repeat_interleave(8, 2).repeat_interleave(8, 3)
    latents = codec.encode(pixels)
    assert latents.shape == (5, 4, 2, 2) and latents.dtype == torch.float32
    torch.testing.assert_close(latents[:, :3], pixels[:, :, ::8, ::8] * 0.18215, rtol=0.01, atol=0)
    decoded = codec.decode(latents, batch_size=2)
    assert LATENT_SCALE == 0.18215 and autoencoder.batches == [2, 2, 1] and decoded.dtype == torch.float32
    torch.testing.assert_close(decoded, pixels, rtol=0.01, atol=0)
    with pytest.raises(ValueError, match="latents: got shape"):
        codec.decode(latents[:, :3])
    with pytest.raises(ValueError, match="batch_size: got 0"):
        codec.decode(latents, batch_size=0)


def test_missing_autoencoder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        load_codec(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        load_codec(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(ImportError, match="pip install diffusers"):
        load_codec(tmp_path)
