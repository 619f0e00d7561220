"""Mutual information between filters and classes, and the score, ceiling and bound made of it. All in nats.

Measure it on held-out pooled features of the STD path. Source: Liang et al., ECCV 2020, section 4.1; estimator: Ross,
doi:10.1371/journal.pone.0087357 (csg_ext/ops/mutual_info.py).
"""

from __future__ import annotations

import math
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from csg_ext.ops._errors import as_array
from csg_ext.ops.mutual_info import class_entropy, class_mutual_info, mutual_info_classif

__all__ = [
    "best_class",
    "class_entropy",
    "class_mutual_info",
    "entropy_bound",
    "gap_closed",
    "mis_ceiling",
    "mutual_info_classif",
    "mutual_information_score",
]

_MEANS_ROWS = 8192  # samples that are averaged at a time


def mutual_info_matrix(name: str, mi: Tensor | ArrayLike) -> Tensor:
    """mi (K, C) as a dense floating tensor; ValueError or TypeError, which begin with `name`, for anything else."""
    if isinstance(mi, Tensor):
        m = mi
    else:
        array = as_array(name, "mi", mi)
        if array.dtype.kind not in "fiub":
            raise TypeError(f"{name}: mi must be numbers, got {array.dtype}")
        m = torch.from_numpy(np.array(array, np.float32 if array.dtype == np.float32 else np.float64))
    if m.is_complex() or m.layout != torch.strided or m.is_meta:
        raise TypeError(f"{name}: mi must be a dense tensor of real numbers, got {m.dtype} with layout {m.layout}")
    if not m.is_floating_point():
        m = m.double()
    if m.dim() != 2 or m.numel() == 0:
        raise ValueError(f"{name}: mi must be a non-empty (K, C) matrix, got shape {tuple(m.shape)}")
    return m


@overload
def best_class(
    mi: Tensor, features: Tensor | ArrayLike | None = None, labels: Tensor | ArrayLike | None = None
) -> Tensor: ...
@overload
def best_class(
    mi: ArrayLike, features: Tensor | ArrayLike | None = None, labels: Tensor | ArrayLike | None = None
) -> NDArray[np.int64]: ...
def best_class(
    mi: Tensor | ArrayLike, features: Tensor | ArrayLike | None = None, labels: Tensor | ArrayLike | None = None
) -> Tensor | NDArray[np.int64]:
    """The class that every filter tells most about, (K,) in int64, of an MI matrix mi (K, C); a tensor for a tensor.

    Of classes with the same value the one in whose samples the filter's mean is largest, by features (N, K) and labels
    (N,); without these the first. With two classes every filter has the same value for both ("is it the one" and "is it
    the other" are one question), so that there only the means tell them apart.

    Raises ValueError for shapes that do not fit, labels that are no classes, or one of features and labels alone;
    TypeError for an mi that is not real.

    Example:
        >>> best_class([[0.3, 0.1], [0.0, 0.2]])
        array([0, 1])
    """
    m = mutual_info_matrix("best_class", mi)
    best = m.argmax(dim=1)
    if (features is None) != (labels is None):
        raise ValueError("best_class: features and labels must be given together, got one of them")
    tied = m == m.amax(dim=1, keepdim=True)
    rows = torch.nonzero(tied.sum(dim=1) > 1)[:, 0]
    if features is not None and labels is not None and len(rows):
        shape, count, (filters, classes) = tuple(np.shape(features)), tuple(np.shape(labels)), m.shape
        if len(shape) != 2 or shape[1] != filters or count != shape[:1]:
            raise ValueError(
                f"best_class: features and labels must be (N, {filters}) and (N,), got {shape} and {count}"
            )
        chosen = rows.cpu().numpy()
        x: Any = features if isinstance(features, Tensor) else as_array("best_class", "features", features)
        means = torch.from_numpy(class_means("best_class", x[:, chosen], labels, classes))
        best[rows] = torch.where(tied[rows], means.to(m.device), -torch.inf).argmax(dim=1)
    return best if isinstance(mi, Tensor) else best.numpy()


def class_means(
    name: str, features: Tensor | ArrayLike, labels: Tensor | ArrayLike, num_classes: int | None
) -> NDArray[np.float64]:
    """The mean of every filter over every class's samples, (K, C); -inf for a class without one.

    features (N, K), labels (N,); num_classes: the largest label + 1 when not given. ValueError, which begins with
    `name`, for shapes and labels that do not fit.
    """
    x: Any = features if isinstance(features, Tensor) else as_array(name, "features", features)
    y = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
    if x.ndim != 2 or 0 in x.shape or y.shape != (len(x),):
        raise ValueError(f"{name}: features and labels must be (N, K) and (N,), got {tuple(x.shape)} and {y.shape}")
    classes = int(y.max()) + 1 if num_classes is None and y.dtype.kind in "iub" else num_classes or 0
    if y.dtype.kind not in "iub" or y.min() < 0 or y.max() >= classes:
        raise ValueError(f"{name}: labels must be integers in [0, {classes}), got {y.dtype} {y!r:.60}")
    sums, counts = np.zeros((classes, x.shape[1])), np.bincount(y.astype(np.int64), minlength=classes)
    for begin in range(0, len(y), _MEANS_ROWS):  # bounds the copy in float64
        part, of = x[begin : begin + _MEANS_ROWS], y[begin : begin + _MEANS_ROWS]
        values = part.detach().double().cpu().numpy() if isinstance(part, Tensor) else part
        np.add.at(sums, of.astype(np.int64), np.asarray(values, np.float64))
    return np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], -np.inf).T


def mutual_information_score(mi: Tensor | ArrayLike) -> float:
    """MIS = mean over filters of the largest MI with a class, in nats, of an MI matrix mi (K, C).

    Raises ValueError for another shape or an empty matrix, TypeError for one that is not real.
    Source: Liang et al., ECCV 2020, section 4.1.

    Example:
        >>> mutual_information_score([[0.3, 0.1], [0.0, 0.2]])          # two filters: 0.3 and 0.2
        0.25
    """
    return float(mutual_info_matrix("mutual_information_score", mi).amax(dim=1).mean())


def mis_ceiling(
    logits: Tensor | ArrayLike,
    labels: Tensor | ArrayLike,
    n_neighbors: int = 3,
    random_state: int = 0,
    *,
    ties: str = "noise",
) -> float:
    """A practical ceiling of MIS in nats: the mean MI of the network's own class scores (N, C) with their classes.

    A filter that tells as much about its class as the whole network's score of that class does reaches it. This is the
    mean of the diagonal of class_mutual_info(logits, labels, ...); labels (N,), n_neighbors, random_state and ties are
    those of that function, and so are the errors. Raises ValueError for logits that are no (N, C).
    """
    scores = logits if isinstance(logits, Tensor) else np.asarray(logits)
    if scores.ndim != 2:
        raise ValueError(f"mis_ceiling: logits must be (N, C), got shape {tuple(scores.shape)}")
    if scores.shape[1] == 0:
        raise ValueError("mis_ceiling: logits must be (N, C) with at least one class, got none")
    mi = class_mutual_info(
        scores, labels, num_classes=scores.shape[1], n_neighbors=n_neighbors, random_state=random_state, ties=ties
    )
    return float(mi.diagonal().mean())


def entropy_bound(num_classes: int) -> float:
    """H(1/C), the entropy of one class against the rest in nats: no MI of C balanced classes exceeds it.

    class_entropy gives it for each class of a set of labels. num_classes is C; ValueError below 2.

    Example:
        >>> round(entropy_bound(10), 3), round(entropy_bound(1000), 4)
        (0.325, 0.0079)
    """
    if num_classes < 2:
        raise ValueError(f"entropy_bound: num_classes must be at least 2, got {num_classes}")
    p = 1 / num_classes
    return -p * math.log(p) - (1 - p) * math.log1p(-p)


def gap_closed(mis: float, baseline_mis: float, ceiling: float) -> float:
    """(mis - baseline) / (ceiling - baseline): the share of the way from the baseline's MIS to the ceiling; NaN if
    the baseline already lies at or above the ceiling.

    Example:
        >>> gap_closed(mis=0.25, baseline_mis=0.2, ceiling=0.3)
        0.5
    """
    return (mis - baseline_mis) / (ceiling - baseline_mis) if ceiling > baseline_mis else math.nan
