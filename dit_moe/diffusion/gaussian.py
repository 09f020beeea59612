"""Gaussian diffusion as DiT uses it: linear schedule, noise prediction, learned-range variance, DDPM and DDIM steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, repeat
from typing import NamedTuple

import torch
from torch import Tensor

Step = int | Tensor | Mapping[str, Tensor]
"""A kept step for the whole batch, a (B,) integer tensor of them, or one step's coefficients as () tensors by name."""


class Moments(NamedTuple):
    """Mean and variance of p(x_{t-1} | x_t), and the clean sample they imply; each (B, C, H, W)."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    pred_x0: Tensor

    def draw(self, noise: Tensor) -> Tensor:
        """x_{t-1} that standard normal noise (B, C, H, W) picks."""
        return self.mean + (0.5 * self.log_variance).exp() * noise


class DiffusionLoss(NamedTuple):
    """Training terms of each sample, (B,): noise error, variational bound in bits per dimension, and their sum."""

    mse: Tensor
    vb: Tensor
    loss: Tensor


def linear_betas(num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 2e-2) -> Tensor:
    """Noise variances rising linearly; for other than 1000 steps both ends are scaled to keep the total noise.

    Returns:
        (num_steps,) float64.
    Raises:
        ValueError: num_steps < 1, or variances outside (0, 1).

    Source: Ho et al. 2020 (DDPM), section 4.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps: got {num_steps}, expected at least 1")
    scale = 1000 / num_steps
    return torch.linspace(beta_start * scale, beta_end * scale, num_steps, dtype=torch.float64)


def respaced_timesteps(num_steps: int, respacing: str | int | None = None) -> list[int]:
    """The steps of a long process that a shorter one keeps, in rising order.

    Args:
        num_steps: length of the full process.
        respacing: None or "" keeps all; "250" (or 250) spreads 250 steps evenly from the first to the last;
            "10,20" does so in each of two equal sections; "ddim10" takes every k-th step from 0, for the k that
            gives 10.
    Returns:
        Distinct step indices.
    Raises:
        ValueError: the text cannot be read, or that many steps cannot be had.

    Source: Nichol and Dhariwal 2021 (improved DDPM), section 4; Song et al. 2020 (DDIM) for the stride.
    """
    text = "" if respacing is None else str(respacing).strip()
    if not text:
        return list(range(num_steps))
    try:
        counts = [int(part) for part in text.removeprefix("ddim").split(",")]
    except ValueError:
        raise ValueError(f"respacing: got {respacing!r}, expected such as '250', '10,20' or 'ddim50'") from None
    if min(counts) < 1:
        raise ValueError(f"respacing: got {respacing!r}, expected counts of at least 1")
    if text.startswith("ddim"):
        return _strided_timesteps(num_steps, counts)
    size, extra = divmod(num_steps, len(counts))
    steps: list[int] = []
    start = 0
    for section, count in enumerate(counts):
        length = size + (section < extra)
        if count > length:
            raise ValueError(f"respacing: got {count} steps for a section of {length} steps")
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        # Summed, not multiplied: where a position falls between two steps, rounding then picks the official step.
        positions = accumulate(repeat(stride, count - 1), initial=0.0)
        steps += [start + round(position) for position in positions]
        start += length
    return steps


def _strided_timesteps(num_steps: int, counts: Sequence[int]) -> list[int]:
    if len(counts) != 1:
        raise ValueError(f"respacing: got {len(counts)} counts after 'ddim', expected one")
    for stride in range(1, num_steps + 1):
        steps = range(0, num_steps, stride)
        if len(steps) == counts[0]:
            return list(steps)
    possible = {len(range(0, num_steps, stride)) for stride in range(1, num_steps + 1)}
    near = sorted(sorted(possible, key=lambda count: abs(count - counts[0]))[:2])
    raise ValueError(f"respacing: no stride over {num_steps} steps gives {counts[0]}; the nearest are {near}")


class GaussianDiffusion:
    """A discrete Gaussian diffusion over kept steps 0 (almost clean) to num_steps - 1 (noise), as math on tensors.

    The model predicts the noise and, in as many further channels, where the log variance lies between its bounds.
    Steps `t` in the methods count kept steps: an int for the whole batch or a (B,) integer tensor; `model_times` turns
    them into the times of the full process that the model was trained on. What a sampler needs also takes a step's
    coefficients, from `table`, in place of its number, so that they may lie on the device. Coefficients are computed in
    float64 and rounded to float32, whatever the tensors' dtype: so does the official code, and float64 results then
    agree with its.

    Args:
        betas: (N,) noise variances of the full process, in (0, 1).
        timesteps: the steps to keep, rising; None keeps all.
    Raises:
        ValueError: betas or timesteps out of range.

    Source: Ho et al. 2020 (DDPM); Nichol and Dhariwal 2021 (improved DDPM), equation 15, for the learned range.
    """

    def __init__(self, betas: Tensor | Sequence[float], timesteps: Sequence[int] | None = None) -> None:
        betas = torch.as_tensor(betas, dtype=torch.float64)
        if betas.ndim != 1 or not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError("betas: expected one dimension of values in (0, 1)")
        kept = list(range(len(betas))) if timesteps is None else list(timesteps)
        if not kept or kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= len(betas):
            raise ValueError(f"timesteps: expected rising steps of 0 to {len(betas) - 1}, at least one")
        self.timesteps = kept
        self.num_steps, self.full_steps = len(kept), len(betas)
        alpha_bar = torch.cumprod(1 - betas, 0)[kept]
        previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        self._tables = _coefficient_tables(alpha_bar, previous)
        self._tables["time"] = torch.tensor(kept, dtype=torch.float32)
        self._tables_on: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def model_times(self, t: int | Tensor, batch: int, device: torch.device | str = "cpu") -> Tensor:
        """The full process's times of kept steps t, as the model takes them: (batch,) float32."""
        if isinstance(t, int):
            return torch.full((batch,), float(self.timesteps[t]), device=device)
        return self._table("time", t.device, torch.float32)[t]

    def table(self, name: str) -> Tensor:
        """The coefficient of every kept step: (num_steps,) float32 on the CPU."""
        return self._tables[name]

    def q_sample(self, x0: Tensor, t: int | Tensor, noise: Tensor) -> Tensor:
        """Noisy samples x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) noise (DDPM equation 4).

        Args:
            x0, noise: (B, C, H, W) float.
            t: kept step, int or (B,) int64.
        Returns:
            (B, C, H, W), dtype of x0.
        Raises:
            ValueError: noise of another shape than x0, or t out of range.
        """
        _check_same_shape("noise", noise, "x0", x0)
        return self._at("sqrt_alpha_bar", t, x0) * x0 + self._at("sqrt_one_minus_alpha_bar", t, x0) * noise

    def p_mean_variance(self, model_output: Tensor, x_t: Tensor, t: Step, *, clip: bool = False) -> Moments:
        """Moments of the reverse step from the model's output.

        Args:
            model_output: (B, 2C, H, W) noise and variance position in [-1, 1], or (B, C, H, W) noise alone, which
                takes the fixed variance beta.
            x_t: (B, C, H, W) float.
            t: kept step, int or (B,) int64, or its coefficients.
            clip: limit the predicted clean sample to [-1, 1] (pixels, never latents).
        Returns:
            Moments in the dtype of x_t.
        Raises:
            ValueError: channels that do not fit, or t out of range.
        """
        noise, position = self._split(model_output, x_t)
        pred_x0 = self.predict_x0(x_t, t, noise)
        if clip:
            pred_x0 = pred_x0.clamp(-1, 1)
        mean = self._posterior_mean(pred_x0, x_t, t)
        if position is None:
            log_variance = self._at("log_fixed_variance", t, x_t).expand_as(x_t)
        else:
            log_variance = self._learned_log_variance(position, x_t, t)
        return Moments(mean, log_variance.exp(), log_variance, pred_x0)

    def predict_x0(self, x_t: Tensor, t: Step, noise: Tensor) -> Tensor:
        """The clean sample that x_t and its noise imply (DDPM equation 4 solved for x0): (B, C, H, W)."""
        return self._at("sqrt_recip_alpha_bar", t, x_t) * x_t - self._at("sqrt_recip_alpha_bar_minus_1", t, x_t) * noise

    def ddpm_step(
        self, model_output: Tensor, x_t: Tensor, t: int, noise: Tensor | None = None, *, clip: bool = False
    ) -> Tensor:
        """One ancestral step: a draw of x_{t-1}, or its mean at t = 0.

        Args:
            model_output, x_t, t, clip: as in p_mean_variance, t an int.
            noise: (B, C, H, W) standard normal; may be None at t = 0.
        Returns:
            (B, C, H, W), dtype of x_t.
        Raises:
            ValueError: noise missing or of the wrong shape, t out of range.
        """
        moments = self.p_mean_variance(model_output, x_t, t, clip=clip)
        if t == 0:
            return moments.mean
        return moments.draw(_checked_noise(noise, x_t))

    def ddim_step(
        self,
        model_output: Tensor,
        x_t: Tensor,
        t: int,
        noise: Tensor | None = None,
        *,
        eta: float = 0.0,
        clip: bool = False,
    ) -> Tensor:
        """One DDIM step; eta 0 is deterministic, eta 1 has the noise of DDPM's lower variance bound.

        Args:
            model_output, x_t, t, clip: as in p_mean_variance, t an int; variance channels are ignored.
            noise: (B, C, H, W) standard normal; may be None where eta is 0 or t is 0.
            eta: share of fresh noise, at least 0.
        Returns:
            (B, C, H, W), dtype of x_t.
        Raises:
            ValueError: eta negative, noise missing or of the wrong shape, t out of range.

        Source: Song et al. 2020 (DDIM), equations 12 and 16.
        """
        sigma, direction = self.ddim_spread(t, eta)
        x = self.ddim_mean(model_output, x_t, t, direction, clip=clip)
        return x if t == 0 or eta == 0 else x + sigma * _checked_noise(noise, x_t)

    def ddim_spread(self, t: int, eta: float) -> tuple[float, float]:
        """Factors of the fresh noise and of the predicted noise in a DDIM step.

        Raises:
            ValueError: eta negative, or larger than step t has room for.

        Source: Song et al. 2020 (DDIM), equations 12 and 16.
        """
        if not eta >= 0:
            raise ValueError(f"eta: got {eta}, expected at least 0")
        sigma = eta * self._coefficient("posterior_std", t)
        room = 1 - self._coefficient("alpha_bar_previous", t) - sigma**2
        if room < 0:
            raise ValueError(f"eta: got {eta}, which asks for more noise than step {t} has")
        return sigma, float(torch.tensor(room, dtype=torch.float32).sqrt())

    def ddim_mean(
        self, model_output: Tensor, x_t: Tensor, t: Step, direction: float | Tensor, *, clip: bool = False
    ) -> Tensor:
        """A DDIM step without its fresh noise: (B, C, H, W), dtype of x_t.

        Args:
            model_output, x_t, clip: as in p_mean_variance; variance channels are ignored.
            t: kept step, an int, or its coefficients.
            direction: from ddim_spread, float or () tensor.
        """
        pred_noise, _ = self._split(model_output, x_t)
        pred_x0 = self.predict_x0(x_t, t, pred_noise)
        if clip:
            pred_x0 = pred_x0.clamp(-1, 1)
            pred_noise = self._implied_noise(x_t, t, pred_x0)
        return self._at("sqrt_alpha_bar_previous", t, x_t) * pred_x0 + direction * pred_noise

    def losses(self, model_output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> DiffusionLoss:
        """Training terms of each sample: noise error plus, for a learned variance, the variational bound.

        The bound trains the variance only: its mean is detached. At t = 0 it is the likelihood of 8-bit values in
        [-1, 1], also for latents, as DiT trains.

        Args:
            model_output: (B, 2C, H, W) or (B, C, H, W) float, the model at x_t.
            x0, x_t, noise: (B, C, H, W) float; x_t from q_sample.
            t: (B,) int64 kept steps.
        Returns:
            DiffusionLoss of (B,) tensors in at least float32; vb is zero without variance channels.
        Raises:
            ValueError: shapes that do not fit, or t out of range.

        Source: improved DDPM, section 3.1 (L_hybrid, the bound with weight 1 as DiT trains it).
        """
        _check_same_shape("x_t", x_t, "x0", x0)
        _check_same_shape("noise", noise, "x0", x0)
        dtype = torch.promote_types(torch.promote_types(model_output.dtype, x0.dtype), torch.float32)
        model_output, x0, x_t, noise = (tensor.to(dtype) for tensor in (model_output, x0, x_t, noise))
        pred_noise, position = self._split(model_output, x_t)
        mse = (noise - pred_noise).square().flatten(1).mean(1)
        vb = torch.zeros_like(mse)
        if position is not None:
            frozen = torch.cat([pred_noise.detach(), position], 1)
            vb = self._bound(self.p_mean_variance(frozen, x_t, t), x0, x_t, t)
        return DiffusionLoss(mse, vb, mse + vb)

    def _bound(self, model: Moments, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """KL divergence of the true reverse step from the model's, or the negative log likelihood at t = 0, in bits."""
        true_log_variance = self._at("log_posterior_variance", t, x0)
        difference = self._posterior_mean(x0, x_t, t) - model.mean
        ratio = true_log_variance - model.log_variance
        kl = 0.5 * (ratio.exp() - ratio - 1 + difference.square() * (-model.log_variance).exp())
        likelihood = _log_likelihood_8bit(x0, model.mean, 0.5 * model.log_variance)
        bits = torch.where(t == 0, -likelihood.flatten(1).mean(1), kl.flatten(1).mean(1))
        return bits / math.log(2)

    def _split(self, model_output: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor | None]:
        batch, channels, *size = x_t.shape
        for factor in (1, 2):
            if model_output.shape == (batch, factor * channels, *size):
                output = model_output.to(x_t.dtype)
                return output[:, :channels], output[:, channels:] if factor == 2 else None
        raise ValueError(
            f"model_output: got shape {tuple(model_output.shape)}, expected {(batch, 2 * channels, *size)} or "
            f"{(batch, channels, *size)} for x_t of shape {tuple(x_t.shape)}"
        )

    def _posterior_mean(self, x0: Tensor, x_t: Tensor, t: Step) -> Tensor:
        return self._at("posterior_mean_x0", t, x_t) * x0 + self._at("posterior_mean_x_t", t, x_t) * x_t

    def _learned_log_variance(self, position: Tensor, x_t: Tensor, t: Step) -> Tensor:
        low, high = self._at("log_posterior_variance", t, x_t), self._at("log_beta", t, x_t)
        share = (position + 1) / 2
        return share * high + (1 - share) * low

    def _implied_noise(self, x_t: Tensor, t: Step, x0: Tensor) -> Tensor:
        scaled = self._at("sqrt_recip_alpha_bar", t, x_t) * x_t - x0
        return scaled / self._at("sqrt_recip_alpha_bar_minus_1", t, x_t)

    def _at(self, name: str, t: Step, like: Tensor) -> Tensor:
        """Coefficients of step t in the dtype of `like`, shaped to multiply it."""
        if isinstance(t, Mapping):
            return t[name]
        if isinstance(t, int):
            return torch.full((), self._coefficient(name, t), dtype=like.dtype, device=like.device)
        if t.shape != like.shape[:1] or t.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"t: got {t.dtype} of shape {tuple(t.shape)}, expected int64 of shape ({like.shape[0]},)")
        if t.device.type == "cpu" and t.numel() and not (0 <= int(t.min()) and int(t.max()) < self.num_steps):
            raise ValueError(f"t: got values {int(t.min())} to {int(t.max())}, expected 0 to {self.num_steps - 1}")
        return self._table(name, like.device, like.dtype)[t].view(-1, *[1] * (like.ndim - 1))

    def _coefficient(self, name: str, t: int) -> float:
        if not 0 <= t < self.num_steps:
            raise ValueError(f"t: got {t}, expected 0 to {self.num_steps - 1}")
        return float(self._tables[name][t])

    def _table(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The table on a device, copied there once: a copy at each use would stop the host."""
        key = (name, device, dtype)
        if key not in self._tables_on:
            self._tables_on[key] = self._tables[name].to(device, dtype)
        return self._tables_on[key]


def make_diffusion(respacing: str | int | None = None, num_steps: int = 1000) -> GaussianDiffusion:
    """DiT's diffusion: linear schedule, with the steps that `respacing` keeps (see respaced_timesteps)."""
    return GaussianDiffusion(linear_betas(num_steps), respaced_timesteps(num_steps, respacing))


def _coefficient_tables(alpha_bar: Tensor, previous: Tensor) -> dict[str, Tensor]:
    """Per-step coefficients from the cumulative signal shares (DDPM equations 4, 6 and 7), rounded to float32."""
    alpha = alpha_bar / previous
    beta = 1 - alpha
    variance = beta * (1 - previous) / (1 - alpha_bar)
    # The true variance is 0 at the first step; its logarithm there takes the second step's, as in improved DDPM.
    floor = variance[1] if len(variance) > 1 else beta[0]
    positive = torch.where(variance > 0, variance, floor)
    tables = {
        "alpha_bar_previous": previous,
        "sqrt_alpha_bar_previous": previous.float().sqrt(),
        "sqrt_alpha_bar": alpha_bar.sqrt(),
        "sqrt_one_minus_alpha_bar": (1 - alpha_bar).sqrt(),
        "sqrt_recip_alpha_bar": (1 / alpha_bar).sqrt(),
        "sqrt_recip_alpha_bar_minus_1": (1 / alpha_bar - 1).sqrt(),
        "posterior_mean_x0": beta * previous.sqrt() / (1 - alpha_bar),
        "posterior_mean_x_t": (1 - previous) * alpha.sqrt() / (1 - alpha_bar),
        "posterior_std": variance.sqrt(),
        "log_posterior_variance": positive.log(),
        "log_beta": beta.log(),
        "log_fixed_variance": torch.cat([positive[:1], beta[1:]]).log(),
    }
    return {name: table.float() for name, table in tables.items()}


def _log_likelihood_8bit(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log probability of the 8-bit bin around x in [-1, 1] under a Gaussian; the end bins reach to infinity."""
    inverse_std = (-log_std).exp()
    above = _normal_cdf((x - mean + 1 / 255) * inverse_std)
    below = _normal_cdf((x - mean - 1 / 255) * inverse_std)
    tiny = 1e-12
    inside = (above - below).clamp_min(tiny).log()
    first, last = above.clamp_min(tiny).log(), (1 - below).clamp_min(tiny).log()
    return torch.where(x < -0.999, first, torch.where(x > 0.999, last, inside))


def _normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation of the normal distribution function, which the published losses use."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _check_same_shape(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.shape != other.shape:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {tuple(other.shape)} as {other_name} has")


def _checked_noise(noise: Tensor | None, x_t: Tensor) -> Tensor:
    if noise is None:
        raise ValueError("noise: got None, expected standard normal noise for a random step")
    _check_same_shape("noise", noise, "x_t", x_t)
    return noise.to(x_t.dtype)
