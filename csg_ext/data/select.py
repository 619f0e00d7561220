"""Which samples of a set are used: class subsets, seeded splits and long-tailed class sizes.

Every choice depends on the seed and the samples' names alone, through a hash: not on the order in which files are
listed, on other classes, on the platform or on the version of a library.
"""

from __future__ import annotations

import hashlib
import math
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

TEST_SHARE = 0.2
_EXACT = 1e-9  # relative; so that 5000 / 100 does not become 49 in floating point

Indices = NDArray[np.int64]


def hashes(names: Iterable[bytes], seed: int) -> NDArray[np.uint64]:
    """A pseudo-random number for every name (UTF-8, made NFC, because file systems differ in that)."""
    key = str(seed).encode()
    digests = []
    for name in names:
        text = unicodedata.normalize("NFC", name.decode("utf-8", "surrogateescape"))
        digests.append(hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8, key=key).digest())
    return np.frombuffer(b"".join(digests), ">u8").astype(np.uint64)


def _ranks(labels: Indices, order: NDArray[np.uint64]) -> Indices:
    """The rank of every sample's hash among its class."""
    rank = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        rank[members[np.argsort(order[members], kind="stable")]] = np.arange(len(members))
    return rank


def check_share(name: str, share: float) -> None:
    """Raises ValueError unless 0 < share < 1."""
    if not 0 < share < 1:
        raise ValueError(f"data: {name} must lie in (0, 1), got {share}")


def held_out(labels: Indices, order: NDArray[np.uint64], share: float) -> NDArray[np.bool_]:
    """A mask: `share` of every class, rounded; at least one sample and never all, so a class of one gives none."""
    counts = np.bincount(labels)[labels]
    wanted = np.minimum(np.maximum(np.rint(share * counts), 1), counts - 1)
    return _ranks(labels, order) < wanted


def class_subset(labels: Indices, classes: Sequence[str], wanted: Sequence[str]) -> tuple[Indices, Indices]:
    """(positions of the samples whose class is wanted, their labels: the position of their class in `wanted`)."""
    if isinstance(wanted, str):
        raise TypeError(f"data: classes must be a list of class names, got the text {wanted!r}")
    for name in wanted:
        if name not in classes:
            shown = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
            raise ValueError(f"data: classes must be among the set's own ({shown}), got {name!r}")
    if len(set(wanted)) != len(wanted):
        double = next(name for name in wanted if list(wanted).count(name) > 1)
        raise ValueError(f"data: classes must differ, got {double!r} twice")
    if len(wanted) < 2:
        raise ValueError(f"data: classes must name at least 2 classes, got {len(wanted)}")
    position = np.full(len(classes), -1, np.int64)
    for new, name in enumerate(wanted):
        position[list(classes).index(name)] = new
    mapped = position[labels]
    kept = np.flatnonzero(mapped >= 0)
    return kept, mapped[kept]


def long_tail(labels: Indices, classes: Sequence[str], ratio: float, order: NDArray[np.uint64]) -> Indices:
    """Positions of the samples that stay when class c of C keeps floor(n ratio^(-c / (C - 1))) of its samples.

    ratio is the imbalance factor of Cui et al. (Class-balanced loss based on effective number of samples, CVPR 2019):
    the largest class size divided by the smallest. n is the largest number for which every class has enough samples:
    the size of the first class where all are equal.
    Raises ValueError: a ratio below 1 or not finite, or one that leaves a class empty.
    """
    if not (math.isfinite(ratio) and ratio >= 1):
        raise ValueError(
            f"data: imbalance must be a number of at least 1 (largest class / smallest class), got {ratio}"
        )
    share = ratio ** (-np.arange(len(classes)) / (len(classes) - 1))
    counts = np.bincount(labels, minlength=len(classes))
    sizes = np.floor((counts / share).min() * share * (1 + _EXACT)).astype(np.int64)
    if sizes[-1] < 1:
        raise ValueError(
            f"data: imbalance {ratio:g} leaves class {classes[-1]!r} no image: the largest class would hold {sizes[0]}"
        )
    return np.flatnonzero(_ranks(labels, order) < sizes[labels])
