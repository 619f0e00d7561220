"""An approximate mutual information of filters and classes, from equal-frequency bins."""

from __future__ import annotations

import math
from typing import overload

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from csg_ext.ops._errors import explained
from csg_ext.ops._mutual_info_arguments import Features, class_indices, positive
from csg_ext.ops.mutual_info import Progress, _by_chunks

_OP = "approximate_class_mutual_info"
_CELLS = 2**24  # of the tables of counts, at a time


@overload
def approximate_class_mutual_info(
    features: Tensor,
    labels: Tensor | ArrayLike,
    *,
    num_classes: int | None = ...,
    bins: int = ...,
    device: torch.device | str | None = ...,
    chunk_size: int | None = ...,
    progress: Progress | None = ...,
) -> Tensor: ...
@overload
def approximate_class_mutual_info(
    features: ArrayLike,
    labels: Tensor | ArrayLike,
    *,
    num_classes: int | None = ...,
    bins: int = ...,
    device: torch.device | str | None = ...,
    chunk_size: int | None = ...,
    progress: Progress | None = ...,
) -> NDArray[np.float64]: ...
def approximate_class_mutual_info(
    features: Tensor | ArrayLike,
    labels: Tensor | ArrayLike,
    *,
    num_classes: int | None = None,
    bins: int = 64,
    device: torch.device | str | None = None,
    chunk_size: int | None = None,
    progress: Progress | None = None,
) -> Tensor | NDArray[np.float64]:
    """An approximation of class_mutual_info's matrix M (K, C) in nats, from the counts of equal-frequency bins.

    The MI of the bin's number with 1[labels = c], less its bias (Miller-Madow: (cells in use - bins in use - 1) / 2N),
    at least 0. Equal values share a bin: that of the first of them in order. Source of the correction: Miller, "Note on
    the bias of information estimates", 1955. Deterministic: the same bits for any threads, chunks and instruction set.
    A CPU takes a kernel on the buckets that class_mutual_info sorts with, CUDA torch's operators.

    Its error and its time are in docs/mutual_information.md: it is low where a class is rarer than a bin.

    Args:
        features: (N, K), a tensor on any device, or an array, as for class_mutual_info.
        labels: (N,), integers in [0, C).
        num_classes: C; the largest label + 1 when not given. A class without samples has MI 0.
        bins: at most so many bins of N / bins samples each.
        device, chunk_size, progress: as for class_mutual_info.

    Returns:
        (K, C) in float64, a tensor on the features' device if features is a tensor, else an array.

    Raises:
        ValueError: shapes or values that do not fit. TypeError: an argument of the wrong type.
    """
    source = Features(_OP, "features", features, device)
    bins = min(positive(_OP, "bins", bins), source.n)
    codes, counts = class_indices(_OP, labels, source.n, num_classes)
    source.check_finite()
    codes, counts = codes.to(source.device), counts.to(source.device)

    def values(x: Tensor, _: Tensor | None) -> Tensor:
        if x.device.type != "cpu":
            return _by_sorting(x, codes, counts, bins)
        try:
            return torch.ops.csg_ext.binned_class_mutual_info.default(x, codes, len(counts), bins)
        except (RuntimeError, NotImplementedError) as error:
            raise explained(error, _OP, x.device) from None

    mi = _by_chunks(source, (0, source.k), len(counts), None, 0, values, chunk_size, progress)
    return mi if isinstance(features, Tensor) else mi.numpy()


def _by_sorting(x: Tensor, codes: Tensor, counts: Tensor, bins: int) -> Tensor:
    """The kernel's values by torch's operators: some columns (N, k), labels (N,), class sizes (C,) -> (k, C)."""
    n, classes = len(codes), len(counts)
    ranks = torch.arange(n, device=x.device)
    mi = torch.empty((x.shape[1], classes), dtype=torch.float64, device=x.device)
    step = max(1, _CELLS // (bins * classes))
    for begin in range(0, x.shape[1], step):
        values, order = x[:, begin : begin + step].T.sort(dim=1)
        first = torch.ones_like(values, dtype=torch.bool)
        first[:, 1:] = values[:, 1:] != values[:, :-1]
        bin_number = torch.where(first, ranks, 0).cummax(1).values * bins // n
        column = torch.arange(len(values), device=x.device)[:, None]
        cell = (column * bins + bin_number) * classes + codes[order]
        of_class = torch.bincount(cell.flatten(), minlength=len(values) * bins * classes).view(-1, bins, classes)
        of_bin = of_class.sum(2, keepdim=True)
        sums = (_term(of_class) + _term(of_bin - of_class) - _term(of_bin)).sum(1)
        mi[begin : begin + step] = math.log(n) + (sums - _term(counts) - _term(n - counts) - 0.5) / n
    return mi.clamp_(min=0)


def _term(count: Tensor) -> Tensor:
    """n log n - 1/2, 0 at n = 0: sums of it are n times an entropy with Miller's and Madow's correction."""
    return torch.special.xlogy(count.double(), count.double()) - 0.5 * (count > 0)
