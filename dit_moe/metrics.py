"""FID, sFID, Inception Score, precision and recall of sampled images, computed by torch-fidelity; never downloads."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .images import read_npz

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256_START = "6726825d"
SPATIAL_CHANNELS = 7
"""Channels of the 17 x 17 map that sFID looks at: 7 give 2,023 values, about as many as FID's 2,048."""


class MetricsUnavailableError(RuntimeError):
    """Something that the metrics need is not there; the message names all of it."""


def default_inception_path() -> Path:
    """Where torch-fidelity keeps the Inception weights once it has fetched them."""
    return Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE


def missing_requirements(reference: str | os.PathLike, inception: str | os.PathLike | None = None) -> list[str]:
    """What compute_metrics would need and does not find, one sentence each; empty when it can run."""
    missing = []
    try:
        _torch_fidelity()
    except (ImportError, RuntimeError) as error:  # torchvision built for another torch raises RuntimeError
        missing.append(f"the package torch-fidelity (pip install 'torch-fidelity>=0.4'): {error}")
    weights = default_inception_path() if inception is None else Path(inception)
    if not weights.is_file():
        missing.append(
            f"the Inception weights {weights}: the file {INCEPTION_FILE} of torch-fidelity's release v0.2.0 on GitHub"
        )
    if not Path(reference).is_file():
        missing.append(
            f"the reference {reference}: ADM's statistics of the training set, as VIRTUAL_imagenet256_labeled.npz, "
            "or an .npz of real images as arr_0"
        )
    return missing


def compute_metrics(
    samples: str | os.PathLike,
    reference: str | os.PathLike,
    *,
    inception: str | os.PathLike | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 64,
    check_weights: bool = True,
    on_progress: Callable[[int], object] | None = None,
) -> dict[str, float]:
    """Metrics of sampled images against a reference, by ADM's protocol with torch-fidelity's Inception.

    Args:
        samples: .npz with arr_0 (N, H, W, 3) uint8, as merge_shards writes it; 50,000 images for figures that compare.
        reference: .npz with ADM's statistics (mu, sigma, mu_s, sigma_s) and, for precision and recall, images as arr_0;
            without statistics they are computed from its images.
        inception: the Inception weights; None looks where torch-fidelity keeps them.
        device: where Inception runs.
        batch_size: images at once.
        check_weights: refuse weights that are not the standard ones; figures of others are not FIDs.
        on_progress: called with the number of images seen so far.
    Returns:
        fid, sfid, inception_score, inception_score_std; with reference images also precision and recall. sfid is left
        out where the reference has fid's statistics only.
    Raises:
        MetricsUnavailableError: a package, weights or the reference are missing; the message names all of them.
        ValueError: weights or arrays that are not what they should be, or fewer than 2 images.

    Source: Heusel et al. 2017 (FID), Nash et al. 2021 (sFID), Salimans et al. 2016 (IS), Kynkaanniemi et al. 2019
    (precision and recall, 3 neighbours).
    """
    missing = missing_requirements(reference, inception)
    if missing:
        raise MetricsUnavailableError("cannot compute metrics, missing: " + "; ".join(missing))
    library = _torch_fidelity()
    weights = default_inception_path() if inception is None else Path(inception)
    if check_weights:
        _check_inception(weights)
    network = library.Inception("inception-v3-compat", ["2048", "logits_unbiased"], str(weights)).to(device)
    stored = _stored_statistics(reference)
    seen = _Counter(on_progress)
    sampled = _extract(network, samples, device, batch_size, seen)
    real = _extract(network, reference, device, batch_size, seen) if stored.has_images else None
    result = {}
    for name, features, key in (("fid", "pool", ""), ("sfid", "spatial", "_s")):
        statistics = stored.statistics.get(key)
        if statistics is None and not stored.statistics and real is not None:
            statistics = library.statistics(real[features].double())
        if statistics is not None:
            own = library.statistics(sampled[features].double())
            result[name] = float(library.distance(own, statistics, False)["frechet_inception_distance"])
    score = library.score(sampled["logits"], splits=min(10, len(sampled["logits"])))
    result["inception_score"] = float(score["inception_score_mean"])
    result["inception_score_std"] = float(score["inception_score_std"])
    if real is not None:
        both = library.precision_recall(sampled["pool"], real["pool"], save_cpu_ram=True, verbose=False)
        result["precision"], result["recall"] = float(both["precision"]), float(both["recall"])
    return result


class _Counter:
    def __init__(self, on_progress: Callable[[int], object] | None) -> None:
        self.count, self.on_progress = 0, on_progress

    def add(self, images: int) -> None:
        self.count += images
        if self.on_progress is not None:
            self.on_progress(self.count)


def _torch_fidelity() -> SimpleNamespace:
    """The parts of torch-fidelity that are used here."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    return SimpleNamespace(
        Inception=FeatureExtractorInceptionV3,
        statistics=fid_features_to_statistics,
        distance=fid_statistics_to_metric,
        score=isc_features_to_metric,
        precision_recall=prc_features_to_metric,
    )


def _check_inception(weights: Path) -> None:
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    if not digest.startswith(INCEPTION_SHA256_START):
        raise ValueError(f"{weights}: SHA-256 starts with {digest[:8]}, expected {INCEPTION_SHA256_START}")
    # torch-fidelity unpickles the file without limits; this load refuses anything but tensors first.
    torch.load(weights, map_location="cpu", weights_only=True)


def _stored_statistics(path: str | os.PathLike) -> SimpleNamespace:
    """The statistics in a reference file by key suffix ("" for FID, "_s" for sFID), and whether it holds images."""
    try:
        with np.load(path, allow_pickle=False) as file:
            names = set(file.files)
            statistics = {
                suffix: {part: file[part + suffix].astype(np.float64) for part in ("mu", "sigma")}
                for suffix in ("", "_s")
                if {f"mu{suffix}", f"sigma{suffix}"} <= names
            }
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise ValueError(f"{path}: not an .npz file of arrays ({error})") from error
    if not statistics and "arr_0" not in names:
        raise ValueError(f"{path}: got arrays {sorted(names)}, expected mu and sigma, or images as arr_0")
    return SimpleNamespace(statistics=statistics, has_images="arr_0" in names)


def _extract(
    network: nn.Module, path: str | os.PathLike, device: torch.device | str, batch_size: int, seen: _Counter
) -> dict[str, Tensor]:
    """Features of all images of a file on the CPU: pool (N, 2048), logits (N, 1008), spatial (N, 2023), float32."""
    found: dict[str, list[Tensor]] = {"pool": [], "logits": [], "spatial": []}

    def keep_map(module: nn.Module, inputs: Any, output: Tensor) -> None:
        found["spatial"].append(output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1).float().cpu())

    hook = network.get_submodule("Mixed_6d.branch1x1").register_forward_hook(keep_map)
    try:
        with torch.no_grad():
            for batch in read_npz(path, batch_size):
                pool, logits = network(torch.from_numpy(batch.copy()).permute(0, 3, 1, 2).to(device))
                found["pool"].append(pool.float().cpu())
                found["logits"].append(logits.float().cpu())
                seen.add(len(batch))
    finally:
        hook.remove()
    if sum(map(len, found["pool"])) < 2:
        raise ValueError(f"{path}: got fewer than 2 images, expected at least 2 (50,000 for figures that compare)")
    return {name: torch.cat(parts) for name, parts in found.items()}
