"""ExpertRecorder: counts equal those of a slow independent reference, whatever samples and whoever routes."""

from __future__ import annotations

import copy
import functools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dit_moe_kernels import use_backend
from torch import Tensor, nn

from dit_moe import DiT, MoEFeedForward, sample_ddim, sample_ddpm, sample_rectified_flow
from dit_moe.analysis import ExpertCounts, ExpertRecorder, IncompleteCountsError, RecordSizes, record_experts
from dit_moe.engine import SamplingEngine
from dit_moe.layers import TopKRouter
from tests.model.util import tiny_model

STEPS, SIZES = 3, (4, 4, 2)  # images of each batch
GROUPS = 3


class SlowReference:
    """Forward hooks that keep every id; numpy counts them afterwards, one choice at a time."""

    def __init__(self, model: nn.Module) -> None:
        self.calls: list[list[np.ndarray]] = []
        self.handles = []
        for layer, router in enumerate(module for module in model.modules() if isinstance(module, TopKRouter)):
            self.calls.append([])
            self.handles.append(router.register_forward_hook(functools.partial(self._keep, layer)))

    def _keep(self, layer: int, router: nn.Module, inputs: Any, routing: Any) -> None:
        self.calls[layer].append(routing.topk_ids.cpu().numpy().copy())

    def counts(self, half: str, guided: bool, tokens: int, experts: int) -> dict[str, np.ndarray]:
        layers, images = len(self.calls), sum(SIZES)
        per_group = -(-images // GROUPS)
        found = {
            "images": np.zeros((images, layers, experts), dtype=np.int64),
            "steps": np.zeros((GROUPS, layers, STEPS, experts), dtype=np.int64),
            "patches": np.zeros((GROUPS, layers, tokens, experts), dtype=np.int64),
            "step_patches": np.zeros((STEPS, layers, tokens, experts), dtype=np.int64),
        }
        for layer, calls in enumerate(self.calls):
            assert len(calls) == len(SIZES) * STEPS
            for number, ids in enumerate(calls):
                batch, step = divmod(number, STEPS)
                size = SIZES[batch]
                first = {"conditional": 0, "unconditional": size, "both": 0}[half]
                stop = size if half == "conditional" or not guided else 2 * size
                for row in range(first, stop):
                    image = sum(SIZES[:batch]) + row % size
                    for token in range(tokens):
                        for expert in ids[row * tokens + token]:
                            found["images"][image, layer, expert] += 1
                            found["steps"][image // per_group, layer, step, expert] += 1
                            found["patches"][image // per_group, layer, token, expert] += 1
                            found["step_patches"][step, layer, token, expert] += 1
        return found


def sample_all(model: DiT, recorder: ExpertRecorder, sampler: Any = sample_rectified_flow, cfg: float = 2.0) -> Tensor:
    """Every batch through one sampler; returns the class ids."""
    classes = torch.arange(sum(SIZES)) * 3 % 10
    for ids in classes.split(SIZES):
        noise = torch.randn(len(ids), 4, 8, 8)
        with recorder.images(ids) as on_step:
            sampler(model, noise, ids, STEPS, cfg, on_step=on_step)
    return classes


def sample_ddim3(model: DiT, noise: Tensor, ids: Tensor, steps: int, cfg: float, **options: Any) -> Tensor:
    """DDIM in three steps, which no whole stride gives."""
    return sample_ddim(model, noise, ids, str(steps), cfg, **options)


def assert_counts(counts: ExpertCounts, expected: dict[str, np.ndarray]) -> None:
    for name, array in expected.items():
        got = getattr(counts, name)
        assert got is None or np.array_equal(got, array), name


@pytest.mark.parametrize("half", ["conditional", "unconditional", "both"])
@pytest.mark.parametrize("sampler", [sample_rectified_flow, sample_ddpm, sample_ddim3], ids=["rf", "ddpm", "ddim"])
def test_counts_equal_a_slow_reference(sampler: Any, half: str) -> None:
    model = tiny_model()
    reference = SlowReference(model)
    with record_experts(model, sum(SIZES), STEPS, num_groups=GROUPS, half=half, step_patch=True) as recorder:
        classes = sample_all(model, recorder, sampler)
    counts = recorder.counts()
    assert_counts(counts, reference.counts(half, True, 16, 4))
    assert counts.class_ids.tolist() == classes.tolist()
    counts.check_complete()
    halves = 2 if half == "both" else 1
    for array in (counts.images, counts.steps, counts.patches, counts.step_patches):
        assert array is not None and array.sum() == sum(SIZES) * 16 * 2 * 2 * STEPS * halves  # I * N * K * L * S


def test_without_guidance_the_whole_batch_counts() -> None:
    model = tiny_model()
    reference = SlowReference(model)
    with record_experts(model, sum(SIZES), STEPS, num_groups=GROUPS) as recorder:
        sample_all(model, recorder, cfg=1.0)
    assert recorder.counts().step_patches is None
    assert_counts(recorder.counts(), reference.counts("conditional", False, 16, 4))


def test_recording_leaves_the_samples_and_the_model_as_they_are() -> None:
    model = tiny_model()
    noise, ids = torch.randn(4, 4, 8, 8), torch.arange(4)
    plain = sample_rectified_flow(model, noise, ids, STEPS, 2.0)
    state = copy.deepcopy(model.state_dict())
    with record_experts(model, 4, STEPS) as recorder, recorder.images(ids) as on_step:
        assert torch.equal(sample_rectified_flow(model, noise, ids, STEPS, 2.0, on_step=on_step), plain)
    before = recorder.counts()
    sample_rectified_flow(model, noise, ids, STEPS, 2.0)
    assert np.array_equal(recorder.counts().images, before.images)
    assert all(module.observer is None for module in model.modules() if isinstance(module, TopKRouter))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_calls_outside_the_blocks_are_not_counted() -> None:
    model = tiny_model()
    with record_experts(model, 4, STEPS) as recorder:
        model(torch.randn(4, 4, 8, 8), torch.rand(4), torch.arange(4))
        assert recorder.counts().images.shape == (0, 2, 4)
        assert recorder.counts().steps.sum() == 0


def test_what_happens_in_a_pause_is_not_counted() -> None:
    model = tiny_model()
    x, t, ids = torch.randn(2, 4, 8, 8), torch.rand(2), torch.arange(2)
    with record_experts(model, 2, 1) as recorder, recorder.images(ids) as on_step:
        with recorder.paused():
            model(x, t, ids)
        model(x, t, ids)
        on_step(1, 1)
    recorder.counts().check_complete()


def test_counts_are_copies() -> None:
    model = tiny_model()
    with record_experts(model, sum(SIZES), STEPS, num_groups=1) as recorder:
        early = recorder.counts()
        sample_all(model, recorder)
    assert early.steps.sum() == 0 < recorder.counts().steps.sum()


def test_saved_counts_can_be_read_and_gone_on_with(tmp_path: Path) -> None:
    model = tiny_model()
    batches = [(torch.randn(2, 4, 8, 8), torch.tensor(ids)) for ids in ([1, 2], [3, 10], [1, 1])]

    def run(recorder: ExpertRecorder, batches: list[tuple[Tensor, Tensor]]) -> ExpertCounts:
        for noise, ids in batches:
            with recorder.images(ids) as on_step:
                sample_rectified_flow(model, noise, ids, STEPS, 2.0, on_step=on_step)
        return recorder.counts({"seed": 7})

    sizes: dict[str, Any] = dict(num_images=6, num_steps=STEPS, num_groups=2, step_patch=True)
    with record_experts(model, **sizes) as recorder:
        whole = run(recorder, batches)
    with record_experts(model, **sizes) as recorder:
        run(recorder, batches[:2]).save(tmp_path / "counts.npz")
    with record_experts(model, **sizes) as recorder:
        recorder.restore(ExpertCounts.load(tmp_path / "counts.npz"))
        assert recorder.num_done == 4
        parts = run(recorder, batches[2:])
    assert_counts(parts, {name: getattr(whole, name) for name in ("images", "steps", "patches", "step_patches")})
    assert parts.class_ids.tolist() == [1, 2, 3, 10, 1, 1] and parts.provenance == {"seed": 7}
    by_class = parts.by_class()
    assert by_class.shape == (11, 2, 4) and np.array_equal(by_class[10], whole.images[3])
    assert np.array_equal(by_class[1], whole.images[[0, 4, 5]].sum(0))
    with record_experts(model, 6, STEPS + 1) as recorder:
        with pytest.raises(ValueError, match="step_counts: got"):
            recorder.restore(parts)


class OwnRouter(nn.Module):
    """A user's layer whose router is not ours: tokens of one image in turn to experts 0, 1, 2, some unrouted."""

    def __init__(self, recorder: ExpertRecorder, layer: int) -> None:
        super().__init__()
        self.recorder, self.layer = recorder, layer

    def forward(self, x: Tensor) -> Tensor:
        ids = torch.arange(x.shape[0] * x.shape[1]).view(-1, 1) % 4 - 1  # -1, 0, 1, 2, ...
        self.recorder.record(self.layer, ids)
        return x


def test_a_router_of_ones_own() -> None:
    sizes = RecordSizes(
        num_images=2, num_steps=1, num_layers=1, num_tokens=8, num_experts=3, top_k=1, num_classes=5, num_groups=1
    )
    recorder = ExpertRecorder(sizes, "cpu")
    layer = OwnRouter(recorder, 0)
    with recorder.images(torch.tensor([4, 0])) as on_step:
        layer(torch.zeros(2, 8, 16))
        on_step(1, 1, None)
    counts = recorder.counts()
    assert counts.images[:, 0].tolist() == [[2, 2, 2], [2, 2, 2]]
    assert counts.patches[0, 0].sum(1).tolist() == [0, 2, 2, 2, 0, 2, 2, 2]
    with pytest.raises(IncompleteCountsError, match=re.escape("images[0, 0]: got 6 choices, expected 8")):
        counts.check_complete()


def test_our_layer_in_another_model() -> None:
    class Foreign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (MoEFeedForward(8, 16, num_experts=4) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.second(x + self.first(x).hidden).hidden

    model = Foreign()
    with record_experts(model, 3, 2, num_tokens=5, num_classes=1) as recorder:
        with recorder.images(torch.zeros(3, dtype=torch.int64)) as on_step:
            for step in (1, 2):
                model(torch.randn(3, 5, 8))
                on_step(step, 2, None)
    recorder.counts().check_complete()
    assert recorder.counts().num_layers == 2


def test_compiled_models_are_recorded() -> None:
    torch._dynamo.reset()
    model = tiny_model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, t, ids = torch.randn(2, 4, 8, 8), torch.rand(2), torch.arange(2)
    compiled(x, t, ids)  # before anyone observes
    results = []
    for call in (model, compiled):
        with record_experts(model, 2, 2) as recorder, recorder.images(ids) as on_step:
            for step in (1, 2):
                call(x * step, t, ids)
                on_step(step, 2, x)
        recorder.counts().check_complete()
        results.append(recorder.counts())
    assert np.array_equal(results[0].steps, results[1].steps)


def test_a_missed_call_shows() -> None:
    model = tiny_model()
    with record_experts(model, 2, 2) as recorder, recorder.images(torch.arange(2)) as on_step:
        model(torch.randn(2, 4, 8, 8), torch.rand(2), torch.arange(2))
        on_step(1, 2, None)
        on_step(2, 2, None)
    with pytest.raises(IncompleteCountsError, match=re.escape("images[0, 0]: got 32 choices, expected 64")):
        recorder.counts().check_complete()


def test_wrong_use_is_named() -> None:
    model = tiny_model()
    noise, ids = torch.randn(2, 4, 8, 8), torch.arange(2)
    with pytest.raises(ValueError, match="no TopKRouter"), record_experts(nn.Linear(2, 2), 1, 1):
        pass
    with record_experts(model, 4, STEPS) as recorder:
        with pytest.raises(ValueError, match="have an observer already"), record_experts(model, 4, STEPS):
            pass
        with pytest.raises(ValueError, match="got 5 more images after 0, room for 4"), recorder.images(torch.zeros(5)):
            pass
        with recorder.images(ids) as on_step:
            sample_rectified_flow(model, noise, ids, STEPS, 2.0, on_step=on_step)
        with pytest.raises(ValueError, match="got step 1 of 9, expected 1 of 3"):
            with recorder.images(ids) as on_step:
                sample_rectified_flow(model, noise, ids, 9, 2.0, on_step=on_step)
        with pytest.raises(RuntimeError, match="ended with an exception"):
            recorder.counts()
    with record_experts(model, 4, STEPS) as recorder:
        with pytest.raises(RuntimeError, match="up to step 0, expected 3: pass it"), recorder.images(ids):
            sample_rectified_flow(model, noise, ids, STEPS, 2.0)
    with record_experts(model, 4, STEPS) as recorder:
        with pytest.raises(ValueError, match="topk_ids: got 48 tokens, expected 32 or 64"), recorder.images(ids):
            model(torch.randn(3, 4, 8, 8), torch.rand(3), torch.arange(3))
    with record_experts(model, 4, STEPS, half="unconditional") as recorder:
        with pytest.raises(ValueError, match="topk_ids: got 32 tokens, expected 64"), recorder.images(ids) as on_step:
            sample_rectified_flow(model, noise, ids, STEPS, 1.0, on_step=on_step)
    with pytest.raises(ValueError, match="half: got 'left'"), record_experts(model, 4, STEPS, half="left"):
        pass
    with pytest.raises(ValueError, match="expected less than 2\\^31"), record_experts(model, 10**9, 1000):
        pass


def test_files_that_are_no_counts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("no")
    np.savez(tmp_path / "other.npz", a=np.zeros(2))
    for name in ("text.npz", "other.npz"):
        with pytest.raises(ValueError, match="not a file of expert counts"):
            ExpertCounts.load(tmp_path / name)


@pytest.mark.gpu
@use_backend("auto")
def test_one_captured_graph_of_the_model_counts_every_step() -> None:
    model = tiny_model().cuda()
    x, t, ids = torch.randn(4, 4, 8, 8).cuda(), torch.rand(4).cuda(), torch.arange(4).cuda()
    inputs = torch.randn(STEPS, 4, 4, 8, 8).cuda()
    with record_experts(model, 4, STEPS, step_patch=True) as recorder, torch.no_grad():
        with recorder.images(ids) as on_step:
            for step in range(STEPS):
                model(inputs[step], t, ids)
                on_step(step + 1, STEPS, x)
        eager = recorder.counts()
    with record_experts(model, 4, STEPS, step_patch=True) as recorder, torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            model(x, t, ids)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            model(x, t, ids)
        with recorder.images(ids) as on_step:
            for step in range(STEPS):
                x.copy_(inputs[step])
                graph.replay()
                on_step(step + 1, STEPS, x)
        replayed = recorder.counts()
    replayed.check_complete()
    for name in ("images", "steps", "patches", "step_patches"):
        assert np.array_equal(getattr(eager, name), getattr(replayed, name)), name


@pytest.mark.parametrize(
    ("device", "capture"),
    [("cpu", False), pytest.param("cuda", True, marks=pytest.mark.gpu)],
    ids=["buffers", "graphs"],
)
def test_the_engine_is_recorded(device: str, capture: bool) -> None:
    """Graphs captured before, during and after recording; unguided steps among guided ones; batches of two sizes."""
    with use_backend("auto" if device == "cuda" else "reference"):
        model = tiny_model().to(device)
        engine = SamplingEngine(model, capture=capture, precompute=False)
        batches = [(torch.randn(n, 4, 8, 8, device=device), torch.arange(n, device=device)) for n in (2, 2, 3)]
        options: dict[str, Any] = dict(guidance_interval=(0.3, 0.8))
        plain = sample_rectified_flow(engine, *batches[0], 4, 2.0, **options)
        assert engine.mode == ("CUDA graphs" if capture else "static buffers")
        found = []
        for sampled in (model, engine):
            with record_experts(model, 7, 4, num_groups=2, step_patch=True) as recorder:
                for noise, ids in batches:
                    with recorder.images(ids) as on_step:
                        sample_rectified_flow(sampled, noise, ids, 4, 2.0, on_step=on_step, **options)
            recorder.counts().check_complete()
            found.append(recorder.counts())
        assert engine.mode == ("CUDA graphs" if capture else "static buffers")
        for name in ("images", "steps", "patches", "step_patches"):
            assert np.array_equal(getattr(found[0], name), getattr(found[1], name)), name
        assert torch.equal(sample_rectified_flow(engine, *batches[0], 4, 2.0, **options), plain)
        assert recorder.counts().steps.sum() == found[1].steps.sum()


@pytest.mark.gpu
@use_backend("auto")
def test_recording_does_not_wait_for_the_gpu() -> None:
    model = tiny_model().cuda()
    x, t, ids = torch.randn(4, 4, 8, 8).cuda(), torch.rand(4).cuda(), torch.arange(4).cuda()
    with record_experts(model, 8, 1) as recorder, torch.no_grad():
        for _ in range(2):  # the first compiles
            torch.cuda.set_sync_debug_mode("error" if recorder.num_done else "default")
            try:
                with recorder.images(ids) as on_step:
                    model(x, t, ids)
                    on_step(1, 1, x)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    recorder.counts().check_complete()
