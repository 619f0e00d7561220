"""How much a filter is for one class alone: what MIS, which asks only about the best class, does not say."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from csg_ext.metrics.agreement import class_agreement
from csg_ext.metrics.mutual_information import best_class, class_means, mutual_info_matrix


def class_selectivity(
    features: Tensor | ArrayLike, labels: Tensor | ArrayLike, num_classes: int | None = None
) -> NDArray[np.float64]:
    """Class-selectivity index of every filter, (K,) in [0, 1]: (m - r) / (m + r) with m the largest of its mean
    activations over the samples of a class and r the mean of those of the other classes; 0 of a filter that is silent.

    1 is a filter that is active for one class only, 0 one that all classes excite alike. features (N, K), not negative
    (after ReLU); labels (N,). Classes without a sample count as none.
    Raises ValueError for shapes, labels or negative activations that do not fit, and for samples of one class only.
    Source: Morcos et al., On the importance of single directions for generalization, ICLR 2018, section 2.

    Example:
        >>> class_selectivity([[4.0, 1.0], [1.0, 1.0]], [0, 1])
        array([0.6, 0. ])
    """
    means = class_means("class_selectivity", features, labels, num_classes)
    means = means[:, np.isfinite(means).any(0)]
    if means.shape[1] < 2:
        raise ValueError("class_selectivity: labels must name at least two classes, got one")
    if (np.asarray(features.amin(0).cpu() if isinstance(features, Tensor) else np.min(features, axis=0)) < 0).any():
        raise ValueError("class_selectivity: features must not be negative, such as after ReLU, got negative ones")
    largest = means.max(1)
    rest = (means.sum(1) - largest) / (means.shape[1] - 1)
    total = largest + rest
    return np.divide(largest - rest, total, out=np.zeros_like(total), where=total > 0)


def exclusivity(mi: Tensor | ArrayLike) -> NDArray[np.float64]:
    """1 - second / first of every filter's mutual information with the classes, (K,) in [0, 1], of an MI matrix (K, C).

    1 is a filter that tells of one class only, 0 one that tells as much of two, or nothing. Estimates below 0 count as
    0. With two classes both values are the same, so that it says nothing.
    Raises ValueError for another shape or fewer than two classes, TypeError for an mi that is not real.

    Example:
        >>> exclusivity([[0.4, 0.1, 0.0], [0.2, 0.2, 0.1]])
        array([0.75, 0.  ])
    """
    m = mutual_info_matrix("exclusivity", mi).double().cpu().clamp(min=0)
    if m.shape[1] < 2:
        raise ValueError(f"exclusivity: mi must be (K, C) with two classes or more, got shape {tuple(m.shape)}")
    first, second = m.topk(2, dim=1).values.numpy().T
    return np.where(first > 0, 1 - second / np.where(first > 0, first, 1), 0.0)


def quiet_filters(features: Tensor | ArrayLike, labels: Tensor | ArrayLike, classes: ArrayLike) -> NDArray[np.bool_]:
    """The filters whose mean over the samples of their class, `classes` (K,), lies below that of the others, (K,) bool.

    Mutual information does not tell them from filters that speak for their class: "is it c?" can be answered by
    silence. classes: -1 for a filter without one, which counts as not quiet. features (N, K), labels (N,).
    Raises ValueError for shapes, labels or classes that do not fit.

    Example:
        >>> quiet_filters([[0.0, 2.0], [1.0, 1.0], [1.0, 0.0]], [0, 1, 2], [0, 0])
        array([ True, False])
    """
    own = np.asarray(classes)
    if own.ndim != 1 or own.dtype.kind not in "iu":
        raise ValueError(f"quiet_filters: classes must be (K,) integers, got {own.dtype} {own.shape}")
    y = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
    most = max(int(own.max(initial=0)), int(y.max(initial=0)) if y.dtype.kind in "iub" else 0)
    means = class_means("quiet_filters", features, y, most + 1)
    if own.shape != (len(means),):
        raise ValueError(f"quiet_filters: classes must be ({len(means)},) like the filters, got {own.shape}")
    counts = np.bincount(y.astype(np.int64), minlength=most + 1)
    sums = np.where(counts > 0, means, 0) * counts
    of = np.maximum(own, 0)
    inside, count = sums[np.arange(len(own)), of], counts[of]
    both = (own >= 0) & (count > 0) & (count < len(y))
    return both & (inside * (len(y) - count) < (sums.sum(1) - inside) * count)


def specificity(
    features: NDArray[Any],
    labels: NDArray[np.int64],
    mi: NDArray[np.float64],
    weight: NDArray[Any] | None,
    ceilings: NDArray[np.float64],
) -> dict[str, float]:
    """What is reported beside MIS of any network, with a gate or without; means over all K filters.

    - class_selectivity (left out where activations are negative) and exclusivity (left out with two classes);
    - quiet_filters: the share of the filters that are quiet for the class they tell most about;
    - mis_of_ceiling: a filter's largest MI over the ceiling of that class, the MI of the network's score for it. Unlike
      the ratio of both means it does not grow when filters move to classes that are easy to tell;
    - weight_agreement: class_agreement with the classifier's weights in the gate's place.

    features (N, K), labels (N,), mi (K, C) with 0 for dead filters, weight (C, K), or None to leave weight_agreement
    out, ceilings (C,): nats.
    """
    own = np.where(mi.max(1) > 0, best_class(mi, features, labels), -1)
    told, top = mi.max(1).clip(0), ceilings[own]
    found = {
        "quiet_filters": float(quiet_filters(features, labels, own).mean()),
        "mis_of_ceiling": float(np.divide(told, top, out=np.zeros_like(told), where=(own >= 0) & (top > 0)).mean()),
    }
    if weight is not None:
        found["weight_agreement"] = class_agreement(weight, mi, features, labels)
    if features.min() >= 0:
        found["class_selectivity"] = float(class_selectivity(features, labels, mi.shape[1]).mean())
    if mi.shape[1] > 2:
        found["exclusivity"] = float(exclusivity(mi).mean())
    return found
