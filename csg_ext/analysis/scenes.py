"""The generated benchmark of localization: Fashion-MNIST items pasted on photographs, with exact masks.

    python -m csg_ext.analysis.scenes scenes.npz --seed 0

The scenes are composites, no photographs of these objects: an item of the embedded Fashion-MNIST subset, tinted, at a
random size and place, on a random crop of one of scikit-image's photographs. Train scenes use items of the train part
and one half of the photographs, test scenes those of the test part and the other half. Needs scikit-image (and scipy,
which it brings).

The file is a set for `csg-ext train --data` (train_images, train_labels, test_images, test_labels, classes: scenes of
one item) with the masks of these items (train_masks, test_masks) for `csg-ext localize`, and test scenes of two items
of different classes: pair_images (M, 3, S, S), pair_labels (M, 2), pair_masks (M, 2, S, S).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from csg_ext.training.files import atomic_file

SIDE = 40  # of a scene, pixels
SIZES = (16, 34)  # of a single item
PAIR_SIZES = (16, 20)  # each of two items lies in its half of the scene
PHOTOS = {
    "train": ("astronaut", "brick", "camera", "chelsea", "coffee", "grass", "hubble_deep_field"),
    "test": ("coins", "gravel", "retina", "rocket", "stereo_motorcycle"),
}
_DARK = 8  # what a pixel of an item exceeds
_LARGE = 0.9  # share of the item's square beyond which its mask is taken for a failure
_CROP = (40, 160)  # side of the crop that becomes a background
_TINT = 0.3  # the weakest channel of a tint; the strongest is 1

Images = NDArray[np.uint8]


class Scenes(NamedTuple):
    """images uint8 (N, 3, S, S), labels int64 (N, items), masks bool (N, items, S, S)."""

    images: Images
    labels: NDArray[np.int64]
    masks: NDArray[np.bool_]


def item_masks(items: Images) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(masks (N, h, w), usable (N,)) of grey items (N, h, w): what exceeds 8 of 255 with its holes filled.

    An item whose mask holds two or more corners or over 0.9 of the square is not usable: its outline is cut off.
    """
    from scipy.ndimage import binary_fill_holes, generate_binary_structure

    in_plane = np.zeros((3, 3, 3), bool)
    in_plane[1] = generate_binary_structure(2, 1)
    # Filled together, in the plane of each item alone: what is empty above and below would count as outside.
    masks = binary_fill_holes(items > _DARK, in_plane)
    corners = masks[:, [0, 0, -1, -1], [0, -1, 0, -1]].sum(1)
    return masks, (corners < 2) & (masks.mean((1, 2)) <= _LARGE) & masks.any((1, 2))


def photographs(part: str) -> list[Images]:
    """scikit-image's photographs of a part ("train" or "test"), uint8 (3, H, W) each."""
    from skimage import data

    found = []
    for name in PHOTOS[part]:
        photo = getattr(data, name)()
        photo = photo[0] if isinstance(photo, tuple) else photo  # of a stereo pair, the left one
        found.append(np.ascontiguousarray(np.moveaxis(photo, -1, 0) if photo.ndim == 3 else np.stack([photo] * 3)))
    return found


def make_scenes(
    items: Images,
    labels: NDArray[np.int64],
    photos: Sequence[Images],
    count: int,
    objects: int,
    seed: int,
    sizes: tuple[int, int] | None = None,
) -> Scenes:
    """`count` scenes of one item, or of two items of different classes that do not overlap.

    items uint8 (M, h, w) with labels (M,); photos uint8 (3, H, W) each, at least 40 x 40. A scene depends on the seed,
    the inputs and its position alone. Classes take turns: scene i holds an item of class i mod C (with two items, one
    of the others at random beside it). sizes: the smallest and the largest side of an item in pixels; None means 16 to
    34, and 16 to 20 where there are two, each of which lies in its half of the scene.
    """
    if objects not in (1, 2):
        raise ValueError(f"make_scenes: objects must be 1 or 2, got {objects}")
    low, high = sizes or (SIZES if objects == 1 else PAIR_SIZES)
    if not 1 <= low <= high <= SIDE // objects:
        raise ValueError(f"make_scenes: sizes must rise within [1, {SIDE // objects}], got {low} and {high}")
    if count < 1:
        raise ValueError(f"make_scenes: count must be at least 1, got {count}")
    for photo in photos:
        if photo.dtype != np.uint8 or photo.ndim != 3 or len(photo) != 3 or min(photo.shape[1:]) < SIDE:
            raise ValueError(
                f"make_scenes: photos must be uint8 (3, H, W) of at least {SIDE} x {SIDE}, got {photo.dtype} "
                f"{photo.shape}"
            )
    shapes, usable = item_masks(items)
    members = [np.flatnonzero((labels == c) & usable) for c in range(int(labels.max()) + 1)]
    if len(members) < objects or any(len(m) == 0 for m in members):
        raise ValueError("make_scenes: items must hold a usable one of every class, and a class for every object")
    scenes = Scenes(
        np.empty((count, 3, SIDE, SIDE), np.uint8),
        np.empty((count, objects), np.int64),
        np.zeros((count, objects, SIDE, SIDE), bool),
    )
    for i in range(count):
        rng = np.random.default_rng((seed, objects, i))
        scene = _background(photos[int(rng.integers(len(photos)))], rng)
        classes = [i % len(members)]
        if objects == 2:
            classes.append((classes[0] + int(rng.integers(1, len(members)))) % len(members))
        for q, (label, (top, left, height, width)) in enumerate(zip(classes, _places(objects, rng), strict=True)):
            item = rng.choice(members[label])
            size = int(rng.integers(low, high + 1))
            y, x = top + int(rng.integers(height - size + 1)), left + int(rng.integers(width - size + 1))
            tint = rng.uniform(_TINT, 1, 3)
            mask = _resized(shapes[item].astype(np.float32), size) >= 0.5
            colour = _resized(items[item].astype(np.float32), size) * (tint / tint.max())[:, None, None]
            square = (..., slice(y, y + size), slice(x, x + size))
            scene[square] = np.where(mask, colour, scene[square])
            scenes.masks[i, q][square] = mask
            scenes.labels[i, q] = label
        scenes.images[i] = np.rint(scene).astype(np.uint8)
    return scenes


def _places(objects: int, rng: np.random.Generator) -> list[tuple[int, int, int, int]]:
    """Where each item lies, as (top, left, height, width): anywhere, or in the two halves of the scene."""
    if objects == 1:
        return [(0, 0, SIDE, SIDE)]
    half = SIDE // 2
    halves = (
        [(0, 0, SIDE, half), (0, half, SIDE, half)]
        if rng.random() < 0.5
        else [(0, 0, half, SIDE), (half, 0, half, SIDE)]
    )
    return halves[:: 1 if rng.random() < 0.5 else -1]


def _background(photo: Images, rng: np.random.Generator) -> NDArray[np.float32]:
    """A random square crop, mirrored at random, as float32 (3, S, S)."""
    height, width = photo.shape[1:]
    side = int(rng.integers(_CROP[0], min(_CROP[1], height, width) + 1))
    y, x = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
    crop = photo[:, y : y + side, x : x + side]
    return _resized(crop[:, :, ::-1] if rng.random() < 0.5 else crop, SIDE)


def _resized(image: NDArray[np.generic], side: int) -> NDArray[np.float32]:
    """(..., h, w) as float32 (..., side, side), bilinear, antialiased."""
    x = torch.from_numpy(np.ascontiguousarray(image, np.float32)).reshape(1, -1, *image.shape[-2:])
    out = F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False, antialias=True)
    return out.reshape(*image.shape[:-2], side, side).numpy()


def benchmark_set(train: int, test: int, pairs: int, seed: int) -> dict[str, NDArray[np.generic]]:
    """The arrays of the benchmark's file, from the embedded items and scikit-image's photographs."""
    from csg_ext.data import load_images

    items = load_images()
    one = make_scenes(items.train_images[:, 0], items.train_labels, photographs("train"), train, 1, seed)
    held = photographs("test")
    other = make_scenes(items.test_images[:, 0], items.test_labels, held, test, 1, seed + 1)
    two = make_scenes(items.test_images[:, 0], items.test_labels, held, pairs, 2, seed + 1)
    return {
        "train_images": one.images,
        "train_labels": one.labels[:, 0],
        "train_masks": one.masks[:, 0],
        "test_images": other.images,
        "test_labels": other.labels[:, 0],
        "test_masks": other.masks[:, 0],
        "pair_images": two.images,
        "pair_labels": two.labels,
        "pair_masks": two.masks,
        "classes": np.array(items.classes),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the benchmark's file; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m csg_ext.analysis.scenes",
        description="Generates the benchmark of localization: Fashion-MNIST items on crops of photographs, with masks.",
    )
    parser.add_argument("output", metavar="FILE.npz", type=Path)
    parser.add_argument("--seed", type=int, metavar="N", default=0, help="default 0")
    for name, default in (("train", 8000), ("test", 2000), ("pairs", 1000)):
        parser.add_argument(f"--{name}", type=int, metavar="N", default=default, help=f"scenes (default {default})")
    args = parser.parse_args(argv)
    try:
        arrays = benchmark_set(args.train, args.test, args.pairs, args.seed)
        with atomic_file(args.output) as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # the stubs take a name for allow_pickle
    except ModuleNotFoundError as error:
        print(f"error: the scenes need {error.name}, which is missing: pip install scikit-image", file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    share = arrays["test_masks"].mean()
    print(f"{args.output}: {args.train} train, {args.test} test and {args.pairs} pair scenes; masks cover {share:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
