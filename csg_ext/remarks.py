"""What every command says, in the same words, of dead filters and of classes without a filter."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_NAMED = 20  # filters or classes that a sentence names


def filter_remarks(
    filter_classes: NDArray[np.int64], dead: NDArray[np.bool_], classes: Sequence[str], by: str
) -> list[str]:
    """Sentences, none where there is nothing to say: which filters are dead, which classes have no filter.

    filter_classes (K,): the class of every filter, -1 for none; dead bool (K,); by: what chose the classes.
    """
    said = []
    if dead.any():
        which = _first([str(k) for k in np.flatnonzero(dead)])
        are, have = ("is", "has") if dead.sum() == 1 else ("are", "have")
        said.append(
            f"{dead.sum()} of {len(dead)} filters {are} dead (one activation on all images) and {have} no class: "
            f"{which}."
        )
    without = np.setdiff1d(np.arange(len(classes)), filter_classes)
    if len(without):
        names = _first([classes[c] for c in without])
        have = "has" if len(without) == 1 else "have"
        said.append(f"{len(without)} of {len(classes)} classes {have} no filter by {by}: {names}.")
    return said


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
