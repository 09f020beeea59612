"""The command line, end to end on tiny models."""

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

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from dit_moe import DiT, DiTConfig, load_model, save_model
from dit_moe.cli import app
from dit_moe.data import load_dataset
from dit_moe.demo import demo_plan, judge, sample_classes
from tests.model.util import tiny_model

TINY = [
    "--hidden-size",
    16,
    "--depth",
    1,
    "--num-heads",
    2,
    "--num-experts",
    4,
    "--device",
    "cpu",
    "--backend",
    "reference",
]


def invoke(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "250"}).invoke(app, list(map(str, arguments)))


def run(*arguments: object) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def fail(*arguments: object, code: int = 1) -> str:
    """The error line of a command that must fail without a traceback."""
    result = invoke(*arguments)
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)  # and no error that escaped
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate(("cat", "dog")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(8):
            colour = (200 * number, 10 * index, 50)
            Image.new("RGB", (9, 7), colour).save(tmp_path / "images" / name / f"{index}.png")
    (tmp_path / "images" / "cat" / "broken.png").write_bytes(b"\x89PNG nothing")
    return tmp_path / "images"


@pytest.fixture
def trained(folder: Path, tmp_path: Path) -> Path:
    run("train", "--data", folder, "--image-size", 8, "--out", tmp_path / "run", "--steps", 4, "--batch-size", 8, *TINY)
    return tmp_path / "run"


def test_help_names_every_command() -> None:
    text = run("--help")
    for command in ("demo", "info", "train", "sample", "evaluate", "analyze", "convert", "upcycle"):
        assert command in text
        assert "Usage" in run(command, "--help")


def test_info_tells_what_runs_and_why_not() -> None:
    text = run("info")
    assert f"torch │ {torch.__version__}" in text
    assert "reference" in text and "can run" in text
    if not torch.cuda.is_available():
        assert "torch sees no GPU" in text


def test_train_reports_and_saves(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    text = run(
        "train", "--data", folder, "--image-size", 7, "--out", out, "--steps", 6, "--batch-size", 8, "--log-every", 2,
        "--patch-size", 4, "--dtype", "bf16", "--flip", *TINY
    )  # fmt: skip
    assert "skipped 1 files" in text and "broken.png" in text
    assert "16 images of 3 x 8 x 8, 2 classes" in text  # 7 pixels, padded to two patches
    assert "backend: reference, as asked" in text
    assert re.search(r"step 6 loss \d\.\d+ balance \d\.\d+ load .* images/s", text)
    assert "expert load by layer" in text
    config = load_model(out / "model.safetensors").config
    assert (config.in_channels, config.num_classes, config.num_experts, config.learn_sigma) == (3, 2, 4, False)
    reports = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [report["step"] for report in reports] == [2, 4, 6]
    assert json.loads((out / "classes.json").read_text()) == ["cat", "dog"]


def test_train_takes_objective_and_memory_options(folder: Path, tmp_path: Path) -> None:
    text = run(
        "train", "--data", folder, "--image-size", 8, "--out", tmp_path / "run", "--steps", 3, "--batch-size", 8,
        "--objective", "ddpm", "--dtype", "bf16-weights", "--micro-batches", 2, "--recompute-blocks", 1, "--moments",
        "bf16", "--ema-dtype", "bf16", "--ema-device", "cpu", "--ema-every", 2, *TINY
    )  # fmt: skip
    assert "bf16-weights on cpu" in text
    assert load_model(tmp_path / "run" / "model.safetensors").config.learn_sigma


def test_resume_equals_an_unbroken_run(folder: Path, tmp_path: Path) -> None:
    common = ["train", "--data", folder, "--image-size", 8, "--batch-size", 8, *TINY]
    run(*common, "--out", tmp_path / "whole", "--steps", 5)
    run(*common, "--out", tmp_path / "parts", "--steps", 3)
    assert "holds a run: pass --resume" in fail(*common, "--out", tmp_path / "parts", "--steps", 5)
    assert "resumed at step 3" in run(*common, "--out", tmp_path / "parts", "--steps", 5, "--resume")
    whole, parts = (load_model(tmp_path / name / "model.safetensors").state_dict() for name in ("whole", "parts"))
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name
    message = fail(*common, "--out", tmp_path / "parts", "--steps", 9, "--resume", "--lr", 0.5)
    assert "settings.learning_rate was 0.0001, is 0.5" in message


def test_sigterm_saves_and_resume_goes_on(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [
        "train", "--data", folder, "--image-size", 8, "--out", out, "--steps", 100_000, "--batch-size", 8,
        "--log-every", 5, *TINY,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen([sys.executable, "-m", "dit_moe", *map(str, command)], env=environment)
    try:
        deadline = time.monotonic() + 240
        while not (out / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 128 + signal.SIGTERM
    finally:
        process.kill()
    steps = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    command[command.index("--steps") + 1] = steps + 2
    assert f"resumed at step {steps}" in run(*command, "--resume")


def test_sample_grid_and_npz(trained: Path, tmp_path: Path) -> None:
    model = trained / "model.safetensors"
    out, npz = tmp_path / "grid.png", tmp_path / "out.npz"
    text = run(
        "sample", "--ckpt", model, "--class", "dog", "--class", 0, "-n", 3, "--steps", 2, "--out", out, "--npz", npz,
        "--device", "cpu", "--backend", "reference"
    )  # fmt: skip
    assert "6 images" in text and "rows: dog, cat" in text
    with np.load(npz) as file:
        assert file["arr_0"].shape == (6, 8, 8, 3)
        assert file["arr_1"].tolist() == [1, 1, 1, 0, 0, 0]
        first = file["arr_0"]
    with Image.open(out) as grid:
        assert grid.size == (3 * 58 + 2, 2 * 58 + 2)  # 8 pixels enlarged sevenfold, 2 of padding
    run("sample", "--ckpt", model, "--class", "dog", "--class", 0, "-n", 3, "--steps", 2, "--out", out, "--npz", npz,
        "--batch-size", 2, "--device", "cpu", "--backend", "reference")  # fmt: skip
    with np.load(npz) as file:
        assert np.abs(file["arr_0"].astype(int) - first).max() <= 1  # the batch does not matter but for rounding


def test_sample_says_how_it_ran_and_guides_where_asked(tmp_path: Path) -> None:
    model = tmp_path / "model.safetensors"
    save_model(tiny_model(in_channels=3, num_classes=2), model)

    def images(*options: object) -> tuple[str, np.ndarray]:
        npz = tmp_path / "out.npz"
        text = run(
            "sample", "--ckpt", model, "-n", 2, "--steps", 4, "--out", tmp_path / "x.png",
            "--npz", npz, "--device", "cpu", "--backend", "reference", *options
        )  # fmt: skip
        with np.load(npz) as file:
            return text, file["arr_0"].astype(int)

    text, plain = images("--cfg", 1)
    assert "sampling: step by step (CUDA graphs need a GPU, the model is on cpu)" in text
    text, unguided = images("--cfg", 9, "--cfg-interval", 0.05, 0.1, "--no-graphs")  # between two steps of four
    assert "sampling: step by step (as asked)" in text
    assert np.array_equal(plain, unguided)
    guided = images("--cfg", 9)[1]
    assert not np.array_equal(guided, plain)
    assert not np.array_equal(images("--cfg", 9, "--cfg-schedule", "linear")[1], guided)
    assert "guidance_interval: got (0.5, 0.2)" in fail(
        "sample", "--ckpt", model, "--cfg-interval", 0.5, 0.2, "--out", tmp_path / "x.png"
    )


def test_debug_lets_errors_through(tmp_path: Path) -> None:
    arguments = ["sample", "--ckpt", tmp_path / "absent", "--device", "cpu", "--out", tmp_path / "x.png"]
    assert isinstance(invoke("--debug", *arguments).exception, FileNotFoundError)
    assert "absent" in fail(*arguments)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_sample_with_gaussian_samplers(trained: Path, tmp_path: Path, sampler: str) -> None:
    config = DiTConfig(input_size=8, patch_size=4, in_channels=3, hidden_size=16, depth=1, num_heads=2, num_classes=2)
    save_model(DiT(config), tmp_path / "gaussian.safetensors")
    run("sample", "--ckpt", tmp_path / "gaussian.safetensors", "-n", 1, "--sampler", sampler, "--steps", 5,
        "--out", tmp_path / "x.png", "--device", "cpu", "--backend", "reference")  # fmt: skip
    assert (tmp_path / "x.png").exists()


def test_sample_errors(trained: Path, tmp_path: Path) -> None:
    model, out = trained / "model.safetensors", tmp_path / "x.png"
    common = ["--out", out, "--steps", 2, "--device", "cpu", "--backend", "reference"]
    assert "got '2', expected 0 to 1 or one of cat, dog" in fail("sample", "--ckpt", model, "--class", 2, *common)
    assert "No such file" in fail("sample", "--ckpt", tmp_path / "absent", *common)
    (tmp_path / "junk.pt").write_bytes(b"junk" * 100)
    assert fail("sample", "--ckpt", tmp_path / "junk.pt", *common).startswith("error:")
    assert "is no folder" in fail("sample", "--ckpt", model, "--out", tmp_path / "no" / "x.png")
    assert "steps" in fail("sample", "--ckpt", model, *common, "--steps", 0)
    latent = DiTConfig(input_size=4, in_channels=4, hidden_size=16, depth=1, num_heads=2, num_classes=2)
    save_model(DiT(latent), tmp_path / "latent.safetensors")
    assert "latents of 4 channels" in fail("sample", "--ckpt", tmp_path / "latent.safetensors", *common)
    assert not out.exists()


def test_train_errors(folder: Path, tmp_path: Path) -> None:
    common = ["--out", tmp_path / "run", "--steps", 2]
    assert "expected one of" in fail("train", "--data", "absent", *common, *TINY)
    assert "image_size: got none" in fail("train", "--data", folder, *common, *TINY)
    images = ["--data", folder, "--image-size", 8]
    assert "batch_size: got 64" in fail("train", *images, *common, *TINY)
    assert "hidden_size" in fail("train", *images, *common, "--hidden-size", 15)
    assert "model name" in fail("train", *images, *common, "--preset", "nothing")
    assert "learning_rate: got 0.0" in fail("train", *images, *common, *TINY, "--lr", 0)
    assert "device: got 'tpu'" in fail("train", *images, *common, "--device", "tpu")
    assert "cannot resume" in fail("train", *images, *common, *TINY, "--batch-size", 8, "--resume")
    fail("train", "--data", folder, code=2)
    fail("train", *images, *common, "--dtype", "fp8", code=2)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_unavailable_device_and_backend(trained: Path, tmp_path: Path) -> None:
    model = trained / "model.safetensors"
    assert "sees no GPU" in fail("sample", "--ckpt", model, "--device", "cuda")
    message = fail("sample", "--ckpt", model, "--backend", "cuda", "--out", tmp_path / "x.png")
    assert "backend 'cuda' cannot run" in message


def test_evaluate_samples_resumes_and_names_what_is_missing(trained: Path, tmp_path: Path) -> None:
    command = [
        "evaluate", "--ckpt", trained / "model.safetensors", "--out", tmp_path / "shards", "--num-images", 5,
        "--shard-size", 2, "--steps", 2, "--device", "cpu", "--backend", "reference"
    ]  # fmt: skip
    assert "5 images" in run(*command)
    shard = sorted((tmp_path / "shards").glob("shard-*.npz"))[1]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "shards").glob("shard-*.npz")}
    shard.unlink()
    run(*command)
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "shards").glob("shard-*.npz")}
    assert before.keys() == after.keys()
    assert [path for path in before if before[path] != after[path]] == [shard]
    with np.load(tmp_path / "shards" / "samples.npz") as file:
        assert file["arr_0"].shape == (5, 8, 8, 3)
    message = fail(*command, "--reference", tmp_path / "absent.npz")
    assert "missing" in message and "absent.npz" in message


def test_demo_in_short(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    text = run("demo", "--out", tmp_path / "demo", "--steps", 10, "--device", "cpu", "--backend", "reference")
    assert "backend: reference, as asked" in text
    assert re.search(r"loss \d\.\d+ -> \d\.\d+ in 10 steps", text)
    assert "expert load by layer" in text
    assert re.search(r"names \d+ of 200 sampled ones as asked", text)
    with Image.open(tmp_path / "demo" / "samples.png") as grid:
        assert grid.size[0] == grid.size[1]
    assert len(list((tmp_path / "demo").glob("class-*.png"))) == 10
    assert load_model(tmp_path / "demo" / "model.safetensors").config.num_classes == 10


def test_judge_tells_right_from_wrong() -> None:
    """Real digits pass as sampled ones; the same under shifted labels do not."""
    pytest.importorskip("sklearn")
    data = load_dataset("digits")
    images, labels = data.images[:100].permute(0, 2, 3, 1).numpy(), data.class_ids[:100].numpy()
    verdict = judge(images, labels, data)
    assert verdict.held_out_accuracy > 0.95
    assert verdict.accuracy > 0.95
    assert (verdict.num_held_out, verdict.num_sampled) == (360, 100)
    assert judge(images, (labels + 1) % 10, data).accuracy < 0.05


def test_demo_samples_are_ordered_by_class() -> None:
    pytest.importorskip("sklearn")
    data = load_dataset("digits")
    plan = replace(demo_plan(torch.device("cpu"), data), images_per_class=2, sampling_steps=2)
    images, class_ids = sample_classes(DiT(plan.config(data)), plan, 10, torch.device("cpu"))
    assert images.shape == (20, 8, 8, 1)
    assert class_ids.tolist() == sorted(class_ids.tolist())


@pytest.mark.skipif(torch.cuda.is_available(), reason="`auto` takes the GPU's kernels there")
def test_auto_says_what_it_chose() -> None:
    """In a fresh process, since the choice is made and told once."""
    code = (
        "import torch; from dit_moe_kernels import swiglu; from dit_moe.cli.common import Backend, chosen_backend\n"
        "with chosen_backend(Backend.auto) as choices:\n"
        "    swiglu(torch.ones(2, 4)); swiglu(torch.ones(2, 4))\n"
        "print(*choices.lines())"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment.pop("TRITON_INTERPRET", None)
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.startswith("backend: reference on cpu in float32 for swiglu (not cuda:")
    assert "; not triton: the tensors are on the CPU" in out.stdout
    assert out.stdout.count("backend:") == 1
