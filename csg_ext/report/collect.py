"""What a report shows of a run: read from its folder, and reduced to what fits a page."""

from __future__ import annotations

import base64
import io
import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from csg_ext import metrics
from csg_ext._text import reason
from csg_ext.data.batches import normalise
from csg_ext.data.formats import load_numpy
from csg_ext.data.images import ImageData
from csg_ext.nn.gate import GatedModel
from csg_ext.remarks import filter_remarks
from csg_ext.runs import checkpoint_files, read_checkpoint, restore, run_images, tell_skipped, training_statistics
from csg_ext.training.compare import table
from csg_ext.training.files import ARMS, ARRAYS, METRICS_JSON, RUN, SUMMARY, is_number, read_json

# Bytes of the page for all runs together, before base64 adds a third.
SPRITE_BYTES, MAP_BYTES = 1_500_000, 500_000
THUMBNAIL = 48  # largest side of an image in the page, pixels
TOP = 6  # images of a filter
GALLERY = 24  # images that can be picked
_EXACT = 2**19  # entries of a matrix up to which 16 bits each are spent, 8 beyond
# What the page shows of summary.json beside its table.
_SHOWN: dict[str, tuple[str, ...]] = {
    "std": ("mis_bound",),
    "csg": ("device", "precision"),
    "data": ("name", "train", "test", "shape", "classes"),
    "config": ("model", "epochs", "schedule"),
    **dict.fromkeys(("seed", "seconds", "finished", "machine", "versions"), ()),
}


@dataclass
class Arm:
    """One trained network: its model, its gate (C, K) or None where none was trained, and what it left behind.

    mi (K, C), features (N, K), labels (N,) and confusion (C, C) are of the N test images; history: the rows of
    metrics.json.
    """

    name: str
    model: GatedModel
    gate: NDArray[np.float32] | None
    gate_note: str
    mi: NDArray[np.float64]
    features: NDArray[np.float32]
    labels: NDArray[np.int64]
    confusion: NDArray[np.int64]
    history: list[dict[str, Any]]
    statistics: tuple[list[float], list[float]]

    @cached_property
    def dead(self) -> NDArray[np.bool_]:
        """The filters with one and the same feature on all test images, (K,)."""
        return metrics.dead_filters(self.features)

    @property
    def classes_by(self) -> str:
        """What gives the filters their classes."""
        return "mutual information" if self.gate is None else "the gate"

    @cached_property
    def mi_classes(self) -> NDArray[np.int64]:
        """The class that every filter tells most about, (K,); -1 for dead ones."""
        return np.where(self.dead, -1, metrics.best_class(self.mi, self.features, self.labels))

    @property
    def filter_classes(self) -> NDArray[np.int64]:
        """The class of every filter, (K,); -1 for dead ones."""
        return self.mi_classes if self.gate is None else np.where(self.dead, -1, self.gate.argmax(axis=0))


@dataclass
class Run:
    """A finished run of csg-ext train: its summary.json, its images, and its arms STD and CSG."""

    name: str
    summary: dict[str, Any]
    data: ImageData
    arms: list[Arm]


def read_run(folder: str | Path, data: ImageData | None = None) -> Run:
    """A finished run in the folder that csg-ext train wrote; data: its images, where they are loaded already.

    Raises OSError or ValueError with one sentence.
    """
    place = Path(folder)
    files = checkpoint_files(place)
    if not (place / RUN).is_file():
        raise ValueError(f"report: RUN must be the folder of a run that csg-ext train wrote, got {place} without {RUN}")
    for file in (SUMMARY, *(f"{arm}/{name}" for arm in ARMS for name in (ARRAYS, METRICS_JSON))):
        if not (place / file).is_file():
            raise FileNotFoundError(f"report: RUN must be a finished run, got {place} without {file}")
    summary = read_summary(place / SUMMARY)
    stored = [read_checkpoint(file) for file in files]
    if data is None:
        data = run_images(
            stored, f"csg-ext train --resume --output {shlex.quote(str(place))} --data PATH notes their new place"
        )
        tell_skipped(data.skipped, f"and {len(data.skipped) - 10} more")
    arms = []
    for name, checkpoint in zip(ARMS, stored, strict=True):
        note = "" if checkpoint.holds_gate else "The checkpoint holds no gate."
        model = restore(checkpoint, data).eval()
        gate = model.gate.detach().numpy()
        if not note and (gate == gate[0, 0]).all():
            note = "This network was trained without a gate." if name == "std" else "The gate was not trained."
        arrays = _read_arrays(place / name / ARRAYS, data, gate.shape[1])
        arms.append(
            Arm(
                name=name.upper(),
                model=model,
                gate=None if note else gate,
                gate_note=note,
                history=read_history(place / name / METRICS_JSON),
                statistics=training_statistics(checkpoint, data),
                labels=data.test_labels,
                **arrays,
            )
        )
    return Run(place.resolve().name, summary, data, arms)


def read_summary(file: Path) -> dict[str, Any]:
    """summary.json, with all that a page shows of it; OSError, or ValueError with one sentence."""
    summary = read_json(file, "the numbers that csg-ext train wrote")
    got = f"{file}: expected the numbers that csg-ext train wrote, got"
    try:
        table(summary)
        missing = [key for key in _SHOWN if key not in summary] or [
            f"{key}.{part}" for key, parts in _SHOWN.items() for part in parts if part not in summary[key]
        ]
        if not missing:
            shown = [summary["std"]["mis_bound"], summary["seconds"], *summary["data"]["shape"]]
            if not all(map(is_number, shown)) or not isinstance(summary["versions"], dict) or len(shown) != 5:
                raise TypeError("other types where numbers belong")
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        raise ValueError(f"{got} others: {type(error).__name__} {reason(error)}") from None
    if missing:
        raise ValueError(f"{got} a file without {missing[0]}")
    return summary


def read_history(file: Path) -> list[dict[str, Any]]:
    """The rows of metrics.json; OSError, or ValueError with one sentence."""
    history = read_json(file, "the epochs that csg-ext train wrote")
    wanted = {"epoch", "loss_std", "train_accuracy", "l1_density"}
    if not isinstance(history, list) or not all(isinstance(row, dict) and wanted <= row.keys() for row in history):
        raise ValueError(f"{file}: expected the epochs that csg-ext train wrote, got other JSON")
    for row in history:
        for key in sorted(wanted):
            if not is_number(row[key]) and (key == "epoch" or row[key] is not None):
                raise ValueError(f"{file}: {key} must be a number, got {row[key]!r:.100}")
    return history


def _read_arrays(file: Path, data: ImageData, filters: int) -> dict[str, NDArray[Any]]:
    classes, count = len(data.classes), len(data.test_labels)
    wanted = {"mi": (filters, classes), "features": (count, filters), "confusion": (classes, classes)}
    try:
        loaded = load_numpy(file, only=wanted.keys())
        found = {key: loaded[key] for key in wanted}
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{file}: expected the arrays of a finished arm, got a file that fails with: {reason(error)}"
        ) from None
    for key, shape in wanted.items():
        if found[key].shape != shape or not np.isfinite(found[key]).all():
            raise ValueError(f"{file}: {key} must be finite and of shape {shape}, got shape {found[key].shape}")
    return found


def remarks(arm: Arm, classes: list[str]) -> list[str]:
    """What the page says of the arm's dead filters and of classes without a filter."""
    return filter_remarks(arm.filter_classes, arm.dead, classes, arm.classes_by)


# ---- what the page's script gets


def contents(run: Run, share: float = 1.0) -> dict[str, Any]:
    """What the interactive part needs of a run, ready for JSON; share of the page's size that it may take."""
    data = run.data
    gallery = _gallery(data.test_labels, len(data.classes))
    thumbnails = _Thumbnails(data, int(share * SPRITE_BYTES), gallery)
    tops = _top_images(run.arms, thumbnails)
    networks = []
    for arm, top in zip(run.arms, tops, strict=True):
        notes = [arm.gate_note] if arm.gate_note else []
        if len(top) < len(arm.mi):
            notes.append(f"Top images are shown for {len(top)} of {len(arm.mi)} filters, to keep the page small.")
        if arm.mi.size > _EXACT:
            notes.append("Values are rounded to 1/255 of their range, to keep the page small.")
        networks.append(
            {
                "name": arm.name,
                "notes": notes,
                "gate": None if arm.gate is None else quantise(arm.gate) | {"own": arm.filter_classes.tolist()},
                "mi": quantise(arm.mi.T) | {"own": arm.mi_classes.tolist()},
                "top": top,
                **_maps(arm, data.test_images[gallery], int(share * MAP_BYTES / len(run.arms))),
            }
        )
    return {
        "name": run.name,
        "classes": data.classes,
        "bound": max(float(run.summary["std"]["mis_bound"]), 1e-6),
        "sprite": thumbnails.sprite(),
        "gallery": [thumbnails.places[i] for i in gallery],
        "networks": networks,
    }


def quantise(matrix: ArrayLike) -> dict[str, Any]:
    """A finite matrix as base64 integers, little-endian: value = low + step * integer."""
    m = np.asarray(matrix, np.float64)
    bits = 16 if m.size <= _EXACT else 8
    low, high = float(m.min()), float(m.max())
    step = (high - low) / (2**bits - 1) or 1.0
    integers = np.round((m - low) / step).astype("<u2" if bits == 16 else "u1")
    return {"shape": list(m.shape), "low": low, "step": step, "bits": bits, "values": _base64(integers.tobytes())}


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def data_uri(raw: bytes) -> str:
    """A PNG for the src of an <img>."""
    return f"data:image/png;base64,{_base64(raw)}"


def _gallery(labels: NDArray[np.int64], classes: int) -> list[int]:
    """Test images to pick from: the first of every class, of as many classes as there are places."""
    chosen = np.unique(np.linspace(0, classes - 1, min(classes, GALLERY)).astype(int))
    each = max(1, GALLERY // len(chosen))
    return [int(i) for c in chosen for i in np.flatnonzero(labels == c)[:each]]


def visible(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Images (N, channels, H, W) that can be shown: the mean of the channels where these are neither grey nor RGB."""
    return images if images.shape[1] in (1, 3) else images.mean(axis=1, keepdims=True).astype(np.uint8)


class _Thumbnails:
    """Small copies of test images on one sheet; places: where an image lies on it."""

    def __init__(self, data: ImageData, size: int, first: list[int]) -> None:
        channels, height, width = data.test_images.shape[1:]
        self.data = data
        self.side = min(max(height, width), THUMBNAIL)
        self.size = [max(1, round(extent * self.side / max(height, width))) for extent in (width, height)]
        self.most = max(len(first), size // (self.side * self.side * channels))
        self.places = {image: place for place, image in enumerate(first)}

    def add(self, images: list[int]) -> bool:
        """Takes the images onto the sheet, all or none; False where they do not fit."""
        new = [i for i in images if i not in self.places]
        if len(self.places) + len(new) > self.most:
            return False
        for image in new:
            self.places[image] = len(self.places)
        return True

    def sprite(self) -> dict[str, Any]:
        """The sheet as a PNG with the test images' numbers and labels, in its order."""
        from PIL import Image

        images, columns = list(self.places), 32
        mode = "RGB" if self.data.channels == 3 else "L"
        sheet = Image.new(mode, (columns * self.side, -(-len(images) // columns) * self.side))
        for place, index in enumerate(images):
            pixels = visible(self.data.test_images[index : index + 1])[0].transpose(1, 2, 0)
            pixels = pixels[:, :, 0] if mode == "L" else pixels
            sheet.paste(
                Image.fromarray(pixels).resize(self.size), (place % columns * self.side, place // columns * self.side)
            )
        file = io.BytesIO()
        sheet.save(file, format="PNG", optimize=True)
        return {
            "side": self.side,
            "size": self.size,
            "columns": columns,
            "images": images,
            "labels": self.data.test_labels[images].tolist(),
            "source": data_uri(file.getvalue()),
        }


def _top_images(arms: list[Arm], thumbnails: _Thumbnails) -> list[dict[int, list[int]]]:
    """For every arm {filter: places of the images with its largest pooled features}, the filters with most mutual
    information first, of all arms in turn, until the sheet is full. Dead and never active filters have no images."""
    count = min(TOP, len(arms[0].features))
    best = [np.argsort(-arm.features, axis=0, kind="stable")[:count].T for arm in arms]
    ranks = [np.argsort(-arm.mi.max(axis=1), kind="stable") for arm in arms]
    found: list[dict[int, list[int]]] = [{} for _ in arms]
    for turn in zip(*ranks, strict=True):
        for arm, images, k, places in zip(arms, best, turn, found, strict=True):
            chosen = [int(i) for i in images[k] if arm.features[i, k] != 0 and not arm.dead[k]]
            if not thumbnails.add(chosen):
                return found
            places[int(k)] = [thumbnails.places[i] for i in chosen]
    return found


@torch.inference_mode()
def _maps(arm: Arm, images: NDArray[np.uint8], size: int) -> dict[str, Any]:
    """The maps of every image: first the class activation map of the predicted class (its positive part), then those
    of the filters that add most to that class's score, uint8, each image's filters on one scale.

    Source of the class activation map: Zhou et al., "Learning Deep Features for Discriminative Localization", 2016.
    """
    model = arm.model
    features = model.forward_features(normalise(images, *arm.statistics, torch.device("cpu")))
    logits = model.classifier(features.mean(dim=(2, 3)))
    probability, predicted = logits.softmax(1).max(1)
    weight = model.classifier.weight[predicted]  # (G, K)
    added = weight * features.mean(dim=(2, 3))
    most = min(features.shape[1], max(1, size // (features[:, 0].numel())))
    filters = added.argsort(dim=1, descending=True, stable=True)[:, :most]
    shape = list(features.shape[2:])
    strongest = features.gather(1, filters[:, :, None, None].expand(-1, -1, *shape))
    cam = torch.einsum("gk,gkhw->ghw", weight, features).clamp_min(0)[:, None]
    maps = torch.cat([_bytes(cam), _bytes(strongest)], dim=1).numpy()
    return {
        "map_shape": shape,
        "gallery": [
            {
                "predicted": int(predicted[i]),
                "probability": float(probability[i]),
                "filters": filters[i].tolist(),
                "added": [round(float(v), 4) for v in added[i, filters[i]]],
                "maps": _base64(maps[i].tobytes()),
            }
            for i in range(len(images))
        ],
    }


def _bytes(maps: torch.Tensor) -> torch.Tensor:
    """Maps (G, M, h, w) as uint8, 255 the largest value of each of the G rows."""
    top = maps.amax(dim=(1, 2, 3), keepdim=True).clamp_min(1e-12)
    return (maps.clamp_min(0) / top * 255).round().to(torch.uint8)
