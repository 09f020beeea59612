"""The engine's CUDA graphs against the step-by-step samplers: results, reuse, weights, memory, and what they refuse."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from dit_moe_kernels import use_backend
from torch import Tensor

from dit_moe import DiT
from dit_moe.engine import SamplingEngine
from tests.model.test_engine import CASES, draw
from tests.model.util import tiny_model

pytestmark = pytest.mark.gpu

Start = tuple[DiT, Tensor, Tensor]


@pytest.fixture(autouse=True)
def _kernels() -> Any:
    with use_backend("triton"):  # the reference reads the experts' row counts back
        yield


@pytest.fixture
def start() -> Start:
    return tiny_model().cuda(), torch.randn(3, 4, 8, 8, device="cuda"), torch.tensor([1, 7, 10], device="cuda")


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name, options", CASES)
def test_equals_the_samplers(name: str, options: dict[str, Any], start: Start) -> None:
    model, noise, class_ids = start
    expected = draw(name, *start, **options)
    exact = SamplingEngine(model, precompute=False)
    for _ in range(2):  # captured, then replayed
        assert torch.equal(draw(name, exact, noise, class_ids, **options), expected)
    assert exact.mode == "CUDA graphs"
    engine = SamplingEngine(model)
    first = draw(name, engine, noise, class_ids, **options)
    assert relative(first, expected) < 1e-4  # products of more rows sum in another order
    assert torch.equal(draw(name, engine, noise, class_ids, **options), first)
    assert engine.mode == "CUDA graphs"


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, backend: str) -> None:
    """Experts that all see each token, so that a rounding cannot send it elsewhere."""
    model, noise = tiny_model(top_k=4, hidden_size=64).cuda(), torch.randn(3, 4, 8, 8, device="cuda")
    class_ids = torch.tensor([1, 2, 3], device="cuda")
    with use_backend("reference"):
        truth = draw("rf", model.double(), noise.double(), class_ids)
    model = model.to(dtype)
    with use_backend(backend):
        stepwise = draw("rf", model, noise, class_ids)
        assert torch.equal(draw("rf", SamplingEngine(model, precompute=False), noise, class_ids), stepwise)
        engine = SamplingEngine(model)
        sample = draw("rf", engine, noise, class_ids)
        assert engine.mode == "CUDA graphs"
        assert torch.equal(draw("rf", SamplingEngine(model), noise, class_ids), sample)
    assert (sample - truth).norm() <= 2 * (stepwise - truth).norm()


@pytest.mark.parametrize("precompute", [True, False])
def test_weights_changed_after_capture(precompute: bool) -> None:
    """With experts that all see each token, so that no rounding of fp16 can send it elsewhere."""
    model, noise, class_ids = start = (
        tiny_model(top_k=4).cuda(), torch.randn(3, 4, 8, 8, device="cuda"), torch.tensor([1, 7, 9], device="cuda")
    )  # fmt: skip
    engine = SamplingEngine(model, precompute=precompute)
    draw("rf", engine, noise, class_ids)
    (program,) = engine._programs.values()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert relative(draw("rf", engine, noise, class_ids), draw("rf", *start)) < 1e-4
    assert list(engine._programs.values()) == [program]
    model.load_state_dict({name: tensor * 0.9 for name, tensor in model.state_dict().items()}, assign=True)
    assert relative(draw("rf", engine, noise, class_ids), draw("rf", *start)) < 1e-4
    assert program not in engine._programs.values()
    model.half()
    assert relative(draw("rf", engine, noise, class_ids), draw("rf", *start)) < 0.05
    assert engine.mode == "CUDA graphs"


def test_changing_calls_in_turn(start: Start) -> None:
    """Graphs of several kinds share one pool of memory; each must still find its own buffers untouched."""
    model, noise, class_ids = start
    engine = SamplingEngine(model, precompute=False, max_programs=3)
    calls: list[tuple[str, int, dict[str, Any]]] = [
        ("rf", 3, {}),
        ("rf", 1, {}),
        ("ddpm", 3, {}),
        ("rf", 3, {"steps": 9, "guidance_interval": (0.2, 0.7)}),
        ("ddim", 2, {"eta": 0.4}),
        ("rf", 3, {"cfg_scale": 1}),
    ]
    for name, batch, options in calls * 3:
        expected = draw(name, model, noise[:batch], class_ids[:batch], **options)
        assert torch.equal(draw(name, engine, noise[:batch], class_ids[:batch], **options), expected), (name, batch)
    assert len(engine._programs) == 3 and engine.mode == "CUDA graphs"


def test_memory_does_not_grow(start: Start) -> None:
    model, noise, class_ids = start
    engine = SamplingEngine(model, max_programs=2)
    used = []
    for call in range(20):
        batch = 1 + call % 3  # one more kind than there is room for, so that each call captures anew
        draw("ddpm", engine, noise[:batch], class_ids[:batch])
        torch.cuda.synchronize()
        used.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert max(used[-6:]) <= max(used[3:9])


def test_hooks_and_exceptions(start: Start) -> None:
    model, noise, class_ids = start
    engine, states, expected = SamplingEngine(model, precompute=False), [], []
    draw("rf", engine, noise, class_ids, on_step=lambda done, steps, state: states.append(state))
    draw("rf", *start, on_step=lambda done, steps, state: expected.append(state))
    assert all(torch.equal(*pair) for pair in zip(states, expected, strict=True))

    def stop(done: int, steps: int, state: Tensor) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw("rf", engine, noise, class_ids, on_step=stop)
    assert not engine._programs
    assert torch.equal(draw("rf", engine, noise, class_ids), expected[-1])


@pytest.mark.parametrize("name", ["rf", "ddpm", "ddim"])
def test_no_wait_per_step(name: str, start: Start) -> None:
    model, noise, class_ids = start
    engine = SamplingEngine(model)
    options = {} if name == "rf" else {"generator": [torch.Generator().manual_seed(seed) for seed in range(3)]}
    draw(name, engine, noise, class_ids, **options)

    def forbid(done: int, steps: int, state: Tensor) -> None:
        torch.cuda.set_sync_debug_mode("error" if done < steps else "default")

    try:
        draw(name, engine, noise, class_ids, on_step=forbid, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert engine.mode == "CUDA graphs"


def test_side_streams(start: Start) -> None:
    model, noise, class_ids = start
    engine = SamplingEngine(model, precompute=False)
    expected = draw("rf", *start)
    torch.cuda.synchronize()
    results = []
    for _ in range(3):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            results.append(draw("rf", engine, noise, class_ids))
    torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in results)


def test_a_step_that_waits_is_refused_with_its_reason(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    model, noise, class_ids = start
    engine = SamplingEngine(model)
    with use_backend("reference"), caplog.at_level(logging.INFO, "dit_moe"):
        for _ in range(2):
            assert torch.equal(draw("rf", engine, noise, class_ids), draw("rf", *start))
    assert "capturing a step failed" in engine.mode and "synchroniz" in engine.mode
    assert len(caplog.records) == 1
    draw("rf", engine, noise, class_ids)  # the kernels' backend is another kind of call
    assert engine.mode == "CUDA graphs"


@pytest.mark.slow
@pytest.mark.parametrize("precompute", [True, False])
def test_compiled(precompute: bool, start: Start) -> None:
    model, noise, class_ids = start
    engine = SamplingEngine(model, precompute=precompute, compile=True)
    for batch in (3, 2):
        sample = draw("rf", engine, noise[:batch], class_ids[:batch])
        assert engine.mode == "CUDA graphs"
        assert relative(sample, draw("rf", model, noise[:batch], class_ids[:batch])) < 1e-4
