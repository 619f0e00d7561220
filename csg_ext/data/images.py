"""A labelled image set in memory, and the one entry that reads it from any supported layout."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

EMBEDDED = Path(__file__).with_name("fashion_mnist_14k.npz")


@dataclass
class ImageData:
    """Train and test images, uint8 (N, channels, H, W), with int64 labels (N,) in 0..C-1.

    `skipped` names the files that could not be read, each with its reason.
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    classes: list[str]
    skipped: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            images, labels = getattr(self, f"{part}_images"), getattr(self, f"{part}_labels")
            if images.dtype != np.uint8 or images.ndim != 4:
                raise ValueError(
                    f"{self.name}: {part}_images must be uint8 (N, channels, H, W), got {images.dtype} {images.shape}"
                )
            if labels.shape != images.shape[:1]:
                raise ValueError(
                    f"{self.name}: {part}_labels must be ({len(images)},) like its images, got {labels.shape}"
                )
            if len(labels) == 0:
                raise ValueError(f"{self.name}: the {part} part must hold at least one image, got none")
            if labels.min() < 0 or labels.max() >= len(self.classes):
                raise ValueError(
                    f"{self.name}: {part}_labels must lie in [0, {len(self.classes)}), "
                    f"got {labels.min()} to {labels.max()}"
                )
        if self.train_images.shape[1:] != self.test_images.shape[1:]:
            raise ValueError(
                f"{self.name}: train and test images must have one shape, "
                f"got {self.train_images.shape[1:]} and {self.test_images.shape[1:]}"
            )
        if len(self.classes) < 2:
            raise ValueError(f"{self.name}: at least 2 classes are needed, got {len(self.classes)}")

    @property
    def channels(self) -> int:
        """1 for grey images, 3 for colour."""
        return self.train_images.shape[1]

    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of every channel of the train part, in units of [0, 1]."""
        histogram = [np.bincount(self.train_images[:, c].ravel(), minlength=256) for c in range(self.channels)]
        level = np.arange(256) / 255
        mean = [float(h @ level / h.sum()) for h in histogram]
        std = [float(np.sqrt(h @ (level - m) ** 2 / h.sum())) for h, m in zip(histogram, mean, strict=True)]
        return mean, [max(s, 1e-3) for s in std]

    def fingerprint(self) -> str:
        """sha256 over the images and labels: tells whether a resumed run still sees the same data."""
        digest = hashlib.sha256()
        for array in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            digest.update(str((array.shape, array.dtype.str)).encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def hold_out(self, count: int) -> ImageData:
        """The same set with `count` train images as its test part, the last ones of every class in proportion (rounded
        for each class): for choosing hyperparameters without the test part."""
        total = len(self.train_labels)
        if not 0 < count < total:
            raise ValueError(f"hold_out: count must lie in [1, {total - 1}], got {count}")
        held = np.zeros(total, bool)
        for label in range(len(self.classes)):
            members = np.flatnonzero(self.train_labels == label)
            held[members[len(members) - round(count * len(members) / total) :]] = True
        return replace(
            self,
            name=f"{self.name} (validation: {held.sum()} of its train images)",
            train_images=self.train_images[~held],
            train_labels=self.train_labels[~held],
            test_images=self.train_images[held],
            test_labels=self.train_labels[held],
        )

    def save(self, path: str | Path) -> None:
        """Writes an .npz that load_images reads back."""
        np.savez(
            path,
            train_images=self.train_images,
            train_labels=self.train_labels,
            test_images=self.test_images,
            test_labels=self.test_labels,
            classes=np.array(self.classes),
        )


def load_images(
    path: str | Path | None = None,
    *,
    image_size: int | None = None,
    strict: bool = False,
    seed: int = 0,
    progress: Callable[[Any], Any] = iter,
) -> ImageData:
    """Reads the embedded Fashion-MNIST subset (path None) or the images at `path`.

    path may be torchvision's folder of CIFAR-10, CIFAR-100, MNIST, Fashion-MNIST or KMNIST, a folder of IDX files
    (gzipped or not), a folder of images (train/ with val/ or test/, or one folder per class, of which a seeded fifth
    is held out), or an .npz with the arrays of ImageData.
    image_size: side in pixels that images of a folder are resized and cropped to; by default they keep their size when
    they all share one of at most 64 x 64, and get 32 otherwise. Other layouts take no image_size.
    strict: an image that does not decode is an error instead of being skipped and named in `skipped`.
    progress: wraps the list of image files while they are decoded, e.g. tqdm.

    Raises FileNotFoundError, OSError or ValueError, each with one sentence that names the path.
    """
    from csg_ext.data import folder, formats

    if path is None:
        return formats.read_npz(EMBEDDED, name="Fashion-MNIST, 14k subset")
    root = Path(path)
    if not root.exists():
        raise FileNotFoundError(f"data: expected a folder or an .npz file, got {root}, which does not exist")
    if root.is_file():
        if root.suffix != ".npz":
            raise ValueError(f"data: expected a folder or an .npz file, got the file {root}")
        return formats.read_npz(root)
    try:
        entries = sorted(root.iterdir())
    except OSError as error:
        raise OSError(f"data: the folder {root} cannot be read: {error.strerror}") from None
    for read in (formats.read_cifar, formats.read_idx_folder):
        data = read(root)
        if data is not None:
            if image_size is not None and data.train_images.shape[2:] != (image_size, image_size):
                raise ValueError(
                    f"data: image_size applies to image folders, got {image_size} for "
                    f"{data.train_images.shape[2]} x {data.train_images.shape[3]} images in {root}"
                )
            return data
    if any(entry.is_dir() and not entry.name.startswith(".") for entry in entries):
        return folder.read_image_folder(root, image_size=image_size, strict=strict, seed=seed, progress=progress)
    raise ValueError(
        f"data: expected an image folder, torchvision's layout of CIFAR or MNIST, or IDX files, got {root}, "
        f"which holds {'none of them' if entries else 'nothing'}"
    )
