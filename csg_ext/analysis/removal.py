"""Class removal: zero the filters of some classes, reversibly, and see which classes' accuracy falls.

The gate says which class a filter speaks for: the class of the largest entry in its column. On the STD path, which
knows no labels, the features of the filters of the classes to forget are zeroed before the classifier.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from csg_ext.nn.attach import AttachedModel
from csg_ext.nn.gate import GatedModel


class _ZeroFilters:
    """A hook that zeroes channels of a module's input or output; copies and pickles of the module take it along.

    channel_dim None: K pooled values per sample, whatever their shape.
    """

    def __init__(self, forgotten: Tensor, channel_dim: int | None) -> None:
        self.forgotten = forgotten  # bool (K,)
        self.channel_dim = channel_dim

    def __call__(self, module: nn.Module, args: tuple[Any, ...], *output: Tensor) -> Any:
        """A forward pre-hook (without output) and a forward hook."""
        x = output[0] if output else args[0]
        shape = [1, *x.shape[1:]] if self.channel_dim is None else [1] * x.dim()
        if self.channel_dim is not None:
            shape[self.channel_dim] = -1
        zeroed = x.masked_fill(self.forgotten.to(x.device).view(shape), 0)  # also where a feature is not finite
        return zeroed if output else (zeroed, *args[1:])


class Forgotten:
    """What `forget` returns: `classes`, the indices of the zeroed `filters`, and `restore()`.

    As a context manager it restores the model at the end of the block.
    """

    def __init__(self, classes: list[int], filters: list[int], handle: Any) -> None:
        self.classes = classes
        self.filters = filters
        self._handle = handle

    def restore(self) -> None:
        """The model as it was; a second call changes nothing."""
        self._handle.remove()

    def __enter__(self) -> Forgotten:
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()

    def __repr__(self) -> str:
        return f"Forgotten(classes={self.classes}, filters={self.filters})"


def forget(
    model: GatedModel | AttachedModel, classes: int | Iterable[int], filters_of: str | ArrayLike = "gate"
) -> Forgotten:
    """Zero the features of the filters of `classes`, from now on until `restore()`.

    No weight changes: a hook does it where the gate is applied, so the state dict stays the same bit for bit, and
    the features get gradients of zero. Copies made meanwhile go on forgetting, whatever becomes of the model. Calls may
    be nested. A model is to be compiled or wrapped after it.
    Source: the application of the gate in Liang et al., ECCV 2020, to removing a class.

    Args:
        model: a `GatedModel` or what `csg_ext.attach` returned.
        classes: one class or several, in 0..C-1.
        filters_of: "gate" for the class of the largest entry in a filter's column (the first of equal ones), or the
            class of every filter, int (K,), with -1 for none, e.g. `best_class(mi)` where there is no trained gate.

    Returns:
        Forgotten: `with forget(model, 3) as removed: ...`.

    Raises:
        ValueError: no class, a class outside [0, C), a gate that is constant, filters_of of another shape.
        TypeError: another model, or classes that are no integers.

    Warns:
        UserWarning: classes to which no filter belongs; there is nothing of them to zero.
    """
    if not isinstance(model, (GatedModel, AttachedModel)):
        raise TypeError(f"forget: model must be a GatedModel or what attach returned, got {type(model).__name__}")
    gone = _classes(classes, model.csg.num_classes)
    owners = _owners(model, filters_of)
    empty = [c for c in gone if not bool((owners == c).any())]
    if empty:
        warnings.warn(f"forget: no filter belongs to the classes {empty}: nothing of them is zeroed", stacklevel=2)
    forgotten = torch.isin(owners, torch.tensor(gone))
    return Forgotten(gone, torch.nonzero(forgotten)[:, 0].tolist(), _hook(model, forgotten))


def _hook(model: GatedModel | AttachedModel, forgotten: Tensor) -> Any:
    if isinstance(model, GatedModel):
        return model.classifier.register_forward_pre_hook(_ZeroFilters(forgotten, None))
    place = model.plan.gate
    module = model.model.get_submodule(place.name)
    hook = _ZeroFilters(forgotten, None if model.plan.pooled else model.plan.channel_dim)
    return module.register_forward_pre_hook(hook) if place.side == "input" else module.register_forward_hook(hook)


def _classes(classes: int | Iterable[int], num_classes: int) -> list[int]:
    """The classes, sorted, each once."""
    try:
        given = np.atleast_1d(np.asarray(classes if isinstance(classes, (int, np.integer)) else list(classes)))
    except TypeError:
        raise TypeError(f"forget: classes must be an integer or several, got {type(classes).__name__}") from None
    if given.ndim != 1 or not len(given):
        raise ValueError(f"forget: classes must be one class or several, got an array of shape {given.shape}")
    if given.dtype.kind not in "iu":
        raise TypeError(f"forget: classes must be integers, got {given.dtype}")
    if given.min() < 0 or given.max() >= num_classes:
        raise ValueError(f"forget: classes must lie in [0, {num_classes}), got {given.tolist()}")
    return np.unique(given).tolist()


def _owners(model: GatedModel | AttachedModel, filters_of: str | ArrayLike) -> Tensor:
    """The class of every filter, int64 (K,), on the CPU."""
    gate = model.gate.detach().cpu()
    if isinstance(filters_of, str):
        if filters_of != "gate":
            raise ValueError(f"forget: filters_of must be 'gate' or the filters' classes, got {filters_of!r}")
        if bool((gate == gate[0, 0]).all()):
            raise ValueError(
                f"forget: the model's gate must be trained, got one that is {float(gate[0, 0]):g} everywhere; without "
                "a gate give filters_of the class of every filter, such as best_class(mi)"
            )
        return gate.argmax(0)
    owners = np.asarray(filters_of.cpu() if isinstance(filters_of, Tensor) else filters_of)
    if owners.shape != gate.shape[1:]:
        raise ValueError(f"forget: filters_of must be ({gate.shape[1]},), a class per filter, got {owners.shape}")
    if owners.dtype.kind not in "iu":
        raise TypeError(f"forget: filters_of must hold integers, got {owners.dtype}")
    if owners.min() < -1 or owners.max() >= len(gate):
        raise ValueError(f"forget: filters_of must lie in [-1, {len(gate)}), got {owners.min()} to {owners.max()}")
    return torch.from_numpy(owners.astype(np.int64))


# ---- accuracy per class


def accuracy_per_class(labels: ArrayLike, logits: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The share of every class's samples that the largest logit gives to it, (C,), and their counts, (C,).

    labels int (N,) in 0..C-1, logits (N, C). A class without samples has NaN. Raises ValueError for shapes that do not
    fit, labels that are no classes, or logits that hold NaN.
    """
    y, scores = np.asarray(labels), np.asarray(logits)
    if scores.ndim != 2 or y.shape != scores.shape[:1]:
        raise ValueError(
            f"accuracy_per_class: labels and logits must be (N,) and (N, C), got {y.shape} and {scores.shape}"
        )
    classes = scores.shape[1]
    if y.dtype.kind not in "iu" or (len(y) and (y.min() < 0 or y.max() >= classes)):
        raise ValueError(f"accuracy_per_class: labels must be integers in [0, {classes}), got {y.dtype} {y!r:.60}")
    if np.isnan(scores).any():  # argmax would take one for the largest
        raise ValueError(f"accuracy_per_class: logits must not hold NaN, got {int(np.isnan(scores).sum())}")
    counts = np.bincount(y, minlength=classes)
    right = np.bincount(y[scores.argmax(1) == y], minlength=classes)
    return np.divide(right, counts, out=np.full(classes, math.nan), where=counts > 0), counts


def removal_table(
    labels: ArrayLike,
    before: ArrayLike,
    after: ArrayLike,
    removed: Iterable[int],
    names: Sequence[str] | None = None,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Accuracy per class before and after classes were removed, for logits (N, C) of the same samples, labels (N,).

    Returns {"classes": {name: entry}, "means": {"removed": entry, "kept": entry}}; an entry holds "samples", "before",
    "after" and, of a class, whether it was "removed". Means are over the samples of these classes; a class (or a group)
    without samples has None. names: the C classes' names, by default their numbers. Raises ValueError for shapes that
    do not fit, classes out of range, or names that are the same.
    """
    (first, counts), (second, _) = accuracy_per_class(labels, before), accuracy_per_class(labels, after)
    if len(first) != len(second) or (names is not None and len(names) != len(first)):
        raise ValueError(
            f"removal_table: before, after and names must have as many classes, got {len(first)}, {len(second)} and "
            f"{None if names is None else len(names)}"
        )
    labelled = [str(c) for c in range(len(first))] if names is None else list(names)
    if len(set(labelled)) < len(labelled):
        raise ValueError("removal_table: names must differ, got some of them twice")
    numbers = np.asarray(list(removed))
    if numbers.size and (numbers.dtype.kind not in "iu" or numbers.min() < 0 or numbers.max() >= len(first)):
        raise ValueError(
            f"removal_table: removed must be integers in [0, {len(first)}), got {numbers.dtype} {numbers!r:.60}"
        )
    gone = np.isin(np.arange(len(first)), numbers)

    def entry(chosen: NDArray[np.bool_]) -> dict[str, Any]:
        total = int(counts[chosen].sum())
        means = {
            key: float(np.nansum((share * counts)[chosen]) / total) if total else None
            for key, share in (("before", first), ("after", second))
        }
        return {"samples": total, **means}

    alone = np.eye(len(first), dtype=bool)
    return {
        "classes": {labelled[c]: entry(alone[c]) | {"removed": bool(gone[c])} for c in range(len(first))},
        "means": {"removed": entry(gone), "kept": entry(~gone)},
    }
