"""Filters and their classes: where gate and mutual information agree, how many a class has, how alike they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from csg_ext.plots.common import (
    BLUE,
    COLOURS,
    NAMED,
    ORANGE,
    PALETTE,
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

_CELLS = 256  # filters on a side of the similarity matrix: of more, a cell shows a mean
_HATCHES = ("", "///", "...", "xx")


@in_any_script
def plot_class_agreement(
    gate: ArrayLike | None,
    mi: ArrayLike,
    classes: Sequence[str],
    *,
    dead: ArrayLike | None = None,
    axes: Axes | None = None,
) -> tuple[Figure, Axes]:
    """Where the largest entries of the gate (C, K) and of the MI matrix (K, C) overlap, filter by filter.

    Filters are sorted by the gate's class, those that agree first: one square where both name a class, else a circle
    for the gate's class and a cross for that of the mutual information. The title states the share that agree of the
    filters with a class by both, `metrics.class_agreement` where none is dead. dead: as in plot_gate. It needs three
    classes: of two, a filter's mutual information is the same with both.
    Source: Liang et al., ECCV 2020, figure 5.
    """
    name = "plot_class_agreement"
    names = class_names(name, classes)
    if len(names) < 3:
        raise ValueError(f"{name}: classes must be at least 3, as mutual information cannot tell two apart, got 2")
    g, m = check_trained(name, gate), np.asarray(mi).T
    for matrix in (g, m):
        check_matrix(name, matrix, names)
    if g.shape != m.shape:
        raise ValueError(f"{name}: gate and mi must be (C, K) and (K, C), got {g.shape} and {m.T.shape}")
    by_gate, by_mi = class_of_filters(name, g, dead), class_of_filters(name, m, dead)
    live = (by_gate >= 0) & (by_mi >= 0)
    agree = live & (by_gate == by_mi)
    order = np.lexsort((~agree, by_gate))
    order = order[live[order]]
    figure, axes = figure_and_axes(name, axes, 8, 1.6 + 0.25 * min(len(names), NAMED // 2))
    x, same = np.arange(len(order)), agree[order]
    side = float(np.clip(500 / max(1, len(order), len(names)), 1.5, 7))
    style: dict[str, Any] = {"linestyle": "none", "markersize": side}
    said = f"gate and MI: {same.sum()} filters", f"gate alone: {(~same).sum()}", "MI alone"
    axes.plot(x[~same], by_gate[order][~same], "o", color=BLUE, fillstyle="none", label=said[1], **style)
    axes.plot(x[~same], by_mi[order][~same], "x", color=ORANGE, label=said[2], **style)
    axes.plot(x[same], by_gate[order][same], "s", color="black", label=said[0], **style)
    axes.set_xlim(-1, len(order))
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    class_ticks(axes.yaxis, np.arange(len(names)), names)
    kind = "dead" if dead is not None and np.sum(dead) == (~live).sum() else "without a class"
    left_out = f"; {(~live).sum()} {kind} left out" if (~live).any() else ""
    axes.set_xlabel(f"{len(order)} filters, sorted by the gate's class{left_out}")
    share = f"{agree.sum() / len(order):.1%}" if len(order) else "none"
    axes.set_title(f"Classes agree: {share} of the filters (chance {1 / len(names):.1%})", loc="left", pad=22)
    _legend_above(axes, ncols=3, markerscale=max(1, 4 / side))
    return figure, axes


@in_any_script
def plot_filters_per_class(
    filter_classes: ArrayLike | Mapping[str, ArrayLike], classes: Sequence[str], *, axes: Axes | None = None
) -> tuple[Figure, Axes]:
    """How many filters every class has: bars with names; of more than 40 classes, the counts in falling order.

    filter_classes: int (K,) with -1 for a dead filter, or several such arrays by name, e.g. {"STD": ..., "CSG": ...}.
    Classes without a filter are counted in the legend; a bar of none has a 0.
    """
    from matplotlib.ticker import MaxNLocator

    name = "plot_filters_per_class"
    names = class_names(name, classes)
    arms = filter_classes if isinstance(filter_classes, Mapping) else {"": filter_classes}
    if not 0 < len(arms) <= len(_HATCHES):
        raise ValueError(f"{name}: filter_classes must be 1 to {len(_HATCHES)} arrays, got {len(arms)}")
    few = len(names) <= NAMED
    figure, axes = figure_and_axes(name, axes, 7, 1.4 + (0.12 + 0.13 * len(arms)) * len(names) if few else 3.5)
    for i, (arm, given) in enumerate(arms.items()):
        owner = check_filter_classes(name, given, names)
        counts = np.bincount(owner[owner >= 0], minlength=len(names))
        label = _count_text(arm, owner, counts)
        if few:
            _draw_bars(axes, counts, i, len(arms), label)
        else:
            _draw_ranks(axes, counts, i, label, names)
    if few:
        axes.set_yticks(np.arange(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlabel("filters")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        axes.set_xlabel(f"{len(names)} classes, those with most filters first")
        axes.set_ylabel("filters")
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("Filters per class", loc="left", pad=8 + 14 * len(arms) if few else None)
    if few:
        _legend_above(axes)
    else:
        axes.legend(loc="upper right", frameon=False, fontsize=7)
    return figure, axes


def _legend_above(axes: Axes, **options: Any) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize=8, borderaxespad=0.2, **options)


def _count_text(arm: str, owner: NDArray[np.int64], counts: NDArray[Any]) -> str:
    text = f"{arm}: " if arm else ""
    text += f"{len(owner)} filters, {(owner < 0).sum()} dead; "
    return text + f"{(counts == 0).sum()} of {len(counts)} classes without a filter"


def _draw_bars(axes: Axes, counts: NDArray[Any], i: int, arms: int, label: str) -> None:
    height = 0.8 / arms
    at = np.arange(len(counts)) - 0.4 + (i + 0.5) * height
    bars = axes.barh(at, counts, height, color=PALETTE[i], hatch=_HATCHES[i], edgecolor="white", label=label)
    axes.bar_label(bars, fontsize=7, padding=2)


def _draw_ranks(axes: Axes, counts: NDArray[Any], i: int, label: str, names: Sequence[str]) -> None:
    order = np.argsort(-counts, kind="stable")
    most = ", ".join(f"{names[c]} {counts[c]}" for c in order[:3] if counts[c])
    dash = ("-", "--", "-.", ":")[i]
    label += f"\nmost: {most}" if most else ""
    axes.step(np.arange(len(counts)), counts[order], where="mid", color=PALETTE[i], linestyle=dash, label=label)


@in_any_script
def plot_filter_similarity(
    similarity: ArrayLike,
    filter_classes: ArrayLike,
    classes: Sequence[str],
    top: float | None = None,
    *,
    axes: Axes | None = None,
) -> tuple[Figure, Axes]:
    """The similarity matrix (K, K) of filters sorted by class, filter_classes (K,), a thin line between classes.

    The diagonal, 1 by definition, is left blank. top of the colour scale: the largest other value when not given. Dead
    filters, of class -1, come last. Of more than 256 filters a cell shows the mean over several; the title has the
    means within and between classes in any case.
    """
    name = "plot_filter_similarity"
    s, owner = np.asarray(similarity, np.float64), np.asarray(filter_classes)
    if owner.ndim != 1 or s.shape != (len(owner), len(owner)):
        raise ValueError(
            f"{name}: similarity and filter_classes must be (K, K) and (K,), got {s.shape} and {owner.shape}"
        )
    names = class_names(name, classes)
    owner = check_filter_classes(name, owner, names)
    if not np.isfinite(s).all():
        raise ValueError(f"{name}: similarity must be finite, got {int((~np.isfinite(s)).sum())} values that are not")
    sortable = np.where(owner < 0, len(names), owner)
    order = np.argsort(sortable, kind="stable")
    step = -(-len(owner) // _CELLS)
    shown = _mean_cells(s[order][:, order], step)
    if top is None:
        top = float(shown.max()) if shown.count() else 0.0
    top = top if top > 0 else 1.0  # a scale without extent would show 0 in the colour of its middle
    figure, axes = figure_and_axes(name, axes, 8, 6)
    image = axes.imshow(shown, cmap=COLOURS, vmin=0, vmax=top, interpolation="nearest")
    present, counts = np.unique(sortable, return_counts=True)
    edges = np.concatenate([[0], np.cumsum(counts)])
    if len(present) <= NAMED:
        for edge in edges[1:-1]:
            axes.axvline(edge / step - 0.5, color="white", linewidth=0.4)
            axes.axhline(edge / step - 0.5, color="white", linewidth=0.4)
    class_ticks(axes.yaxis, (edges[:-1] + edges[1:]) / 2 / step - 0.5, [[*names, "dead"][c] for c in present])
    axes.set_xticks([])
    cells = f"\na cell: the mean of {step} × {step}" if step > 1 else "; each with itself left out (white)"
    axes.set_xlabel(f"{len(owner)} filters, sorted by class{cells}")
    figure.colorbar(image, ax=axes, label="|cosine| of the kernels", pad=0.01)
    axes.set_title(f"Similarity of kernels{_within(s, owner)}", loc="left")
    return figure, axes


def _mean_cells(matrix: NDArray[np.float64], step: int) -> np.ma.MaskedArray[Any, Any]:
    """Means of step x step entries without the diagonal; cells without an entry are masked."""
    begins = np.arange(0, len(matrix), step)
    off = 1 - np.eye(len(matrix))

    def total(m: NDArray[np.float64]) -> NDArray[np.float64]:
        return m if step == 1 else np.add.reduceat(np.add.reduceat(m, begins, axis=0), begins, axis=1)

    count = total(off)
    return np.ma.array(total(matrix * off) / np.maximum(count, 1), mask=count == 0)


def _within(s: NDArray[np.float64], owner: NDArray[np.int64]) -> str:
    """The means over pairs of live filters of one class and of two."""
    live = owner >= 0
    pairs = np.triu(np.outer(live, live), 1)
    same = owner[:, None] == owner
    if not (pairs & same).any() or not (pairs & ~same).any():
        return ""
    return f": mean {s[pairs & same].mean():.3g} within, {s[pairs & ~same].mean():.3g} between classes"
