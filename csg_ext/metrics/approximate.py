"""An approximate mutual information of filters and classes in plain PyTorch: equal-frequency bins, on any device."""

from __future__ import annotations

import math
from typing import overload

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from csg_ext.ops.mutual_info import _class_indices, _Features, _positive

_CHUNK_VALUES = 2**24  # sorted values, or cells of the tables, at a time


@overload
def approximate_class_mutual_info(
    features: Tensor, labels: Tensor | ArrayLike, *, num_classes: int | None = ..., bins: int = ...
) -> Tensor: ...
@overload
def approximate_class_mutual_info(
    features: ArrayLike, labels: Tensor | ArrayLike, *, num_classes: int | None = ..., bins: int = ...
) -> NDArray[np.float64]: ...
def approximate_class_mutual_info(
    features: Tensor | ArrayLike, labels: Tensor | ArrayLike, *, num_classes: int | None = None, bins: int = 64
) -> Tensor | NDArray[np.float64]:
    """An approximation of class_mutual_info's matrix M (K, C) in nats, from the counts of equal-frequency bins.

    The MI of the bin's number with 1[labels = c], less its bias (Miller-Madow: (cells in use - bins in use - 1) / 2N),
    at least 0. Equal values share a bin. Source of the correction: Miller, "Note on the bias of information estimates",
    1955. It needs torch operators alone; where csg_ext has kernels, class_mutual_info is more exact and, on a CPU,
    faster (a fifth of the time at 50,000 samples, 64 filters and 1,000 classes, 2 threads).

    It is low where a class is rarer than a bin. Measured beside class_mutual_info(ties="exact") with 64 bins on 64
    filters that each shift by 0 to 4 standard deviations for one class, normal or rectified normal: root mean square
    difference of that class's MI 0.0021 and 0.0020 at 10,000 samples and 10 classes (MIS 0.144 and 0.144, not 0.145 and
    0.145); 0.0021 and 0.0021 at 50,000 and 100 (MIS 0.0168 and 0.0167, not 0.0181 and 0.0180); 0.0007 and 0.0006 at
    50,000 and 1,000 (MIS 0.0019 and 0.0018, not 0.0021 and 0.0021). Without the correction the other classes' MI is
    0.0025 and 0.0013 too large at 10,000 samples; with it 0.0005 and 0.0003 too small.

    Args:
        features: (N, K), a tensor on any device, or an array, as for class_mutual_info.
        labels: (N,), integers in [0, C).
        num_classes: C; the largest label + 1 when not given.
        bins: at most so many bins of N / bins samples each.

    Returns:
        (K, C) in float64: a tensor on the features' device if features is a tensor, else an array.

    Raises:
        ValueError: shapes or values that do not fit. TypeError: an argument of the wrong type.
    """
    op = "approximate_class_mutual_info"
    bins = _positive(op, "bins", bins)
    source = _Features(op, "features", features, None)
    codes, counts = _class_indices(op, labels, source.n, num_classes)
    source.check_finite()
    n, classes, device = source.n, len(counts), source.device
    codes, counts = codes.to(device), counts.to(device)
    ranks = torch.arange(n, device=device)
    mi = torch.empty((source.k, classes), dtype=torch.float64, device=device)
    step = max(1, _CHUNK_VALUES // max(n, bins * classes))
    for begin in range(0, source.k, step):
        values, order = source.columns(begin, begin + step).T.sort(dim=1)
        first = torch.ones_like(values, dtype=torch.bool)
        first[:, 1:] = values[:, 1:] != values[:, :-1]
        bin_number = torch.where(first, ranks, 0).cummax(1).values * bins // n
        column = torch.arange(len(values), device=device)[:, None]
        cell = (column * bins + bin_number) * classes + codes[order]
        of_class = torch.bincount(cell.flatten(), minlength=len(values) * bins * classes).view(-1, bins, classes)
        of_bin = of_class.sum(2, keepdim=True)
        of_rest = of_bin - of_class
        sums = (_n_log_n(of_class) + _n_log_n(of_rest) - _n_log_n(of_bin)).sum(1) - _n_log_n(counts)
        cells = ((of_class > 0).long() + (of_rest > 0).long() - (of_bin > 0).long()).sum(1)
        excess = cells - (counts > 0).long() - (counts < n).long() + 1
        mi[begin : begin + step] = math.log(n) + (sums - _n_log_n(n - counts) - excess.double() / 2) / n
    mi.clamp_(min=0)
    return mi if isinstance(features, Tensor) else mi.numpy()


def _n_log_n(count: Tensor) -> Tensor:
    return torch.special.xlogy(count.double(), count.double())
