"""Samplers against the official code's results, and their guidance, randomness, dtypes and errors on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dit_moe_kernels import use_backend
from torch import Tensor

from dit_moe import DiT
from dit_moe.checkpoint import load_checkpoint
from dit_moe.diffusion import make_diffusion
from dit_moe.sampling import draw_noise, sample_ddim, sample_ddpm, sample_rectified_flow
from tests.model.util import tiny_model

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # relative to the largest value
# DDIM takes square roots of its coefficients in float32, as the official code does, and a CPU's math library may round
# one of them the other way (6e-8): over the ten steps 9.2e-8 of the largest value was seen, and 1e-9 where it does not.
DDIM_TOLERANCE = {torch.float64: 2e-7, torch.float32: 1e-4}
SAMPLERS = {"rf": sample_rectified_flow, "ddpm": sample_ddpm, "ddim": sample_ddim}


def load_golden(name: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], DiT]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        meta = json.loads(str(file["meta"]))
        arrays = {key: torch.from_numpy(file[key]) for key in file.files if key != "meta"}
    state = {key.removeprefix("state/"): value for key, value in arrays.items() if key.startswith("state/")}
    return arrays, load_checkpoint(state, num_heads=meta["num_heads"], dtype=dtype)


def assert_relative(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    error = (actual.double() - expected).abs().max() / expected.abs().max()
    assert error.item() <= tolerance, f"relative error {error.item():.2e}"


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ["tiny_timm", "tiny_flash"])
def test_rectified_flow_matches_official(name: str, dtype: torch.dtype) -> None:
    arrays, model = load_golden(name, dtype)
    sample = sample_rectified_flow(model, arrays["noise"].to(dtype), arrays["y"], 8, 3.0)
    assert sample.dtype == dtype
    assert_relative(sample, arrays["rf_sample_8steps_cfg3"], TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_ddim_matches_official(dtype: torch.dtype) -> None:
    arrays, model = load_golden("tiny_timm", dtype)
    sample = sample_ddim(model, arrays["noise"].to(dtype), arrays["y"], 10, 2.0)
    assert_relative(sample, arrays["ddim10_eta0_cfg2"], DDIM_TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_ddpm_training_losses_match_official(dtype: torch.dtype) -> None:
    arrays, model = load_golden("tiny_timm", dtype)
    diffusion = make_diffusion()
    x0, t, noise = arrays["x"].to(dtype), arrays["ddpm_t"], arrays["ddpm_noise"].to(dtype)
    x_t = diffusion.q_sample(x0, t, noise)
    losses = diffusion.losses(model(x_t, diffusion.model_times(t, len(t)), arrays["y"]), x0, x_t, t, noise)
    for name in ("mse", "vb", "loss"):
        assert_relative(getattr(losses, name), arrays[f"ddpm_train_{name}"], TOLERANCE[dtype])


class Recorder:
    """A model that records the batch size, times and dtype of each call."""

    def __init__(self, model: DiT) -> None:
        self.model, self.config, self.training = model, model.config, False
        self.calls: list[tuple[int, list[float], torch.dtype]] = []

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.calls.append((x.shape[0], t.unique().tolist(), x.dtype))
        return self.model(x, t, y)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


@pytest.fixture
def start() -> tuple[DiT, Tensor, Tensor]:
    return tiny_model().double(), torch.randn(3, 4, 8, 8, dtype=torch.float64), torch.tensor([1, 7, 10])


def test_batched_guidance_equals_two_forwards(start: tuple[DiT, Tensor, Tensor]) -> None:
    model, z, y = start
    sample = sample_rectified_flow(model, z, y, 3, 2.5)
    with torch.no_grad():
        for i in (3, 2, 1):
            t = torch.full((3,), i / 3, dtype=torch.float64)
            conditional, null = model(z, t, y)[:, :4], model(z, t, torch.full_like(y, 10))[:, :4]
            z = z - (null + 2.5 * (conditional - null)) / 3
    torch.testing.assert_close(sample, z, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("guidance_channels", [1, 3, 4, None])
def test_ddpm_guides_the_asked_channels(start: tuple[DiT, Tensor, Tensor], guidance_channels: int | None) -> None:
    model, x, y = start
    sample = sample_ddpm(
        model, x, y, 3, 2.5, guidance_channels=guidance_channels, generator=torch.Generator().manual_seed(5)
    )
    generator, diffusion, k = torch.Generator().manual_seed(5), make_diffusion("3"), guidance_channels or 4
    with torch.no_grad():
        for step, t in ((2, 999.0), (1, 500.0), (0, 0.0)):
            times = torch.full((3,), t)
            output, null = model(x, times, y), model(x, times, torch.full_like(y, 10))
            output[:, :k] = null[:, :k] + 2.5 * (output[:, :k] - null[:, :k])
            noise = torch.randn(x.shape, dtype=x.dtype, generator=generator) if step else None
            x = diffusion.ddpm_step(output, x, step, noise)
    torch.testing.assert_close(sample, x, rtol=1e-10, atol=1e-10)


def test_three_channels_are_the_default_of_ddpm_and_all_of_rectified_flow(start: tuple[DiT, Tensor, Tensor]) -> None:
    for name, default in (("rf", None), ("ddim", 3)):
        sampler = SAMPLERS[name]
        assert torch.equal(sampler(*start, 2, 3.0), sampler(*start, 2, 3.0, guidance_channels=default))
        other = sampler(*start, 2, 3.0, guidance_channels=3 if default is None else None)
        assert not torch.equal(sampler(*start, 2, 3.0), other)


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_forward_per_step_and_none_for_the_null_class_at_scale_1(
    name: str, start: tuple[DiT, Tensor, Tensor]
) -> None:
    model, x, y = start
    for scale, batch in ((1, 3), (1.0, 3), (2.0, 6), (0.0, 6)):
        recorder = Recorder(model)
        SAMPLERS[name](recorder, x, y, 4, scale)
        assert [call[0] for call in recorder.calls] == [batch] * 4
    times = {"rf": [1.0, 0.75, 0.5, 0.25], "ddpm": [999.0, 666.0, 333.0, 0.0], "ddim": [750.0, 500.0, 250.0, 0.0]}
    assert [call[1] for call in recorder.calls] == [[t] for t in times[name]]


def test_scale_0_is_the_null_class(start: tuple[DiT, Tensor, Tensor]) -> None:
    model, x, y = start
    null = sample_rectified_flow(model, x, torch.full_like(y, 10), 4, 1)
    torch.testing.assert_close(sample_rectified_flow(model, x, y, 4, 0), null)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_keep_a_float32_state(name: str, dtype: torch.dtype) -> None:
    model, x, y = tiny_model(), torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    seeds = {} if name == "rf" else {"generator": torch.Generator().manual_seed(1)}
    exact = SAMPLERS[name](model, x, y, 4, 1.5, **seeds)
    recorder = Recorder(model.to(dtype))
    if seeds:
        seeds = {"generator": torch.Generator().manual_seed(1)}
    sample = SAMPLERS[name](recorder, x, y, 4, 1.5, **seeds)
    assert sample.dtype == torch.float32
    assert {call[2] for call in recorder.calls} == {dtype}
    assert ((sample - exact).norm() / exact.norm()).item() < (0.1 if dtype == torch.bfloat16 else 0.02)


@pytest.mark.parametrize("name", SAMPLERS)
def test_autocast(name: str) -> None:
    model, x, y = tiny_model(), torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    exact = SAMPLERS[name](model, x, y, 1, 1.5)
    with torch.autocast("cpu", torch.bfloat16):
        sample = SAMPLERS[name](model, x, y, 1, 1.5)
    assert sample.dtype == torch.float32
    assert ((sample - exact).norm() / exact.norm()).item() < 0.1


def test_seeds_reproduce(start: tuple[DiT, Tensor, Tensor]) -> None:
    def run(sampler: str, seed: int | None, **options: Any) -> Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return SAMPLERS[sampler](*start, 5, 1, generator=generator, **options)

    assert torch.equal(run("ddpm", 1), run("ddpm", 1))
    assert not torch.equal(run("ddpm", 1), run("ddpm", 2))
    assert torch.equal(run("ddim", 1), run("ddim", 2))
    assert torch.equal(run("ddim", 1, eta=0.5), run("ddim", 1, eta=0.5))
    assert not torch.equal(run("ddim", 1, eta=0.5), run("ddim", 2, eta=0.5))
    torch.manual_seed(4)
    first = run("ddpm", None)
    torch.manual_seed(4)
    assert torch.equal(first, run("ddpm", None))


def test_a_generator_per_sample_makes_it_independent_of_its_batch(start: tuple[DiT, Tensor, Tensor]) -> None:
    model, x, y = start

    def seeds(*values: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(value) for value in values]

    together = sample_ddpm(model, x, y, 5, 2.0, generator=seeds(11, 12, 13))
    alone = sample_ddpm(model, x[1:2], y[1:2], 5, 2.0, generator=seeds(12))
    torch.testing.assert_close(together[1:2], alone, rtol=1e-10, atol=1e-10)
    assert torch.equal(draw_noise((2, 3), seeds(1, 2))[1], draw_noise((1, 3), seeds(2))[0])


def test_mode_and_gradients_are_left_as_they_were() -> None:
    model, x, y = tiny_model(class_dropout_prob=0.9), torch.randn(3, 4, 8, 8), torch.tensor([1, 7, 9])
    evaluated = sample_rectified_flow(model, x, y, 2, 2.0)
    model.train()
    assert torch.equal(sample_rectified_flow(model, x, y, 2, 2.0), evaluated)  # no class dropout while sampling
    assert model.training and not evaluated.requires_grad and torch.is_grad_enabled()

    def stop(done: int, steps: int, state: Tensor) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample_rectified_flow(model, x, y, 2, 2.0, on_step=stop)
    assert model.training and torch.is_grad_enabled()


@pytest.mark.parametrize("name", SAMPLERS)
def test_hook_sees_every_step(name: str, start: tuple[DiT, Tensor, Tensor]) -> None:
    seen: list[tuple[int, int]] = []
    states: list[Tensor] = []

    def on_step(done: int, steps: int, state: Tensor) -> None:
        seen.append((done, steps))
        states.append(state)

    sample = SAMPLERS[name](*start, 4, 1.5, on_step=on_step)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert torch.equal(states[-1], sample) and not torch.equal(states[0], states[1])


@pytest.mark.parametrize("name", SAMPLERS)
def test_empty_batch(name: str) -> None:
    sample = SAMPLERS[name](tiny_model(), torch.zeros(0, 4, 8, 8), torch.zeros(0, dtype=torch.long), 2)
    assert sample.shape == (0, 4, 8, 8)


def test_times_are_not_rounded_to_the_models_dtype() -> None:
    recorder = Recorder(tiny_model().bfloat16())
    sample_rectified_flow(recorder, torch.randn(1, 4, 8, 8), torch.tensor([1]), 50, 1)
    expected = [i / 50 for i in range(50, 0, -1)]
    np.testing.assert_allclose([call[1][0] for call in recorder.calls], expected, rtol=1e-6)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"steps": 0}, ValueError, "steps: got 0"),
        ({"noise": torch.zeros(2, 3, 8, 8)}, ValueError, "noise: got shape"),
        ({"noise": torch.zeros(4, 8, 8)}, ValueError, "noise: got shape"),
        ({"noise": torch.zeros(2, 4, 8, 8, dtype=torch.long)}, TypeError, "noise: got dtype"),
        ({"class_ids": torch.zeros(3, dtype=torch.long)}, ValueError, "class_ids: got shape"),
        ({"class_ids": torch.zeros(2)}, TypeError, "class_ids: got dtype"),
        ({"class_ids": torch.tensor([0, 11])}, ValueError, "class_ids: got values 0 to 11, expected 0 to 10"),
        ({"class_ids": torch.tensor([-1, 3])}, ValueError, "class_ids: got values -1"),
        ({"class_ids": torch.zeros(2, dtype=torch.long, device="meta")}, ValueError, "class_ids: got device meta"),
        ({"guidance_channels": 0}, ValueError, "guidance_channels: got 0"),
        ({"cfg_scale": float("nan")}, ValueError, "cfg_scale: got nan"),
    ],
)
def test_errors(name: str, change: dict[str, Any], error: type[Exception], message: str) -> None:
    call = {"noise": torch.zeros(2, 4, 8, 8), "class_ids": torch.zeros(2, dtype=torch.long), "steps": 2, **change}
    with pytest.raises(error, match=message):
        SAMPLERS[name](tiny_model(), **call)


def test_errors_of_single_samplers() -> None:
    model, x, y = tiny_model(), torch.zeros(2, 4, 8, 8), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match="got 1001 steps"):
        sample_ddpm(model, x, y, 1001)
    with pytest.raises(ValueError, match="the nearest are"):
        sample_ddim(model, x, y, 60)
    with pytest.raises(ValueError, match="empty text"):
        sample_ddpm(model, x, y, "")
    with pytest.raises(TypeError, match="steps: got float"):
        sample_ddpm(model, x, y, 2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got 1 generators, expected one per sample, 2"):
        sample_ddpm(model, x, y, 2, generator=[torch.Generator()])
    with pytest.raises(ValueError, match="class_dropout_prob is 0"):
        sample_rectified_flow(tiny_model(class_dropout_prob=0.0), x, y, 2)
    assert sample_rectified_flow(tiny_model(class_dropout_prob=0.0), x, y, 2, 1).shape == x.shape


@pytest.mark.gpu
@pytest.mark.parametrize("name", SAMPLERS)
def test_no_host_sync_per_step(name: str) -> None:
    model, x, y = tiny_model().cuda(), torch.randn(2, 4, 8, 8, device="cuda"), torch.tensor([1, 2], device="cuda")

    def forbid(done: int, steps: int, state: Tensor) -> None:
        torch.cuda.set_sync_debug_mode("error" if done < steps else "default")

    with use_backend("triton"):  # the reference reads the experts' row counts back
        SAMPLERS[name](model, x, y, 2, 1.5)  # the first run may compile kernels and fill caches
        try:
            SAMPLERS[name](model, x, y, 4, 1.5, on_step=forbid)
        finally:
            torch.cuda.set_sync_debug_mode("default")
