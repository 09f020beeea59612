"""Findings, figures, report, probe and the command, on models and counts whose answers are known."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from dit_moe.analysis import ExpertCounts, analyse
from dit_moe.analysis.pruning import probe_experts
from dit_moe.analysis.run import number_of_steps, probe_sampling, record_sampling
from dit_moe.checkpoint import save_model
from dit_moe.cli.app import app
from dit_moe.evaluate import SamplingSettings, sample_indices
from tests.model.util import naive_swiglu, tiny_model

LAYERS, STEPS, TOKENS, EXPERTS, IMAGES, CLASSES, GROUPS = 4, 10, 16, 4, 40, 5, 4
EVEN = np.full(EXPERTS, 1 / EXPERTS)


def made_counts(
    by_class: float = 0.0, by_position: tuple[float, ...] = (0.6, 0.5, 0.3, 0.2), early: float = 0.8, seed: int = 0
) -> ExpertCounts:
    """Counts of choices that favour one expert by class, by position (less so in deeper layers), and in early steps."""
    rng = np.random.default_rng(seed)
    sizes = [(IMAGES, LAYERS, EXPERTS), (GROUPS, LAYERS, STEPS, EXPERTS), (GROUPS, LAYERS, TOKENS, EXPERTS)]
    images, steps, patches = (np.zeros(size, dtype=np.int32) for size in sizes)
    class_ids = np.arange(IMAGES) % CLASSES
    for image, layer, step, token in np.ndindex(IMAGES, LAYERS, STEPS, TOKENS):
        share = EVEN.copy()
        share[class_ids[image] % EXPERTS] += by_class
        share[token % EXPERTS] += by_position[layer]
        share[0] += early if step < STEPS // 2 else 0
        expert = rng.choice(EXPERTS, p=share / share.sum())
        images[image, layer, expert] += 1
        steps[image // 10, layer, step, expert] += 1
        patches[image // 10, layer, token, expert] += 1
    return ExpertCounts(images, steps, patches, None, class_ids, CLASSES, 1, 10, provenance={"checkpoint": "<made>"})


@pytest.fixture(scope="module")
def counts() -> ExpertCounts:
    return made_counts()


def verdicts(counts: ExpertCounts) -> list[str]:
    return [finding.verdict for finding in analyse(counts, resamples=60, shuffles=20).findings]


def test_findings_follow_the_counts(counts: ExpertCounts) -> None:
    assert verdicts(counts) == ["holds", "holds", "holds"]
    assert verdicts(made_counts(by_class=2.0, by_position=(0.0,) * 4, early=0.0)) == ["does not hold"] * 2 + [
        "holds in part"
    ]
    reverse = verdicts(made_counts(by_position=(0.2, 0.3, 0.5, 0.6), by_class=0.3))
    assert reverse == ["holds in part", "does not hold", "holds"]


def test_a_late_relapse_is_not_called_uniform(counts: ExpertCounts) -> None:
    steps = counts.steps.copy()
    steps[:, :, -1] = [[steps[:, :, -1].sum(-1)[0, 0], 0, 0, 0]]
    changed = ExpertCounts(counts.images, steps, counts.patches, None, counts.class_ids, CLASSES, 1, 10)
    finding = analyse(changed, resamples=20, shuffles=2).findings[2]
    assert [check.holds for check in finding.checks][1] is False and "step 9" in finding.checks[1].numbers


def test_counts_of_a_stopped_run_are_analysed(counts: ExpertCounts) -> None:
    steps, patches = counts.steps.copy(), counts.patches.copy()
    steps[2:], patches[2:] = 0, 0
    part = ExpertCounts(counts.images[:20], steps, patches, None, counts.class_ids[:20], CLASSES, 1, 10)
    found = analyse(part, resamples=5, shuffles=2)
    assert np.isfinite(found.patch_information.corrected).all() and np.isfinite(found.step_entropy.low).all()
    with pytest.raises(ValueError, match="got no images"):
        analyse(ExpertCounts(counts.images[:0], steps * 0, patches * 0, None, counts.class_ids[:0], CLASSES, 1, 10))


# ---------------------------------------------------------------- the probe


def test_probe_equals_a_loop_over_tokens() -> None:
    model = tiny_model(depth=1)
    layer = model.blocks[0].moe
    seen: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    inputs = torch.randn(2, 4, 8, 8), torch.rand(2), torch.arange(2)
    probe = probe_experts(model, lambda: model(*inputs), num_images=1, num_calls=1, num_tokens=40, seed=3)
    handle.remove()
    rows = torch.randint(16, (40,), generator=torch.Generator().manual_seed(3))
    x = seen[0][0][rows].double()  # image 0 alone
    layer = layer.double().requires_grad_(False)
    probs = torch.softmax(x @ layer.gate.weight.T, 1)
    y = torch.stack(
        [torch.stack([naive_swiglu(token, layer.experts.w13[e], layer.experts.w2[e]) for token in x]) for e in range(4)]
    )
    whole = layer(x).hidden.square().sum()
    for expert in range(4):
        chose = [t for t in range(40) if expert in probs[t].topk(2).indices.tolist()]
        weight = probs[chose, expert]
        expected: list[Any] = [weight.mean(), y[expert, chose].norm(dim=1).mean()]
        for other in range(4):
            apart = (y[expert, chose] - y[other, chose]) * weight[:, None]
            expected.append((apart.square().sum() / whole).sqrt())
        expected.append(((y[expert, chose] * weight[:, None]).square().sum() / whole).sqrt())
        got = [
            probe.weight[0, expert],
            probe.output_norm[0, expert],
            *probe.merge_cost[0, expert],
            probe.drop_cost[0, expert],
        ]
        if chose:
            assert got == pytest.approx([float(value) for value in expected], rel=1e-4, abs=1e-6)
        else:
            assert np.isnan(got[0]) and got[-1] == 0
    (merge,) = probe.cheapest_merges()
    assert merge[1] != merge[2] and merge[3] == np.sort(probe.merge_cost[0][~np.eye(4, dtype=bool)])[0]


def test_probe_takes_tokens_of_every_step() -> None:
    model = tiny_model()
    settings = SamplingSettings(num_images=3, steps=4, cfg_scale=2.0)
    probe = probe_sampling(model, settings, num_images=2, num_tokens=10)
    assert probe.tokens == 10 and probe.drop_cost.shape == (2, 4)
    assert np.isfinite(probe.drop_cost).all() and not any(module._forward_pre_hooks for module in model.modules())


# ---------------------------------------------------------------- sampling


@pytest.mark.parametrize(
    ("sampler", "steps", "calls"), [("rf", 3, 3), ("ddpm", 4, 4), ("ddim", 5, 5), ("ddpm", "1,2", 3)]
)
def test_sampled_counts_are_complete_and_resumed(sampler: str, steps: Any, calls: int, tmp_path: Path) -> None:
    model = tiny_model()
    settings = SamplingSettings(num_images=5, sampler=sampler, steps=steps, cfg_scale=2.0)
    assert number_of_steps(settings) == calls
    whole = record_sampling(model, settings, tmp_path / "whole.npz", batch_size=2, num_groups=2, step_patch=True)
    assert whole.images.sum() == 5 * 16 * 2 * 2 * calls  # I * N * K * L * S
    assert whole.class_ids.tolist() == [0, 1, 2, 3, 4]

    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 4:
            raise Stop

    path = tmp_path / "parts.npz"
    options: dict[str, Any] = dict(batch_size=2, num_groups=2, step_patch=True)
    with pytest.raises(Stop):
        record_sampling(model, settings, path, on_progress=stop, **options)
    assert ExpertCounts.load(path).num_images == 2  # saved after the first batch
    seen: list[int] = []
    parts = record_sampling(model, settings, path, on_progress=lambda done, total: seen.append(done), **options)
    assert seen == [2, 4, 5]
    assert np.array_equal(parts.steps, whole.steps) and np.array_equal(parts.images, whole.images)
    assert record_sampling(model, settings, path, **options).num_images == 5  # nothing left to do
    with pytest.raises(ValueError, match="holds counts of other settings .*step_patch: True there, False now"):
        record_sampling(model, settings, path, batch_size=2, num_groups=2)


def test_a_step_hook_does_not_change_the_images() -> None:
    model, settings = tiny_model(), SamplingSettings(num_images=2, steps=2)
    steps: list[int] = []
    hooked = sample_indices(model, range(2), settings, on_step=lambda done, *_: steps.append(done))
    assert torch.equal(hooked, sample_indices(model, range(2), settings)) and steps == [1, 2]


# ---------------------------------------------------------------- the command


class Page(HTMLParser):
    """What a page refers to and shows, and whether its tags are closed."""

    VOID = {"meta", "img", "br"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_analyze_writes_a_report_that_needs_nothing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    save_model(tiny_model(in_channels=3, num_classes=5), tmp_path / "model.safetensors")
    (tmp_path / "classes.json").write_text(json.dumps(["cat", "<dog>", "cow", "hen", "bat"]))
    out = tmp_path / "out"
    arguments = ["analyze", "--ckpt", tmp_path / "model.safetensors", "--out", out, "--images", 12, "--steps", 4]
    arguments += [
        "--batch-size",
        5,
        "--device",
        "cpu",
        "--backend",
        "reference",
        "--resamples",
        9,
        "--groups",
        3,
        "--probe",
        2,
    ]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert "12 images sampled and counted" in result.output and "Selection depends on position" in result.output

    counts = ExpertCounts.load(out / "counts.npz")
    counts.check_complete()
    assert counts.provenance["checkpoint"] == "model.safetensors" and counts.provenance["sampling"]["steps"] == 4
    assert str(tmp_path) not in json.dumps(counts.provenance)
    numbers = json.loads((out / "scalars.json").read_text())
    assert len(numbers["layers"]) == 2 and numbers["choices"] == 12 * 4 * 16 * 2 * 2
    page = Page((out / "report.html").read_text())
    assert not page.open
    assert len(page.sources) == 8 and all(source.startswith("data:image/png;base64,iVBOR") for source in page.sources)
    for finding in numbers["findings"]:
        assert finding["title"] in page.text and finding["verdict"] in page.text
    for name in ("class", "patch", "patch-maps", "step", "information", "step-entropy", "load", "samples"):
        assert (out / f"{name}.png").stat().st_size > 1000
    assert re.search(r"Which experts could go", page.text)
    again = CliRunner().invoke(app, [str(argument) for argument in [*arguments, "--per-layer-scale"]])
    assert again.exit_code == 0 and "scale of its own" in (out / "report.html").read_text()


def test_analyze_says_what_is_wrong(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    save_model(tiny_model(num_experts=0), tmp_path / "dense.safetensors")
    result = CliRunner().invoke(
        app, ["analyze", "--ckpt", str(tmp_path / "dense.safetensors"), "--out", str(tmp_path / "o")]
    )
    assert result.exit_code == 1 and "no TopKRouter" in result.output + result.stderr
