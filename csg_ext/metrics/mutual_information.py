"""Mutual information between filters and classes, and the score, ceiling and bound made of it. All in nats.

Measure it on held-out pooled features of the STD path. Source: Liang et al., ECCV 2020, section 4.1; estimator: Ross,
doi:10.1371/journal.pone.0087357 (csg_ext/ops/mutual_info.py).
"""

from __future__ import annotations

import math
from typing import overload

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


def _matrix(name: str, mi: Tensor | ArrayLike) -> Tensor:
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
def best_class(mi: Tensor) -> Tensor: ...
@overload
def best_class(mi: ArrayLike) -> NDArray[np.int64]: ...
def best_class(mi: Tensor | ArrayLike) -> Tensor | NDArray[np.int64]:
    """The class that every filter tells most about, (K,) in int64, of an MI matrix (K, C); a tensor for a tensor.

    Example:
        >>> best_class([[0.3, 0.1], [0.0, 0.2]])
        array([0, 1])
    """
    best = _matrix("best_class", mi).argmax(dim=1)
    return best if isinstance(mi, Tensor) else best.numpy()


def mutual_information_score(mi: Tensor | ArrayLike) -> float:
    """MIS = mean over filters of the largest MI with a class, in nats, of an MI matrix (K, C).

    Example:
        >>> mutual_information_score([[0.3, 0.1], [0.0, 0.2]])          # two filters: 0.3 and 0.2
        0.25
    """
    return float(_matrix("mutual_information_score", mi).amax(dim=1).mean())


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
    mean of the diagonal of class_mutual_info(logits, labels).
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

    class_entropy gives it for each class of a set of labels.

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
