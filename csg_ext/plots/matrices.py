"""Matrices with a row per class: the gate, mutual information, confusions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from csg_ext.plots.common import (
    COLOURS,
    NAMED,
    check_filter_classes,
    check_matrix,
    check_trained,
    class_names,
    class_of_filters,
    class_ticks,
    figure_and_axes,
    in_any_script,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WRITTEN = 20  # classes whose confusions are written as numbers
_ROWS, _COLUMNS = 250, 500  # cells of a picture: of larger matrices, a cell shows the largest of several entries


def class_order(scores: ArrayLike) -> NDArray[np.int64]:
    """The order of filters by their best class, then by falling score, (K,), from scores (C, K) such as a gate."""
    s = np.asarray(scores)
    return np.lexsort((-s.max(axis=0), s.argmax(axis=0)))


def _largest(matrix: NDArray[Any], step: int, axis: int) -> NDArray[Any]:
    """The largest of every `step` entries along an axis."""
    return matrix if step == 1 else np.maximum.reduceat(matrix, np.arange(0, matrix.shape[axis], step), axis=axis)


def _draw_matrix(
    axes: Axes,
    matrix: NDArray[Any],
    names: Sequence[str],
    limits: tuple[float, float],
    owner: NDArray[np.int64],
    dead: ArrayLike | None = None,
) -> Any:
    """Classes down, filters across by their class and falling score, those of class -1 grey at the end, a thin line
    between few blocks. dead: those of class -1 that the text may call so, by default all."""
    order = np.lexsort((-matrix.max(axis=0), owner))
    live, grey = order[owner[order] >= 0], int((owner < 0).sum())
    rows, columns = (-(-size // most) for size, most in zip(matrix.shape, (_ROWS, _COLUMNS), strict=True))
    shown = (
        _largest(_largest(matrix[:, live], columns, 1), rows, 0) if len(live) else np.zeros((-(-len(names) // rows), 0))
    )
    blank = np.full((len(shown), -(-grey // columns)), np.nan)
    cells = np.ma.masked_invalid(np.hstack([shown, blank])) if grey else shown
    low, high = limits if limits[0] < limits[1] else (limits[0], limits[0] + 1)  # else 0 has the colour of the middle
    image = axes.imshow(cells, aspect="auto", cmap=COLOURS, vmin=low, vmax=high, interpolation="nearest")
    axes.set_facecolor("lightgrey")
    if len(names) <= NAMED:
        for edge in np.cumsum(np.bincount(owner[live], minlength=len(names)))[:-1]:
            axes.axvline(edge / columns - 0.5, color="white", linewidth=0.4)
    class_ticks(axes.yaxis, (np.arange(len(names)) + 0.5) / rows - 0.5, names)
    if columns > 1:  # the ticks count filters, not cells
        at = np.linspace(0, matrix.shape[1], 5).astype(int)
        axes.set_xticks(at / columns - 0.5, at.tolist())
    text = f"{matrix.shape[1]} filters, sorted by class"
    if grey:
        text += f"; {grey} {'dead' if dead is None or np.sum(dead) == grey else 'without a class'} (grey)"
    if rows > 1 or columns > 1:
        sizes = [f"{count} {what}" for count, what in ((rows, "classes"), (columns, "filters")) if count > 1]
        text += f"\na cell: the largest of {' × '.join(sizes)}"
    axes.set_xlabel(text)
    return image


def _height(classes: int) -> float:
    return 1.3 + 0.25 * min(classes, NAMED // 2 if classes > NAMED else classes)


@in_any_script
def plot_gate(
    gate: ArrayLike | None, classes: Sequence[str], *, dead: ArrayLike | None = None, axes: Axes | None = None
) -> tuple[Figure, Axes]:
    """The gate (C, K), filters sorted by their class: near block-diagonal when filters are class-specific.

    dead: bool (K,), the filters with one and the same activation everywhere. Of more than 250 classes or 500 filters, a
    cell shows the largest of several entries. Raises ValueError for a gate that is None or constant: it says nothing
    about any class.
    """
    names = class_names("plot_gate", classes)
    g = check_trained("plot_gate", gate)
    check_matrix("plot_gate", g, names)
    owner = class_of_filters("plot_gate", g, dead)
    figure, axes = figure_and_axes("plot_gate", axes, 8, _height(len(names)))
    image = _draw_matrix(axes, g, names, (0, 1), owner, np.zeros(len(owner)) if dead is None else dead)
    figure.colorbar(image, ax=axes, label="gate entry", pad=0.01)
    axes.set_title(f"Class-specific gate, L1-density {np.abs(g).mean():.3g} (floor {1 / len(g):.3g})", loc="left")
    return figure, axes


@in_any_script
def plot_mutual_information(
    std: ArrayLike,
    csg: ArrayLike,
    classes: Sequence[str],
    bound: float | None = None,
    *,
    dead: tuple[ArrayLike | None, ArrayLike | None] = (None, None),
    filter_classes: tuple[ArrayLike | None, ArrayLike | None] = (None, None),
    titles: tuple[str, str] = ("STD", "CSG"),
    axes: Sequence[Axes] | None = None,
) -> tuple[Figure, NDArray[Any]]:
    """The MI matrices (K, C) of STD and CSG, or of two networks of other titles, on one colour scale, each sorted by
    its own classes; axes (2,).

    bound, the entropy of a class in nats, is the top of the colour scale; the largest value is when not given. dead:
    bool (K,) of each, the filters with one and the same activation everywhere: they have no mutual information,
    whatever the noise against ties estimates, and count as 0 in the MIS of the title. filter_classes: int (K,) of each,
    -1 for a dead filter, as metrics.best_class gives them; by default the class of a filter's largest value, which
    cannot tell two classes apart.
    """
    name = "plot_mutual_information"
    names = class_names(name, classes)
    matrices = [np.asarray(std).T, np.asarray(csg).T]
    for matrix in matrices:
        check_matrix(name, matrix, names)
    owners = [_owners(name, *given, names) for given in zip(matrices, dead, filter_classes, strict=True)]
    top = bound if bound is not None else max(float(m.max()) for m in matrices)
    figure, panels = figure_and_axes(name, axes, 11, 0.2 + _height(len(names)), 2, ncols=2, sharey=True)
    for ax, (owner, gone), title, matrix in zip(panels, owners, titles, matrices, strict=True):
        image = _draw_matrix(ax, matrix, names, (0, top), owner, gone)
        ax.set_title(f"{title}: MIS {_mis(matrix, owner):.3g} nats", loc="left")
    figure.colorbar(image, ax=list(panels), label="mutual information, nats", pad=0.01)
    return figure, panels


@in_any_script
def plot_class_mutual_information(
    mi: ArrayLike,
    classes: Sequence[str],
    bound: float | None = None,
    *,
    dead: ArrayLike | None = None,
    filter_classes: ArrayLike | None = None,
    axes: Axes | None = None,
) -> tuple[Figure, Axes]:
    """One MI matrix (K, C), filters sorted by their class; of many classes, the 40 with most filters and their filters.

    bound, the entropy of a class in nats, is the top of the colour scale. Not given: mi is taken as normalised by it.
    dead and filter_classes: as in plot_mutual_information.
    """
    name = "plot_class_mutual_information"
    names = class_names(name, classes)
    matrix = np.asarray(mi).T
    check_matrix(name, matrix, names)
    owner, gone = _owners(name, matrix, dead, filter_classes, names)
    score, top, unit = f"MIS {_mis(matrix, owner):.3g}", 1.0, "share of the class's entropy"
    title = f"{score} of 1 (normalised)"
    if bound is not None:
        title, top, unit = f"{score} nats, bound {bound:.3g}", bound, "mutual information, nats"
    if len(names) > NAMED and (owner >= 0).any():
        counts = np.bincount(owner[owner >= 0], minlength=len(names))
        shown = np.sort(np.argsort(-counts, kind="stable")[:NAMED])
        filters = np.isin(owner, shown)
        title += f"\n{NAMED} of {len(names)} classes, {filters.sum()} of {len(owner)} filters"
        matrix, names = matrix[shown][:, filters], [names[c] for c in shown]
        owner, gone = np.searchsorted(shown, owner[filters]), None
    figure, axes = figure_and_axes(name, axes, 8, 0.2 + _height(len(names)))
    figure.colorbar(_draw_matrix(axes, matrix, names, (0, top), owner, gone), ax=axes, label=unit, pad=0.01)
    axes.set_title(title, loc="left")
    return figure, axes


def _owners(
    name: str, matrix: NDArray[Any], dead: ArrayLike | None, given: ArrayLike | None, names: Sequence[str]
) -> tuple[NDArray[np.int64], ArrayLike | None]:
    """The class of every filter, and which of those without one are dead (None: all)."""
    if given is None:
        return class_of_filters(name, matrix, dead), np.zeros(matrix.shape[1]) if dead is None else dead
    owner = check_filter_classes(name, given, names)
    if len(owner) != matrix.shape[1]:
        raise ValueError(f"{name}: filter_classes must be ({matrix.shape[1]},), got {owner.shape}")
    return owner, None


def _mis(matrix: NDArray[Any], owner: NDArray[np.int64]) -> float:
    """The mutual-information score of a matrix (C, K), dead filters counted as 0."""
    return float(np.where(owner >= 0, matrix.max(axis=0), 0).mean())


@in_any_script
def plot_confusion(confusion: ArrayLike, classes: Sequence[str], *, axes: Axes | None = None) -> tuple[Figure, Axes]:
    """The confusion matrix (C, C) of counts, true classes down: the share of every true class, which is also written
    into the cells of up to 20 classes. A class without samples has an empty row. Of more than 250 classes, a cell
    shows the largest of several shares."""
    names = class_names("plot_confusion", classes)
    counts = np.asarray(confusion)
    check_matrix("plot_confusion", counts, names)
    if counts.shape[0] != counts.shape[1]:
        raise ValueError(f"plot_confusion: confusion must be (C, C), got shape {counts.shape}")
    total = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, total, out=np.zeros(counts.shape), where=total > 0)
    step = -(-len(names) // _ROWS)
    side = 2.5 + 0.35 * min(len(names), NAMED // 2 if len(names) > NAMED else NAMED)
    figure, axes = figure_and_axes("plot_confusion", axes, side + 0.8, side + 0.3)
    cells = _largest(_largest(shares, step, 0), step, 1)
    image = axes.imshow(cells, cmap=COLOURS, vmin=0, vmax=1, interpolation="nearest")
    at = (np.arange(len(names)) + 0.5) / step - 0.5
    class_ticks(axes.xaxis, at, names, rotation=90)
    class_ticks(axes.yaxis, at, names)
    axes.set_xlabel("predicted class" + (f"\na cell: the largest of {step} × {step} classes" if step > 1 else ""))
    axes.set_ylabel("true class")
    if len(names) <= _WRITTEN:
        for (row, column), share in np.ndenumerate(shares):
            if counts[row, column]:
                colour = "black" if share > 0.5 else "white"
                axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", color=colour, fontsize=7)
    from matplotlib.ticker import PercentFormatter

    percent = PercentFormatter(1, symbol="")  # as in the cells
    figure.colorbar(image, ax=axes, label="% of the true class", format=percent, pad=0.01)
    axes.set_title(f"Accuracy {np.trace(counts) / max(1, counts.sum()):.2%}", loc="left")
    return figure, axes
