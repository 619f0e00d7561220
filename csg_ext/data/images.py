"""A labelled image set in memory, and the one entry that reads it from any supported layout."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from csg_ext.data import select

if TYPE_CHECKING:
    from csg_ext.data.index import ArrayList, ImageIndex, ImageList

EMBEDDED = Path(__file__).with_name("fashion_mnist_14k.npz")


@dataclass
class ImageData:
    """Train and test images, uint8 (N, channels, H, W), with int64 labels (N,) in 0..C-1.

    name: what messages call the set. classes: the C names, which differ. skipped: the files and folders that were left
    out, each with its reason. train_names, test_names: of every image of a folder or shards its path below the folder;
    empty for packed sets, whose order is the file's. Raises ValueError where these do not fit together or a class has
    no image in a part.
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    classes: list[str]
    skipped: list[str] = field(default_factory=list)
    train_names: list[str] = field(default_factory=list)
    test_names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            images, labels = getattr(self, f"{part}_images"), getattr(self, f"{part}_labels")
            names = getattr(self, f"{part}_names")
            if names and len(names) != len(labels):
                raise ValueError(
                    f"{self.name}: {part}_names must be empty or name all {len(labels)} images, got {len(names)}"
                )
            if images.dtype != np.uint8 or images.ndim != 4:
                raise ValueError(
                    f"{self.name}: {part}_images must be uint8 (N, channels, H, W), got {images.dtype} {images.shape}"
                )
            if 0 in images.shape[1:]:
                raise ValueError(
                    f"{self.name}: {part}_images must have a channel and sides of at least 1, got {images.shape}"
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
            counts = np.bincount(labels, minlength=len(self.classes))
            if counts.min() == 0:
                raise ValueError(
                    f"{self.name}: the {part} part must hold at least one image of every class, "
                    f"got none of class {self.classes[int(counts.argmin())]!r}"
                )
        if self.train_images.shape[1:] != self.test_images.shape[1:]:
            raise ValueError(
                f"{self.name}: train and test images must have one shape, "
                f"got {self.train_images.shape[1:]} and {self.test_images.shape[1:]}"
            )
        if len(self.classes) < 2:
            raise ValueError(f"{self.name}: at least 2 classes are needed, got {len(self.classes)}")
        if len(set(self.classes)) != len(self.classes):  # a class is chosen by its name
            double = next(name for name in self.classes if self.classes.count(name) > 1)
            raise ValueError(f"{self.name}: the names of the classes must differ, got {double!r:.100} twice")

    @property
    def channels(self) -> int:
        """1 for grey images, 3 for colour."""
        return self.train_images.shape[1]

    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of every channel of the train part, in units of [0, 1]."""
        return channel_statistics(self.train_images)

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
            train_names=list(compress(self.train_names, ~held)),
            test_names=list(compress(self.train_names, held)),
        )

    def index(self) -> ImageIndex[ArrayList]:
        """The set as an index of its images, which are told apart by their positions."""
        from csg_ext.data.index import ArrayList, ImageIndex

        parts = {
            "train": ArrayList("train", self.train_images, np.arange(len(self.train_labels)), self.train_labels),
            "test": ArrayList("test", self.test_images, np.arange(len(self.test_labels)), self.test_labels),
        }
        return ImageIndex(self.name, Path(self.name), parts, self.classes)

    def with_channels(self, channels: int) -> ImageData:
        """The set in grey (1: ITU-R 601 luma, as in Pillow) or in colour (3: grey repeated)."""
        return replace(
            self,
            train_images=with_channels(self.train_images, channels),
            test_images=with_channels(self.test_images, channels),
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


def channel_statistics(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of every channel of uint8 (N, channels, H, W), in units of [0, 1]."""
    histogram = [np.bincount(images[:, c].ravel(), minlength=256) for c in range(images.shape[1])]
    level = np.arange(256) / 255
    mean = [float(h @ level / h.sum()) for h in histogram]
    std = [float(np.sqrt(h @ (level - m) ** 2 / h.sum())) for h, m in zip(histogram, mean, strict=True)]
    return mean, [max(s, 1e-3) for s in std]


def with_channels(images: np.ndarray, channels: int) -> np.ndarray:
    """uint8 (N, 1 or 3, H, W) in grey or in colour; see ImageData.with_channels."""
    if images.shape[1] == channels:
        return images
    if images.shape[1] not in (1, 3):
        raise ValueError(f"data: channels applies to images of 1 or 3 channels, got {images.shape[1]}")
    if channels == 3:
        return np.repeat(images, 3, axis=1)
    grey = np.empty((len(images), 1, *images.shape[2:]), np.uint8)
    for start in range(0, len(images), 1024):  # bounds the 32-bit intermediate
        part = images[start : start + 1024].astype(np.uint32)
        grey[start : start + 1024, 0] = (19595 * part[:, 0] + 38470 * part[:, 1] + 7471 * part[:, 2] + 0x8000) >> 16
    return grey


def load_images(
    path: str | Path | None = None,
    *,
    classes: Sequence[str] | None = None,
    imbalance: float | None = None,
    channels: int | None = None,
    image_size: int | None = None,
    test_share: float = select.TEST_SHARE,
    strict: bool = False,
    seed: int = 0,
    memory_limit: float = 4.0,
    progress: Callable[[Any], Any] = iter,
) -> ImageData:
    """Reads the embedded Fashion-MNIST subset (path None) or the images at `path` into memory.

    path may be torchvision's folder of CIFAR-10, CIFAR-100, MNIST, Fashion-MNIST or KMNIST, a folder of IDX files
    (gzipped or not), a folder of images (train/ with val/ or test/, or one folder per class), WebDataset shards (a
    folder of .tar files, one of them, or several as in "train-{000..009}.tar"), or an .npz with the arrays of
    ImageData. docs/data.md has every layout.
    classes: the classes to use, labelled in this order. imbalance: makes the train part long-tailed, its largest class
    `imbalance` times its smallest (see select.long_tail). channels: 1 makes colour images grey, 3 grey ones colour;
    None keeps the set's own.
    image_size: side in pixels that images of folders and shards are resized and cropped to; by default they keep their
    size when they all share one of at most 64 x 64, and get 32 otherwise. Other layouts take no image_size.
    test_share: what is held out of every class where the set has no test part of its own. seed: of that split and of
    the imbalance.
    strict: an image or shard that is damaged is an error instead of being skipped and named in `skipped`.
    memory_limit: GiB that images of folders and shards may take once decoded; csg_ext.data.image_loader has no limit.
    progress: wraps the lists of shards and images while they are read, e.g. tqdm.

    Raises FileNotFoundError, OSError or ValueError, each with one sentence that names the path.
    """
    return load_found(
        find_images(path, strict=strict, progress=progress),
        classes=classes,
        imbalance=imbalance,
        channels=channels,
        image_size=image_size,
        test_share=test_share,
        strict=strict,
        seed=seed,
        memory_limit=memory_limit,
        progress=progress,
    )


def load_found(
    found: ImageData | ImageIndex[ImageList],
    *,
    classes: Sequence[str] | None,
    imbalance: float | None,
    channels: int | None,
    image_size: int | None,
    test_share: float,
    strict: bool,
    seed: int,
    memory_limit: float,
    progress: Callable[[Any], Any],
) -> ImageData:
    """What find_images gave, read into memory with the settings of load_images."""
    check_settings(channels, image_size, test_share)
    if not memory_limit > 0:
        raise ValueError(f"data: memory_limit must be a number above 0 (GiB), got {memory_limit}")
    if isinstance(found, ImageData):
        if image_size is not None and found.train_images.shape[2:] != (image_size, image_size):
            raise ValueError(
                f"data: image_size applies to image folders and shards, got {image_size} for "
                f"{found.train_images.shape[2]} x {found.train_images.shape[3]} images in {found.name}"
            )
        if classes is not None or imbalance is not None:
            found = _chosen(found, classes, imbalance, seed)
        return found if channels is None else found.with_channels(channels)

    from csg_ext.data.folder import read_into_memory

    index = found.subset(classes)
    if not has_test_part(index):
        index = index.split("test", test_share, seed)
    return read_into_memory(
        index.check().imbalanced(imbalance, seed),
        image_size=image_size,
        channels=channels,
        strict=strict,
        progress=progress,
        memory_limit=memory_limit,
    )


def check_settings(channels: int | None, image_size: int | None, test_share: float) -> None:
    """Raises ValueError for settings of load_images and image_loader that fit no set."""
    if channels not in (None, 1, 3):
        raise ValueError(f"data: channels must be 1 or 3, got {channels}")
    if image_size is not None and image_size < 1:
        raise ValueError(f"data: image_size must be at least 1, got {image_size}")
    select.check_share("test_share", test_share)


def _chosen(data: ImageData, classes: Sequence[str] | None, imbalance: float | None, seed: int) -> ImageData:
    index = data.index().subset(classes).imbalanced(imbalance, seed)
    train, test = index.parts["train"], index.parts["test"]
    return replace(
        data,
        train_images=data.train_images[train.positions],
        train_labels=train.labels,
        test_images=data.test_images[test.positions],
        test_labels=test.labels,
        classes=index.classes,
    )


def find_images(
    path: str | Path | None, *, strict: bool = False, progress: Callable[[Any], Any] = iter
) -> ImageData | ImageIndex[ImageList]:
    """The set at path: in memory where its layout is packed, else an index. See load_images."""
    from csg_ext.data import formats

    if path is None:
        return formats.read_npz(EMBEDDED, name="Fashion-MNIST, 14k subset")
    shards = _named_shards(str(path))
    if shards:
        from csg_ext.data.shards import index_shards, parts_by_name

        return index_shards(shards[0].parent, parts_by_name(shards), strict=strict, progress=progress)
    root = Path(path)
    if not root.exists():
        raise FileNotFoundError(
            f"data: expected a folder, .tar shards or an .npz file, got {root}, which does not exist"
        )
    if root.is_file():
        if root.suffix != ".npz":
            raise ValueError(f"data: expected a folder, .tar shards or an .npz file, got the file {root}")
        return formats.read_npz(root)
    try:
        entries = sorted(root.iterdir())
    except OSError as error:
        raise OSError(f"data: the folder {root} cannot be read: {error.strerror}") from None
    for read in (formats.read_cifar, formats.read_idx_folder):
        data = read(root)
        if data is not None:
            return data
    return _index_directory(root, entries, strict, progress)


def has_test_part(found: ImageData | ImageIndex[Any]) -> bool:
    """Whether what find_images gave has a part to measure on, so that none is held out."""
    return isinstance(found, ImageData) or len(found.parts) > 1


def _named_shards(path: str) -> list[Path]:
    """The shards that a path which ends in .tar names, braces as in "train-{000..009}.tar" expanded; else none."""
    if not path.endswith(".tar") or Path(path).is_dir():
        return []
    if "://" in path or path.startswith("pipe:"):
        raise ValueError(f"data: expected shards in the file system, got {path!r}")
    names = [path]
    if "{" in path:
        from braceexpand import braceexpand

        try:
            names = list(braceexpand(path))
        except ValueError:
            raise ValueError(
                f"data: expected a brace for every other one in the names of shards, got {path!r}"
            ) from None
    for name in names:
        if not Path(name).is_file():
            raise FileNotFoundError(f"data: expected the shard {name}, which does not exist")
    folders = sorted({str(Path(name).parent) for name in names})
    if len(folders) > 1:
        raise ValueError(f"data: shards must lie in one folder, got {folders[0]} and {folders[1]}")
    shards = [Path(name) for name in names]
    if len(set(shards)) < len(shards):
        double = next(shard for shard in shards if shards.count(shard) > 1)
        raise ValueError(f"data: shards must differ, got {double} twice in {path!r}")
    return shards


def _index_directory(
    root: Path, entries: list[Path], strict: bool, progress: Callable[[Any], Any]
) -> ImageIndex[ImageList]:
    from csg_ext.data.decode import EXTENSIONS
    from csg_ext.data.folder import index_folder
    from csg_ext.data.index import subfolders
    from csg_ext.data.shards import find_shards, index_shards

    shards = find_shards(root)
    if shards:
        return index_shards(root, shards, strict=strict, progress=progress)
    if subfolders(root):
        return index_folder(root)
    holds = "none of them" if entries else "nothing"
    if any(file.suffix.lower() in EXTENSIONS for file in entries):
        holds = "images but no folders: every class needs a folder of its own"
    raise ValueError(
        f"data: expected an image folder, shards, torchvision's layout of CIFAR or MNIST, or IDX files, got {root}, "
        f"which holds {holds}"
    )
