"""The trainer: its loss and update against independent ones, repeatability, resuming, and saving."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dit_moe_kernels import use_backend
from torch import Tensor

from dit_moe import DiT, load_model
from dit_moe.checkpoint import CheckpointError
from dit_moe.runs import (
    METRICS_FILE,
    MODEL_FILE,
    RunFolder,
    class_names_beside,
    stop_on_signals,
)
from dit_moe.training import Trainer, TrainingDivergedError, TrainingReport, TrainingSettings

from .training_cases import CONFIG, SETTINGS, assert_equal, bars, first, trainer, weights


def test_step_agrees_with_a_plain_one() -> None:
    """One step against AdamW, clipping, EMA and the rectified-flow loss written out here."""
    settings = replace(SETTINGS, warmup_steps=0, schedule="constant", weight_decay=0.1, grad_clip=0.05, ema_decay=0.05)
    run = trainer(settings, replace(CONFIG, class_dropout_prob=0.0))
    with torch.no_grad():  # a fresh model predicts zero and has hardly a gradient
        for param in run.model.parameters():
            param.add_(torch.randn_like(param) * 0.05)
    plain, first_ema = copy.deepcopy(run.model), copy.deepcopy(run.averaged_model().state_dict())
    seen: dict[str, Tensor] = {}
    run.model.register_forward_pre_hook(
        lambda module, args: seen.update(zip(("z", "t", "y"), (a.clone() for a in args), strict=True))
    )
    run.model.train()
    run.train_step()
    # The noise follows from z = (1 - t) x + t noise.
    t = seen["t"].view(-1, 1, 1, 1)
    side = seen["y"].view(-1, 1, 1, 1)
    column = torch.arange(8).view(1, 1, 1, 8)
    x = torch.where((column >= 4) == (side == 1), 1.0, -1.0).expand_as(seen["z"])
    noise = (seen["z"] - (1 - t) * x) / t
    assert abs(noise.std() - 1) < 0.15 and abs(noise.mean()) < 0.15
    assert run.model.training
    velocity, aux = plain(seen["z"], seen["t"], seen["y"], return_aux=True)
    loss = ((velocity - (noise - x)) ** 2).mean()
    (loss + aux.balance_loss).backward()
    params = {name: param for name, param in plain.named_parameters() if param.requires_grad}
    norm = math.sqrt(sum(float(param.grad.square().sum()) for param in params.values()))
    assert norm > settings.grad_clip
    report = run.report()
    assert report.loss == pytest.approx(loss.item(), rel=1e-4)
    assert report.grad_norm == pytest.approx(norm, rel=1e-4)
    assert report.balance_loss == pytest.approx(aux.balance_loss.item(), rel=1e-4)
    lr, now, ema = (
        settings.learning_rate,
        dict(run.model.named_parameters()),
        dict(run.averaged_model().named_parameters()),
    )
    for name, param in params.items():
        grad = param.grad * settings.grad_clip / norm
        expected = param * (1 - lr * 0.1) - lr * grad / (grad.abs() + 1e-8)  # AdamW's first step
        big = grad.abs() > 1e-5  # where the gradient is rounding, its sign is chance
        torch.testing.assert_close(now[name][big], expected[big], rtol=1e-3, atol=2e-5)
        torch.testing.assert_close(ema[name], 0.05 * first_ema[name] + 0.95 * now[name])


def test_learns() -> None:
    run = trainer(replace(SETTINGS, steps=60, learning_rate=1e-2))
    reports: list[TrainingReport] = []
    run.run(report_every=20, on_report=reports.append)
    assert [report.step for report in reports] == [20, 40, 60]
    assert reports[-1].loss < 0.75 * reports[0].loss
    load = torch.tensor(reports[-1].expert_load)
    assert load.shape == (2, 4)
    torch.testing.assert_close(load.mean(1), torch.ones(2))
    assert reports[-1].images_per_second > 0


def test_same_seed_same_weights() -> None:
    runs = [trainer(), trainer(), trainer(replace(SETTINGS, seed=6))]
    for index, run in enumerate(runs):
        torch.manual_seed(index)  # the caller's generator must not matter
        run.run()
    assert_equal(weights(runs[0]), weights(runs[1]))
    assert not torch.equal(first(runs[0]), first(runs[2]))


def test_run_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    run = trainer()
    torch.manual_seed(1)
    run.run(until=2)
    assert torch.equal(torch.rand(3), expected)


def test_resumed_run_equals_an_unbroken_one(tmp_path: Path) -> None:
    whole, broken = trainer(), trainer()
    whole.run()
    broken.run(until=5, report_every=2)
    RunFolder(tmp_path).save(broken)
    torch.manual_seed(99)
    again = Trainer(DiT(CONFIG), bars(), SETTINGS)
    RunFolder(tmp_path).resume(again)
    assert again.step == 5
    again.run()
    assert_equal(weights(whole), weights(again))


def test_resume_before_the_first_step(tmp_path: Path) -> None:
    RunFolder(tmp_path).save(trainer())
    again = trainer()
    RunFolder(tmp_path).resume(again)
    again.run()
    whole = trainer()
    whole.run()
    assert_equal(weights(whole), weights(again))


def test_resume_refuses_what_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="cannot resume"):
        RunFolder(tmp_path).resume(trainer())
    run = trainer()
    run.run(until=2)
    RunFolder(tmp_path).save(run)
    with pytest.raises(CheckpointError, match="settings.learning_rate was 0.003, is 0.1"):
        RunFolder(tmp_path).resume(trainer(replace(SETTINGS, learning_rate=0.1)))
    with pytest.raises(CheckpointError, match="model.num_experts was 4, is 8"):
        RunFolder(tmp_path).resume(trainer(config=replace(CONFIG, num_experts=8)))
    with pytest.raises(CheckpointError, match="data.images was 32, is 16"):
        RunFolder(tmp_path).resume(Trainer(DiT(CONFIG), bars(16), SETTINGS))
    longer = trainer(replace(SETTINGS, steps=20))
    RunFolder(tmp_path).resume(longer)
    assert longer.step == 2
    (shard,) = (tmp_path / "checkpoints/step-00000002").glob("*.distcp")
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="damaged"):
        RunFolder(tmp_path).resume(trainer())


def test_saved_model_is_the_average(tmp_path: Path) -> None:
    run = trainer()
    run.run(until=4)
    RunFolder(tmp_path).save(run)
    loaded = load_model(tmp_path / MODEL_FILE)
    assert loaded.config == CONFIG
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, run.averaged_model().state_dict()[name]), name
    assert class_names_beside(tmp_path / MODEL_FILE) == ("left", "right")
    assert class_names_beside(tmp_path / "deeper" / "x") == ()


def test_metrics_of_repeated_steps_are_dropped(tmp_path: Path) -> None:
    run = trainer()
    run.run(until=4, report_every=2, on_report=RunFolder(tmp_path).append)
    RunFolder(tmp_path).save(run)
    run.run(until=8, report_every=2, on_report=RunFolder(tmp_path).append)
    with open(tmp_path / METRICS_FILE, "a") as file:
        file.write('{"step": 9, "lo')  # cut short by a crash
    RunFolder(tmp_path).resume(trainer())
    steps = [json.loads(line)["step"] for line in (tmp_path / METRICS_FILE).read_text().splitlines()]
    assert steps == [2, 4]


def test_divergence_is_an_error() -> None:
    run = trainer()
    with torch.no_grad():
        first(run).fill_(float("nan"))
    with pytest.raises(TrainingDivergedError, match="step 1: the loss and the balance loss is no longer finite"):
        run.run(report_every=3)


def test_divergence_names_step_and_tensor_and_leaves_the_weights() -> None:
    run = trainer()
    run.run(until=3)
    before = weights(run)
    chosen = run.parameters["blocks.1.moe.experts.w13"]
    hook = chosen.register_hook(lambda grad: grad * float("inf") if run.step == 4 else grad)
    run.train_step()
    good = weights(run)
    with pytest.raises(TrainingDivergedError) as error:
        run.run(until=7)
    hook.remove()
    text = str(error.value)
    assert "step 5: the gradient of blocks.1.moe.experts.w13 is no longer finite; 1 of " in text
    assert not torch.equal(before["model.blocks.1.moe.experts.w13"], good["model.blocks.1.moe.experts.w13"])
    assert all(tensor.isfinite().all() for tensor in run.state().values())
    assert run.optimizer.updates.item() == 6  # of 7 steps


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_after_the_step(number: signal.Signals) -> None:
    run = trainer()
    before = signal.getsignal(number)
    with stop_on_signals() as stop:
        run.run(should_stop=stop, on_step=lambda step: os.kill(os.getpid(), number) if step == 3 else None)
        assert signal.getsignal(number) == before  # a second signal acts as usual
    assert (run.step, stop.signal) == (3, number)


def test_schedule() -> None:
    settings = TrainingSettings(steps=100, learning_rate=1.0, warmup_steps=10, schedule="cosine")
    rates = [settings.learning_rate_at(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.525)
    assert 0.05 < rates[99] < 0.06
    assert replace(settings, schedule="constant").learning_rate_at(99) == 1.0


def test_dense_model_trains() -> None:
    run = trainer(config=replace(CONFIG, num_experts=0))
    run.run(until=3)
    assert run.report().expert_load == ()


def test_bf16_autocast_keeps_fp32_weights() -> None:
    run = trainer(replace(SETTINGS, dtype="bf16", flip=True))
    reports: list[TrainingReport] = []
    run.run(on_report=reports.append)
    assert all(param.dtype == torch.float32 for param in run.parameters.values())
    assert math.isfinite(reports[-1].loss)


def test_checks() -> None:
    for field, value in (("steps", 0), ("batch_size", 0), ("learning_rate", 0.0), ("ema_decay", 1.0), ("seed", -1),
                         ("schedule", "x"), ("dtype", "fp8"), ("grad_clip", float("nan"))):  # fmt: skip
        with pytest.raises(ValueError, match=f"{field}: got"):
            replace(SETTINGS, **{field: value})
    with pytest.raises(ValueError, match="got 1 x 8 x 8 pixels, expected 3 x 8 x 8"):
        trainer(config=replace(CONFIG, in_channels=3))
    with pytest.raises(ValueError, match="got 2 classes, expected at most 1"):
        trainer(config=replace(CONFIG, num_classes=1))
    with pytest.raises(ValueError, match="batch_size: got 64"):
        trainer(replace(SETTINGS, batch_size=64))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": "bf16", "micro_batches": 2, "flip": True},
        {"dtype": "bf16-weights", "moments": "bf16", "ema_dtype": "bf16", "recompute_blocks": 1, "micro_batches": 2},
        {"objective": "ddpm", "dtype": "bf16-weights"},
        {"dtype": "bf16-stochastic", "moments": "bf16"},
    ],
    ids=["fp32", "bf16", "bf16-weights", "ddpm", "bf16-stochastic"],
)
def test_step_does_not_wait_for_the_gpu(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    with use_backend("triton"):
        run = Trainer(DiT(replace(CONFIG, hidden_size=64)), bars(), replace(SETTINGS, **options), "cuda")
        run.train_step()  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(5):  # past the end of an epoch
                run.train_step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert math.isfinite(run.report().loss)
