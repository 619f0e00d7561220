"""What the classifier makes of some classes' filters alone: cluster accuracy, its complement, predicted class only."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def cluster_predictions(
    features: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike,
    filter_classes: ArrayLike,
    kept: ArrayLike,
    *,
    complement: bool = False,
) -> NDArray[np.int64]:
    """Predicted classes, (N,), when sample n keeps the filters of class kept[n] alone; all others are zeroed.

    complement=True zeroes those filters and keeps the others. features (N, K): pooled features of the STD path; weight
    (C, K) and bias (C,): the linear classifier; filter_classes (K,): the class of every filter, e.g. the gate's
    argmax over classes or best_class(mi); kept (N,). A class without a filter leaves a sample with the bias alone.

    Raises ValueError for shapes that do not fit.
    """
    a, w, b = np.asarray(features), np.asarray(weight), np.asarray(bias)
    owner, keep = np.asarray(filter_classes), np.asarray(kept)
    shapes = (a.shape, w.shape, b.shape, owner.shape, keep.shape)
    if a.ndim != 2 or w.ndim != 2 or shapes[1:] != ((len(b), a.shape[1]), (len(w),), a.shape[1:], a.shape[:1]):
        raise ValueError(
            "cluster_predictions: features, weight, bias, filter_classes and kept must be (N, K), (C, K), (C,), (K,) "
            f"and (N,), got {', '.join(map(str, shapes))}"
        )
    open_ = (owner == keep[:, None]) != complement
    scores = np.where(open_, a, 0) @ w.T + b
    return scores.argmax(axis=1)


def cluster_accuracy(
    features: ArrayLike, weight: ArrayLike, bias: ArrayLike, filter_classes: ArrayLike, labels: ArrayLike
) -> float:
    """Accuracy with only the filters of every sample's true class. The label chooses the filters: it is no measure of
    quality, only of where the evidence for a class lies. Arguments and errors: as cluster_predictions; labels (N,)."""
    predicted = cluster_predictions(features, weight, bias, filter_classes, labels)
    return float(np.mean(predicted == np.asarray(labels)))


def complement_accuracy(
    features: ArrayLike, weight: ArrayLike, bias: ArrayLike, filter_classes: ArrayLike, labels: ArrayLike
) -> float:
    """Accuracy with the filters of every sample's true class removed: it collapses where filters are class-specific.

    Source: Liang et al., ECCV 2020. Arguments and errors: as cluster_predictions; labels (N,)."""
    predicted = cluster_predictions(features, weight, bias, filter_classes, labels, complement=True)
    return float(np.mean(predicted == np.asarray(labels)))


def predicted_class_accuracy(
    features: ArrayLike, weight: ArrayLike, bias: ArrayLike, filter_classes: ArrayLike, labels: ArrayLike
) -> float:
    """Accuracy with only the filters of the class that the STD path predicts; no label is used.

    Arguments and errors: as cluster_predictions; labels (N,)."""
    std = (np.asarray(features) @ np.asarray(weight).T + np.asarray(bias)).argmax(axis=1)
    predicted, y = cluster_predictions(features, weight, bias, filter_classes, std), np.asarray(labels)
    if y.shape != predicted.shape:
        raise ValueError(f"predicted_class_accuracy: labels must be ({len(predicted)},) like features, got {y.shape}")
    return float(np.mean(predicted == y))
