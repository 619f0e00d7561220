"""Do the filters of one class resemble each other? Cosine similarity of kernels, and how blocky it is by class."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import nn

_CHUNK_VALUES = 2**22  # similarities gathered at a time
_BESIDE = {"downsample", "shortcut", "se"}


_Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


def last_convolution(
    model: nn.Module, num_filters: int, layer: str | None = None, side: str = "output"
) -> nn.Conv1d | nn.Conv2d | nn.Conv3d:
    """The last convolution of `model`, in the order of its modules, with `num_filters` output channels.

    layer: the name of the module whose output (or, with side="input", input) is looked at; None for the last of all.
    Then convolutions inside that module count where it has any, else those before it. Those of a shortcut and of
    squeeze-and-excitation, by their names in timm and torchvision (downsample, shortcut, se), stand behind the
    convolution that they run beside and count only where there is no other.
    Raises ValueError when there is none.
    """
    convolutions = [(n, m) for n, m in model.named_modules() if isinstance(m, _Convolution)]
    if layer is not None:
        names = [n for n, _ in model.named_modules()]
        before = set(names[: names.index(layer)])
        inside = [(n, m) for n, m in convolutions if n == layer or n.startswith(f"{layer}.")]
        convolutions = inside if inside and side == "output" else [(n, m) for n, m in convolutions if n in before]
    every = [(n, m) for n, m in convolutions if m.out_channels == num_filters]
    found = [m for n, m in every if _BESIDE.isdisjoint(n.split("."))] or [m for _, m in every]
    if not found:
        raise ValueError(
            f"last_convolution: model must hold a convolution with {num_filters} filters"
            + (f" that makes the {side} of {layer}" if layer is not None else "")
            + f", got {type(model).__name__}"
        )
    return found[-1]


def filter_similarity(kernels: ArrayLike) -> NDArray[np.float64]:
    """|cosine| of every two flattened kernels, (K, K), from kernels (K, ...); 0 for a kernel of zeros.

    Raises ValueError for kernels without an axis of filters or without a value.
    Source: Liang et al., ECCV 2020, section 4.
    """
    k = np.asarray(kernels, np.float64)
    if k.ndim < 2 or k.size == 0:
        raise ValueError(f"filter_similarity: kernels must be (K, ...) with values, got shape {k.shape}")
    rows = k.reshape(len(k), -1)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
    return np.minimum(np.abs(rows @ rows.T), 1)


def kernel_similarity(
    model: nn.Module, num_filters: int, layer: str | None = None, side: str = "output"
) -> NDArray[np.float64] | None:
    """filter_similarity of the kernels of last_convolution; None where the model has no such convolution."""
    try:
        kernels = last_convolution(model, num_filters, layer, side).weight
    except ValueError:  # a DenseNet's last map is concatenated
        return None
    return filter_similarity(kernels.detach().double().cpu().numpy())  # NumPy has no bf16


class BlockScore(NamedTuple):
    """Mean similarity of filters of one class less that of filters of two, both means, and a permutation p-value."""

    score: float
    within: float
    between: float
    p_value: float


def block_score(
    similarity: ArrayLike, filter_classes: ArrayLike, *, permutations: int = 2000, seed: int = 0
) -> BlockScore:
    """How blocky a similarity matrix (K, K) is when its filters are sorted by class, filter_classes (K,).

    score = mean similarity of pairs within a class - mean of pairs between classes; the diagonal is left out.
    p_value: the share of `permutations` random assignments with the same class sizes, drawn with `seed`, and of the
    given one, that score as high. All are NaN when no two filters share a class or all filters do.

    Raises ValueError for shapes that do not fit or fewer than one permutation.
    """
    s, owner = np.asarray(similarity, np.float64), np.asarray(filter_classes)
    if owner.ndim != 1 or s.shape != (len(owner), len(owner)):
        raise ValueError(
            f"block_score: similarity and filter_classes must be (K, K) and (K,), got {s.shape} and {owner.shape}"
        )
    if permutations < 1:
        raise ValueError(f"block_score: permutations must be at least 1, got {permutations}")
    i, j = np.nonzero(np.triu(owner[:, None] == owner, 1))
    pairs = len(owner) * (len(owner) - 1) // 2
    if not 0 < len(i) < pairs:
        return BlockScore(math.nan, math.nan, math.nan, math.nan)
    total = np.triu(s, 1).sum()
    inside = s[i, j].sum()
    within, between = inside / len(i), (total - inside) / (pairs - len(i))
    # The score grows with the sum inside the blocks, as the total stays: comparing sums compares scores.
    rng = np.random.default_rng(seed)
    as_high, step = 1, max(1, _CHUNK_VALUES // len(i))
    for begin in range(0, permutations, step):
        count = min(step, permutations - begin)
        order = rng.permuted(np.tile(np.arange(len(owner)), (count, 1)), axis=1)
        as_high += int(np.sum(s[order[:, i], order[:, j]].sum(axis=1) >= inside - 1e-12 * abs(inside)))
    return BlockScore(float(within - between), float(within), float(between), as_high / (permutations + 1))
