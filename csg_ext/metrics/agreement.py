"""How far the gate's classes, the filters' classes and the network's decisions agree; which filters are dead."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from csg_ext.metrics.mutual_information import best_class


def dead_filters(features: Any) -> NDArray[np.bool_]:
    """The filters with one and the same activation on all samples, bool (K,), from features (N, K), array or tensor.

    They tell nothing about any class: their mutual information is 0, whatever the noise against ties estimates.
    Raises ValueError for features of another shape or without a value.
    """
    if len(features.shape) != 2 or 0 in features.shape:
        raise ValueError(f"dead_filters: features must be (N, K) and not empty, got {tuple(features.shape)}")
    if isinstance(features, Tensor):
        return (features.amax(0) == features.amin(0)).cpu().numpy()
    return np.asarray(features.max(axis=0) == features.min(axis=0))


def class_agreement(
    gate: ArrayLike, mi: ArrayLike, features: ArrayLike | None = None, labels: ArrayLike | None = None
) -> float:
    """Share of filters whose largest gate entry and largest MI name the same class; gate (C, K), mi (K, C).

    features (N, K) and labels (N,) are needed with two classes, see best_class. Filters without any mutual information,
    such as dead ones, are left out; 0 where none is left. 1/C is what chance gives.
    Raises ValueError for shapes that do not fit, and for two classes without features and labels.
    Source: Liang et al., ECCV 2020, figure 5 (overlap of the largest entries).
    """
    g, m = np.asarray(gate), np.asarray(mi)
    if g.ndim != 2 or g.T.shape != m.shape or g.size == 0:
        raise ValueError(
            f"class_agreement: mi must be the gate's transposed shape, got gate {g.shape} and mi {m.shape}"
        )
    if len(g) == 2 and features is None:
        raise ValueError("class_agreement: features and labels must be given with two classes, whose MI is the same")
    live = m.max(axis=1) > 0
    return float(np.mean(g.argmax(axis=0)[live] == best_class(m, features, labels)[live])) if live.any() else 0.0


def own_filter_predictions(
    features: ArrayLike, weight: ArrayLike, bias: ArrayLike, gate: ArrayLike
) -> NDArray[np.int64]:
    """Predicted classes (N,) when every class is scored by its own filters alone, the gate rounded to one-hot columns.

    score[n, c] = bias[c] + sum of features[n, k] * weight[c, k] over the filters k whose largest gate entry is c. No
    label enters the scores, unlike in the CSG path. features (N, K), weight (C, K), bias (C,), gate (C, K).
    Raises ValueError for shapes that do not fit.
    """
    a, w, g = np.asarray(features), np.asarray(weight), np.asarray(gate)
    if a.ndim != 2 or w.shape != g.shape or a.shape[1] != g.shape[1]:
        raise ValueError(
            "own_filter_predictions: features, weight and gate must be (N, K), (C, K) and (C, K), "
            f"got {a.shape}, {w.shape} and {g.shape}"
        )
    owned = np.arange(g.shape[0])[:, None] == g.argmax(axis=0)
    scores: NDArray[Any] = a @ (w * owned).T + np.asarray(bias)
    return scores.argmax(axis=1)


def own_filter_accuracy(
    features: ArrayLike, weight: ArrayLike, bias: ArrayLike, gate: ArrayLike, labels: ArrayLike
) -> float:
    """Accuracy of own_filter_predictions, in [0, 1]: near the STD path's where filters are ideally class-specific.

    Arguments and errors: as own_filter_predictions; labels (N,).
    """
    predicted, y = own_filter_predictions(features, weight, bias, gate), np.asarray(labels)
    if y.shape != predicted.shape:
        raise ValueError(f"own_filter_accuracy: labels must be ({len(predicted)},) like features, got {y.shape}")
    return float(np.mean(predicted == y))
