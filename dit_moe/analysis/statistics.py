"""Entropy and mutual information of counts, in bits, with bias correction, shuffled baseline and bootstrap.

Choices of one image are anything but independent: its tokens see each other and its steps follow each other. What is
drawn independently are images. So images, or groups of them, are what is left out (jackknife), drawn again (bootstrap)
and shuffled; formulas that count every choice as a draw of its own would claim far too much certainty.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Statistic = Callable[[np.ndarray], np.ndarray]
_CHUNK = 16  # resamples at a time, to bound the memory


@dataclass(frozen=True)
class Estimate:
    """A statistic with its uncertainty; arrays of one shape.

    value: of the counts as they are ("plug-in").
    corrected: value less the bias that the jackknife finds; NaN where it cannot be found.
    low, high: bootstrap interval around `corrected` (around `value` where that is NaN).
    replicates: (R, ...) bootstrap deviations from their mean, for intervals of functions of several estimates.
    """

    value: np.ndarray
    corrected: np.ndarray
    low: np.ndarray
    high: np.ndarray
    replicates: np.ndarray


@dataclass(frozen=True)
class Baseline:
    """A statistic when the labels mean nothing: over shuffles, its mean, and how often it reached the observed value.

    mean: of the shuffles.
    p_value: (1 + shuffles at least as large) / (1 + shuffles).
    """

    mean: np.ndarray
    p_value: np.ndarray


def entropy(counts: np.ndarray) -> np.ndarray:
    """Entropy in bits of counts (..., E) along the last axis, -> (...); 0 where nothing was counted."""
    totals = counts.sum(-1, keepdims=True, dtype=np.float64)
    shares = counts / np.maximum(totals, np.finfo(np.float64).tiny)
    return -(shares * np.log2(np.where(shares > 0, shares, 1.0))).sum(-1)


def mutual_information(counts: np.ndarray) -> np.ndarray:
    """I(row; expert) in bits of counts (..., R, E): what the row tells of the expert, -> (...).

    0 where rows tell nothing, at most log2 E. Rows weigh as they were counted.
    """
    rows = counts.sum(-1, dtype=np.float64)
    weights = rows / np.maximum(rows.sum(-1, keepdims=True), np.finfo(np.float64).tiny)
    return entropy(counts.sum(-2)) - (weights * entropy(counts)).sum(-1)


def load(counts: np.ndarray) -> np.ndarray:
    """Each expert's share of the choices as a multiple of an even share: (..., E) -> (..., E), 1 is even."""
    return counts * counts.shape[-1] / np.maximum(counts.sum(-1, keepdims=True, dtype=np.float64), 1)


def over_groups(
    groups: np.ndarray, statistic: Statistic, rng: np.random.Generator, *, resamples: int, level: float = 0.95
) -> Estimate:
    """Estimate a statistic of the sum of groups, by leaving groups out and drawing groups again.

    Args:
        groups: (G, ...) counts of each group of images; G of 1 gives no correction and no interval (NaN).
        statistic: of counts (..., *shape) with any leading axes, vectorised over them.
        rng: source of the bootstrap.
        resamples: bootstrap draws, at least 2.
        level: of the interval.
    """
    number, flat = len(groups), groups.reshape(len(groups), -1).astype(np.float64)
    total = flat.sum(0)
    value = statistic(total.reshape(groups.shape[1:]))
    if number < 2:
        unknown = np.full_like(value, np.nan)
        return Estimate(value, unknown, unknown, unknown, np.full((1, *value.shape), np.nan))
    left_out = np.stack([statistic((total - part).reshape(groups.shape[1:])) for part in flat])
    bias = (number - 1) * (left_out.mean(0) - value)
    draws = rng.multinomial(number, np.full(number, 1 / number), size=resamples).astype(np.float64)
    replicates = [
        statistic((draws[start : start + _CHUNK] @ flat).reshape(-1, *groups.shape[1:]))
        for start in range(0, resamples, _CHUNK)
    ]
    return _with_interval(value, value - bias, np.concatenate(replicates), level)


def over_images(
    images: np.ndarray, class_ids: np.ndarray, rng: np.random.Generator, *, resamples: int, level: float = 0.95
) -> Estimate:
    """I(class; expert), by leaving images out and drawing images again within their classes.

    Args:
        images: (I, L, E) counts of each image.
        class_ids: (I,) int.
        rng, resamples, level: as in `over_groups`.

    Returns:
        Estimate of (L,); `corrected` is NaN where a class has one image alone, since a class can then not be told from
        its image.
    """
    order = np.argsort(class_ids, kind="stable")
    images, class_ids = images[order].astype(np.float64), class_ids[order]
    firsts = np.flatnonzero(np.r_[True, class_ids[1:] != class_ids[:-1]])
    sizes = np.diff(np.r_[firsts, len(class_ids)])
    value = mutual_information(_class_counts(images, firsts))
    corrected = np.full_like(value, np.nan) if (sizes < 2).any() else value - _class_bias(images, firsts, sizes)
    replicates = []
    for _ in range(resamples):
        times = np.concatenate([rng.multinomial(size, np.full(size, 1 / size)) for size in sizes])
        replicates.append(mutual_information(_class_counts(images * times[:, None, None], firsts)))
    return _with_interval(value, corrected, np.stack(replicates), level)


def shuffled_groups(groups: np.ndarray, rng: np.random.Generator, *, shuffles: int) -> Baseline:
    """I(row; expert) of counts (G, L, R, E) when the rows are shuffled in each group on its own, -> (L,)."""
    observed = mutual_information(groups.sum(0, dtype=np.int64))
    rows = np.arange(groups.shape[2])
    found = []
    for _ in range(shuffles):
        total = np.zeros(groups.shape[1:], dtype=np.int64)
        for part in groups:
            total += part[:, rng.permutation(rows)]
        found.append(mutual_information(total))
    return _baseline(observed, np.stack(found))


def shuffled_images(images: np.ndarray, class_ids: np.ndarray, rng: np.random.Generator, *, shuffles: int) -> Baseline:
    """I(class; expert) of counts (I, L, E) when the images' classes are shuffled, -> (L,)."""
    sorted_ids = np.sort(class_ids, kind="stable")
    firsts = np.flatnonzero(np.r_[True, sorted_ids[1:] != sorted_ids[:-1]])
    observed = mutual_information(_class_counts(images[np.argsort(class_ids, kind="stable")], firsts))
    found = [mutual_information(_class_counts(images[rng.permutation(len(images))], firsts)) for _ in range(shuffles)]
    return _baseline(observed, np.stack(found))


def interval(centre: np.ndarray, replicates: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Bootstrap interval: the replicates' quantiles, as deviations (R, ...) from their mean, around a centre (...)."""
    low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return centre + low, centre + high


def _with_interval(value: np.ndarray, corrected: np.ndarray, replicates: np.ndarray, level: float) -> Estimate:
    # A resample holds fewer different images than the sample, so its plug-in value is biased once more: only how the
    # resamples scatter is used, not where they lie.
    deviations = replicates - replicates.mean(0)
    low, high = interval(np.where(np.isnan(corrected), value, corrected), deviations, level)
    return Estimate(value, corrected, low, high, deviations)


def _class_counts(images: np.ndarray, firsts: np.ndarray) -> np.ndarray:
    """(I, L, E) sorted by class, and each class's first image -> (L, C, E)."""
    return np.add.reduceat(images, firsts, axis=0).swapaxes(0, 1)


def _class_bias(images: np.ndarray, firsts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Jackknife bias of I(class; expert), one image of one class left out at a time: (L,).

    The classes' weights are part of the design and stay: leaving out an image changes its class's shares alone.
    """
    totals = np.add.reduceat(images, firsts, axis=0)  # (C, L, E)
    weights = totals.sum(-1, keepdims=True) / totals.sum((0, -1))[:, None]  # (C, L, 1)
    shares = totals / totals.sum(-1, keepdims=True)
    mean, conditional = (weights * shares).sum(0), weights[..., 0] * _share_entropy(shares)
    value = _share_entropy(mean) - conditional.sum(0)
    bias = np.zeros_like(value)
    for label, (first, size) in enumerate(zip(firsts, sizes, strict=True)):
        rest = totals[label] - images[first : first + size]  # (n, L, E)
        rest /= rest.sum(-1, keepdims=True)
        without = _share_entropy(mean + weights[label] * (rest - shares[label])) - (
            conditional.sum(0) - conditional[label] + weights[label, :, 0] * _share_entropy(rest)
        )
        bias += (size - 1) * (without.mean(0) - value)
    return bias


def _share_entropy(shares: np.ndarray) -> np.ndarray:
    """Entropy in bits of shares (..., E) that sum to one; rounding below zero counts as zero."""
    return -(shares * np.log2(np.where(shares > 0, shares, 1.0))).sum(-1)


def _baseline(observed: np.ndarray, found: np.ndarray) -> Baseline:
    return Baseline(found.mean(0), (1 + (found >= observed - 1e-12).sum(0)) / (1 + len(found)))
