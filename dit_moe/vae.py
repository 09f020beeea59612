"""Latents to pixels and back by Stable Diffusion's autoencoder, from the optional package diffusers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LATENT_SCALE = 0.18215
"""Factor that brings the autoencoder's latents to about unit variance; the official models are trained at it."""


class LatentCodec:
    """Encode pixels to the latents that the official models work on, and decode latents to pixels.

    Args:
        autoencoder: a module with diffusers' AutoencoderKL interface: encode(x).latent_dist and decode(z).sample.
        scale: factor from the autoencoder's latents to the model's.
    """

    def __init__(self, autoencoder: Any, scale: float = LATENT_SCALE) -> None:
        self.autoencoder, self.scale = autoencoder.eval().requires_grad_(False), scale

    @torch.no_grad()
    def decode(self, latents: Tensor, batch_size: int = 8) -> Tensor:
        """Pixels of latents, a few at a time, since decoding needs far more memory than sampling.

        Args:
            latents: (B, 4, h, w) float.
            batch_size: latents decoded at once, at least 1.
        Returns:
            (B, 3, 8h, 8w) float32, about -1 to 1.
        Raises:
            ValueError: batch_size < 1 or latents of the wrong shape.
        """
        self._check("latents", latents, self.autoencoder.config.latent_channels, batch_size)
        parts = [self._run_decoder(part) for part in latents.split(batch_size)]
        return torch.cat(parts).float()

    @torch.no_grad()
    def encode(self, pixels: Tensor, batch_size: int = 8, generator: torch.Generator | None = None) -> Tensor:
        """Latents of pixels, drawn from the autoencoder's distribution as in training.

        Args:
            pixels: (B, 3, H, W) float, -1 to 1.
            batch_size: images encoded at once, at least 1.
            generator: source of the draw.
        Returns:
            (B, 4, H/8, W/8) float32.
        Raises:
            ValueError: batch_size < 1 or pixels of the wrong shape.
        """
        self._check("pixels", pixels, self.autoencoder.config.in_channels, batch_size)
        parts = []
        for part in pixels.split(batch_size):
            distribution = self.autoencoder.encode(self._as_weights(part)).latent_dist
            parts.append(distribution.sample(generator=generator) * self.scale)
        return torch.cat(parts).float()

    @torch.no_grad()
    def moments(self, pixels: Tensor, batch_size: int = 8) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the distribution that `encode` draws from, scaled as its latents.

        Args:
            pixels: (B, 3, H, W) float, -1 to 1.
            batch_size: images encoded at once, at least 1.
        Returns:
            Two (B, 4, H/8, W/8) float32.
        Raises:
            ValueError: batch_size < 1 or pixels of the wrong shape.
        """
        self._check("pixels", pixels, self.autoencoder.config.in_channels, batch_size)
        parts = [self.autoencoder.encode(self._as_weights(part)).latent_dist for part in pixels.split(batch_size)]
        means = torch.cat([part.mean for part in parts]).float() * self.scale
        return means, torch.cat([part.std for part in parts]).float() * self.scale

    def _run_decoder(self, latents: Tensor) -> Tensor:
        return self.autoencoder.decode(self._as_weights(latents) / self.scale).sample

    def _as_weights(self, x: Tensor) -> Tensor:
        weight = next(self.autoencoder.parameters())
        return x.to(weight.device, weight.dtype)

    @staticmethod
    def _check(name: str, tensor: Tensor, channels: int, batch_size: int) -> None:
        if tensor.ndim != 4 or tensor.shape[1] != channels or tensor.shape[0] < 1:
            raise ValueError(
                f"{name}: got shape {tuple(tensor.shape)}, expected (B, {channels}, height, width), B >= 1"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size: got {batch_size}, expected at least 1")


def load_codec(
    path: str | os.PathLike, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> LatentCodec:
    """The autoencoder from a local folder in diffusers' format (config.json and weights); nothing is downloaded.

    Args:
        path: the folder, such as a copy of sd-vae-ft-mse (images) or sd-vae-ft-ema (named in the paper).
        device, dtype: where and how it runs; float16 overflows in some autoencoders, float32 and bfloat16 do not.
    Returns:
        LatentCodec.
    Raises:
        ImportError: diffusers is not installed.
        FileNotFoundError: the folder or its config.json is not there.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "is not a folder"
        raise FileNotFoundError(
            f"VAE: {folder} {what}; expected a local copy of an AutoencoderKL in diffusers' format, such as "
            "stabilityai/sd-vae-ft-mse (config.json and diffusion_pytorch_model.safetensors)"
        )
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ImportError("decoding latents needs the package diffusers: pip install diffusers") from error
    autoencoder = AutoencoderKL.from_pretrained(
        str(folder), torch_dtype=dtype, local_files_only=True, use_safetensors=True
    )
    return LatentCodec(autoencoder.to(device))
