"""TensorBoard, utilisation, and grids of samples while training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dit_moe import DiTConfig
from dit_moe.images import to_uint8
from dit_moe.presets import model_config
from dit_moe.sampling import sample_ddim, sample_rectified_flow
from dit_moe.tracking import GridSampler, TensorBoardLog, peak_flops, utilisation
from dit_moe.training import TrainingReport

from .test_cli import TINY, run
from .training_cases import CONFIG, SETTINGS, assert_equal, shaken, trainer, weights

REPORT = TrainingReport(7, 1.5, 0.25, 3.0, 1e-4, 12.0, ((2.0, 0.0), (1.0, 1.0)))


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    found = {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}
    return {**found, **{name: [(e.step, 0.0) for e in events.Images(name)] for name in events.Tags()["images"]}}


def test_entropy_of_the_load() -> None:
    assert REPORT.expert_entropy == pytest.approx((0.0, 1.0))
    skewed = replace(REPORT, expert_load=((3.0, 1.0, 0.0, 0.0),))
    expected = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25)) / np.log(4)
    assert skewed.expert_entropy == pytest.approx((expected,))


def test_utilisation_counts_three_forwards() -> None:
    """XL/2-8E2A takes 327.97 GMAC an image (docs of the paper's table), so 100 images/s take 197 TFLOP/s."""
    config = model_config("DiT-MoE-XL/2-8E2A")
    assert utilisation(config, 100.0, 989e12) == pytest.approx(3 * 2 * 327.97e9 * 100 / 989e12, rel=1e-3)
    assert peak_flops(torch.device("cpu"), "bf16") is None


def test_tensorboard_holds_what_a_report_says(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    log = TensorBoardLog(tmp_path, CONFIG, peak=1e9)
    log.report(REPORT)
    log.grid(np.zeros((4, 5, 3), dtype=np.uint8), 7)
    log.close()
    found = scalars(tmp_path)
    for name, value in (
        ("loss/diffusion", 1.5), ("loss/balance", 0.25), ("optimiser/gradient norm", 3.0),
        ("optimiser/learning rate", 1e-4), ("speed/images per second", 12.0), ("entropy/layer 00", 0.0),
        ("entropy/layer 01", 1.0), ("load of layer 00/expert 00", 2.0), ("load of layer 01/expert 01", 1.0),
        ("speed/model FLOPs utilisation", utilisation(CONFIG, 12.0, 1e9)),
    ):  # fmt: skip
        assert found[name] == [(7, pytest.approx(value, rel=1e-5))], name
    assert found["samples"] == [(7, 0.0)]


def test_tensorboard_forgets_steps_that_are_done_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    for steps, start in (((1, 2, 3), 0), ((3, 4), 2)):
        log = TensorBoardLog(tmp_path, CONFIG, step=start)
        for step in steps:
            log.report(replace(REPORT, step=step, loss=float(step + start)))
        log.close()
    assert scalars(tmp_path)["loss/diffusion"] == [(1, 1.0), (2, 2.0), (3, 5.0), (4, 6.0)]


@pytest.mark.parametrize("objective", ["rf", "ddpm"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16-weights"])
def test_grids_are_the_averaged_models_and_leave_training_alone(tmp_path: Path, objective: str, dtype: str) -> None:
    config: DiTConfig = replace(CONFIG, learn_sigma=objective == "ddpm")
    settings = replace(SETTINGS, objective=objective, dtype=dtype)
    watched, other = (shaken(trainer(settings, config)) for _ in range(2))
    other.run(until=6)
    watched.run(until=4)
    sampler = GridSampler(tmp_path, 2, 3, steps=5, cfg_scale=2.0)
    grid = sampler.draw(watched)
    assert grid is not None
    average = watched.averaged_model()
    noise, ids = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 0, 0, 1, 1, 1])
    sample = sample_rectified_flow if objective == "rf" else sample_ddim
    options = {} if objective == "rf" else {"clip": True}
    expected = to_uint8(sample(average, noise, ids, 5, 2.0, **options))
    cell = 8 * 8 + 2  # eightfold pixels and the padding
    found = np.stack(
        [grid[2 + cell * r : cell * (r + 1) : 8, 2 + cell * c : cell * (c + 1) : 8] for r in (0, 1) for c in range(3)]
    )
    if dtype == "fp32":
        assert np.array_equal(found, expected)
    else:  # the model itself runs in bf16
        assert np.abs(found.astype(int) - expected.astype(int)).mean() < 8
    with Image.open(tmp_path / "step-00000004.png") as file:
        assert np.array_equal(np.asarray(file), grid[:, :, 0])
    watched.run(until=6)
    assert_equal(weights(watched), weights(other))


def test_train_watches(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("tensorboard")
    out = tmp_path / "run"
    text = run(
        "train", "--data", "digits", "--out", out, "--steps", 5, "--log-every", 2, "--batch-size", 8, "--tensorboard",
        "--peak-tflops", 0.001, "--sample-every", 2, "--sample-steps", 2, "--sample-classes", 3, *TINY,
    )  # fmt: skip
    assert "MFU" in text
    assert sorted(path.name for path in (out / "samples").iterdir()) == ["step-00000002.png", "step-00000004.png"]
    found = scalars(out / "tensorboard")
    assert [step for step, _ in found["loss/diffusion"]] == [2, 4, 5]
    assert [step for step, _ in found["samples"]] == [2, 4]
