"""Sample many images for evaluation: resumable, shared between ranks, every image fixed by its index alone.

An image's noise is seeded by (seed, index) and its class follows from its index, so neither the number of ranks nor the
order of work changes it. Batch size changes it by no more than rounding: matrix products may sum in another order.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .checkpoint.files import written_aside
from .engine import SamplingEngine, StepHook
from .guidance import Guidance
from .images import save_npz, to_uint8
from .sampling import draw_noise, sample_ddim, sample_ddpm, sample_rectified_flow

SAMPLERS: dict[str, Callable[..., Tensor]] = {"rf": sample_rectified_flow, "ddpm": sample_ddpm, "ddim": sample_ddim}
SETTINGS_FILE = "settings.json"
_NOISE_STREAM, _CLASS_STREAM = 1, 2


@dataclass(frozen=True)
class SamplingSettings:
    """Everything beside the model that fixes the images; a folder of shards holds images of one such record.

    Args:
        num_images: N; ADM's protocol takes 50,000.
        sampler: "rf", "ddpm" or "ddim".
        steps: sampling steps, or a respacing text for "ddpm" and "ddim".
        cfg_scale: guidance; 1 is none.
        guidance_channels: channels guided; None takes the sampler's default (all for "rf", 3 for the others).
        guidance_interval, cfg_schedule: where and how guidance changes, by the names of `guidance.Guidance`.
        eta: share of fresh noise of "ddim"; 0 for the others.
        clip: limit predicted clean samples to [-1, 1] ("ddpm" and "ddim" in pixel space).
        seed: at least 0.
        classes: "balanced" takes class index % num_classes, "random" draws each class evenly by (seed, index).
        shard_size: images in one file, the unit of work that is shared out and resumed.
    Raises:
        ValueError: a value out of range.
    """

    num_images: int
    sampler: str = "rf"
    steps: int | str = 50
    cfg_scale: float = 1.5
    guidance_channels: int | None = None
    eta: float = 0.0
    clip: bool = False
    seed: int = 0
    classes: str = "balanced"
    shard_size: int = 500
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    cfg_schedule: str = "constant"

    def __post_init__(self) -> None:
        for name, least in (("num_images", 1), ("shard_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least {least}")
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler: got {self.sampler!r}, expected one of {sorted(SAMPLERS)}")
        if self.classes not in ("balanced", "random"):
            raise ValueError(f"classes: got {self.classes!r}, expected 'balanced' or 'random'")
        if self.eta and self.sampler != "ddim":
            raise ValueError(f"eta: got {self.eta} with sampler {self.sampler!r}, expected 0 ('ddim' alone takes it)")
        if self.sampler == "rf" and (self.clip or isinstance(self.steps, str)):
            raise ValueError("clip and respacing texts for steps belong to 'ddpm' and 'ddim', got sampler 'rf'")
        object.__setattr__(self, "guidance_interval", tuple(self.guidance_interval))  # JSON knows lists only
        Guidance(self.cfg_scale, self.guidance_channels, self.guidance_interval, self.cfg_schedule)  # checks them

    def shards(self) -> list[range]:
        """The image indices of each shard."""
        stops = range(self.shard_size, self.num_images + self.shard_size, self.shard_size)
        return [range(stop - self.shard_size, min(stop, self.num_images)) for stop in stops]


def class_of(index: int, settings: SamplingSettings, num_classes: int) -> int:
    """The class of an image, from its index (and the seed where classes are random)."""
    if settings.classes == "balanced":
        return index % num_classes
    sequence = np.random.SeedSequence([settings.seed, index, _CLASS_STREAM])
    return int(np.random.Generator(np.random.PCG64(sequence)).integers(num_classes))


def generator_of(index: int, seed: int) -> torch.Generator:
    """The source of an image's noise: its first draw is the starting noise, later ones the sampler's steps."""
    state = np.random.SeedSequence([seed, index, _NOISE_STREAM]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)  # one bit less, since torch takes signed seeds


def sample_shards(
    model: Any,
    folder: str | os.PathLike,
    settings: SamplingSettings,
    *,
    batch_size: int = 32,
    rank: int = 0,
    world_size: int = 1,
    decode: Callable[[Tensor], Tensor] | None = None,
    decoder: str = "none",
    on_progress: Callable[[int, int], object] | None = None,
) -> None:
    """Sample this rank's shards that are not yet there; run again after a stop to go on.

    Args:
        model: a DiT on its device, in the dtype to sample in, or a SamplingEngine around one; one is made for a DiT.
        folder: where shards and settings.json go; made if absent, shared by all ranks.
        settings: what to sample.
        batch_size: images sampled at once.
        rank, world_size: this process and how many share the work; any number may go on with another's folder.
        decode: latents (B, C, H, W) -> pixels (B, 1 or 3, H', W') in [-1, 1]; None where the model makes pixels.
        decoder: name of the decoder, kept with the settings so that a run with another one is refused.
        on_progress: called with (images done, images to do) of this rank after each batch.
    Raises:
        ValueError: arguments out of range, images that are not finite, or a folder of other settings or weights.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, expected at least 1")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: got {rank} of world_size {world_size}, expected 0 to world_size - 1")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    engine = model if isinstance(model, SamplingEngine) else SamplingEngine(model)
    _claim_folder(folder, _record(engine.model, settings, decoder))
    todo = [shard for shard in settings.shards()[rank::world_size] if not _shard_path(folder, shard).exists()]
    total, done = sum(map(len, todo)), 0
    for shard in todo:
        parts = []
        for start in range(shard.start, shard.stop, batch_size):
            indices = range(start, min(start + batch_size, shard.stop))
            pixels = sample_indices(engine, indices, settings)
            parts.append(to_uint8(pixels if decode is None else decode(pixels)))
            done += len(indices)
            if on_progress is not None:
                on_progress(done, total)
        class_ids = [class_of(index, settings, engine.config.num_classes) for index in shard]
        with written_aside(_shard_path(folder, shard)) as aside, open(aside, "wb") as file:
            np.savez(file, images=np.concatenate(parts), class_ids=np.array(class_ids, dtype=np.int64))


def sample_indices(
    model: Any, indices: range, settings: SamplingSettings, *, on_step: StepHook | None = None
) -> Tensor:
    """The model's images of some indices as one batch: (len(indices), C, H, W) float32 (or float64), not decoded.

    `on_step` is called after each step, as the samplers do.
    """
    class_ids = torch.tensor([class_of(index, settings, model.config.num_classes) for index in indices])
    generators = [generator_of(index, settings.seed) for index in indices]
    return sample_batch(model, class_ids, generators, settings, on_step=on_step)


def sample_batch(
    model: Any,
    class_ids: Tensor,
    generators: Sequence[torch.Generator],
    settings: SamplingSettings,
    *,
    on_step: StepHook | None = None,
) -> Tensor:
    """Images of given classes from given sources of noise.

    Args:
        model: a DiT, or a SamplingEngine around one.
        class_ids: (B,) int64, on any device.
        generators: one for each image.
        settings: how to sample; numbers and seeds of images are not read.
        on_step: called after each step, as the samplers do.
    Returns:
        (B, C, H, W) float32 (or float64), not decoded.
    """
    device, config = next(model.parameters()).device, model.config
    noise = draw_noise(
        (len(generators), config.in_channels, config.input_size, config.input_size), generators, device=device
    )
    options: dict[str, Any] = {
        "on_step": on_step,
        "guidance_interval": settings.guidance_interval,
        "cfg_schedule": settings.cfg_schedule,
    }
    if settings.guidance_channels is not None:
        options["guidance_channels"] = settings.guidance_channels
    if settings.sampler != "rf":
        options.update(generator=generators, clip=settings.clip)
    if settings.sampler == "ddim":
        options["eta"] = settings.eta
    sampler = SAMPLERS[settings.sampler]
    return sampler(model, noise, class_ids.to(device), settings.steps, settings.cfg_scale, **options)


def merge_shards(folder: str | os.PathLike, path: str | os.PathLike) -> int:
    """Join a folder's shards into one .npz file in ADM's format, in the order of the images' indices.

    Args:
        folder: as given to sample_shards.
        path: the file to write.
    Returns:
        The number of images written.
    Raises:
        FileNotFoundError: no settings.json, or shards are missing; the message says how many images.
        ValueError: a shard holds another number of images than its name says.
    """
    folder = Path(folder)
    if not (folder / SETTINGS_FILE).is_file():
        raise FileNotFoundError(f"{folder / SETTINGS_FILE}: not there; is {folder} a folder of sample_shards?")
    settings = SamplingSettings(**json.loads((folder / SETTINGS_FILE).read_text())["sampling"])
    shards = settings.shards()
    missing = [shard for shard in shards if not _shard_path(folder, shard).exists()]
    if missing:
        raise FileNotFoundError(
            f"{folder}: {sum(map(len, missing))} of {settings.num_images} images are not sampled yet, the first in "
            f"{_shard_path(folder, missing[0]).name}; run sample_shards again"
        )
    class_ids: list[np.ndarray] = []
    for shard in shards:
        with np.load(_shard_path(folder, shard), allow_pickle=False) as file:
            class_ids.append(file["class_ids"])
    save_npz(path, _shard_images(folder, shards), settings.num_images, np.concatenate(class_ids))
    return settings.num_images


def rank_from_environment(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """(rank, world_size) as torchrun sets them, (0, 1) without torchrun."""
    return int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1))


def weights_digest(model: nn.Module, elements: int = 64) -> str:
    """A short digest of up to `elements` values of each tensor of the state dict, the same on every device."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().reshape(-1)
        stride = max(1, flat.numel() // elements)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(flat[::stride].contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _record(model: Any, settings: SamplingSettings, decoder: str) -> dict[str, Any]:
    return {
        "sampling": asdict(settings),
        "model": model.config.to_dict(),
        "weights": weights_digest(model),
        "decoder": decoder,
    }


def _claim_folder(folder: Path, record: dict[str, Any]) -> None:
    """Write the record if there is none, and refuse a folder that holds another; ranks may do so at once."""
    path = folder / SETTINGS_FILE
    if not path.exists():
        with written_aside(path) as aside:
            aside.write_text(json.dumps(record, indent=2) + "\n")
    found = json.loads(path.read_text())
    # A folder of an older release lacks what was added since, and was sampled with its defaults.
    found["sampling"] = asdict(SamplingSettings(**found["sampling"]))
    changed = [
        f"{part}.{key}: {found[part].get(key)!r} there, {value!r} now"
        for part in ("sampling", "model")
        for key, value in record[part].items()
        if found[part].get(key) != value
    ]
    changed += [
        f"{key}: {found[key]} there, {record[key]} now" for key in ("weights", "decoder") if found[key] != record[key]
    ]
    if changed:
        raise ValueError(f"{folder} holds images of other settings ({'; '.join(changed)}); take another folder")


def _shard_path(folder: Path, shard: range) -> Path:
    return folder / f"shard-{shard.start:07d}-{shard.stop:07d}.npz"


def _shard_images(folder: Path, shards: list[range]) -> Iterator[np.ndarray]:
    for shard in shards:
        path = _shard_path(folder, shard)
        with np.load(path, allow_pickle=False) as file:
            images = file["images"]
        if len(images) != len(shard):
            raise ValueError(f"{path}: got {len(images)} images, expected {len(shard)}")
        yield images
