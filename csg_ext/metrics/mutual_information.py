"""Mutual information between filters and classes, and the score, ceiling and bound made of it. All in nats.

Measure it on held-out pooled features of the STD path. Source: Liang et al., ECCV 2020, section 4.1; estimator: Ross,
doi:10.1371/journal.pone.0087357, as scikit-learn implements it.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray


def _checked(name: str, features: ArrayLike, labels: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    a, y = np.asarray(features, np.float64), np.asarray(labels)
    if a.ndim != 2:
        raise ValueError(f"{name}: features must be (N, K), got shape {a.shape}")
    if y.shape != a.shape[:1]:
        raise ValueError(f"{name}: labels must be ({len(a)},) like the features' first axis, got shape {y.shape}")
    if not np.issubdtype(y.dtype, np.integer):
        raise ValueError(f"{name}: labels must be integers, got {y.dtype}")
    if not np.isfinite(a).all():
        raise ValueError(f"{name}: features must be finite, got {np.count_nonzero(~np.isfinite(a))} that are not")
    if len(y) and y.min() < 0:
        raise ValueError(f"{name}: labels must be non-negative, got {y.min()}")
    return a, y.astype(np.int64)


def _one_vs_rest(
    a: NDArray[np.float64], y: NDArray[np.int64], label: int, n_neighbors: int, random_state: int, n_jobs: int | None
) -> NDArray[np.float64]:
    """MI of every column of a (N, K) with 1[y = label], (K,)."""
    from sklearn.feature_selection import mutual_info_classif

    return mutual_info_classif(
        a, y == label, discrete_features=False, n_neighbors=n_neighbors, random_state=random_state, n_jobs=n_jobs
    )


def class_mutual_info(
    features: ArrayLike,
    labels: ArrayLike,
    num_classes: int | None = None,
    n_neighbors: int = 3,
    random_state: int = 0,
    n_jobs: int | None = None,
) -> NDArray[np.float64]:
    """The MI matrix M (K, C): M[k, c] = MI(a_k ; 1[y = c]) in nats, each class against the rest.

    features (N, K): one continuous value per sample and filter. labels (N,): integers in 0..C-1; num_classes is C,
    the largest label + 1 when not given. The k-nearest-neighbour estimate adds noise of 1e-10 relative to break ties;
    random_state seeds it. n_jobs: processes over filters.
    """
    a, y = _checked("class_mutual_info", features, labels)
    if num_classes is None:
        num_classes = int(y.max(initial=-1)) + 1
    elif len(y) and y.max() >= num_classes:
        raise ValueError(f"class_mutual_info: labels must lie in [0, {num_classes}), got {y.max()}")
    columns = [_one_vs_rest(a, y, c, n_neighbors, random_state, n_jobs) for c in range(num_classes)]
    return np.stack(columns, axis=1) if columns else np.zeros((a.shape[1], 0))


def best_class(mi: ArrayLike) -> NDArray[np.int64]:
    """The class that every filter tells most about, (K,), of an MI matrix (K, C)."""
    return np.argmax(np.asarray(mi), axis=1)


def mutual_information_score(mi: ArrayLike) -> float:
    """MIS = mean over filters of the largest MI with a class, in nats, of an MI matrix (K, C)."""
    m = np.asarray(mi)
    if m.ndim != 2 or m.size == 0:
        raise ValueError(f"mutual_information_score: mi must be a non-empty (K, C) matrix, got shape {m.shape}")
    return float(m.max(axis=1).mean())


def mis_ceiling(logits: ArrayLike, labels: ArrayLike, n_neighbors: int = 3, random_state: int = 0) -> float:
    """A practical ceiling of MIS in nats: the mean MI of the network's own class scores (N, C) with their classes.

    A filter that tells as much about its class as the whole network's score of that class does reaches it.
    """
    a, y = _checked("mis_ceiling", logits, labels)
    if a.shape[1] == 0:
        raise ValueError("mis_ceiling: logits must be (N, C) with at least one class, got none")
    per_class = [_one_vs_rest(a[:, c : c + 1], y, c, n_neighbors, random_state, None)[0] for c in range(a.shape[1])]
    return float(np.mean(per_class))


def entropy_bound(num_classes: int) -> float:
    """H(1/C), the entropy of one class against the rest in nats: no MI of C balanced classes exceeds it."""
    if num_classes < 2:
        raise ValueError(f"entropy_bound: num_classes must be at least 2, got {num_classes}")
    p = 1 / num_classes
    return -p * math.log(p) - (1 - p) * math.log1p(-p)


def gap_closed(mis: float, baseline_mis: float, ceiling: float) -> float:
    """(mis - baseline) / (ceiling - baseline): the share of the way from the baseline's MIS to the ceiling; NaN if
    the baseline already lies at or above the ceiling."""
    return (mis - baseline_mis) / (ceiling - baseline_mis) if ceiling > baseline_mis else math.nan
