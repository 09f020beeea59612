"""The sampling benchmark in its tiny form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import sampling
from benchmarks.cases import TINY_CASE


def test_tiny_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIT_MOE_BACKEND", "reference")  # the interpreter would take minutes
    out = tmp_path / "folder" / "result.json"
    given = f"--device cpu --dtype fp32 --case {TINY_CASE} --images 2 --steps 3 --rounds 2 --out {out}".split()
    assert sampling.main(given) == 0
    result = json.loads(out.read_text())
    assert result == json.loads(capsys.readouterr().out)
    (run,) = result["runs"]
    assert run["case"] == TINY_CASE and len(run["seconds"]) == len(run["forward_seconds"]) == 2
    assert run["repeats_bit_for_bit"] and run["finite"]
    assert run["ratio_to_forwards"] == pytest.approx(run["median_seconds"] / (3 * run["median_forward_seconds"]))
