"""Training curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from csg_ext.plots.common import BLUE, ORANGE, figure_and_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

_STYLES = {"std": (BLUE, "--"), "csg": (ORANGE, "-")}
_PANELS = (
    ("loss_std", "cross-entropy, STD path (train)"),
    ("train_accuracy", "accuracy, STD path (train)"),
    ("l1_density", "L1-density of the gate"),
)
_SHADES = {  # of an epoch's paths (STD, CSG): name, colour, hatch
    (True, False): ("STD path", "#56B4E9", None),
    (False, True): ("CSG path", "#E69F00", "///"),
    (True, True): ("both paths", "#CC79A7", "..."),
}


def plot_training(
    histories: Mapping[str, Sequence[Mapping[str, Any]]],
    num_classes: int,
    *,
    axes: Sequence[Axes] | None = None,
) -> tuple[Figure, NDArray[Any]]:
    """Training curves by epoch: loss and accuracy of the STD path on the train images, L1-density; axes (3,).

    histories: {"std": rows, "csg": rows} as metrics.json holds them. The epochs are shaded by the paths that the arm
    "csg" took in them: those that have a loss in its rows.
    """
    figure, panels = figure_and_axes("plot_training", axes, 11, 3.4, 3, ncols=3)
    paths = _runs(histories.get("csg", ()))
    for ax, (key, title) in zip(panels, _PANELS, strict=True):
        for arm, rows in histories.items():
            points = [(row["epoch"], row[key]) for row in rows if row.get(key) is not None]
            if points:
                colour, dash = _STYLES.get(arm, ("black", ":"))
                ax.plot(*zip(*points, strict=True), color=colour, linestyle=dash, marker=".", label=arm.upper())
        _shade(ax, paths, named=ax is panels[0])
        ax.set_title(title, loc="left")
        ax.set_xlabel("epoch")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
    panels[2].axhline(1 / num_classes, color="grey", linewidth=0.8, linestyle=":", label=f"floor 1/{num_classes}")
    panels[2].set_ylim(0, 1.02)
    for ax in panels:
        if ax.get_legend_handles_labels()[0]:
            ax.legend(frameon=False, fontsize=8)
    return figure, panels


def _shade(axes: Axes, paths: list[tuple[int, int, tuple[bool, bool]]], named: bool) -> None:
    for i, (first, last, path) in enumerate(paths):
        text, colour, hatch = _SHADES[path]
        new = named and path not in {p for *_, p in paths[:i]}
        label = f"CSG's epochs: {text}" if new else None
        area = axes.axvspan(first - 0.5, last + 0.5, facecolor=colour, alpha=0.25, zorder=0, label=label)
        area.set(hatch=hatch, edgecolor="white", linewidth=0)


def _runs(rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, int, tuple[bool, bool]]]:
    """(first epoch, last epoch, paths) of every stretch of epochs with the same paths."""
    runs: list[tuple[int, int, tuple[bool, bool]]] = []
    for row in rows:
        path = (row.get("loss_std") is not None, row.get("loss_csg") is not None)
        if not any(path) or "loss_csg" not in row:
            continue
        if runs and runs[-1][2] == path and runs[-1][1] == row["epoch"] - 1:
            runs[-1] = (runs[-1][0], row["epoch"], path)
        else:
            runs.append((row["epoch"], row["epoch"], path))
    return runs
