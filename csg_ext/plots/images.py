"""Filters on images: the images that a filter answers to most, and the filters that spoke for one image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from csg_ext.analysis.localization import upsample
from csg_ext.plots.common import (
    GREY,
    ORANGE,
    PALETTE,
    check_filter_classes,
    class_names,
    figure_and_axes,
    in_any_script,
    plain_axes,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def _array(values: Any) -> NDArray[Any]:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def _pictures(name: str, images: Any) -> NDArray[Any]:
    """Images (N, 1 or 3, H, W), uint8 or floats in [0, 1], as (N, H, W, 1 or 3) in [0, 1]."""
    x = _array(images)
    if x.ndim != 4 or x.shape[1] not in (1, 3) or not len(x):
        raise ValueError(f"{name}: images must be (N, 1 or 3, H, W), got {x.shape}")
    x = x / 255 if x.dtype == np.uint8 else x.astype(np.float64)
    if not (np.isfinite(x).all() and x.min() >= 0 and x.max() <= 1):
        raise ValueError(f"{name}: images must be uint8, or floats in [0, 1] before normalisation")
    return np.moveaxis(x, 1, -1)


def _show(axes: Axes, picture: NDArray[Any]) -> None:
    axes.imshow(picture.squeeze(-1) if picture.shape[-1] == 1 else picture, cmap="gray", vmin=0, vmax=1)
    plain_axes(axes)


@in_any_script
def plot_top_images(
    images: Any,
    maps: Any,
    filter: int,
    *,
    labels: ArrayLike | None = None,
    classes: Sequence[str] | None = None,
    filter_class: int | None = None,
    count: int = 8,
    chosen_from: int | None = None,
    axes: Sequence[Axes] | None = None,
) -> tuple[Figure, NDArray[Any]]:
    """The images with a filter's highest mean activation, its map laid over in orange, opaque at its maximum.

    Where a map is negative nothing is laid over; all maps share one scale, and a line surrounds what exceeds half of
    the maximum. A dead filter, which has one activation everywhere, is drawn as such, without maps; where the images
    are a choice from more, only if filter_class is -1.

    Args:
        images: (N, 1 or 3, H, W), uint8, or floats in [0, 1] (not normalised).
        maps: the layer's maps of the same images, (N, K, h, w).
        filter: the filter's index in 0..K-1.
        labels, classes: int (N,) and the names, for a title over each image.
        filter_class: the filter's class, named in the title; -1 for none.
        count: how many images, fewer where there are fewer.
        chosen_from: of how many these are the strongest, for the title; N when not given.
        axes: as many as images are shown.
    """
    name = "plot_top_images"
    pictures, m = _pictures(name, images), _array(maps)
    if m.ndim != 4 or len(m) != len(pictures):
        raise ValueError(f"{name}: maps must be ({len(pictures)}, K, h, w), got {m.shape}")
    if not 0 <= filter < m.shape[1]:
        raise ValueError(f"{name}: filter must lie in [0, {m.shape[1]}), got {filter}")
    if count < 1:
        raise ValueError(f"{name}: count must be at least 1, got {count}")
    maps_of_filter = m[:, filter].astype(np.float64)
    if not np.isfinite(maps_of_filter).all():
        raise ValueError(f"{name}: maps must be finite, got NaN or infinite values of filter {filter}")
    names = None if classes is None else class_names(name, classes)
    if labels is not None:
        labels = _labels(name, labels, len(pictures), names)
    mean = maps_of_filter.mean((1, 2))
    best = np.argsort(-mean, kind="stable")[:count]
    columns, own = min(4, len(best)), axes is None
    rows = -(-len(best) // columns)
    width = max(5.5, 1.9 * columns)  # the title's
    figure, panels = figure_and_axes(name, axes, width, 0.5 + 2.1 * rows, len(best), nrows=rows, ncols=columns)
    dead = maps_of_filter.max() == maps_of_filter.min()
    if chosen_from is not None and chosen_from > len(m):  # a live one may reach its limit in all of the strongest
        dead = dead and filter_class == -1
    top = maps_of_filter[best].max()
    for ax, i in zip(panels, best, strict=True):
        _show(ax, pictures[i])
        if not dead and top > 0:
            _lay_over(ax, maps_of_filter[i] / top, pictures.shape[1:3])
        label = "" if labels is None else str(labels[i]) if names is None else names[labels[i]]
        ax.set_title(f"{label} {'dead' if dead else f'{mean[i]:.3g}'}".strip(), fontsize=8)
    if own:
        owner = "" if filter_class is None else f", class {_name_of(filter_class, names)}"
        text = (
            "dead, one activation everywhere"
            if dead
            else f"highest mean activation of {chosen_from or len(m)} images\n"
            "orange: its map; white line: half of the map's maximum over these images"
        )
        figure.suptitle(f"Filter {filter}{owner}: {text}", fontsize=10)
    return figure, panels


def _labels(name: str, labels: ArrayLike, count: int, names: Sequence[str] | None) -> NDArray[Any]:
    y = np.asarray(labels)
    if y.shape != (count,) or y.dtype.kind not in "iu":
        raise ValueError(f"{name}: labels must be integers ({count},), got {y.dtype} {y.shape}")
    if names is not None and (y.min() < 0 or y.max() >= len(names)):
        raise ValueError(f"{name}: labels must lie in [0, {len(names)}), got {y.min()} to {y.max()}")
    return y


def _name_of(c: int, names: Sequence[str] | None) -> str:
    return "none" if c < 0 else str(c) if names is None else names[c]


def _lay_over(axes: Axes, share: NDArray[np.float64], size: Sequence[int]) -> None:
    """A map whose maximum is 1, at most, over an image of that size."""
    from matplotlib.colors import to_rgb

    large = upsample(torch.from_numpy(share.clip(0)), size).numpy()
    colour = np.empty((*large.shape, 4))
    colour[..., :3], colour[..., 3] = to_rgb(ORANGE), 0.75 * large.clip(0, 1)
    axes.imshow(colour)
    if large.min() < 0.5 < large.max():
        axes.contour(large, [0.5], colors="white", linewidths=0.8)


@in_any_script
def plot_image_filters(
    image: Any,
    activations: Any,
    filter_classes: ArrayLike,
    classes: Sequence[str],
    *,
    label: int | None = None,
    predicted: int | None = None,
    count: int = 10,
    axes: Sequence[Axes] | None = None,
) -> tuple[Figure, NDArray[Any]]:
    """One image, the filters that spoke most, and the classes that they speak for; axes (3,).

    Filters do not share a unit: give activations relative to each filter's own scale, such as pooled features divided
    by their 99th percentile over a set, where filters are to be compared. The classes of the strongest filters have
    colours of their own, 7 at most; further ones are grey. Names say the same.

    Args:
        image: (1 or 3, H, W), uint8, or floats in [0, 1].
        activations: pooled features (K,); a filter spoke where its activation is positive.
        filter_classes: int (K,), -1 for dead filters, which never speak.
        label, predicted: classes named over the image.
        count: filters, and classes, to show.
    """
    name, own = "plot_image_filters", axes is None
    names = class_names(name, classes)
    owner = check_filter_classes(name, filter_classes, names)
    a = _array(activations).astype(np.float64)
    if a.shape != owner.shape or not np.isfinite(a).all():
        raise ValueError(f"{name}: activations must be finite and ({len(owner)},), got {a.shape}")
    if count < 1:
        raise ValueError(f"{name}: count must be at least 1, got {count}")
    picture = _pictures(name, _array(image)[None])[0]
    spoke = np.where(owner >= 0, a.clip(0), 0)
    filters = np.argsort(-spoke, kind="stable")[:count]
    filters = filters[spoke[filters] > 0]
    sums = np.bincount(owner[owner >= 0], weights=spoke[owner >= 0], minlength=len(names))
    shown = np.argsort(-sums, kind="stable")[:count]
    shown = shown[sums[shown] > 0]
    colours = dict(zip(shown.tolist(), PALETTE, strict=False))
    height = 1 + 0.24 * max(6, len(filters), len(shown))
    grid = {"ncols": 3, "width_ratios": [1, 1.2, 1.2]}
    figure, panels = figure_and_axes(name, axes, 10, height, 3, **grid)
    if own and picture.shape[1] > 1.5 * picture.shape[0]:
        figure.set_layout_engine("constrained")  # the other makes the bars as low as a wide image
    _show(panels[0], picture)
    said = [f"{what}: {_name_of(c, names)}" for what, c in (("true", label), ("predicted", predicted)) if c is not None]
    panels[0].set_title("\n".join(said), loc="left", fontsize=8)
    filter_names = [f"{names[owner[k]]} · {k}" for k in filters]
    _bars(panels[1], filter_names, spoke[filters], [colours.get(int(owner[k]), GREY) for k in filters])
    panels[1].set_title(f"the strongest of {int((spoke > 0).sum())} filters that spoke", loc="left", fontsize=9)
    panels[1].set_xlabel("activation")
    _bars(panels[2], [names[c] for c in shown], sums[shown], [colours.get(c, GREY) for c in shown.tolist()])
    panels[2].set_title("and the classes they speak for", loc="left", fontsize=9)
    panels[2].set_xlabel("sum over the class's filters")
    return figure, panels


def _bars(axes: Axes, names: Sequence[str], values: NDArray[Any], colours: Sequence[str]) -> None:
    if not len(values):
        axes.text(0.5, 0.5, "no filter spoke", ha="center", va="center", transform=axes.transAxes)
        axes.set_xticks([])
    axes.barh(np.arange(len(values)), values, color=colours)
    axes.set_yticks(np.arange(len(values)), names, fontsize=8)
    axes.set_ylim(max(1, len(values)) - 0.5, -0.5)
    axes.set_frame_on(False)
