"""Gaussian diffusion against independent float64 formulas and against Gaussians, whose samplers are known exactly."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dit_moe.diffusion import GaussianDiffusion, linear_betas, make_diffusion, respaced_timesteps

BETAS = np.linspace(1e-4, 2e-2, 1000)
ALPHA_BAR = np.cumprod(1 - BETAS)
CLOSE = {"rtol": 2e-6, "atol": 2e-6}  # coefficients are rounded to float32, as in the official code


def test_linear_schedule() -> None:
    np.testing.assert_allclose(linear_betas().numpy(), BETAS, rtol=1e-12)
    assert linear_betas(500)[-1].item() == pytest.approx(0.04)


@pytest.mark.parametrize("count", [2, 10, 50, 250, 500, 1000])
def test_respacing_spreads_evenly(count: int) -> None:
    steps = respaced_timesteps(1000, str(count))
    assert steps == np.round(np.linspace(0, 999, count)).astype(int).tolist()
    assert steps == respaced_timesteps(1000, count)


def test_respacing_by_stride_and_by_sections() -> None:
    assert respaced_timesteps(1000, "ddim10") == list(range(0, 1000, 100))
    assert respaced_timesteps(1000, "ddim50") == list(range(0, 1000, 20))
    assert respaced_timesteps(1000, "ddim30") == list(range(0, 1000, 34))
    assert respaced_timesteps(10, "2,3") == [0, 4, 5, 7, 9]
    assert respaced_timesteps(11, "1,2") == [0, 6, 10]
    assert respaced_timesteps(7) == respaced_timesteps(7, "") == list(range(7))


@pytest.mark.parametrize(
    "respacing, message",
    [
        ("ddim60", "no stride over 1000 steps gives 60; the nearest are \\[59, 63\\]"),
        ("1001", "got 1001 steps for a section of 1000"),
        ("0", "at least 1"),
        ("-5", "at least 1"),
        ("fast", "expected such as"),
        ("ddim10,20", "after 'ddim', expected one"),
    ],
)
def test_respacing_errors(respacing: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        respaced_timesteps(1000, respacing)


def test_respaced_process_keeps_the_signal_of_the_full_one() -> None:
    full, short = make_diffusion(), make_diffusion("ddim10")
    x0, noise = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    t = torch.tensor([0, 4, 9])
    torch.testing.assert_close(short.q_sample(x0, t, noise), full.q_sample(x0, t * 100, noise))
    assert short.model_times(t, 3).tolist() == [0.0, 400.0, 900.0]
    assert short.model_times(4, 2).tolist() == [400.0, 400.0]


def bayes_posterior(x0: np.ndarray, x_t: np.ndarray, before: float, now: float) -> tuple[np.ndarray, float]:
    """q(x_{t-1} | x_t, x0) as a product of two Gaussians, by adding precisions; `before`, `now` are signal shares."""
    alpha = now / before
    precision = alpha / (1 - alpha) + 1 / (1 - before)
    mean = (math.sqrt(alpha) / (1 - alpha) * x_t + math.sqrt(before) / (1 - before) * x0) / precision
    return mean, 1 / precision


@pytest.mark.parametrize("t", [1, 2, 300, 999])
def test_posterior_and_learned_range(t: int) -> None:
    diffusion = make_diffusion()
    x0, noise = torch.randn(2, 4, 3, 3, dtype=torch.float64), torch.randn(2, 4, 3, 3, dtype=torch.float64)
    x_t = diffusion.q_sample(x0, t, noise)
    mean, variance = bayes_posterior(x0.numpy(), x_t.numpy(), ALPHA_BAR[t - 1], ALPHA_BAR[t])
    for position, expected in ((-1.0, variance), (1.0, BETAS[t]), (0.0, math.sqrt(variance * BETAS[t]))):
        output = torch.cat([noise, torch.full_like(noise, position)], 1)
        moments = diffusion.p_mean_variance(output, x_t, t)
        np.testing.assert_allclose(moments.variance.numpy(), expected, rtol=1e-5)
        np.testing.assert_allclose(moments.log_variance.exp().numpy(), moments.variance.numpy())
    np.testing.assert_allclose(moments.pred_x0.numpy(), x0.numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(moments.mean.numpy(), mean, rtol=1e-4, atol=1e-4)
    per_sample = diffusion.p_mean_variance(output, x_t, torch.full((2,), t))
    torch.testing.assert_close(per_sample.mean, moments.mean)
    torch.testing.assert_close(per_sample.variance, moments.variance)


def test_model_without_variance_takes_beta() -> None:
    moments = make_diffusion().p_mean_variance(torch.zeros(1, 4, 2, 2), torch.ones(1, 4, 2, 2), 700)
    assert moments.variance.shape == (1, 4, 2, 2)
    np.testing.assert_allclose(moments.variance.numpy(), BETAS[700], rtol=1e-5)


def test_ddpm_step_adds_noise_of_the_learned_variance_except_at_the_end() -> None:
    diffusion = make_diffusion("250")
    output, x, noise = torch.randn(2, 8, 2, 2), torch.randn(2, 4, 2, 2), torch.randn(2, 4, 2, 2)
    moments = diffusion.p_mean_variance(output, x, 100)
    torch.testing.assert_close(
        diffusion.ddpm_step(output, x, 100, noise), moments.mean + moments.variance.sqrt() * noise
    )
    assert torch.equal(diffusion.ddpm_step(output, x, 0, noise), diffusion.p_mean_variance(output, x, 0).mean)


@pytest.mark.parametrize("clip", [False, True])
def test_ddim_with_eta_1_is_ddpm_with_the_lower_variance(clip: bool) -> None:
    diffusion = make_diffusion("ddim50")
    shape = (2, 4, 2, 2)
    output, x, noise = torch.randn(shape).double(), torch.randn(shape).double(), torch.randn(shape).double()
    output = torch.cat([output, -torch.ones_like(output)], 1)
    for t in (0, 1, 20, 49):
        ddim = diffusion.ddim_step(output, x, t, noise, eta=1.0, clip=clip)
        ddpm = diffusion.ddpm_step(output, x, t, noise, clip=clip)
        # Clipped noise is large, and multiplies a difference of float32 coefficients near 1.
        tolerance = 1e-3 if clip else 1e-5
        torch.testing.assert_close(ddim, ddpm, rtol=tolerance, atol=tolerance)


def test_clip_limits_the_predicted_sample() -> None:
    diffusion = make_diffusion()
    x = 5 * torch.randn(1, 4, 4, 4)
    output = torch.randn(1, 8, 4, 4)
    assert diffusion.p_mean_variance(output, x, 500).pred_x0.abs().max() > 1
    assert diffusion.p_mean_variance(output, x, 500, clip=True).pred_x0.abs().max() <= 1
    last = diffusion.ddim_step(output, x, 0, clip=True)
    torch.testing.assert_close(last, diffusion.p_mean_variance(output, x, 0, clip=True).pred_x0)


class GaussianData:
    """The exact noise prediction for data that is Normal(mean, std^2) in each pixel."""

    def __init__(self, mean: float, std: float) -> None:
        self.mean, self.std = mean, std

    def noise(self, x_t: Tensor, original_step: int) -> Tensor:
        signal = ALPHA_BAR[original_step]
        variance = signal * self.std**2 + 1 - signal
        return math.sqrt(1 - signal) / variance * (x_t - math.sqrt(signal) * self.mean)


def test_ddim_transports_noise_onto_gaussian_data() -> None:
    data, diffusion = GaussianData(2.0, 0.3), make_diffusion()
    start = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    x = start
    for t in reversed(range(1000)):
        x = diffusion.ddim_step(data.noise(x, t), x, t)
    torch.testing.assert_close(x, 2 + 0.3 * start, rtol=0, atol=0.02)


def test_ddpm_draws_gaussian_data() -> None:
    data, diffusion = GaussianData(2.0, 0.3), make_diffusion("250")
    x = torch.randn(1, 1, 128, 128)
    for t in reversed(range(250)):
        noise = data.noise(x, diffusion.timesteps[t])
        output = torch.cat([noise, -torch.ones_like(noise)], 1)
        x = diffusion.ddpm_step(output, x, t, torch.randn_like(x) if t else None)
    assert x.mean().item() == pytest.approx(2.0, abs=0.02)
    assert x.std().item() == pytest.approx(0.3, abs=0.02)


def normal_cdf(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def test_losses_match_float64_formulas() -> None:
    diffusion = make_diffusion()
    shape = (3, 4, 3, 3)
    x0 = torch.randn(shape, dtype=torch.float64).clamp(-1.2, 1.2)
    noise = torch.randn(shape, dtype=torch.float64)
    pred = noise + 0.5 * torch.randn(shape, dtype=torch.float64)
    position = 0.5 * torch.randn(shape, dtype=torch.float64)
    t = torch.tensor([0, 37, 999])
    x_t = diffusion.q_sample(x0, t, noise)
    losses = diffusion.losses(torch.cat([pred, position], 1), x0, x_t, t, noise)
    np.testing.assert_allclose(losses.mse.numpy(), ((noise - pred) ** 2).mean((1, 2, 3)).numpy(), rtol=1e-10)
    torch.testing.assert_close(losses.loss, losses.mse + losses.vb)
    for i in (1, 2):
        step = int(t[i])
        before, now = ALPHA_BAR[step - 1], ALPHA_BAR[step]
        true_mean, true_variance = bayes_posterior(x0[i].numpy(), x_t[i].numpy(), before, now)
        pred_x0 = (x_t[i].numpy() - math.sqrt(1 - now) * pred[i].numpy()) / math.sqrt(now)
        mean, _ = bayes_posterior(pred_x0, x_t[i].numpy(), before, now)
        share = (position[i].numpy() + 1) / 2
        log_variance = share * math.log(BETAS[step]) + (1 - share) * math.log(true_variance)
        spread = (true_variance + (true_mean - mean) ** 2) / np.exp(log_variance)
        kl = 0.5 * (log_variance - math.log(true_variance) - 1 + spread)
        assert losses.vb[i].item() == pytest.approx(kl.mean() / math.log(2), rel=1e-4)
    moments = diffusion.p_mean_variance(torch.cat([pred, position], 1), x_t, t)
    mean, std, x = (tensor[0].numpy() for tensor in (moments.mean, moments.variance.sqrt(), x0))
    high = np.where(x > 0.999, 1.0, normal_cdf((x + 1 / 255 - mean) / std))
    low = np.where(x < -0.999, 0.0, normal_cdf((x - 1 / 255 - mean) / std))
    bits = -np.log2(np.maximum(high - low, 1e-12)).mean()
    assert losses.vb[0].item() == pytest.approx(bits, rel=0.02)  # the loss uses a tanh approximation of the normal CDF


def test_bound_trains_the_variance_only() -> None:
    diffusion = make_diffusion()
    x0, noise = torch.randn(2, 4, 2, 2), torch.randn(2, 4, 2, 2)
    t = torch.tensor([0, 500])
    output = torch.randn(2, 8, 2, 2, requires_grad=True)
    diffusion.losses(output, x0, diffusion.q_sample(x0, t, noise), t, noise).vb.sum().backward()
    assert output.grad is not None
    assert output.grad[:, :4].abs().max() == 0 and output.grad[1, 4:].abs().min() > 0


def test_perfect_prediction_has_no_loss() -> None:
    diffusion = make_diffusion()
    x0, noise = torch.randn(1, 4, 2, 2, dtype=torch.float64), torch.randn(1, 4, 2, 2, dtype=torch.float64)
    t = torch.tensor([400])
    x_t = diffusion.q_sample(x0, t, noise)
    losses = diffusion.losses(torch.cat([noise, -torch.ones_like(noise)], 1), x0, x_t, t, noise)
    assert losses.mse.item() == 0 and abs(losses.vb.item()) < 1e-10
    assert diffusion.losses(noise, x0, x_t, t, noise).vb.item() == 0


def test_one_step_process() -> None:
    diffusion = make_diffusion("1")
    x = diffusion.ddpm_step(torch.zeros(1, 8, 2, 2), torch.ones(1, 4, 2, 2), 0)
    assert bool(x.isfinite().all())


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda d, x: d.p_mean_variance(torch.zeros(2, 6, 2, 2), x, 5), "model_output: got shape"),
        (lambda d, x: d.p_mean_variance(x, x, 1000), "t: got 1000, expected 0 to 999"),
        (lambda d, x: d.p_mean_variance(x, x, torch.tensor([0, 1000])), "t: got values 0 to 1000"),
        (lambda d, x: d.p_mean_variance(x, x, torch.tensor([0.5, 1.0])), "t: got torch.float32"),
        (lambda d, x: d.q_sample(x, torch.tensor([1]), x), "t: got torch.int64 of shape"),
        (lambda d, x: d.q_sample(x, 1, x[:1]), "noise: got shape"),
        (lambda d, x: d.ddpm_step(x, x, 5), "noise: got None"),
        (lambda d, x: d.ddim_step(x, x, 5, eta=-0.1), "eta: got -0.1"),
        (lambda d, x: d.ddim_step(x, x, 999, x, eta=9.0), "eta: got 9.0"),
        (lambda d, x: d.losses(x, x, x[:1], torch.tensor([1, 2]), x), "x_t: got shape"),
        (lambda d, x: GaussianDiffusion([0.1, 1.2]), "betas"),
        (lambda d, x: GaussianDiffusion([0.1, 0.2], [1, 0]), "timesteps"),
        (lambda d, x: GaussianDiffusion([0.1, 0.2], [0, 2]), "timesteps"),
        (lambda d, x: GaussianDiffusion([0.1, 0.2], []), "timesteps"),
        (lambda d, x: linear_betas(0), "num_steps: got 0"),
    ],
)
def test_errors(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(make_diffusion(), torch.zeros(2, 4, 2, 2))
