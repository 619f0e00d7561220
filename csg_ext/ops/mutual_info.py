"""class_mutual_info and mutual_info_classif: k-nearest-neighbour mutual information of every feature with the classes.

Estimator: Ross, "Mutual Information between Discrete and Continuous Data Sets", PLoS ONE 9(2), 2014,
doi:10.1371/journal.pone.0087357. All values are in nats.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from numbers import Integral
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from csg_ext.ops._errors import dtype_name, explained, fake_check_device, fake_check_floating
from csg_ext.ops._mutual_info_arguments import (
    CHUNK_VALUES,
    Features,
    check_choice,
    class_indices,
    label_codes,
    positive,
    seed,
)

Progress = Callable[[int, int], object]

_OP = "class_mutual_info"
_TIES = ("noise", "exact")
_PROTOCOLS = ("one-vs-rest", "balanced")
_MOST_PSI_BITS = 53  # kMostPsiBits of the kernels
_NOISE_VALUES = 2**29  # 4 GiB: beyond, the stream of the noise is drawn once for every so many values


@overload
def class_mutual_info(
    features: Tensor,
    labels: Tensor | ArrayLike,
    *,
    num_classes: int | None = ...,
    n_neighbors: int = ...,
    ties: str = ...,
    random_state: int = ...,
    protocol: str = ...,
    normalize: bool = ...,
    device: torch.device | str | None = ...,
    chunk_size: int | None = ...,
    progress: Progress | None = ...,
) -> Tensor: ...
@overload
def class_mutual_info(
    features: ArrayLike,
    labels: Tensor | ArrayLike,
    *,
    num_classes: int | None = ...,
    n_neighbors: int = ...,
    ties: str = ...,
    random_state: int = ...,
    protocol: str = ...,
    normalize: bool = ...,
    device: torch.device | str | None = ...,
    chunk_size: int | None = ...,
    progress: Progress | None = ...,
) -> NDArray[np.float64]: ...
def class_mutual_info(
    features: Tensor | ArrayLike,
    labels: Tensor | ArrayLike,
    *,
    num_classes: int | None = None,
    n_neighbors: int = 3,
    ties: str = "noise",
    random_state: int = 0,
    protocol: str = "one-vs-rest",
    normalize: bool = False,
    device: torch.device | str | None = None,
    chunk_size: int | None = None,
    progress: Progress | None = None,
) -> Tensor | NDArray[np.float64]:
    """The matrix M (K, C): ``M[k, c] = MI(features[:, k] ; 1[labels = c])`` in nats, each class against the rest.

    All classes come from one sort per feature, in O(N log N) whatever C is. Source of the estimator: Ross,
    doi:10.1371/journal.pone.0087357. It can exceed what it estimates, and even the entropy of a rare class:
    :func:`class_entropy` gives that bound.

    Args:
        features: (N, K), one continuous value per sample and feature. A tensor on the CPU or a CUDA device, of any
            strides; or an array, which is not copied (read-only ones, memory maps and Fortran order included).
            float32, float64, float16 and bfloat16 are taken as they are; other numbers are converted to float64, some
            columns at a time.
        labels: (N,), integers in [0, C), C at most 2^24; a tensor on any device, or an array.
        num_classes: C; the largest label + 1 when not given. A class without samples has MI 0 up to the noise.
        n_neighbors: k of the estimator. A class of at most k samples uses as many neighbours as it has.
        ties: what happens to equal values.
            "noise": scikit-learn's way. Each feature is divided by its standard deviation and gets noise of relative
            size 1e-10. With an integer ``random_state`` the values equal ``mutual_info_classif(features, labels == c,
            discrete_features=False, n_neighbors=k, random_state=random_state)`` to 1e-9 for every c, on every device.
            "exact": the features as they are; a ball counts everything at its radius (k_i samples of its own class, m_i
            of all). Deterministic, without noise to draw and to hold, and steadier where many values are equal
            (ReLU zeros, integers), where "noise" depends on its seed. Recommended on CUDA.
        random_state: in [0, 2^32); seeds the noise, and the draws of "balanced".
        protocol: "one-vs-rest": all samples. "balanced": per class, as many samples of other classes as it has itself.
            With n_c samples in class c, m = min(n_c, N - n_c) of them and m others are drawn without replacement, and
            the value is the MI of the feature with the two groups: at most about ln 2 for every class, rare or not;
            0 where m < 2. The draw depends on (random_state, c) and the labels alone, and keeps the samples' order.
        normalize: divide column c by its bound (:func:`class_entropy`); 0 where the bound is 0.
        device: where to compute; the features' own device when not given. Features that live elsewhere are moved some
            columns at a time, so sets larger than the GPU's memory work.
        chunk_size: columns worked on at a time; chosen for some tenths of a second when not given. Any gives the same
            bits. Ctrl-C acts between chunks, and while the noise is drawn.
        progress: called as ``progress(columns_done, K)`` after each chunk.

    Returns:
        (K, C) in float64, a tensor on the features' device if features is a tensor, else an array.

    Raises:
        ValueError: shapes or values that do not fit: features that are not finite, labels that are no class indices,
            a single class, fewer than n_neighbors + 1 samples, an unknown option.
        TypeError: an argument of the wrong type.

    Example:
        >>> labels = torch.arange(3).repeat(100)
        >>> apart = labels + torch.linspace(0, 0.5, 300)                # tells the classes apart
        >>> mi = class_mutual_info(torch.stack([apart, apart.flip(0) % 1], 1), labels)
        >>> mi.shape
        torch.Size([2, 3])
        >>> class_entropy(labels)                                       # what the first feature reaches, nearly
        tensor([0.6365, 0.6365, 0.6365], dtype=torch.float64)
        >>> bool((mi[0] > 0.6).all() and (mi[1] < 0.1).all())
        True
    """
    return _class_mutual_info(
        features, labels, num_classes=num_classes, n_neighbors=n_neighbors, ties=ties, random_state=random_state,
        protocol=protocol, normalize=normalize, device=device, chunk_size=chunk_size, progress=progress,
    )  # fmt: skip


@overload
def class_entropy(labels: Tensor, num_classes: int | None = ..., protocol: str = ...) -> Tensor: ...
@overload
def class_entropy(labels: ArrayLike, num_classes: int | None = ..., protocol: str = ...) -> NDArray[np.float64]: ...
def class_entropy(
    labels: Tensor | ArrayLike, num_classes: int | None = None, protocol: str = "one-vs-rest"
) -> Tensor | NDArray[np.float64]:
    """The entropy of 1[labels = c] in nats, (C,): what :func:`class_mutual_info` of class c cannot exceed in truth.

    protocol "balanced": ln 2, or 0 for a class that is not measured (min(n_c, N - n_c) < 2).

    Returns a tensor on the labels' device if labels is a tensor, else an array, in float64.
    Raises ValueError or TypeError: as :func:`class_mutual_info` for labels, num_classes and protocol.
    """
    op = "class_entropy"
    check_choice(op, "protocol", protocol, _PROTOCOLS)
    bound = _bounds(class_indices(op, labels, None, num_classes)[1], protocol)
    return bound.to(labels.device) if isinstance(labels, Tensor) else bound.numpy()


def mutual_info_classif(
    X: Any,
    y: Any,
    *,
    discrete_features: Any = False,
    n_neighbors: int = 3,
    copy: bool = True,
    random_state: int | np.random.RandomState | None = None,
    n_jobs: int | None = None,
) -> NDArray[np.float64]:
    """MI of every feature with the label, (K,) in nats: scikit-learn's function of this name for continuous features.

    Takes its place in SelectKBest and Pipelines and returns its values to 1e-9 for the same random_state, drawing the
    same numbers from it. Source: Ross, doi:10.1371/journal.pone.0087357.

    Args:
        X: (N, K), dense and finite: an array, a DataFrame of numbers, or a tensor.
        y: (N,), class labels of any type that sorts: integers, strings, booleans.
        discrete_features: False, or "auto", which means the same for dense X.
        n_neighbors: k of the estimator.
        copy: accepted for compatibility; X is never written to.
        random_state: None for NumPy's global generator, a seed, or a numpy.random.RandomState.
        n_jobs: accepted for compatibility; threads are torch's (torch.set_num_threads).

    Raises:
        ValueError: sparse X, discrete features (use sklearn.feature_selection.mutual_info_classif for both), a
            continuous y, values that are not finite, shapes that do not fit, no class of at least two samples.
        TypeError: an argument of the wrong type.
    """
    op = "mutual_info_classif"
    other = "sklearn.feature_selection.mutual_info_classif handles"
    if hasattr(type(X), "tocsc") or (isinstance(X, Tensor) and X.layout != torch.strided):
        raise ValueError(f"{op}: X must be dense, got {type(X).__name__}; {other} sparse input")
    if isinstance(discrete_features, str) and discrete_features == "auto":
        discrete_features = False
    if not (isinstance(discrete_features, bool | np.bool_) and not discrete_features):
        raise ValueError(f"{op}: discrete_features must be False or 'auto', got {discrete_features!r}; {other} others")
    n_neighbors = positive(op, "n_neighbors", n_neighbors)
    if isinstance(random_state, Integral):
        random_state = seed(op, random_state)
    elif not (random_state is None or random_state is np.random or isinstance(random_state, np.random.RandomState)):
        raise ValueError(f"{op}: random_state must be None, an integer or a RandomState, got {random_state!r}")
    source = Features(op, "X", X, None)
    codes, classes = label_codes(op, y, source.n)
    source.check_finite()
    if classes == source.n:
        raise ValueError(f"{op}: y must have a class of at least two samples, got {classes} classes of one")
    rows, values = _all_samples(codes, classes, n_neighbors, True, source)
    noise = _noise(random_state, rows, source.k, 0, source.k)
    mi = _by_chunks(source, (0, source.k), 1, lambda begin, end: noise[:, begin:end], rows, values, None, None)
    return mi[:, 0].cpu().numpy()


# ---- the matrix ------------------------------------------------------------------------------------------------------


def _class_mutual_info(
    features: Tensor | ArrayLike,
    labels: Tensor | ArrayLike,
    begin: int = 0,
    end: int | None = None,
    *,
    num_classes: int | None,
    n_neighbors: int,
    ties: str,
    random_state: int,
    protocol: str,
    normalize: bool,
    device: torch.device | str | None,
    chunk_size: int | None,
    progress: Progress | None,
) -> Tensor | NDArray[np.float64]:
    """Rows [begin, end) of :func:`class_mutual_info`, bit for bit: also what one of several processes works on."""
    check_choice(_OP, "ties", ties, _TIES)
    check_choice(_OP, "protocol", protocol, _PROTOCOLS)
    n_neighbors, random_state = positive(_OP, "n_neighbors", n_neighbors), seed(_OP, random_state)
    source = Features(_OP, "features", features, device)
    codes, counts = class_indices(_OP, labels, source.n, num_classes)
    source.check_finite()
    if source.n < n_neighbors + 1:
        raise ValueError(
            f"{_OP}: features must have at least n_neighbors + 1 = {n_neighbors + 1} samples, got {source.n}"
        )
    if int((counts > 0).sum()) < 2:
        raise ValueError(f"{_OP}: labels must hold at least two classes, got class {int(codes[0])} only")
    span = (begin, source.k if end is None else end)
    if protocol == "balanced":
        rows, values = _balanced(codes, counts, n_neighbors, random_state, source)
    else:
        rows, values = _all_samples(codes, len(counts), n_neighbors, False, source)
    noise = functools.partial(_noise, random_state, rows, source.k) if ties == "noise" else None
    mi = _by_chunks(source, span, len(counts), noise, rows, values, chunk_size, progress)
    if normalize:
        bound = _bounds(counts, protocol).to(mi.device)
        mi = torch.where(bound > 0, mi / bound, 0.0)
    return mi if isinstance(features, Tensor) else mi.numpy()


_Values = Callable[[Tensor, "Tensor | None"], Tensor]  # some columns (N, k) and their noise -> (k, C)


def _call(source: Features, *arguments: Any) -> Tensor:
    try:
        return torch.ops.csg_ext.class_mutual_info.default(*arguments)
    except (RuntimeError, NotImplementedError) as error:
        raise explained(error, source.op, source.device) from None


def _all_samples(
    codes: Tensor, classes: int, n_neighbors: int, multiclass: bool, source: Features
) -> tuple[int, _Values]:
    """How many rows of noise the values need, and the values."""
    codes = codes.to(source.device)
    psi, bits = _psi(source.n, source.device)
    return source.n, lambda x, noise: _call(source, x, codes, classes, n_neighbors, noise, multiclass, psi, bits)


def _balanced(
    codes: Tensor, counts: Tensor, n_neighbors: int, random_state: int, source: Features
) -> tuple[int, _Values]:
    """The same for as many samples of other classes as of each class."""
    psi, bits = _psi(source.n, source.device)
    subsets: list[tuple[int, Tensor, Tensor]] = []
    order = np.argsort(codes.cpu().numpy(), kind="stable")
    end = 0
    for c, count in enumerate(counts.tolist()):
        begin, end = end, end + count
        if min(count, source.n - count) >= 2:
            rows, is_class = _draw_balanced(order[begin:end], source.n, (random_state, c))
            subsets.append((c, torch.from_numpy(rows).to(source.device), torch.from_numpy(is_class).to(source.device)))

    def values(x: Tensor, noise: Tensor | None) -> Tensor:
        mi = torch.zeros((x.shape[1], len(counts)), dtype=torch.float64, device=x.device)
        for c, rows, is_class in subsets:
            of_class = None if noise is None else noise[: len(rows)]
            table = psi[: len(rows) + 1]
            mi[:, c] = _call(source, x[rows], is_class, 2, n_neighbors, of_class, True, table, bits)[:, 0]
        return mi

    return max((len(rows) for _, rows, _ in subsets), default=0), values


def _draw_balanced(
    members: NDArray[np.int64], n: int, seed: tuple[int, int]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """min(n_c, N - n_c) of a class's samples (ascending) and as many others: (rows ascending, 1 for the class's own).

    numpy.random.RandomState(seed) draws the ranks of the samples among the larger of the two sides; the smaller side
    takes part as a whole.
    """
    m, rng = min(len(members), n - len(members)), np.random.RandomState(seed)
    others = _draw(rng, n - len(members), m)
    others += np.searchsorted(members - np.arange(len(members)), others, side="right")  # ranks -> samples
    rows = np.concatenate([members[_draw(rng, len(members), m)], others])
    order = np.argsort(rows)
    return rows[order], (order < m).astype(np.int64)


def _draw(rng: np.random.RandomState, n: int, m: int) -> NDArray[np.int64]:
    """m different numbers below n, ascending: the first m different ones of a stream, or of a permutation."""
    if m == n:
        return np.arange(n)
    if 2 * m > n:
        return np.sort(rng.permutation(n)[:m])
    drawn = np.unique(rng.randint(n, size=m, dtype=np.int64))
    while len(drawn) < m:
        drawn = np.unique(np.concatenate([drawn, rng.randint(n, size=m - len(drawn), dtype=np.int64)]))
    return drawn


def _by_chunks(
    source: Features,
    span: tuple[int, int],
    width: int,
    noise: Callable[[int, int], Tensor] | None,
    rows: int,
    values: _Values,
    chunk_size: int | None,
    progress: Progress | None,
) -> Tensor:
    """values() of the columns in span, (columns, width), with noise(begin, end), (rows, end - begin), if given."""
    begin, end = span
    mi = torch.empty((end - begin, width), dtype=torch.float64, device=source.home)
    step = _default_chunk(source, end - begin) if chunk_size is None else positive(source.op, "chunk_size", chunk_size)
    drawn, drawn_begin, drawn_end = None, begin, begin
    for at in range(begin, end, step):
        stop = min(at + step, end)
        if noise is not None and at == drawn_end:
            drawn_begin, drawn_end = at, min(at + max(1, _NOISE_VALUES // max(1, rows) // step) * step, end)
            drawn = None  # frees the memory first
            drawn = noise(drawn_begin, drawn_end)
        part = None if drawn is None else drawn[:, at - drawn_begin : stop - drawn_begin].to(source.device)
        found = values(source.columns(at, stop), part)
        if found.isnan().any():
            column = at + int(found.isnan().any(1).int().argmax())
            raise ValueError(
                f"{source.op}: {source.name} must have a finite variance for the noise to be scaled, got an "
                f"infinite one in column {column}: divide it by a constant, or use class_mutual_info(..., ties='exact')"
            )
        mi[at - begin : stop - begin] = found
        if progress is not None:
            progress(stop - begin, end - begin)
    return mi


def _default_chunk(source: Features, columns: int) -> int:
    """Chunks of one size, all threads busy in each."""
    cpu = source.device.type == "cpu"
    unit, values = (8 * torch.get_num_threads(), CHUNK_VALUES) if cpu else (8, 4 * CHUNK_VALUES)
    most = max(unit, values // source.n // unit * unit)
    chunks = max(1, math.ceil(columns / most))
    return max(1, math.ceil(columns / chunks / unit)) * unit


def _noise(random_state: int | np.random.RandomState | None, n: int, k: int, begin: int, end: int) -> Tensor:
    """Columns [begin, end) of rng.standard_normal((n, k)), which scikit-learn draws, (n, end - begin)."""
    rng: Any = np.random if random_state is None else random_state
    if isinstance(random_state, int):
        rng = np.random.RandomState(random_state)
    state = rng.get_state(legacy=False)
    if state["bit_generator"] != "MT19937":
        return torch.from_numpy(rng.standard_normal((n, k))[:, begin:end])
    key, position = torch.from_numpy(state["state"]["key"].astype(np.int64)), state["state"]["pos"]
    has_gauss, gauss = bool(state["has_gauss"]), state["gauss"]
    noise = torch.empty((end - begin, n), dtype=torch.float64, device="cpu")
    step = max(1, CHUNK_VALUES // max(1, k))
    for first in range(0, n, step):  # some rows at a time: Ctrl-C acts between them
        here = min(step, n - first)
        part, key, position, has_gauss, gauss = torch.ops.csg_ext._standard_normal.default(
            key, position, has_gauss, gauss, here, k, begin, end
        )
        if here == n:
            noise = part
        else:
            noise[:, first : first + here] = part
    rng.set_state(("MT19937", key.numpy().astype(np.uint32), position, int(has_gauss), gauss))
    return noise.t()


@functools.lru_cache(maxsize=4)
def _psi(n: int, device: torch.device) -> tuple[Tensor, int]:
    """round((digamma(i) + Euler's constant) * 2^bits) for i in [0, n], 0 at i = 0, and bits, the most the op takes.

    Those are sums of 2^bits / j for j < i; of their whole parts and of what is left of them, so that no bit is lost.
    """
    bits = _MOST_PSI_BITS
    j = torch.arange(1, max(n, 1), device="cpu")
    whole = torch.div(2**bits, j, rounding_mode="floor")
    left = ((2**bits - whole * j) / j.double()).cumsum(0).round().to(torch.int64)
    table = torch.zeros(n + 1, dtype=torch.int64, device="cpu")
    table[2:] = whole.cumsum(0) + left
    return table.to(device), bits


def _bounds(counts: Tensor, protocol: str) -> Tensor:
    """The entropy of each class against the rest, (C,) nats, from its number of samples."""
    n = counts.sum()
    if protocol == "balanced":
        return (torch.minimum(counts, n - counts) >= 2).double() * math.log(2)
    p = counts / n.double()
    return torch.special.entr(p) - torch.special.xlog1py(1 - p, -p)


def _fake_check(op: str, features: Tensor, labels: Tensor, num_classes: int) -> None:
    """The kernels' own checks, in their words, as those below: sizes may be symbols."""
    shape = tuple(features.shape)
    torch._check(features.dim() == 2, lambda: f"{op}: features must have the shape (N, K), got {shape}")
    fake_check_floating(op, "features", features.dtype)
    got = f"{dtype_name(labels.dtype)} of {tuple(labels.shape)}"
    text = f"{op}: labels must be int64 of the shape (N,) = ({shape[0]},), got {got}"
    torch._check(labels.dim() == 1 and labels.dtype == torch.int64, lambda: text)
    torch._check(labels.shape[0] == shape[0], lambda: text)
    fake_check_device(op, "labels", labels, features)
    torch._check(1 <= num_classes < 2**26, lambda: f"{op}: num_classes must be in [1, 2^26), got {num_classes}")
    n, k = features.shape
    torch._check(n < 2**30, lambda: f"{op}: features must have fewer than 2^30 samples, got {n}")
    # Not `or`, which would ask for the value of a symbol.
    torch._check((n >= 1) | (k == 0), lambda: f"{op}: features must have at least one sample, got {shape}")


@torch.library.register_fake("csg_ext::class_mutual_info")
def _fake_class_mutual_info(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    n_neighbors: int,
    noise: Tensor | None,
    multiclass: bool,
    psi: Tensor,
    psi_bits: int,
) -> Tensor:
    op = "class_mutual_info"
    _fake_check(op, features, labels, num_classes)
    torch._check(n_neighbors >= 1, lambda: f"{op}: n_neighbors must be at least 1, got {n_neighbors}")
    n, k = features.shape
    text = f"{op}: psi must be int64 of the shape (N + 1,)"
    torch._check(psi.dim() == 1 and psi.dtype == torch.int64 and psi.is_contiguous(), lambda: text)
    torch._check(psi.shape[0] == n + 1, lambda: text)
    fake_check_device(op, "psi", psi, features)
    most = _MOST_PSI_BITS
    torch._check(0 <= psi_bits <= most, lambda: f"{op}: psi_bits must be in [0, {most}], got {psi_bits}")
    if noise is not None:
        wrong = f"{op}: noise must be float64 of the shape of features"
        torch._check(noise.dim() == 2 and noise.dtype == torch.float64, lambda: wrong)
        torch._check(noise.shape[0] == n, lambda: wrong)
        torch._check(noise.shape[1] == k, lambda: wrong)
        fake_check_device(op, "noise", noise, features)
    return features.new_empty((k, 1 if multiclass else num_classes), dtype=torch.float64)


@torch.library.register_fake("csg_ext::binned_class_mutual_info")
def _fake_binned_class_mutual_info(features: Tensor, labels: Tensor, num_classes: int, bins: int) -> Tensor:
    _fake_check("binned_class_mutual_info", features, labels, num_classes)
    torch._check(bins >= 1, lambda: f"binned_class_mutual_info: bins must be at least 1, got {bins}")
    return features.new_empty((features.shape[1], num_classes), dtype=torch.float64)
