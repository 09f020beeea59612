"""What the ranks run to test the trainer: whole trainings, checkpoints, stops and broken numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.ranks import rank_device
from dit_moe import DiT, DiTConfig
from dit_moe.data import ImageDataset
from dit_moe.parallel import ParallelConfig, full_state_dict
from dit_moe.runs import RunFolder
from dit_moe.training import Trainer, TrainingDivergedError, TrainingReport, TrainingSettings
from dit_moe.training.ranks import AgreedStop
from dit_moe.training.shards import local_part

from .scenarios import DDP, DDP_EP2, FSDP, FSDP_EP2

CONFIG = DiTConfig(
    input_size=8, patch_size=4, in_channels=1, hidden_size=32, depth=2, num_heads=2, mlp_ratio=2.0, num_experts=4,
    num_shared_experts=1, num_classes=3, learn_sigma=False, balance_alpha=0.05,
)  # fmt: skip
SETTINGS = TrainingSettings(
    steps=50, batch_size=8, learning_rate=1e-3, warmup_steps=5, grad_clip=0.5, flip=True, ema_decay=0.9, seed=3
)

KINDS = {"ddp": DDP, "fsdp": FSDP, "fsdp_ep2": FSDP_EP2, "ddp_ep2": DDP_EP2}


def pictures(count: int = 40) -> ImageDataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=generator)
    return ImageDataset("pictures", images, torch.arange(count) % 3, ("a", "b", "c"))


def new_trainer(parallel: ParallelConfig | None = None, seed: int = 0, **changes: Any) -> Trainer:
    """Random everywhere: a fresh model predicts zero and has hardly a gradient."""
    torch.manual_seed(seed)
    model = DiT(CONFIG)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "pos_embed":
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return Trainer(model, pictures(), replace(SETTINGS, **changes), rank_device(), parallel)


def whole(run: Trainer) -> dict[str, Tensor]:
    """The state without what a tensor's spreading does to it, on every rank."""
    return {name: tensor.clone() for name, tensor in full_state_dict(run.state(), rank0_only=False).items()}


def trained(parallel: ParallelConfig | None = None, **changes: Any) -> dict[str, Any]:
    run = new_trainer(parallel, **changes)
    reports: list[TrainingReport] = []
    run.run(report_every=1, on_report=reports.append)
    average = run.averaged_model()
    return {
        "reports": [{**report.to_dict(), "images_per_second": 0} for report in reports],
        "state": whole(run),
        "average": None if average is None else {name: tensor.cpu() for name, tensor in average.state_dict().items()},
    }


def trainer_alone(rank: int, num_ranks: int, folder: Path) -> dict[str, Any]:
    """One process without torch.distributed, on its GPU."""
    return trained()


def trainer_ddp(rank: int, num_ranks: int, folder: Path) -> dict[str, Any]:
    return trained(DDP)


def trainer_fsdp(rank: int, num_ranks: int, folder: Path) -> dict[str, Any]:
    return trained(FSDP)


def trainer_ddp_ep2(rank: int, num_ranks: int, folder: Path) -> dict[str, Any]:
    return trained(DDP_EP2)


def trainer_fsdp_ep2(rank: int, num_ranks: int, folder: Path) -> dict[str, Any]:
    return trained(FSDP_EP2)


def trainer_variants(rank: int, num_ranks: int, folder: Path) -> dict[str, Any]:
    """Micro-batches, recomputation and bf16 on several ranks: the losses of ten steps of each."""
    losses = {}
    for name, parallel in (("ddp", DDP), ("fsdp", FSDP), ("fsdp_ep2", FSDP_EP2)):
        for variant in VARIANTS:
            reports = trained(parallel, **VARIANTS[variant])["reports"]
            losses[name, variant] = [report["loss"] for report in reports]
    return losses


VARIANTS: dict[str, dict[str, Any]] = {
    "micro": {"steps": 10, "micro_batches": 2},
    "recompute": {"steps": 10, "recompute_blocks": 2},
    "bf16": {"steps": 10, "dtype": "bf16"},
    "bf16-weights": {"steps": 10, "dtype": "bf16-weights", "micro_batches": 2, "moments": "bf16"},
    "bf16-stochastic": {"steps": 10, "dtype": "bf16-stochastic", "moments": "bf16", "ema_dtype": "bf16"},
}


def trainer_saves(rank: int, num_ranks: int, folder: Path) -> dict[str, Any]:
    """Checkpoints after 6 of 12 steps, and how each run then ended; one of them is written in a thread."""
    ends = {}
    for name, parallel in KINDS.items():
        run = new_trainer(parallel, steps=12, ema_dtype="bf16" if name == "fsdp" else "fp32")
        place = RunFolder(folder.parent / name, keep=1, asynchronous=name == "fsdp")
        run.run(until=6)
        place.save(run)
        run.run()
        place.close()
        ends[name] = whole(run)
    return ends


def trainer_resumes(rank: int, num_ranks: int, folder: Path) -> dict[str, Any]:
    """Each checkpoint taken up by every kind of run, from weights that are others on every rank."""
    ends = {}
    for saved, parallel in [*KINDS.items()] + [("fsdp_ep2", DDP), ("ddp", FSDP)]:
        run = new_trainer(parallel, seed=rank + 5, steps=12, ema_dtype="bf16" if saved == "fsdp" else "fp32")
        RunFolder(folder.parent / saved).resume(run)
        assert run.step == 6
        run.run()
        ends[saved, parallel.data_parallel, parallel.expert_parallel] = whole(run)
    return ends


LEAST_STATE: dict[str, Any] = {
    "steps": 12, "dtype": "bf16-stochastic", "moments": "bf16", "ema_device": "cpu", "ema_every": 2,
    "recompute_blocks": 2,
}  # fmt: skip


def trainer_least_state(rank: int, num_ranks: int, folder: Path) -> dict[str, Any]:
    """Eight bytes a parameter, saved after 6 of 12 steps and taken up again: losses, ends and bytes of this rank."""
    found = {}
    for name, parallel in (("fsdp", FSDP), ("fsdp_ep2", FSDP_EP2)):
        run, reports = new_trainer(parallel, **LEAST_STATE), []
        place = RunFolder(folder.parent / f"least_{name}", keep=1)
        run.run(until=6, report_every=1, on_report=reports.append)
        place.save(run)
        run.run(report_every=1, on_report=reports.append)
        again = new_trainer(parallel, seed=rank + 5, **LEAST_STATE)
        place.resume(again)
        again.run()
        average = run.averaged_model()
        found[name] = {
            "losses": [report.loss for report in reports],
            "state": whole(run),
            "again": whole(again),
            "average": None if average is None else average.state_dict(),
            "bytes": bytes_held(run),
        }
    return found


def bytes_held(run: Trainer) -> dict[str, int]:
    """Bytes of this rank's parts, the gradients being those of one more step, and elements in all."""
    seen: dict[str, Tensor] = {}
    run.optimizer.step = lambda *args, **options: seen.update(run.optimizer.gradients())  # type: ignore[method-assign]
    run.train_step()
    optimizer = run.optimizer
    parts = {
        "weights": optimizer.weights.values(),
        "parameters": run.parameters.values(),
        "gradients": seen.values(),
        "moments": [*optimizer.exp_avg.values(), *optimizer.exp_avg_sq.values()],
        "averages": run.averages.tensors.values(),
    }
    held = {name: sum(local_part(tensor).nbytes for tensor in tensors) for name, tensors in parts.items()}
    return held | {"elements": sum(local_part(param).numel() for param in run.parameters.values())}


def trainer_stops(rank: int, num_ranks: int, folder: Path) -> dict[str, Any]:
    """The second rank alone wants to stop after step 3."""
    run = new_trainer(DDP)
    stop = AgreedStop(lambda: rank == 1 and run.step >= 3)
    run.run(should_stop=stop)
    return {"step": run.step}


def trainer_breaks(rank: int, num_ranks: int, folder: Path) -> dict[str, Any]:
    """A gradient that is infinite on the last rank alone ends all, with the same message."""
    run = new_trainer(FSDP)
    name = "blocks.1.moe.gate.weight"
    if rank == num_ranks - 1:
        original = run.objective.losses
        run.objective.losses = lambda *args: original(*args) * (float("inf") if run.step == 2 else 1)  # type: ignore
    try:
        run.run(until=5)
    except TrainingDivergedError as error:
        return {"message": str(error), "finite": all(bool(t.isfinite().all()) for t in whole(run).values())}
    return {"message": f"nothing broke {name}", "finite": False}


def trainer_samples(rank: int, num_ranks: int, folder: Path) -> dict[str, Any]:
    """The averaged weights in the spread model give what the averaged model gives, and training goes on as before.

    Nothing asks for a state dict between sampling and training: FSDP would free gathered parameters for that.
    """
    outputs: dict[str, Any] = {}
    x, t, y = torch.ones(2, 1, 8, 8), torch.tensor([0.2, 0.7]), torch.tensor([0, 2])
    for name, parallel in (("ddp", DDP), ("fsdp", FSDP), ("fsdp_ep2", FSDP_EP2)):
        run = new_trainer(parallel, steps=8)
        run.run(until=4)
        with run.averaged_weights() as model, torch.no_grad():
            model.eval()
            outputs[name, "inside"] = model(x, t, y)
        run.run()
        outputs[name, "state"] = whole(run)
        again = new_trainer(parallel, steps=8)
        again.run(until=4)
        average = again.averaged_model()
        if average is not None:
            outputs[name, "outside"] = average(x, t, y)
    return outputs
