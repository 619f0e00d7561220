"""The command `csg-ext mis`: mutual information of stored features with the classes, printed, written and drawn."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from csg_ext._text import name_list
from csg_ext.data.formats import load_numpy
from csg_ext.metrics import best_class, dead_filters, mutual_information_score
from csg_ext.ops.mutual_info import class_entropy, class_mutual_info
from csg_ext.remarks import filter_remarks
from csg_ext.runs import read_safetensors
from csg_ext.training.files import ARMS, ARRAYS, CHECKPOINT, SUMMARY, WEIGHTS, atomic_file, read_json, write_text

MATRIX, PICTURE, NUMBERS = "mutual_information.npz", "mutual_information.png", "mis.json"
_LISTED = 10  # classes that the report names


@dataclass
class FeatureSet:
    """Features (N, K) and labels (N,) as a file holds them; names of the classes, if known."""

    name: str
    features: Tensor | NDArray[Any]
    labels: Tensor | NDArray[Any]
    classes: list[str] | None = None


def read_features(path: str | Path, labels: str | Path | None = None) -> list[FeatureSet]:
    """The features of a file, or of both arms of a run.

    path: .npz or .safetensors with features and labels; .npy with features (not read into memory as a whole); the
    folder, arrays.npz or checkpoint of an arm that `csg-ext train` wrote; or the folder of its run. labels: an .npy
    with labels, which go before those of the file.

    Raises OSError or ValueError, each with one sentence.
    """
    file = Path(path)
    if file.is_dir() or (file.name in (CHECKPOINT, WEIGHTS) and (file.parent / ARRAYS).is_file()):
        if labels is not None:
            raise ValueError(f"--labels expects a file of features, got {file} of a run, which has its labels")
        if all((file / arm / ARRAYS).is_file() for arm in ARMS):
            return [_read_arm(file / arm) for arm in ARMS]
        return [_read_arm(file if file.is_dir() else file.parent)]
    if file.suffix == ".npy":
        if labels is None:
            raise ValueError(f"{file} holds features alone: give their labels as --labels FILE.npy")
        return [FeatureSet(file.name, _load(file), _load(Path(labels)))]
    if file.suffix == ".npz":
        found = _load(file)
    elif file.suffix == ".safetensors":
        found = read_safetensors(file, only=("features", "labels"))
    else:
        raise ValueError(
            f"expected features as .npz, .npy or .safetensors, or what csg-ext train wrote, got {file}"
            + ("" if file.exists() else ", which does not exist")
        )
    if labels is not None:
        found["labels"] = _load(Path(labels))
    for key in ("features", "labels"):
        if key not in found:
            raise ValueError(f"{file}: expected the array {key}, got {name_list(found)}")
    return [FeatureSet(file.name, found["features"], found["labels"])]


def _read_arm(folder: Path) -> FeatureSet:
    """The features that csg-ext train measured: held-out images, STD path."""
    file = folder / ARRAYS
    if not file.is_file():
        raise ValueError(f"expected a folder that csg-ext train wrote, with {ARRAYS}, got {folder}")
    found = _load(file)
    if "features" not in found or "labels" not in found:
        raise ValueError(f"{file}: expected features and labels, got {name_list(found)}")
    classes = None
    summary = folder.parent / SUMMARY
    if summary.is_file():
        content = read_json(summary, "the numbers that csg-ext train wrote")
        data = content.get("data") if isinstance(content, dict) else None
        classes = data.get("classes") if isinstance(data, dict) else None
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise ValueError(f"{summary}: expected the names of the classes under data, got {classes!r:.100}")
    return FeatureSet(folder.name, found["features"], found["labels"], classes)


def _load(file: Path) -> Any:
    """An .npy as a memory map, or an .npz as a dictionary."""
    try:
        return load_numpy(file, mmap=True)
    except ValueError as error:
        raise ValueError(f"{file}: expected a readable NumPy file, got one that fails with: {error}") from None


def measure(data: FeatureSet, output: Path, *, normalize: bool, num_classes: int | None, **options: Any) -> str:
    """Measures, writes the matrix, its picture and the numbers to `output`, and returns the report as text.

    options: n_neighbors, ties, protocol, random_state and device of class_mutual_info.
    """
    begun = time.perf_counter()
    if num_classes is None and data.classes is not None:
        num_classes = len(data.classes)
    if data.classes is not None and num_classes != len(data.classes):
        raise ValueError(f"num_classes must be the {len(data.classes)} classes of {data.name}, got {num_classes}")
    bar = _Bar(data.name)
    try:
        mi = np.asarray(class_mutual_info(data.features, data.labels, num_classes=num_classes, progress=bar, **options))
    except TypeError as error:  # of what a file holds: the values of an argument here
        raise ValueError(str(error)) from None
    finally:
        bar.close()
    seconds = time.perf_counter() - begun
    dead = dead_filters(data.features)
    mi[dead] = 0
    bound = np.asarray(class_entropy(data.labels, num_classes, options["protocol"]))
    normalized = np.divide(mi, bound, out=np.zeros_like(mi), where=bound > 0)
    classes = data.classes or [str(c) for c in range(mi.shape[1])]
    best = np.where(dead, -1, best_class(mi, data.features, data.labels))
    numbers = {
        "mis": mutual_information_score(mi),
        "bound": float(bound.max()),
        "mis_normalized": mutual_information_score(normalized),
        "samples": len(data.labels),
        "filters": len(mi),
        "classes": len(classes),
        "filters_per_class": np.bincount(best[~dead], minlength=len(classes)).tolist(),
        "dead_filters": np.flatnonzero(dead).tolist(),
        "settings": {key: str(v) if key == "device" else v for key, v in options.items()} | {"normalize": normalize},
        "seconds": round(seconds, 2),
    }
    output.mkdir(parents=True, exist_ok=True)
    shown = normalized if normalize else mi
    with atomic_file(output / MATRIX) as file:
        np.savez(file, allow_pickle=False, mi=shown, bound=bound, best_class=best, classes=np.array(classes))
    write_text(output / NUMBERS, json.dumps(numbers, indent=1) + "\n")
    written = [MATRIX, NUMBERS]
    try:
        from csg_ext import plots

        top = None if normalize else float(bound.max())
        figure, _ = plots.plot_class_mutual_information(shown, classes, top, filter_classes=best)
        with atomic_file(output / PICTURE) as file:
            figure.savefig(file, format="png")
        written.append(PICTURE)
    except ModuleNotFoundError as error:
        print(f"no picture: it needs {error.name}, which is missing: pip install 'csg-ext[train]'", file=sys.stderr)
    if data.classes is None:
        classes = [f"class {c}" for c in classes]
    return _text(data.name, numbers, mi, best, classes) + f"Written to {output}: {', '.join(written)}\n"


def _text(
    name: str, numbers: dict[str, Any], mi: NDArray[np.float64], best: NDArray[np.int64], classes: list[str]
) -> str:
    settings, counts = numbers["settings"], np.array(numbers["filters_per_class"])
    drawn = settings["ties"] == "noise" or settings["protocol"] == "balanced"
    lines = [
        f"{name}: {numbers['samples']:,} samples, {numbers['filters']:,} filters, {numbers['classes']:,} classes; "
        f"{settings['n_neighbors']} neighbours, ties {settings['ties']}, {settings['protocol']}"
        + (f", seed {settings['random_state']}" if drawn else "")
        + f"; {numbers['seconds']:.1f} s",
        "",
        f"MIS: mutual information filter-class, nats     {numbers['mis']:.4f}",
        f"  its bound: the largest entropy of a class    {numbers['bound']:.4f}",
        f"  MIS, each class divided by its own entropy   {numbers['mis_normalized']:.4f}",
        "",
        "filters by the class that they tell most about:",
    ]
    order = np.lexsort((np.arange(len(counts)), -counts))
    listed = [c for c in order[:_LISTED] if counts[c] > 0]
    width = max((len(classes[c]) for c in listed), default=0)
    digits = len(f"{counts.max():,}")
    for c in listed:
        mean = mi[best == c, c].mean()
        lines.append(
            f"  {classes[c]:{width}}  {counts[c]:{digits},}  {counts[c] / len(mi):6.1%}  mean MI {mean:.4f} nats"
        )
    others = int((counts > 0).sum()) - len(listed)
    if others:
        lines.append(f"  in {others:,} other classes: {counts.sum() - counts[listed].sum():,}")
    lines += filter_remarks(best, best < 0, classes, "mutual information")
    return "\n".join(lines) + "\n\n"


class _Bar:
    """A bar on a terminal, where there is tqdm; nothing elsewhere."""

    def __init__(self, name: str) -> None:
        self.bar: Any = None
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ModuleNotFoundError:
                return
            self.bar = tqdm(desc=name, unit=" filters", file=sys.stderr, dynamic_ncols=True, leave=False)

    def __call__(self, done: int, total: int) -> None:
        if self.bar is not None:
            self.bar.total = total
            self.bar.update(done - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def main(arguments: dict[str, Any]) -> int:
    """Runs `csg-ext mis` with the parsed arguments; returns the exit status."""
    from csg_ext.training.compare import pick_device

    output, device = Path(arguments["output"]), torch.device(pick_device(arguments["device"]))
    found = read_features(arguments["file"], arguments["labels"])
    for data in found:
        text = measure(
            data,
            output / data.name if len(found) > 1 else output,
            normalize=arguments["normalize"],
            num_classes=arguments["num_classes"],
            n_neighbors=arguments["n_neighbors"],
            ties=arguments["ties"],
            protocol=arguments["protocol"],
            random_state=arguments["seed"],
            device=device,
        )
        print(text, flush=True)
    return 0
