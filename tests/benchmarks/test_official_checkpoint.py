"""The check of an official-sized checkpoint, in its tiny form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import official_checkpoint
from dit_moe import flops, model_config


@pytest.mark.parametrize("preset", ["DiT-MoE-S/2-8E2A", "DiT-MoE-G/2-16E2A"])  # one of each attention layout
def test_tiny_run_writes_what_it_measured(preset: str, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    given = ["--tiny", "--preset", preset, "--images", "2", "--steps", "2", "--device", "cpu", "--out", str(out)]
    assert official_checkpoint.main(given) == 0
    result = json.loads(out.read_text())
    config = model_config(preset, depth=2, hidden_size=64, num_heads=4, input_size=8)
    assert result["parameters"] == flops.count_parameters(config)
    assert result["file_gib"] * 2**30 > 2 * result["parameters"]  # fp16
    assert result["finite"] and result["repeatable"]
    assert result["environment"]["command"][2] == "benchmarks.official_checkpoint"
