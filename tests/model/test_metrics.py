"""Metrics: what is missing is named, the right features are compared, also with torch-fidelity's network."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dit_moe import metrics
from dit_moe.metrics import MetricsUnavailableError, compute_metrics, missing_requirements


class FakeInception(nn.Module):
    """torch-fidelity's network in small: 3 pooled features, 4 logits, and a map to hook."""

    def __init__(self, name: str, features: list[str], weights: str) -> None:
        super().__init__()
        assert features == ["2048", "logits_unbiased"] and Path(weights).is_file()
        self.Mixed_6d = nn.Module()
        self.Mixed_6d.branch1x1 = nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        assert x.dtype == torch.uint8 and x.shape[1] == 3
        x = x.float() / 255
        self.Mixed_6d.branch1x1(torch.cat([x, 10 * x, 100 * x], 1))
        pool = x.mean((2, 3))
        return pool, pool @ torch.arange(12.0).view(3, 4)


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """The distance of two Gaussians fitted to rows, by symmetric square roots (another way than torch-fidelity's)."""
    mean_a, mean_b, cov_a, cov_b = a.mean(0), b.mean(0), np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov_b @ root), 0)).sum()
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def fake_library() -> SimpleNamespace:
    def statistics(features: Tensor) -> dict[str, np.ndarray]:
        rows = features.numpy()
        return {"rows": rows, "mu": rows.mean(0), "sigma": np.cov(rows, rowvar=False)}

    def distance(a: dict[str, np.ndarray], b: dict[str, np.ndarray], verbose: bool) -> dict[str, float]:
        return {"frechet_inception_distance": float(((a["mu"] - b["mu"]) ** 2).sum())}

    return SimpleNamespace(
        Inception=FakeInception,
        statistics=statistics,
        distance=distance,
        score=lambda logits, splits: {"inception_score_mean": logits.mean().item(), "inception_score_std": 0.0},
        precision_recall=lambda a, b, **options: {"precision": a.mean().item(), "recall": b.mean().item()},
    )


@pytest.fixture
def files(tmp_path: Path) -> SimpleNamespace:
    """Samples, a reference with images, and a file in the place of weights."""
    rng = np.random.default_rng(0)
    samples, real = rng.integers(0, 256, (9, 4, 4, 3), np.uint8), rng.integers(0, 200, (7, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "samples.npz", samples)
    np.savez(tmp_path / "real.npz", real)
    torch.save({}, tmp_path / "weights.pth")
    paths = {name: tmp_path / f"{name}.npz" for name in ("samples", "real")}
    return SimpleNamespace(**paths, weights=tmp_path / "weights.pth", images=samples, real_images=real, folder=tmp_path)


def run(files: SimpleNamespace, reference: Path, **options: Any) -> dict[str, float]:
    options = {"inception": files.weights, "check_weights": False, "batch_size": 4, **options}
    return compute_metrics(files.samples, reference, **options)


def pooled(images: np.ndarray) -> np.ndarray:
    return (images / 255).mean((1, 2))


def test_images_as_reference(files: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_torch_fidelity", fake_library)
    seen: list[int] = []
    result = run(files, files.real, on_progress=seen.append)
    assert seen == [4, 8, 9, 13, 16]
    ours, real = pooled(files.images), pooled(files.real_images)
    assert result["fid"] == pytest.approx(((ours.mean(0) - real.mean(0)) ** 2).sum(), rel=1e-4)
    assert result["precision"] == pytest.approx(ours.mean(), rel=1e-4)
    assert result["recall"] == pytest.approx(real.mean(), rel=1e-4)
    assert result["inception_score"] == pytest.approx((ours @ np.arange(12.0).reshape(3, 4)).mean(), rel=1e-4)
    # The map's first 7 of 9 channels: x, 10 x, and the first of 100 x.
    difference = (files.images.astype(float).mean(0) - files.real_images.astype(float).mean(0)) / 255
    expected = (difference**2).sum() * 101 + (difference[..., 0] ** 2).sum() * 10_000
    assert result["sfid"] == pytest.approx(expected, rel=1e-4)


def test_stored_statistics_win_over_images(files: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_torch_fidelity", fake_library)
    mu, sigma = np.full(3, 0.25), np.eye(3)
    np.savez(files.folder / "pool.npz", mu=mu, sigma=sigma)
    result = run(files, files.folder / "pool.npz")
    assert set(result) == {"fid", "inception_score", "inception_score_std"}
    assert result["fid"] == pytest.approx(((pooled(files.images).mean(0) - mu) ** 2).sum(), rel=1e-4)
    spatial = {"mu_s": np.zeros(7 * 16), "sigma_s": np.eye(7 * 16)}
    np.savez(files.folder / "all.npz", files.real_images, mu=mu, sigma=sigma, **spatial)
    result = run(files, files.folder / "all.npz")
    assert set(result) == {"fid", "sfid", "inception_score", "inception_score_std", "precision", "recall"}
    assert result["fid"] == pytest.approx(((pooled(files.images).mean(0) - mu) ** 2).sum(), rel=1e-4)
    assert result["sfid"] > 1000


def test_everything_missing_is_named(files: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise ImportError("No module named 'torch_fidelity'")

    monkeypatch.setattr(metrics, "_torch_fidelity", absent)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(files.folder / "hub"))
    with pytest.raises(MetricsUnavailableError) as caught:
        compute_metrics(files.samples, files.folder / "VIRTUAL.npz")
    for part in (
        "pip install 'torch-fidelity",
        "No module named",
        "6726825d.pth",
        str(files.folder / "hub"),
        "VIRTUAL",
    ):
        assert part in str(caught.value)
    monkeypatch.setattr(metrics, "_torch_fidelity", fake_library)
    assert missing_requirements(files.real, files.weights) == []


def test_other_weights_and_broken_references_are_refused(
    files: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "_torch_fidelity", fake_library)
    with pytest.raises(ValueError, match="SHA-256 starts with .*, expected 6726825d"):
        run(files, files.real, check_weights=True)
    np.savez(files.folder / "b.npz", other=np.zeros(3))
    with pytest.raises(ValueError, match="expected mu and sigma, or images as arr_0"):
        run(files, files.folder / "b.npz")
    (files.folder / "c.npz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="not an .npz file"):
        run(files, files.folder / "c.npz")
    np.savez(files.samples, files.images[:1])
    with pytest.raises(ValueError, match="fewer than 2 images"):
        run(files, files.real)


def test_torch_fidelity(files: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's own network with random weights, against distances computed here from its features."""
    try:
        library = metrics._torch_fidelity()
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torch-fidelity cannot be imported: {error}")
    with monkeypatch.context() as patched:
        patched.setattr(library.Inception, "load_state_dict", lambda self, state: None)
        network = library.Inception("inception-v3-compat", ["2048"], str(files.weights))
        for parameter in network.parameters():
            if parameter.ndim == 4:
                nn.init.kaiming_normal_(parameter)  # torch's default would shrink the features to nothing
    torch.save(network.state_dict(), files.weights)
    result = run(files, files.real)

    maps: list[Tensor] = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: maps.append(output))
    features = [
        network(torch.from_numpy(images).permute(0, 3, 1, 2))[0].numpy().astype(np.float64)
        for images in (files.images, files.real_images)
    ]
    assert features[0].std() > 1e-3
    spatial = [output[:, :7].permute(0, 2, 3, 1).reshape(len(output), -1).numpy().astype(np.float64) for output in maps]
    assert spatial[0].shape == (9, 2023)
    assert result["fid"] == pytest.approx(frechet(*features), rel=1e-3)
    assert result["sfid"] == pytest.approx(frechet(*spatial), rel=1e-3)
    assert result["inception_score"] >= 1 and 0 <= result["precision"] <= 1 and 0 <= result["recall"] <= 1
