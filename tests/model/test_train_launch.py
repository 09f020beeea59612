"""`dit-moe train` under torchrun and from a configuration file."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from dit_moe import load_model
from dit_moe.cli.config_file import RECIPES, recipe_names
from dit_moe.cli.train import _model
from dit_moe.parallel import ParallelConfig
from dit_moe.presets import model_config

from .test_cli import TINY, fail, folder, run  # noqa: F401  (a fixture)

BATCH = ["--image-size", 8, "--batch-size", 8]


def torchrun(*arguments: object, ranks: int = 2) -> subprocess.Popen[str]:
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1",
        "COLUMNS": "250",
    }  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"]
    command += ["-m", "dit_moe", "train", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    text, _ = process.communicate(timeout=240)
    assert process.returncode == 0, text
    return text


def losses(out: Path) -> torch.Tensor:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return torch.tensor([[json.loads(line)[key] for key in ("step", "loss", "grad_norm")] for line in lines])


def test_two_processes_train_as_one(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    common = ["--data", folder, *BATCH, "--steps", 6, "--log-every", 1, *TINY]
    run("train", *common, "--out", tmp_path / "one")
    text = finish(torchrun(*common, "--out", tmp_path / "two"))
    assert "and 1 more (ddp)" in text
    assert len(re.findall("step +6", text)) == 1  # one process reports
    torch.testing.assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5, atol=1e-7)
    states = [load_model(tmp_path / name / "model.safetensors").state_dict() for name in ("one", "two")]
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], rtol=1e-3, atol=2e-5, msg=name)
    # One process goes on from the checkpoint of two.
    assert "resumed at step 6" in run("train", *common, "--out", tmp_path / "two", "--steps", 7, "--resume")


def test_sigterm_ends_all_processes_with_a_checkpoint(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "run"
    common = ["--data", folder, *BATCH, "--out", out, "--log-every", 5, "--data-parallel", "fsdp", *TINY]
    process = torchrun(*common, "--expert-parallel", 2, "--steps", 100_000)
    try:
        deadline = time.monotonic() + 200
        while not (out / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        text, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode != 0
    (step,) = map(int, re.findall(r"stopped at step (\d+) of 100000", text))
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"step-{step:08d}"]
    assert load_model(out / "model.safetensors").config.num_experts == 4


@pytest.mark.parametrize(
    ("parallel", "meta"),
    [(ParallelConfig(), False), (ParallelConfig("ddp"), False), (ParallelConfig("ddp", 2), True),
     (ParallelConfig("fsdp"), True)],
)  # fmt: skip
def test_the_host_draws_no_weights_of_models_that_ranks_share(parallel: ParallelConfig, meta: bool) -> None:
    config = model_config("DiT-MoE-S/2-8E2A")
    assert all(param.is_meta == meta for param in _model(replace(config, depth=1), 0, parallel).parameters())


def test_config_file_gives_defaults(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    settings = {
        "data": str(folder), "image-size": 8, "steps": 4, "batch_size": 4, "lr": 0.5, "schedule": "cosine",
        "flip": True, "hidden-size": 16, "depth": 1, "num-heads": 2, "num-experts": 2,
    }  # fmt: skip
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(settings))
    run(
        "train", "--config", path, "--out", tmp_path / "run", "--lr", 0.001, "--device", "cpu", "--backend", "reference"
    )
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    record = json.loads((checkpoint / "record.json").read_text())
    assert record["settings"]["learning_rate"] == 0.001  # the command line wins
    assert (record["settings"]["batch_size"], record["settings"]["schedule"], record["settings"]["flip"]) == (
        4, "cosine", True,
    )  # fmt: skip
    assert (record["step"], record["model"]["num_experts"]) == (4, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [("lr: [", "while parsing"), ("- lr", "got list"), ("learning: 1", "got learning, expected options of"),
     ("config: x", "got config"), ("steps: many", "steps")],
)  # fmt: skip
def test_config_file_errors(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    assert message in fail("train", "--config", path, "--data", "mnist", "--out", tmp_path / "x", code=2)


def test_unknown_recipe_names_the_known_ones(tmp_path: Path) -> None:
    assert "emoji" in fail("train", "--config", "nothing", "--out", tmp_path / "x", code=2)


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_hold_options_of_the_command(name: str, tmp_path: Path) -> None:
    """Each recipe is accepted; the run ends where the data are looked for, or without torchrun's ranks."""
    values = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    alone = ["--data-parallel", "none", "--expert-parallel", 1, "--device", "cpu"]
    message = fail("train", "--config", name, "--out", tmp_path / "x", "--data", tmp_path / "absent", *alone)
    assert "absent" in message
    if "preset" in values:
        config = model_config(values["preset"])
        assert values.get("recompute-blocks", 0) in (0, config.depth)
        assert config.num_experts % values.get("expert-parallel", 1) == 0
        assert values["batch-size"] % (values["micro-batches"] * values.get("expert-parallel", 1)) == 0
