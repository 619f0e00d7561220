"""Inputs on which mutual_info is hard: ties, duplicates, runs, outliers; classes that are rare, dominant or sorted."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

EQUAL = 1e-9  # what "scikit-learn's value" means


def psi_table(n: int) -> tuple[Tensor, int]:
    """round(digamma(i) * 2^bits) for i in [0, n], and bits."""
    bits = 53
    psi = torch.special.digamma(torch.arange(n + 1, dtype=torch.float64))
    psi[0] = 0
    return (psi * 2.0**bits).round().to(torch.int64), bits


FEATURES: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "relu": lambda rng, n: np.maximum(0, rng.standard_normal(n)),
    "integers": lambda rng, n: rng.integers(0, rng.integers(2, 30), n).astype(float),
    "constant": lambda rng, n: np.full(n, 3.7),
    "duplicates": lambda rng, n: np.round(rng.standard_normal(n), 2),
    "offset": lambda rng, n: 1e6 + rng.standard_normal(n),
    "large offset": lambda rng, n: 1e12 + np.round(rng.standard_normal(n) * 3),
    "heavy tails": lambda rng, n: np.exp(5 * rng.standard_normal(n)),
    "mostly zero": lambda rng, n: np.where(rng.random(n) < 0.97, 0, rng.standard_normal(n)),
    "signed zeros": lambda rng, n: np.where(rng.random(n) < 0.5, 0.0, -0.0) + rng.integers(0, 2, n),
    "sorted": lambda rng, n: np.sort(rng.standard_normal(n)),
    "bfloat16": lambda rng, n: torch.from_numpy(rng.standard_normal(n)).bfloat16().double().numpy(),
}


def make_features(rng: np.random.Generator, n: int, width: int) -> Tensor:
    columns = [FEATURES[str(kind)](rng, n) for kind in rng.choice(list(FEATURES), width)]
    return torch.from_numpy(np.stack(columns, 1))


def make_labels(rng: np.random.Generator, n: int, kind: str) -> tuple[Tensor, int]:
    classes = int(rng.integers(2, 12))
    if kind == "many":
        classes = int(rng.integers(2, max(3, n // 2 + 1)))
    labels = rng.integers(0, classes, n)
    if kind == "rare":
        labels, classes = np.zeros(n, int), 5  # the last one is empty
        few = min(int(rng.integers(1, 12)), n - 1)
        labels[rng.choice(n, few, replace=False)] = rng.integers(1, 4, few)
    elif kind == "sorted":
        labels = np.sort(labels)
    elif kind == "skewed":
        labels = np.minimum(rng.geometric(0.4, n) - 1, classes - 1)
    elif kind == "one":
        labels, classes = np.zeros(n, int), 2
    return torch.from_numpy(labels), classes


LABELS = ["many", "few", "rare", "sorted", "skewed", "one"]


def sample(n: int = 400, k: int = 6, c: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """features (n, k), of which the first c tell a class each, and labels."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, c, n)
    x = rng.standard_normal((n, k)) + 2 * (np.arange(k) == y[:, None])
    return np.maximum(x, 0), y
