"""Checkpoints: whole or absent, the newest kept, written beside training; and runs killed at any moment."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dit_moe import load_model
from dit_moe.checkpoint import CheckpointError
from dit_moe.runs import RunFolder
from dit_moe.training import Trainer
from dit_moe.training.checkpoints import Checkpoints

from .training_cases import SETTINGS, assert_equal, shaken, trainer, weights


def steps_in(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    run, folder = trainer(), RunFolder(tmp_path, keep=2)
    for step in (2, 4, 6):
        run.run(until=step)
        folder.save(run)
        folder.save(run)  # a second time changes nothing
    assert steps_in(tmp_path) == ["step-00000004", "step-00000006"]


def test_crash_while_saving_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, folder = trainer(), RunFolder(tmp_path)
    run.run(until=2)
    folder.save(run)
    saved = weights(run)
    run.run(until=4)

    def fail(*args: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail)
        with pytest.raises(OSError, match="no space"):
            folder.save(run)
    again = shaken(trainer())
    RunFolder(tmp_path).resume(again)
    assert again.step == 2
    assert_equal(saved, weights(again))
    folder.save(run)  # and what the failure left is cleared away
    assert steps_in(tmp_path) == ["step-00000002", "step-00000004"]


def test_asynchronous_checkpoint_holds_the_step_it_was_asked_at(tmp_path: Path) -> None:
    run, folder = trainer(), RunFolder(tmp_path, asynchronous=True)
    run.run(until=3)
    saved = weights(run)
    folder.save(run)
    run.run(until=9)  # the tensors change while they are written
    folder.close()
    again = shaken(trainer())
    RunFolder(tmp_path).resume(again)
    assert again.step == 3
    assert_equal(saved, weights(again))
    again.run(until=9)
    assert_equal(weights(run), weights(again))


def test_asynchronous_failure_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, folder = trainer(), RunFolder(tmp_path, asynchronous=True)
    run.run(until=1)
    monkeypatch.setattr(Checkpoints, "_finish", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    folder.save(run)
    with pytest.raises(OSError, match="could not be written: OSError: disk full"):
        folder.close()


def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        checkpoints.load({})
    checkpoints.save({"weight": torch.ones(3)}, 1, {})
    with pytest.raises(CheckpointError, match="another model: .*other"):
        checkpoints.load({"other": torch.ones(3)})
    with pytest.raises(CheckpointError, match="another model"):
        checkpoints.load({"weight": torch.ones(4)})
    (tmp_path / "step-00000001" / "record.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoints.record()
    with pytest.raises(ValueError, match="keep: got 0"):
        Checkpoints(tmp_path, keep=0)


def test_settings_that_move_memory_may_change(tmp_path: Path) -> None:
    run = trainer(replace(SETTINGS, recompute_blocks=2, ema_device="cpu"))
    run.run(until=3)
    RunFolder(tmp_path).save(run)
    other = trainer()
    RunFolder(tmp_path).resume(other)
    assert_equal(weights(run), weights(other))


PROGRAM = """
import sys
import torch
from dit_moe_kernels import use_backend
from dit_moe.runs import RunFolder
from tests.model.training_cases import SETTINGS, trainer
from dataclasses import replace

torch.set_num_threads(1)
folder, steps, asynchronous = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "async"
with use_backend("reference"):
    run = trainer(replace(SETTINGS, steps=steps, dtype="bf16-weights", flip=True))
    place = RunFolder(folder, asynchronous=asynchronous)
    if place.checkpoints.latest() is None:
        place.start()
    else:
        place.resume(run)
    print("ready", flush=True)
    while run.step < steps:
        run.run(until=min(steps, run.step + 4), report_every=4, on_report=place.append)
        place.save(run)
    place.close()
"""


def start(folder: Path, steps: int, mode: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder), str(steps), mode],
        env=environment, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def killed_run(steps: int) -> Trainer:
    return trainer(replace(SETTINGS, steps=steps, dtype="bf16-weights", flip=True))


def check_survival(folder: Path, kills: int, mode: str, steps: int) -> None:
    """Kill a run again and again at random moments, let it end, and compare with one in this process."""
    chance = random.Random(kills)
    progress = []
    for _ in range(kills):
        process = start(folder, steps, mode)
        time.sleep(chance.uniform(0.0, 1.0))
        process.send_signal(signal.SIGKILL)
        process.wait()
        latest = Checkpoints(folder / "checkpoints").latest()
        progress.append(0 if latest is None else int(latest.name[5:]))
    assert progress == sorted(progress)
    assert progress[-1] < steps, "the run ended before the last kill"
    assert start(folder, steps, mode).wait(timeout=300) == 0
    whole, again = killed_run(steps), shaken(killed_run(steps))
    whole.run()
    RunFolder(folder).resume(again)
    assert again.step == steps
    assert_equal(weights(whole), weights(again))
    average = whole.averaged_model()
    assert average is not None
    assert_equal(average.state_dict(), load_model(folder / "model.safetensors").state_dict())
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(4, steps + 1, 4))
    print(f"{mode}: {kills} kills, after checkpoints {progress} of {steps} steps")


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_killed_run_ends_as_an_unbroken_one(tmp_path: Path, mode: str) -> None:
    check_survival(tmp_path, 2, mode, 100)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_twenty_times_killed_run_ends_as_an_unbroken_one(tmp_path: Path, mode: str) -> None:
    check_survival(tmp_path, 20, mode, 600)
