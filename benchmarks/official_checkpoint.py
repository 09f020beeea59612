"""Write, load and sample a checkpoint of the official layout: `python -m benchmarks.official_checkpoint --help`.

It answers whether a released file of this size would load and sample here, in what time and memory. The weights are
random (the released files are not ours to ship), so the pictures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

import torch

from dit_moe import DiT, export_state_dict, load_checkpoint, model_config, sample_rectified_flow
from dit_moe.sampling import draw_noise

from . import env

T = TypeVar("T")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; prints and writes one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--preset", default="DiT-MoE-G/2-16E2A", help="name in dit_moe.DiT_models")
    parser.add_argument("--images", type=int, default=8, help="images to sample; guidance doubles the batch")
    parser.add_argument("--steps", type=int, default=50, help="Euler steps")
    parser.add_argument("--cfg", type=float, default=4.0, help="guidance scale")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="two narrow blocks, for a smoke run")
    parser.add_argument("--folder", type=Path, default=None, help="where the file goes; a temporary folder by default")
    parser.add_argument("--out", type=Path, default=None, help="JSON file of the results")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        result = measure(options, Path(folder) / "official.pt")
    given = list(sys.argv[1:] if arguments is None else arguments)
    result["environment"] = env.describe(given, options.device, "official_checkpoint")
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
    return 0


def measure(options: argparse.Namespace, path: Path) -> dict[str, Any]:
    """Times in seconds and memory in GiB of writing, loading and sampling twice with one seed."""
    overrides = {"depth": 2, "hidden_size": 64, "num_heads": 4, "input_size": 8} if options.tiny else {}
    device = torch.device(options.device)
    result: dict[str, Any] = {"preset": options.preset, "steps": options.steps, "images": options.images}
    # Another process writes the file, so that what it held does not count in the peak of the one that loads.
    writer = multiprocessing.get_context("spawn").Process(
        target=write_random, args=(model_config(options.preset, **overrides), path, device)
    )
    _, result["write_s"] = _timed(lambda: _run(writer), device)
    result["file_gib"] = path.stat().st_size / 2**30
    host_before = _host_peak_gib()
    # The timm layout's head count is in no key; the presets know it, a tiny model's must be told.
    heads = overrides.get("num_heads")
    model, result["load_s"] = _timed(
        lambda: load_checkpoint(path, num_heads=heads, device=device, dtype=torch.bfloat16), device
    )
    result["load_host_peak_growth_gib"] = _host_peak_gib() - host_before
    result["parameters"] = sum(param.numel() for param in model.parameters())

    def sample() -> torch.Tensor:
        size = (options.images, model.config.in_channels, model.config.input_size, model.config.input_size)
        noise = draw_noise(size, torch.Generator().manual_seed(2024), device=device)
        class_ids = torch.arange(options.images, device=device) % model.config.num_classes
        return sample_rectified_flow(model, noise, class_ids, steps=options.steps, cfg_scale=options.cfg)

    first, result["sample_first_s"] = _timed(sample, device)
    second, result["sample_s"] = _timed(sample, device)
    result["finite"], result["repeatable"] = bool(first.isfinite().all()), bool(torch.equal(first, second))
    result["gpu_peak_gib"] = torch.cuda.max_memory_reserved(device) / 2**30 if device.type == "cuda" else None
    return result


def write_random(config: Any, path: Path, device: torch.device) -> None:
    """A file as the official release's: fp16 tensors, one per expert and matrix, flat in official keys."""
    with torch.device("meta"):
        model = DiT(config).half()
    generator = torch.Generator(device).manual_seed(0)
    state = {}
    for key, tensor in export_state_dict(model).items():
        scale = 0.02 if tensor.ndim < 2 else tensor.shape[-1] ** -0.5
        values = torch.randn(tensor.shape, generator=generator, device=device, dtype=torch.float16)
        state[key] = values.mul_(scale).cpu()
    torch.save(state, path)


def _timed(run: Callable[[], T], device: torch.device) -> tuple[T, float]:
    start = time.perf_counter()
    value = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return value, time.perf_counter() - start


def _run(process: BaseProcess) -> None:
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"writing the file failed with exit code {process.exitcode}")


def _host_peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    raise SystemExit(main())
