"""The emoji comparison in tiny form, and its Frechet distance against closed forms."""

import csv
import json
from pathlib import Path

import pytest
import torch

from benchmarks import emoji
from dit_moe.data import ImageDataset


@pytest.mark.slow  # two trainings and two samplings under Triton's interpreter: 46 s
def test_tiny_run_trains_both_for_the_same_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8)
    data = ImageDataset("noise", pictures, torch.arange(16) % 2, ("a", "b"))
    monkeypatch.setattr(emoji, "load_bundled", lambda name: data)
    tiny = "--device cpu --steps 3 --log-every 1 --image-size 8 --width 32 --batch-size 4 --samples 4"
    tiny += " --sampling-steps 2"
    assert emoji.main([str(tmp_path), *tiny.split(), "--no-features"]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    with open(tmp_path / "losses.csv", newline="") as file:
        rows = [(row["model"], int(row["step"])) for row in csv.DictReader(file)]
    assert rows == [(name, step) for name in ("moe", "dense") for step in (1, 2, 3)]
    assert (tmp_path / "moe.png").read_bytes() != (tmp_path / "dense.png").read_bytes()
    assert "not computed" in emoji.markdown(result)


def test_frechet_of_shifted_and_scaled_features() -> None:
    x = torch.randn(500, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert emoji.frechet(x, x) == pytest.approx(0, abs=1e-9)
    assert emoji.frechet(x, x + 2) == pytest.approx(24)
    centred = x - x.mean(0)
    assert emoji.frechet(centred, 3 * centred) == pytest.approx(4 * float(x.T.cov().trace()))
