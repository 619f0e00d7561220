"""Images with masks of their objects: read, checked, and divided into what is scored and what chooses classes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from csg_ext._text import name_list
from csg_ext.data import ImageData
from csg_ext.data.formats import load_numpy


@dataclass
class Part:
    """Images uint8 (N, channels, H, W), labels int64 (N,) or (N, 2), masks bool (N, H, W) or (N, 2, H, W)."""

    images: NDArray[np.uint8]
    labels: Tensor
    masks: Tensor

    def take(self, rows: Tensor) -> Part:
        """The images at these positions."""
        return Part(self.images[rows.numpy()], self.labels[rows], self.masks[rows])


@dataclass
class Scenes:
    """The images that scores are taken on, those that choose the filters' classes, and scenes of two objects, if any.

    Images whose mask is empty are in neither; `empty` counts those of the test part.
    """

    scored: Part
    choosing: Part
    pairs: Part | None
    empty: int


def read_arrays(file: Path) -> dict[str, NDArray[Any]]:
    """The masks in a file: an .npy holds those of the test part; an .npz test_masks and, where it has them,
    train_masks, pair_images, pair_labels, pair_masks and classes. Raises OSError or ValueError with one sentence."""
    wanted = ("test_masks", "train_masks", "pair_images", "pair_labels", "pair_masks", "classes")
    if file.suffix not in (".npy", ".npz"):
        raise ValueError(f"masks: expected an .npy or .npz file, got {file}")
    try:
        loaded = load_numpy(file, only=wanted)
    except ValueError as error:
        raise ValueError(f"masks: expected a readable NumPy file, got {file}, which fails with: {error}") from None
    if not isinstance(loaded, dict):
        return {"test_masks": loaded}
    if "test_masks" not in loaded:
        raise ValueError(f"masks: expected the array test_masks in {file}, got {name_list(loaded)}")
    return {key: loaded[key] for key in wanted if key in loaded}


def _masks(name: str, array: NDArray[Any], shape: tuple[int, ...]) -> Tensor:
    """Masks as booleans: bool, or uint8 that is 0 and one other value."""
    if array.shape != shape:
        raise ValueError(f"masks: {name} must be {shape}, like the images, got {array.shape}")
    if array.dtype == np.bool_:
        return torch.from_numpy(array)
    if array.dtype != np.uint8:
        raise ValueError(f"masks: {name} must be bool, or uint8 with 0 outside the object, got {array.dtype}")
    values = np.flatnonzero(np.bincount(array.ravel(), minlength=256)[1:]) + 1
    if len(values) > 1:
        raise ValueError(f"masks: {name} must hold 0 and one other value, got also {values[:4].tolist()}")
    return torch.from_numpy(array != 0)


def masked_scenes(data: ImageData, arrays: dict[str, NDArray[Any]]) -> Scenes:
    """The scenes of a set with the masks that read_arrays gives.

    The filters' classes are chosen on train images, at most as many as are scored; where these have no masks, on every
    second test image, which is not scored then.
    """
    scored = _part("test", data.test_images, data.test_labels, arrays)
    empty = len(data.test_labels) - len(scored.labels)
    if "train_masks" in arrays:
        choosing = _part("train", data.train_images, data.train_labels, arrays)
        order = torch.from_numpy(np.random.default_rng(0).permutation(len(choosing.labels)))
        choosing = choosing.take(order[: len(scored.labels)])
    else:
        rows = torch.arange(len(scored.labels))
        scored, choosing = scored.take(rows[1::2]), scored.take(rows[::2])
    if not len(scored.labels) or not len(choosing.labels):
        raise ValueError("masks: expected masks that are not empty in every part, got none")
    return Scenes(scored, choosing, _pairs(data, arrays), empty)


def _part(name: str, images: NDArray[np.uint8], labels: NDArray[np.int64], arrays: dict[str, NDArray[Any]]) -> Part:
    """The images whose mask is not empty; of scenes of two objects, those where both are seen."""
    key = f"{name}_masks"
    masks = _masks(key, arrays[key], labels.shape + images.shape[2:])
    seen = masks.flatten(-2).any(-1).view(len(labels), -1).all(1)
    return Part(images, torch.from_numpy(labels.astype(np.int64)), masks).take(torch.nonzero(seen)[:, 0])


def _pairs(data: ImageData, arrays: dict[str, NDArray[Any]]) -> Part | None:
    names = ("pair_images", "pair_labels", "pair_masks")
    if not any(name in arrays for name in names):
        return None
    missing = [name for name in names if name not in arrays]
    if missing:
        raise ValueError(f"masks: scenes of two objects need {', '.join(names)}, got no {missing[0]}")
    images, labels = arrays["pair_images"], arrays["pair_labels"]
    if images.dtype != np.uint8 or images.shape[1:] != data.test_images.shape[1:]:
        raise ValueError(
            f"masks: pair_images must be uint8 (M, {', '.join(map(str, data.test_images.shape[1:]))}), got "
            f"{images.dtype} {images.shape}"
        )
    fits = labels.dtype.kind in "iu" and labels.shape == (len(images), 2) and len(images) > 0
    if not fits or labels.min() < 0 or labels.max() >= len(data.classes):
        raise ValueError(
            f"masks: pair_labels must be ({len(images)}, 2) with classes in [0, {len(data.classes)}), got "
            f"{labels.dtype} {labels.shape}"
        )
    if "classes" in arrays and arrays["classes"].tolist() != data.classes:
        raise ValueError(
            f"masks: pair_labels count the file's classes, which must be the network's in their order, "
            f"{data.classes!r:.100}, got {arrays['classes'].tolist()!r:.100}"
        )
    pairs = _part("pair", images, labels, arrays)
    if not len(pairs.labels):
        raise ValueError("masks: expected scenes of two objects with masks that are not empty, got none")
    return pairs
