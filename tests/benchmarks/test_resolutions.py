"""The benchmark of image sizes in its tiny form."""

from __future__ import annotations

import pytest
import torch

from benchmarks import resolutions
from benchmarks.cases import TINY_CASE
from benchmarks.models import moe_config
from dit_moe.flops import flops
from tests.benchmarks.conftest import CollectingMain


def test_tiny_run(collected: CollectingMain) -> None:
    result = collected(resolutions.main, f"--device cpu --dtype fp32 --case {TINY_CASE} --batch 1 3 --rounds 2")
    assert [run["batch"] for run in result["runs"]] == [1, 3]
    for run in result["runs"]:
        rates = []
        for case, pixels in ((TINY_CASE, 256), (f"{TINY_CASE}@512", 512)):
            sample = run[f"{pixels}_pixels"]
            rates.append(run["batch"] * flops(moe_config(case)) / sample["median_ms"] / 1e9)
            assert sample["tflops"] == pytest.approx(rates[-1])
        assert run["rate_512_by_256"] == pytest.approx(rates[1] / rates[0])


def test_sizes_share_parameters() -> None:
    small, large = resolutions._models(TINY_CASE, "cpu", torch.float32)
    assert (small.config.num_tokens, large.config.num_tokens) == (16, 64)
    storages = {name: tensor.data_ptr() for name, tensor in small.named_parameters()}
    apart = [name for name, tensor in large.named_parameters() if storages[name] != tensor.data_ptr()]
    assert all("pos_embed" in name for name in apart)
