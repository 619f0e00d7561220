"""What the pictures share: figures and axes, colours, fonts, the classes of filters, the names that fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#888888"
PALETTE = (BLUE, ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")  # Okabe and Ito
COLOURS = "cividis"
NAMED = 40  # classes that get a line of text each
TICKS = 20  # names on an axis of more
# For what the user's font lacks, the first of these that is installed and has it; matplotlib's own font has no
# Chinese, Japanese or Korean and little of other scripts.
SCRIPTS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei"),
    *("Droid Sans Fallback", "IPAexGothic", "IPAGothic", "NanumGothic"),
    *("PingFang SC", "Hiragino Sans", "Microsoft YaHei", "Malgun Gothic"),
    *("Noto Sans Devanagari", "Noto Sans Bengali", "Noto Sans Tamil", "Noto Sans Thai", "Noto Sans Arabic", "FreeSans"),
    *("Arial Unicode MS", "Unifont"),
)

P = ParamSpec("P")
R = TypeVar("R")


def in_any_script(draw: Callable[P, R]) -> Callable[P, R]:
    """The function with every text that it draws in the user's font, and in SCRIPTS what that lacks."""

    @wraps(draw)
    def drawing(*args: P.args, **kwargs: P.kwargs) -> R:
        from matplotlib import rc_context, rcParams
        from matplotlib.font_manager import fontManager

        installed = {font.name for font in fontManager.ttflist}
        families = [*rcParams["font.family"], *(name for name in SCRIPTS if name in installed)]
        with rc_context({"font.family": families}):
            return draw(*args, **kwargs)

    return drawing


def figure_and_axes(name: str, axes: Any, width: float, height: float, count: int | None = None, **grid: Any) -> Any:
    """(Figure, Axes) to draw into: those given, or new ones. With `count`, an array of as many axes."""
    if axes is None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(width, height), layout="compressed", dpi=150)
        made = np.ravel(np.asarray(figure.subplots(**grid), object))
        for spare in made[count or 1 :]:
            spare.remove()
        return figure, made[0] if count is None else made[:count]
    from matplotlib.axes import Axes

    given = np.ravel(np.asarray(axes, object))
    wanted = 1 if count is None else count
    if len(given) != wanted or not all(isinstance(a, Axes) for a in given):
        kinds = ", ".join(sorted({type(a).__name__ for a in given}))
        raise ValueError(f"{name}: axes must be {wanted} of matplotlib's Axes, got {len(given)} ({kinds})")
    return given[0].get_figure(), given[0] if count is None else given


def class_names(name: str, classes: Sequence[str]) -> list[str]:
    """The names as text, long ones cut, at the end or, where that leaves two the same, in the middle.

    Dollars stay as they are: two would begin and end a formula of matplotlib.
    """
    if isinstance(classes, str) or not len(classes):
        raise ValueError(f"{name}: classes must be the classes' names, at least one, got {classes!r}")
    given = [str(name) for name in classes]
    cut = [text if len(text) <= 22 else text[:20] + "…" for text in given]
    if len(set(cut)) < len(set(given)):
        cut = [text if len(text) <= 22 else f"{text[:10]}…{text[-10:]}" for text in given]
    return [text.replace("$", r"\$") for text in cut]


def check_matrix(name: str, matrix: NDArray[Any], classes: Sequence[str]) -> None:
    """Raises ValueError for what is not a matrix with a row per class, has no column or is not finite."""
    if matrix.ndim != 2 or len(matrix) != len(classes) or not matrix.shape[1]:
        raise ValueError(f"{name}: expected a matrix with {len(classes)} rows, one per class, got shape {matrix.shape}")
    if not np.isfinite(matrix).all():
        raise ValueError(f"{name}: expected finite values, got {int((~np.isfinite(matrix)).sum())} that are not")


def class_of_filters(name: str, scores: NDArray[Any], dead: ArrayLike | None) -> NDArray[np.int64]:
    """The best class of every filter, (K,), from scores (C, K); -1 of dead filters and of columns without a positive
    entry."""
    none: NDArray[np.bool_] = np.all(scores <= 0, axis=0)
    if dead is not None:
        given = np.asarray(dead)
        if given.shape != none.shape or given.dtype != bool:
            raise ValueError(f"{name}: dead must be bool ({len(none)},), got {given.dtype} {given.shape}")
        none |= given
    return np.where(none, -1, scores.argmax(axis=0))


def check_filter_classes(name: str, filter_classes: ArrayLike, classes: Sequence[str]) -> NDArray[np.int64]:
    """The classes (K,), -1 for none; ValueError for what they are not."""
    owner = np.asarray(filter_classes)
    if owner.ndim != 1 or not len(owner) or owner.dtype.kind not in "iu":
        raise ValueError(f"{name}: filter_classes must be integers (K,), got {owner.dtype} {owner.shape}")
    if owner.min() < -1 or owner.max() >= len(classes):
        raise ValueError(f"{name}: filter_classes must lie in [-1, {len(classes)}), got {owner.min()} to {owner.max()}")
    return owner.astype(np.int64)


def check_trained(name: str, gate: ArrayLike | None) -> NDArray[Any]:
    """The gate as an array; ValueError for a model without a gate or with one that was not trained."""
    if gate is None:
        raise ValueError(f"{name}: gate must be a matrix (C, K), got None: the checkpoint holds no gate")
    g = np.asarray(gate)
    if g.size and (g == g.flat[0]).all():
        raise ValueError(f"{name}: gate must be trained, got one that is {float(g.flat[0]):g} everywhere")
    return g


def class_ticks(axis: Any, positions: NDArray[Any], names: Sequence[str], **text: Any) -> None:
    """Names at their positions: all, or TICKS of more than NAMED at equal distances."""
    count = len(names)
    shown = np.arange(count) if count <= NAMED else np.linspace(0, count - 1, TICKS).round().astype(np.int64)
    axis.set_ticks(positions[shown], [names[i] for i in shown.tolist()], **text)


def plain_axes(axes: Axes) -> None:
    """No frame and no ticks."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_frame_on(False)
