"""Entropy, mutual information and their uncertainty: known values, and simulations whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dit_moe.analysis.statistics import (
    entropy,
    load,
    mutual_information,
    over_groups,
    over_images,
    shuffled_groups,
    shuffled_images,
)


def test_known_values() -> None:
    assert entropy(np.array([5, 5, 5, 5])) == pytest.approx(2)
    assert entropy(np.array([[3, 0], [1, 3], [0, 0]])).tolist() == pytest.approx([0, 0.811278, 0], abs=1e-6)
    assert mutual_information(np.array([[4, 0], [0, 4]])) == pytest.approx(1)
    assert mutual_information(np.array([[2, 6], [1, 3]])) == pytest.approx(0)
    # rows weigh by their counts: H(0.75) of the expert, no uncertainty left within a row
    assert mutual_information(np.array([[6, 0], [0, 2]])) == pytest.approx(0.811278, abs=1e-6)
    assert mutual_information(np.array([[3, 1], [0, 0]])) == pytest.approx(0)
    assert load(np.array([1, 2, 3, 2])).tolist() == [0.5, 1, 1.5, 1]


def test_mutual_information_equals_the_sum_over_cells() -> None:
    counts = np.random.default_rng(0).integers(0, 50, (3, 7, 5))
    for got, table in zip(mutual_information(counts), counts, strict=True):
        joint = table / table.sum()
        expected = sum(
            p * math.log2(p / (joint[r].sum() * joint[:, e].sum())) for (r, e), p in np.ndenumerate(joint) if p
        )
        assert got == pytest.approx(expected, abs=1e-12)


CLASSES, EXPERTS, PER_IMAGE, LAYERS = 10, 8, 600, 200


def simulate_images(rng: np.random.Generator, per_class: int, effect: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Counts (I, L, E) of images that differ from each other, in every layer anew, and a class effect of known size.

    Each image has shares of its own around its class's, so the choices within an image are not independent.
    """
    shares = np.full((CLASSES, EXPERTS), 1 / EXPERTS)
    for label in range(CLASSES):
        shares[label, label % EXPERTS] += effect
    shares /= shares.sum(1, keepdims=True)
    class_ids = np.tile(np.arange(CLASSES), per_class)
    own = np.stack([rng.dirichlet(shares[label] * 60, LAYERS) for label in class_ids])
    return rng.multinomial(PER_IMAGE, own), class_ids, float(mutual_information(shares))


@pytest.mark.parametrize("effect", [0.0, 0.05])
def test_class_information_is_estimated_without_bias(effect: float) -> None:
    """The mean over layers lies near the truth, where the plain value is several times too large."""
    images, class_ids, truth = simulate_images(np.random.default_rng(1), 12, effect)
    estimate = over_images(images, class_ids, np.random.default_rng(2), resamples=60)
    bias = estimate.value.mean() - truth
    error = abs(estimate.corrected.mean() - truth)
    assert bias > 0.005 and error < 0.1 * bias
    covered = (estimate.low <= truth) & (truth <= estimate.high)
    assert covered.mean() > 0.85


def test_shuffled_classes_tell_an_effect_from_none() -> None:
    rng = np.random.default_rng(3)
    for effect, rejected in ((0.0, (0, 0.12)), (0.15, (0.99, 1))):
        images, class_ids, truth = simulate_images(rng, 8, effect)
        baseline = shuffled_images(images, class_ids, rng, shuffles=39)
        assert rejected[0] <= (baseline.p_value <= 0.05).mean() <= rejected[1]
        if effect == 0:
            assert baseline.mean.mean() == pytest.approx(
                over_images(images, class_ids, rng, resamples=2).value.mean(), rel=0.1
            )


def simulate_groups(rng: np.random.Generator, groups: int, effect: float) -> tuple[np.ndarray, float]:
    """Counts (G, L, R, E): rows with known shares, scattered from group to group."""
    rows = 6
    shares = np.full((rows, EXPERTS), 1 / EXPERTS)
    shares[np.arange(rows), np.arange(rows)] += effect
    shares /= shares.sum(1, keepdims=True)
    own = np.stack([[rng.dirichlet(row * 200, LAYERS) for row in shares] for _ in range(groups)])  # (G, R, L, E)
    return rng.multinomial(500, own).swapaxes(1, 2), float(mutual_information(shares))


@pytest.mark.parametrize("effect", [0.0, 0.1])
def test_group_information_is_estimated_without_bias(effect: float) -> None:
    groups, truth = simulate_groups(np.random.default_rng(4), 20, effect)
    estimate = over_groups(groups, mutual_information, np.random.default_rng(5), resamples=100)
    bias = estimate.value.mean() - truth
    assert bias > 0.0005 and abs(estimate.corrected.mean() - truth) < 0.1 * bias
    assert ((estimate.low <= truth) & (truth <= estimate.high)).mean() > 0.85
    baseline = shuffled_groups(groups, np.random.default_rng(6), shuffles=39)
    rejected = (baseline.p_value <= 0.05).mean()
    assert rejected <= 0.12 if effect == 0 else rejected == 1


def test_one_image_a_class_and_one_group_give_no_correction() -> None:
    images = np.random.default_rng(7).integers(1, 9, (4, 2, 3))
    estimate = over_images(images, np.array([0, 1, 2, 2]), np.random.default_rng(0), resamples=3)
    assert np.isnan(estimate.corrected).all() and np.isfinite(estimate.value).all() and np.isfinite(estimate.low).all()
    alone = over_groups(images[:1], mutual_information, np.random.default_rng(0), resamples=3)
    assert np.isnan([alone.corrected, alone.low, alone.high]).all() and np.isfinite(alone.value).all()
