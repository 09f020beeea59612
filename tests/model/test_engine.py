"""The sampling engine against the step-by-step samplers, its windows, reuse, and what makes it capture anew."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dit_moe import DiT
from dit_moe.checkpoint import load_checkpoint
from dit_moe.engine import SamplingEngine
from dit_moe.graphs import NotCapturable
from dit_moe.sampling import sample_ddim, sample_ddpm, sample_rectified_flow
from tests.model.test_sampling_golden import DDIM_TOLERANCE, assert_relative
from tests.model.util import tiny_model

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
SAMPLERS = {"rf": sample_rectified_flow, "ddpm": sample_ddpm, "ddim": sample_ddim}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("rf", {}),
    ("rf", {"cfg_scale": 1}),
    ("rf", {"guidance_interval": (0.3, 0.8), "guidance_channels": 2}),
    ("ddpm", {}),
    ("ddpm", {"clip": True, "guidance_channels": None, "cfg_schedule": "linear"}),
    ("ddim", {}),
    ("ddim", {"eta": 0.6, "clip": True, "cfg_schedule": "cosine", "guidance_interval": (0.0, 0.7)}),
]
Start = tuple[DiT, Tensor, Tensor]


@pytest.fixture
def start() -> Start:
    return tiny_model().double(), torch.randn(3, 4, 8, 8, dtype=torch.float64), torch.tensor([1, 7, 10])


def draw(name: str, model: Any, noise: Tensor, class_ids: Tensor, steps: int = 5, **options: Any) -> Tensor:
    if name != "rf" and "generator" not in options:
        options["generator"] = torch.Generator().manual_seed(3)
    options.setdefault("cfg_scale", 2.5)
    return SAMPLERS[name](model, noise, class_ids, steps, **options)


def plain(model: DiT, **options: Any) -> SamplingEngine:
    """The engine's steps on its buffers, without a graph."""
    return SamplingEngine(model, capture=False, **options)


@pytest.mark.parametrize("window_bytes", [1, 40_000, 2**28])  # windows of one step, of a few, of all
@pytest.mark.parametrize("name, options", CASES)
def test_equals_the_samplers(name: str, options: dict[str, Any], window_bytes: int, start: Start) -> None:
    expected = draw(name, *start, **options)
    exact = plain(start[0], precompute=False, window_bytes=window_bytes)
    assert torch.equal(draw(name, exact, *start[1:], **options), expected)
    engine = plain(start[0], window_bytes=window_bytes)
    torch.testing.assert_close(draw(name, engine, *start[1:], **options), expected, rtol=1e-9, atol=1e-9)
    assert engine.mode == "static buffers"


def test_more_steps_than_a_window_holds(start: Start) -> None:
    for name, steps in (("rf", 130), ("ddim", 125)):
        options = {"eta": 0.5} if name == "ddim" else {}
        expected = draw(name, *start, steps, **options)
        assert torch.equal(draw(name, plain(start[0], precompute=False), *start[1:], steps, **options), expected)


@pytest.mark.parametrize("precompute", [True, False])
def test_matches_the_official_code(precompute: bool) -> None:
    with np.load(GOLDEN / "tiny_timm.npz") as file:
        meta = json.loads(str(file["meta"]))
        arrays = {key: torch.from_numpy(file[key]) for key in file.files if key != "meta"}
    state = {key.removeprefix("state/"): value for key, value in arrays.items() if key.startswith("state/")}
    engine = plain(load_checkpoint(state, num_heads=meta["num_heads"], dtype=torch.float64), precompute=precompute)
    flow = sample_rectified_flow(engine, arrays["noise"], arrays["y"], 8, 3.0)
    ddim = sample_ddim(engine, arrays["noise"], arrays["y"], 10, 2.0)
    torch.testing.assert_close(flow, arrays["rf_sample_8steps_cfg3"], rtol=1e-9, atol=1e-9)
    assert_relative(ddim, arrays["ddim10_eta0_cfg2"], DDIM_TOLERANCE[torch.float64])


def test_one_program_serves_other_steps_scales_intervals_and_schedules(start: Start) -> None:
    model, noise, class_ids = start
    engine = plain(model, precompute=False)
    for options in (
        {"steps": 3},
        {"steps": 7, "cfg_scale": 4.0},
        {"steps": 4, "guidance_interval": (0.2, 0.6)},
        {"steps": 4, "cfg_schedule": "cosine"},
        {"steps": 6, "cfg_schedule": lambda share: share**2},
    ):
        assert torch.equal(draw("rf", engine, noise, class_ids, **options), draw("rf", *start, **options))
        assert len(engine._programs) == 1
    (program,) = engine._programs.values()
    assert set(program._replays) == {True, False}
    draw("rf", engine, noise[:2], class_ids[:2])
    draw("rf", engine, noise, class_ids, cfg_scale=1)  # no null class: its buffers are half as large
    draw("ddpm", engine, noise, class_ids)
    assert len(engine._programs) == 4
    draw("ddim", engine, noise, class_ids)
    assert len(engine._programs) == 4 and program not in engine._programs.values()  # the one not used for longest


def test_seeds(start: Start) -> None:
    model, noise, class_ids = start
    engine = plain(model, precompute=False, window_bytes=10_000)

    def seeds() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in (11, 12, 13)]

    assert torch.equal(
        draw("ddpm", engine, noise, class_ids, generator=seeds()), draw("ddpm", *start, generator=seeds())
    )
    torch.manual_seed(5)
    first = draw("ddpm", engine, noise, class_ids, generator=None)
    torch.manual_seed(5)
    assert torch.equal(first, draw("ddpm", *start, generator=None))
    with pytest.raises(ValueError, match="got 1 generators, expected one per sample, 3"):
        draw("ddpm", engine, noise, class_ids, generator=[torch.Generator()])


@pytest.mark.parametrize("name", SAMPLERS)
def test_hook_sees_every_state(name: str, start: Start) -> None:
    def record(model: Any) -> list[tuple[int, int, Tensor]]:
        seen: list[tuple[int, int, Tensor]] = []
        draw(name, model, *start[1:], on_step=lambda *step: seen.append(step))
        return seen

    for (done, steps, state), (_, _, expected) in zip(
        record(plain(start[0], precompute=False)), record(start[0]), strict=True
    ):
        assert torch.equal(state, expected), (done, steps)


@pytest.mark.parametrize("precompute", [True, False])
def test_changed_weights_count_at_once(precompute: bool, start: Start) -> None:
    model, noise, class_ids = start
    engine = plain(model, precompute=precompute)
    before = draw("rf", engine, noise, class_ids)
    (program,) = engine._programs.values()
    with torch.no_grad():
        for part in (model.blocks[0].adaLN_modulation, model.blocks[1].moe.experts, model.t_embedder):
            for parameter in part.parameters():
                parameter.mul_(1.5)
    after = draw("rf", engine, noise, class_ids)
    torch.testing.assert_close(after, draw("rf", *start), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(after, before)
    assert list(engine._programs.values()) == [program]
    model.blocks[0].attn.qkv.weight = torch.nn.Parameter(model.blocks[0].attn.qkv.weight * 1.5)
    torch.testing.assert_close(draw("rf", engine, noise, class_ids), draw("rf", *start), rtol=1e-9, atol=1e-9)
    assert program not in engine._programs.values()  # its graph would read the old one's memory


def test_an_exception_ends_the_program_and_no_more(start: Start) -> None:
    model, noise, class_ids = start
    engine = plain(model, precompute=False)
    expected = draw("rf", engine, noise, class_ids)
    model.train()

    def stop(done: int, steps: int, state: Tensor) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw("rf", engine, noise, class_ids, on_step=stop)
    assert not engine._programs and model.training
    assert torch.equal(draw("rf", engine, noise, class_ids), expected)


def test_a_call_within_a_call(start: Start) -> None:
    model, noise, class_ids = start
    engine, inner = plain(model, precompute=False), []

    def again(done: int, steps: int, state: Tensor) -> None:
        if done == 2:
            inner.append(draw("rf", engine, noise.flip(0), class_ids))

    assert torch.equal(draw("rf", engine, noise, class_ids, on_step=again), draw("rf", *start))
    assert torch.equal(inner[0], draw("rf", model, noise.flip(0), class_ids))


def test_inference_mode_leaves_usable_buffers(start: Start) -> None:
    engine = plain(start[0], precompute=False)
    with torch.inference_mode():
        first = draw("rf", engine, *start[1:])
    assert torch.equal(draw("rf", engine, *start[1:]), first) and not first.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """Experts that all see each token, so that a rounding cannot send it elsewhere."""
    model, noise, class_ids = tiny_model(top_k=4), torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    truth = draw("rf", model.double(), noise.double(), class_ids)
    model = model.to(dtype)
    stepwise = draw("rf", model, noise, class_ids)
    assert torch.equal(draw("rf", plain(model, precompute=False), noise, class_ids), stepwise)
    sample = draw("rf", plain(model), noise, class_ids)
    assert sample.dtype == torch.float32
    assert (sample - truth).norm() <= 2 * (stepwise - truth).norm()


@pytest.mark.parametrize(
    "prepare, reason",
    [
        (lambda model: None, "CUDA graphs need a GPU, the model is on cpu"),
        (lambda model: model.blocks[1].register_forward_hook(lambda *args: None), "the model has hooks"),
        (lambda model: model.final_layer.register_forward_pre_hook(lambda *args: None), "the model has hooks"),
        (
            lambda model: setattr(model.blocks[0].moe.gate, "observer", id),
            "the model's routers have an observer that cannot be paused",
        ),
    ],
)
def test_falls_back_with_one_logged_reason(
    prepare: Callable[[DiT], object], reason: str, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    engine = SamplingEngine(start[0])
    expected = draw("ddpm", *start)
    prepare(start[0])
    with caplog.at_level(logging.INFO, "dit_moe"):
        for _ in range(2):
            assert torch.equal(draw("ddpm", engine, *start[1:]), expected)
    assert [reason in record.getMessage() for record in caplog.records] == [True]
    assert engine.mode.startswith(f"step by step ({reason}")


def test_a_model_spread_over_ranks_is_left_alone(start: Start) -> None:
    start[0].blocks[0].moe.count_group = object()  # type: ignore[assignment]
    assert plain(start[0])._reason_against(start[1]) == "the model is spread over several ranks"


def test_failed_capture_is_not_tried_again(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def fail(step: Callable, reset: Callable) -> None:
        tried.append("once")
        raise NotCapturable("capturing a step failed (RuntimeError: no)")

    engine = SamplingEngine(start[0])
    monkeypatch.setattr(engine, "_reason_against", lambda noise: None)
    monkeypatch.setattr(engine, "_capture_for", lambda device: fail)
    for _ in range(2):
        assert torch.equal(draw("ddpm", engine, *start[1:]), draw("ddpm", *start))
        assert engine.mode == "step by step (capturing a step failed (RuntimeError: no))"
    assert tried == ["once"] and not engine._programs
    engine.clear()
    draw("rf", engine, *start[1:])
    assert tried == ["once", "once"]


def test_autocast_and_empty_batches_run_step_by_step() -> None:
    model, noise, class_ids = tiny_model(), torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    engine = plain(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(draw("rf", engine, noise, class_ids), draw("rf", model, noise, class_ids))
    assert engine.mode == "step by step (autocast is on)"
    assert draw("rf", engine, noise[:0], class_ids[:0]).shape == (0, 4, 8, 8)


def test_errors(start: Start) -> None:
    for name in ("max_programs", "window_bytes"):
        with pytest.raises(ValueError, match=f"{name}: got 0"):
            SamplingEngine(start[0], **{name: 0})
    with pytest.raises(ValueError, match="noise: got shape"):
        sample_rectified_flow(plain(start[0]), torch.zeros(2, 3, 8, 8), start[2])
