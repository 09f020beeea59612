"""The sampling benchmark in its tiny form."""

from __future__ import annotations

import pytest

from benchmarks import sampling
from benchmarks.cases import TINY_CASE
from tests.benchmarks.conftest import CollectingMain


def test_tiny_run(collected: CollectingMain) -> None:
    result = collected(sampling.main, f"--device cpu --dtype fp32 --case {TINY_CASE} --images 2 --steps 3 --rounds 2")
    (run,) = result["runs"]
    assert run["case"] == TINY_CASE and len(run["seconds"]) == len(run["forward_seconds"]) == 2
    assert run["repeats_bit_for_bit"] and run["finite"]
    assert run["ratio_to_forwards"] == pytest.approx(run["median_seconds"] / (3 * run["median_forward_seconds"]))
