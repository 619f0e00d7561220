"""Confidence intervals for the difference of two networks on the same test samples."""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

_CHUNK_VALUES = 2**22  # resampled indices at a time


class Interval(NamedTuple):
    """A difference and the ends of its confidence interval."""

    difference: float
    low: float
    high: float


def paired_bootstrap(
    first: ArrayLike, second: ArrayLike, *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Percentile interval of mean(second) - mean(first) over samples, (N,) values of both for the same N samples.

    Samples are drawn with replacement, `resamples` times with `seed`, both values of a sample together. For means of
    per-sample values (accuracy, loss) only; for measures of the whole set see split_half_interval. Source: Efron and
    Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3.

    Raises ValueError for shapes that do not fit, resamples below 1 or a confidence outside (0, 1).
    """
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if a.ndim != 1 or a.shape != b.shape or len(a) == 0:
        raise ValueError(f"paired_bootstrap: first and second must be (N,) alike, got {a.shape} and {b.shape}")
    if resamples < 1:
        raise ValueError(f"paired_bootstrap: resamples must be at least 1, got {resamples}")
    _check_confidence("paired_bootstrap", confidence)
    change, rng = b - a, np.random.default_rng(seed)
    means, step = np.empty(resamples), max(1, _CHUNK_VALUES // len(a))
    for begin in range(0, resamples, step):
        count = min(step, resamples - begin)
        means[begin : begin + count] = change[rng.integers(0, len(a), (count, len(a)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(change.mean()), float(low), float(high))


def split_half_interval(
    statistic: Callable[[NDArray[np.int64]], ArrayLike],
    n: int,
    *,
    splits: int = 100,
    confidence: float = 0.95,
    seed: int = 0,
) -> list[Interval]:
    """Intervals of differences (D,) = statistic(indices of samples) that a bootstrap would bias, at all n samples.

    For estimates from nearest neighbours, which repeated samples destroy. Halves of a random split are disjoint, so
    independent if samples are, and of one size, so their bias cancels: E (D1 - D2)^2 / 4 = Var(D_half) / 2, the
    variance of D at n samples as far as variances fall as 1/n. Its mean over the `splits`, drawn with `seed`, gives a
    normal interval around statistic(all samples). One interval for each of the D differences.
    This is the delete-d jackknife with d = n/2: Shao and Wu, "A general theory for jackknife variance estimation",
    Annals of Statistics, 1989.

    Raises ValueError for n below 2, splits below 1 or a confidence outside (0, 1).
    """
    if n < 2 or splits < 1:
        raise ValueError(f"split_half_interval: n and splits must be at least 2 and 1, got {n} and {splits}")
    _check_confidence("split_half_interval", confidence)
    rng, half = np.random.default_rng(seed), n // 2
    center = np.atleast_1d(np.asarray(statistic(np.arange(n)), np.float64))
    variance = np.zeros_like(center)
    for _ in range(splits):
        order = rng.permutation(n)
        first, second = np.sort(order[:half]), np.sort(order[half : 2 * half])
        gap = np.asarray(statistic(first), np.float64) - np.asarray(statistic(second), np.float64)
        variance += gap**2 / 4 / splits
    reach = NormalDist().inv_cdf((1 + confidence) / 2) * np.sqrt(variance)
    return [Interval(float(c), float(c - r), float(c + r)) for c, r in zip(center, reach, strict=True)]


def _check_confidence(name: str, confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"{name}: confidence must lie in (0, 1), got {confidence}")
