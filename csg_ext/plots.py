"""Pictures of the gate, of mutual information and of training; each function returns (Figure, Axes).

Colours: cividis and the Okabe-Ito palette, readable with colour-vision deficiency; lines also differ in dash.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE = "#0072B2", "#D55E00"
COLOURS = "cividis"
_NAMED = 40  # classes that get a line of text each
_WRITTEN = 20  # classes whose confusions are written as numbers


def _figure(width: float, height: float, **grid: Any) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    return figure, figure.subplots(**grid)


def class_order(scores: ArrayLike) -> NDArray[np.int64]:
    """The order of filters by their best class, then by falling score, from scores (C, K); (K,)."""
    s = np.asarray(scores)
    return np.lexsort((-s.max(axis=0), s.argmax(axis=0)))


def _draw_matrix(axes: Axes, matrix: NDArray[Any], classes: Sequence[str], limits: tuple[float, float]) -> Any:
    """Classes down, filters across in class_order, a thin line between blocks."""
    order = class_order(matrix)
    image = axes.imshow(
        matrix[:, order], aspect="auto", cmap=COLOURS, vmin=limits[0], vmax=limits[1], interpolation="nearest"
    )
    edges = np.cumsum(np.bincount(matrix.argmax(axis=0), minlength=len(matrix)))[:-1]
    for edge in edges:
        axes.axvline(edge - 0.5, color="white", linewidth=0.4)
    axes.set_yticks(range(len(classes)), classes if len(classes) <= _NAMED else [""] * len(classes))
    axes.set_xlabel(f"{matrix.shape[1]} filters, sorted by class")
    return image


def _check(name: str, matrix: NDArray[Any], classes: Sequence[str]) -> None:
    if matrix.ndim != 2 or len(matrix) != len(classes):
        raise ValueError(f"{name}: expected a matrix with {len(classes)} rows, one per class, got shape {matrix.shape}")


def plot_gate(gate: ArrayLike, classes: Sequence[str]) -> tuple[Figure, Axes]:
    """The gate (C, K), filters sorted by their class: near block-diagonal when filters are class-specific."""
    g = np.asarray(gate)
    _check("plot_gate", g, classes)
    figure, axes = _figure(8, 1.2 + 0.25 * min(len(classes), _NAMED))
    figure.colorbar(_draw_matrix(axes, g, classes, (0, 1)), ax=axes, label="gate entry", pad=0.01)
    axes.set_title(f"Class-specific gate, L1-density {np.abs(g).mean():.3f} (floor {1 / len(g):.3f})", loc="left")
    return figure, axes


def plot_mutual_information(
    std: ArrayLike, csg: ArrayLike, classes: Sequence[str], bound: float | None = None
) -> tuple[Figure, NDArray[Any]]:
    """The MI matrices (K, C) of STD and CSG on one colour scale, each sorted by its own classes; axes (2,).

    bound, the entropy of a class in nats, is the top of the colour scale; the largest value is when not given.
    """
    matrices = {"STD": np.asarray(std).T, "CSG": np.asarray(csg).T}
    for matrix in matrices.values():
        _check("plot_mutual_information", matrix, classes)
    top = bound if bound is not None else max(float(m.max()) for m in matrices.values())
    figure, axes = _figure(11, 1.5 + 0.25 * min(len(classes), _NAMED), ncols=2, sharey=True)
    for ax, (name, matrix) in zip(axes, matrices.items(), strict=True):
        image = _draw_matrix(ax, matrix, classes, (0, top))
        ax.set_title(f"{name}: MIS {matrix.max(axis=0).mean():.3f} nats", loc="left")
    figure.colorbar(image, ax=list(axes), label="mutual information, nats", pad=0.01)
    return figure, axes


def plot_class_mutual_information(
    mi: ArrayLike, classes: Sequence[str], bound: float | None = None
) -> tuple[Figure, Axes]:
    """One MI matrix (K, C), filters sorted by their class; of many classes, the 40 with most filters and their filters.

    bound, the entropy of a class in nats, is the top of the colour scale. Not given: mi is taken as normalised by it.
    """
    matrix = np.asarray(mi).T
    _check("plot_class_mutual_information", matrix, classes)
    score, top, unit = f"MIS {matrix.max(axis=0).mean():.3g}", 1.0, "share of the class's entropy"
    title = f"{score} of 1 (normalised)"
    if bound is not None:
        title, top, unit = f"{score} nats, bound {bound:.3g}", bound, "mutual information, nats"
    if len(classes) > _NAMED:
        best = matrix.argmax(axis=0)
        counts = np.bincount(best, minlength=len(classes))
        shown = np.sort(np.argsort(-counts, kind="stable")[:_NAMED])
        filters = np.isin(best, shown)
        title += f"; {_NAMED} of {len(classes)} classes, {filters.sum()} of {len(best)} filters"
        matrix, classes = matrix[shown][:, filters], [classes[c] for c in shown]
    figure, axes = _figure(8, 1.5 + 0.25 * len(classes))
    figure.colorbar(_draw_matrix(axes, matrix, classes, (0, top)), ax=axes, label=unit, pad=0.01)
    axes.set_title(title, loc="left")
    return figure, axes


def plot_confusion(confusion: ArrayLike, classes: Sequence[str]) -> tuple[Figure, Axes]:
    """The confusion matrix (C, C) of counts, true classes down: the share of every true class, which is also written
    into the cells of up to 20 classes. A class without samples has an empty row."""
    counts = np.asarray(confusion)
    _check("plot_confusion", counts, classes)
    if counts.shape[0] != counts.shape[1]:
        raise ValueError(f"plot_confusion: confusion must be (C, C), got shape {counts.shape}")
    total = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, total, out=np.zeros(counts.shape), where=total > 0)
    side = 2.5 + 0.35 * min(len(classes), _NAMED)
    figure, axes = _figure(side + 0.8, side)
    image = axes.imshow(shares, cmap=COLOURS, vmin=0, vmax=1, interpolation="nearest")
    names = classes if len(classes) <= _NAMED else [""] * len(classes)
    axes.set_xticks(range(len(classes)), names, rotation=90)
    axes.set_yticks(range(len(classes)), names)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    if len(classes) <= _WRITTEN:
        for (row, column), share in np.ndenumerate(shares):
            if counts[row, column]:
                colour = "black" if share > 0.5 else "white"
                axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", color=colour, fontsize=7)
    figure.colorbar(image, ax=axes, label="share of the true class", pad=0.01)
    axes.set_title(f"Accuracy {np.trace(counts) / max(1, counts.sum()):.2%}", loc="left")
    return figure, axes


def plot_filter_similarity(
    similarity: ArrayLike, filter_classes: ArrayLike, classes: Sequence[str], top: float | None = None
) -> tuple[Figure, Axes]:
    """The similarity matrix (K, K) of filters sorted by class, filter_classes (K,), a thin line between classes.

    The diagonal, 1 by definition, is left blank. top of the colour scale: the largest other value when not given.
    """
    s, owner = np.asarray(similarity, np.float64), np.asarray(filter_classes)
    if owner.ndim != 1 or s.shape != (len(owner), len(owner)):
        raise ValueError(
            f"plot_filter_similarity: similarity and filter_classes must be (K, K) and (K,), got {s.shape} and "
            f"{owner.shape}"
        )
    order = np.argsort(owner, kind="stable")
    shown = s[order][:, order]
    np.fill_diagonal(shown, np.nan)
    if top is None:
        top = float(np.nanmax(shown)) if len(owner) > 1 else 1.0
    figure, axes = _figure(8, 6)
    image = axes.imshow(shown, cmap=COLOURS, vmin=0, vmax=top, interpolation="nearest")
    present, counts = np.unique(owner, return_counts=True)
    edges = np.concatenate([[0], np.cumsum(counts)])
    for edge in edges[1:-1]:
        axes.axvline(edge - 0.5, color="white", linewidth=0.4)
        axes.axhline(edge - 0.5, color="white", linewidth=0.4)
    named = [classes[c] for c in present] if len(present) <= _NAMED else [""] * len(present)
    axes.set_yticks((edges[:-1] + edges[1:] - 1) / 2, named)
    axes.set_xticks([])
    axes.set_xlabel(f"{len(owner)} filters, sorted by class")
    figure.colorbar(image, ax=axes, label="|cosine| of the kernels", pad=0.01)
    axes.set_title("Similarity of the filters' kernels", loc="left")
    return figure, axes


def plot_training(
    histories: Mapping[str, Sequence[Mapping[str, Any]]], num_classes: int
) -> tuple[Figure, NDArray[Any]]:
    """Training curves by epoch: loss and accuracy of the STD path on the train images, L1-density; axes (3,).

    histories: {"std": rows, "csg": rows} as metrics.json holds them.
    """
    figure, axes = _figure(11, 3, ncols=3)
    styles = {"std": (BLUE, "--"), "csg": (ORANGE, "-")}
    panels = (
        ("loss_std", "cross-entropy, STD path (train)"),
        ("train_accuracy", "accuracy, STD path (train)"),
        ("l1_density", "L1-density of the gate"),
    )
    for ax, (key, title) in zip(axes, panels, strict=True):
        for arm, rows in histories.items():
            points = [(row["epoch"], row[key]) for row in rows if row[key] is not None]
            if points:
                colour, dash = styles.get(arm, ("black", ":"))
                ax.plot(*zip(*points, strict=True), color=colour, linestyle=dash, marker=".", label=arm.upper())
        ax.set_title(title, loc="left")
        ax.set_xlabel("epoch")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
    axes[2].axhline(1 / num_classes, color="grey", linewidth=0.8, linestyle=":", label=f"floor 1/{num_classes}")
    axes[2].set_ylim(0, 1.02)
    for ax in axes:
        if ax.get_legend_handles_labels()[0]:
            ax.legend(frameon=False)
    return figure, axes
