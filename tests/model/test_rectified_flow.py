"""Rectified flow: mixing, times, loss, and the Euler sampler on a distribution whose velocity is known exactly."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dit_moe.diffusion import euler_times, logit_normal_times, make_flow_pair, rectified_flow_loss
from dit_moe.sampling import sample_rectified_flow


def test_pair_mixes_data_and_noise() -> None:
    x, noise = torch.randn(3, 4, 2, 2, dtype=torch.float64), torch.randn(3, 4, 2, 2, dtype=torch.float64)
    t = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    pair = make_flow_pair(x, t=t, noise=noise)
    torch.testing.assert_close(pair.z_t[0], x[0])
    torch.testing.assert_close(pair.z_t[1], 0.75 * x[1] + 0.25 * noise[1])
    torch.testing.assert_close(pair.z_t[2], noise[2])
    later = make_flow_pair(x, t=t + 1e-4, noise=noise)
    torch.testing.assert_close((later.z_t - pair.z_t) / 1e-4, pair.target, rtol=1e-8, atol=1e-8)


def test_pair_draws_from_its_generator() -> None:
    x = torch.randn(5, 1, 2, 2)
    pairs = [make_flow_pair(x, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    assert torch.equal(pairs[0].z_t, pairs[1].z_t) and torch.equal(pairs[0].t, pairs[1].t)
    assert not torch.equal(pairs[0].z_t, pairs[2].z_t)
    assert pairs[0].t.dtype == x.dtype and bool(((pairs[0].t > 0) & (pairs[0].t < 1)).all())


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (-0.5, 0.7)])
def test_times_are_logit_normal(mean: float, std: float) -> None:
    t = logit_normal_times(40_000, mean=mean, std=std, dtype=torch.float64)
    logits = torch.logit(t)
    assert abs(logits.mean().item() - mean) < 0.02
    assert abs(logits.std().item() - std) < 0.02


def test_loss_matches_numpy_and_ignores_variance_channels() -> None:
    output = torch.randn(3, 8, 4, 4, requires_grad=True)
    target = torch.randn(3, 4, 4, 4)
    loss = rectified_flow_loss(output, target)
    error = output.detach().numpy()[:, :4].astype(np.float64) - target.numpy().astype(np.float64)
    np.testing.assert_allclose(loss.detach().numpy(), (error**2).mean((1, 2, 3)), rtol=1e-5)
    loss.sum().backward()
    assert output.grad is not None
    assert output.grad[:, :4].abs().min() > 0 and output.grad[:, 4:].abs().max() == 0


def test_loss_of_half_precision_is_computed_in_float32() -> None:
    output, target = torch.full((1, 1, 64, 64), 300.0, dtype=torch.float16), torch.zeros(1, 1, 64, 64)
    loss = rectified_flow_loss(output, target.half())
    assert loss.dtype == torch.float32 and loss.item() == 90_000  # overflows float16


class GaussianFlow(nn.Module):
    """The exact velocity for data that is Normal(mean, std^2) in each pixel."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean, self.std = mean, std
        self.config = SimpleNamespace(in_channels=1, input_size=4, num_classes=2, class_dropout_prob=0.1)

    def forward(self, z: Tensor, t: Tensor, y: Tensor) -> Tensor:
        t = t.view(-1, 1, 1, 1)
        variance = (1 - t) ** 2 * self.std**2 + t**2
        slope = (t - (1 - t) * self.std**2) / variance
        return -self.mean + slope * (z - (1 - t) * self.mean)


def test_euler_transports_noise_onto_the_data_at_first_order() -> None:
    model = GaussianFlow(1.5, 0.5)
    noise = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    exact = 1.5 + 0.5 * noise  # the solution of the flow's ODE

    def error(steps: int) -> float:
        sample = sample_rectified_flow(model, noise, torch.zeros(2, dtype=torch.long), steps, cfg_scale=1)
        return (sample - exact).abs().max().item()

    coarse, fine = error(100), error(200)
    assert fine < 0.02
    assert 1.8 < coarse / fine < 2.2


def test_euler_times() -> None:
    assert euler_times(4) == [1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: euler_times(0), "steps: got 0"),
        (lambda: logit_normal_times(-1), "batch: got -1"),
        (lambda: logit_normal_times(2, std=0), "std: got 0"),
        (lambda: make_flow_pair(torch.zeros(2, 1, 2, 2), t=torch.zeros(3)), "t: got shape"),
        (lambda: make_flow_pair(torch.zeros(2, 1, 2, 2), noise=torch.zeros(2, 1, 2, 3)), "noise: got shape"),
        (lambda: rectified_flow_loss(torch.zeros(2, 3, 2, 2), torch.zeros(2, 4, 2, 2)), "model_output: got shape"),
        (lambda: rectified_flow_loss(torch.zeros(2, 4, 2, 2), torch.zeros(1, 4, 2, 2)), "model_output: got shape"),
    ],
)
def test_errors(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
