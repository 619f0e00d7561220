"""Reader of image folders: train/ with val/ or test/, or one folder per class with a seeded split."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from csg_ext.data.images import ImageData

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}
TEST_FOLDERS = ("val", "valid", "validation", "test")
KEPT_SIZE = 64  # images up to this side are used as they are when they all share one size
DEFAULT_SIZE = 32
TEST_SHARE = 0.2


def _class_folders(root: Path) -> dict[str, list[Path]]:
    """Image files of every subfolder of root, sorted."""
    return {
        folder.name: sorted(p for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
        for folder in sorted(root.iterdir())
        if folder.is_dir() and not folder.name.startswith(".")
    }


def _decode(path: Path, mode: str, size: int | None) -> np.ndarray:
    """The image as uint8 (channels, H, W): the shorter side scaled to `size`, then the centre cropped."""
    from PIL import Image, ImageOps

    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as file:
            image: Image.Image = file.convert(mode)
    if size is not None:
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def read_image_folder(
    root: Path,
    *,
    image_size: int | None = None,
    strict: bool = False,
    seed: int = 0,
    progress: Callable[[Any], Any] = iter,
) -> ImageData:
    """See load_images."""
    from PIL import Image

    if image_size is not None and image_size < 1:
        raise ValueError(f"data: image_size must be at least 1, got {image_size}")
    test_folder = next((root / name for name in TEST_FOLDERS if (root / name).is_dir()), None)
    if (root / "train").is_dir():
        if test_folder is None:
            raise FileNotFoundError(
                f"data: expected {root / 'val'} or {root / 'test'} beside {root / 'train'}, got neither"
            )
        parts = {"train": _class_folders(root / "train"), "test": _class_folders(test_folder)}
        unknown = sorted(parts["test"].keys() - parts["train"].keys())
        if unknown:
            raise ValueError(
                f"data: every class of {test_folder} must be in {root / 'train'}, got {unknown[0]!r} only there"
            )
    else:
        parts = {"train": _class_folders(root), "test": {}}
    classes = sorted(parts["train"])
    if not any(parts["train"].values()):
        raise ValueError(f"data: expected folders of images ({', '.join(sorted(EXTENSIONS))}) in {root}, got no image")
    for name in classes:
        if not parts["train"][name]:
            raise ValueError(
                f"data: expected at least one image in every class folder, got none in class {name!r} of {root}"
            )

    todo = [
        (part, classes.index(name), path)
        for part, folders in parts.items()
        for name, paths in folders.items()
        for path in paths
    ]
    skipped: list[str] = []
    readable: list[tuple[str, int, Path]] = []
    modes, sizes = set(), set()

    def skip(path: Path, error: Exception) -> None:
        reason = f"{os.path.relpath(path, root)}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        if strict:
            raise ValueError(f"data: with strict every image must decode, got {reason}") from None
        skipped.append(reason)

    for item in todo:
        try:
            with Image.open(item[2]) as image:
                modes.add(image.mode)
                sizes.add(image.size)
        except Exception as error:  # Pillow raises many types for a damaged file
            skip(item[2], error)
        else:
            readable.append(item)
    mode = "L" if modes <= {"1", "L", "LA", "I", "I;16", "F"} else "RGB"
    if image_size is None and (len(sizes) != 1 or max(next(iter(sizes))) > KEPT_SIZE):
        image_size = DEFAULT_SIZE

    images: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    labels: dict[str, list[int]] = {"train": [], "test": []}
    for part, label, path in progress(readable):
        try:
            array = _decode(path, mode, image_size)
        except Exception as error:
            skip(path, error)
        else:
            images[part].append(array)
            labels[part].append(label)

    train_images, train_labels = images["train"], np.asarray(labels["train"], np.int64)
    for index, name in enumerate(classes):
        if not np.any(train_labels == index):
            raise ValueError(f"data: no image of class {name!r} in {root} decodes, the first failure is: {skipped[0]}")
    test_images, test_labels = images["test"], np.asarray(labels["test"], np.int64)
    if not (root / "train").is_dir():
        held_out = _stratified(train_labels, seed)
        test_images = [im for im, out in zip(train_images, held_out, strict=True) if out]
        train_images = [im for im, out in zip(train_images, held_out, strict=True) if not out]
        train_labels, test_labels = train_labels[~held_out], train_labels[held_out]
    if not test_images:
        raise ValueError(f"data: expected at least one readable test image in {test_folder or root}, got none")
    return ImageData(
        root.name, np.stack(train_images), train_labels, np.stack(test_images), test_labels, classes, skipped
    )


def _stratified(labels: np.ndarray, seed: int) -> np.ndarray:
    """A mask over the samples: a seeded fifth of every class (at least one, unless it has a single image)."""
    rng = np.random.default_rng(seed)
    mask = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        mask[members[: min(len(members) - 1, max(1, round(TEST_SHARE * len(members))))]] = True
    return mask
