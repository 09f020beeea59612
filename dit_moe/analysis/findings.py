"""The scalars of each layer, and whether the paper's findings hold for what was counted."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from .counts import ExpertCounts
from .statistics import (
    Baseline,
    Estimate,
    entropy,
    interval,
    load,
    mutual_information,
    over_groups,
    over_images,
    shuffled_groups,
    shuffled_images,
)

HARDLY = 0.1  # "hardly on class": at most this part of the larger of position's and step's information
EVEN = 0.98  # "near uniform": this part of the largest entropy, at which loads scatter by about a quarter (E = 8)
_EARLY = 5  # the early steps are the first fifth, the late ones the second half


@dataclass(frozen=True)
class Range:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float

    def text(self, unit: str = "", digits: int = 3) -> str:
        """Such as "0.120 (0.110 to 0.130) bits"."""
        return f"{self.value:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f}){' ' * bool(unit)}{unit}"


@dataclass(frozen=True)
class Check:
    """One statement that is true or not, with the numbers it rests on."""

    claim: str
    holds: bool
    numbers: str


@dataclass(frozen=True)
class Finding:
    """A finding of the paper and the checks it is broken into."""

    title: str
    checks: tuple[Check, ...]

    @property
    def verdict(self) -> str:
        """ "holds", "holds in part" or "does not hold"."""
        passed = sum(check.holds for check in self.checks)
        return "holds" if passed == len(self.checks) else "holds in part" if passed else "does not hold"


@dataclass(frozen=True)
class Analysis:
    """Everything the report shows. L layers, S steps, E experts; information in bits.

    class_information, patch_information, step_information: (L,) I(expert; class), I(expert; position), I(expert; step).
    class_baseline, patch_baseline, step_baseline: (L,) the same with shuffled labels.
    load_entropy: (L,) entropy of the load over all steps, 1 being even.
    step_entropy: (L, S) the same at each step.
    load: (L, E) share of the choices, 1 being even.
    findings: the paper's, judged.
    """

    counts: ExpertCounts
    class_information: Estimate
    patch_information: Estimate
    step_information: Estimate
    class_baseline: Baseline
    patch_baseline: Baseline
    step_baseline: Baseline
    load_entropy: Estimate
    step_entropy: Estimate
    load: np.ndarray
    resamples: int
    shuffles: int
    findings: tuple[Finding, ...]

    @property
    def mean_information(self) -> dict[str, Range]:
        """Bits of information on the expert, mean over the layers, by "class", "position" and "step"."""
        estimates = (self.class_information, self.patch_information, self.step_information)
        return {name: mean_over_layers(one) for name, one in zip(("class", "position", "step"), estimates, strict=True)}


def analyse(counts: ExpertCounts, *, resamples: int = 500, shuffles: int = 200, seed: int = 0) -> Analysis:
    """Compute the scalars of each layer with their uncertainty, and judge the paper's findings by them.

    Args:
        counts: of at least one image.
        resamples: of the bootstrap, at least 2.
        shuffles: of each baseline, at least 1; the smallest p-value is 1 / (shuffles + 1).
        seed: of both.

    Raises:
        ValueError: no images, or too few resamples or shuffles.
    """
    if counts.num_images < 1:
        raise ValueError("counts: got no images, expected at least one")
    if resamples < 2 or shuffles < 1:
        raise ValueError(f"resamples, shuffles: got {resamples}, {shuffles}, expected at least 2 and 1")
    rng = np.random.default_rng(seed)
    used = -(-counts.num_images // counts.images_per_group)  # groups of a stopped run may be empty
    steps, patches = counts.steps[:used], counts.patches[:used]
    most = max(math.log2(counts.num_experts), np.finfo(np.float64).tiny)

    def load_entropy(rows: np.ndarray) -> np.ndarray:
        return entropy(rows.sum(-2)) / most

    def row_entropy(rows: np.ndarray) -> np.ndarray:
        return entropy(rows) / most

    estimates = {
        "class_information": over_images(counts.images, counts.class_ids, rng, resamples=resamples),
        "patch_information": over_groups(patches, mutual_information, rng, resamples=resamples),
        "step_information": over_groups(steps, mutual_information, rng, resamples=resamples),
        "load_entropy": _at_most_one(over_groups(steps, load_entropy, rng, resamples=resamples)),
        "step_entropy": _at_most_one(over_groups(steps, row_entropy, rng, resamples=resamples)),
    }
    return Analysis(
        counts=counts,
        **estimates,
        class_baseline=shuffled_images(counts.images, counts.class_ids, rng, shuffles=shuffles),
        patch_baseline=shuffled_groups(patches, rng, shuffles=shuffles),
        step_baseline=shuffled_groups(steps, rng, shuffles=shuffles),
        load=load(steps.sum((0, 2), dtype=np.int64)),
        resamples=resamples,
        shuffles=shuffles,
        findings=(
            _selection(*(estimates[f"{name}_information"] for name in ("class", "patch", "step"))),
            _depth(estimates["patch_information"]),
            _steps(estimates["step_entropy"]),
        ),
    )


def _at_most_one(estimate: Estimate) -> Estimate:
    """Correction and interval of a relative entropy may overshoot its bound."""
    parts = {name: np.minimum(getattr(estimate, name), 1) for name in ("corrected", "low", "high")}
    return replace(estimate, **parts)


def best(estimate: Estimate) -> np.ndarray:
    """The corrected value where there is one, else the plain one."""
    return np.where(np.isnan(estimate.corrected), estimate.value, estimate.corrected)


def mean_of(estimate: Estimate, weights: np.ndarray) -> Range:
    """A weighted sum of an estimate's entries (weights of their shape) with its interval."""
    axes = tuple(range(1, estimate.replicates.ndim))
    centre = np.asarray((best(estimate) * weights).sum())
    low, high = interval(centre, (estimate.replicates * weights).sum(axes))
    return Range(float(centre), float(low), float(high))


def mean_over_layers(estimate: Estimate) -> Range:
    """The mean of an estimate (L,) with its interval."""
    return mean_of(estimate, np.full(len(estimate.value), 1 / len(estimate.value)))


def _selection(by_class: Estimate, by_patch: Estimate, by_step: Estimate) -> Finding:
    label, patch, step = map(mean_over_layers, (by_class, by_patch, by_step))
    larger = max(patch.value, step.value)
    share = f"{label.value / larger:.0%} of the larger of the two" if larger > 0 else "both others are zero"
    return Finding(
        "Selection depends on position and time step, hardly on class",
        (
            Check("position tells more of the expert than class", patch.low > label.high, _versus(by_patch, by_class)),
            Check("step tells more of the expert than class", step.low > label.high, _versus(by_step, by_class)),
            Check(
                f"class tells at most {HARDLY:.0%} of what position or step tells",
                label.value <= HARDLY * larger,
                share,
            ),
        ),
    )


def _versus(one: Estimate, other: Estimate) -> str:
    layers = int((one.low > other.high).sum())
    return (
        f"mean over the layers {mean_over_layers(one).text('bits', 4)} against "
        f"{mean_over_layers(other).text('bits', 4)}; clearly more in {layers} of {len(one.value)} layers"
    )


def _depth(by_patch: Estimate) -> Finding:
    layers = len(by_patch.value)
    half = layers // 2
    halves = np.zeros(layers)
    ends = np.zeros(layers)
    if half:
        halves[:half], halves[layers - half :] = 1 / half, -1 / half
        ends[0], ends[-1] = 1, -1
    first, last = mean_of(by_patch, halves), mean_of(by_patch, ends)
    return Finding(
        "Shallow layers are spatially clustered, deep ones spread",
        (
            Check(
                "position tells more of the expert in the first half of the layers than in the second",
                first.low > 0,
                f"difference {first.text('bits', 4)}",
            ),
            Check("and in the first layer more than in the last", last.low > 0, f"difference {last.text('bits', 4)}"),
        ),
    )


def _steps(step_entropy: Estimate) -> Finding:
    layers, steps = step_entropy.value.shape
    early, late = np.zeros((layers, steps)), np.zeros((layers, steps))
    num_early, num_late = max(1, steps // _EARLY), max(1, steps - steps // 2)
    early[:, :num_early] = 1 / (num_early * layers)
    late[:, steps - num_late :] = 1 / (num_late * layers)
    difference, start, end = (mean_of(step_entropy, weights) for weights in (late - early, early, late))
    by_step = best(step_entropy).mean(0)
    worst = steps - num_late + int(np.argmin(by_step[steps - num_late :]))
    alone = np.zeros((layers, steps))
    alone[:, worst] = 1 / layers
    least = mean_of(step_entropy, alone)
    return Finding(
        "Concentrated on few experts in early steps, near uniform after half",
        (
            Check(
                f"the load is less even in the first {num_early} of {steps} steps than in the last {num_late}",
                difference.low > 0,
                f"entropy, 1 being even, mean over the layers: {start.text(digits=4)} against {end.text(digits=4)}; "
                f"difference {difference.text(digits=4)}",
            ),
            Check(
                f"it is near uniform in every step of the second half (entropy at least {EVEN})",
                least.value >= EVEN,
                f"least even at step {worst}: {least.text(digits=4)}",
            ),
        ),
    )
