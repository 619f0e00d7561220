"""Readers of packed data sets: our .npz, IDX files (the MNISTs) and torchvision's CIFAR batches."""

from __future__ import annotations

import gzip
import math
import pickle
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from csg_ext._text import name_list, reason
from csg_ext.data.images import ImageData

_IDX_DIMENSIONS = 4  # at most; sets of images have three
_CHUNK = 2**20
_MAX_CHANNELS = 4  # colour with alpha


def load_numpy(path: Path, only: Collection[str] | None = None, mmap: bool = False) -> Any:
    """The array of an .npy (mmap: left on the disk), or the arrays of an .npz by name; of those not in `only`, None.

    Nothing is unpickled. Raises OSError, or ValueError with the reason alone, for the caller's sentence.
    """
    try:
        loaded = np.load(path, mmap_mode="r" if mmap and path.suffix == ".npy" else None, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            if path.suffix == ".npz":
                raise ValueError("it is no archive of arrays")
            return loaded
        if path.suffix == ".npy":
            raise ValueError("it is an archive, not one array")
        with loaded as archive:
            found = {key: archive[key] if only is None or key in only else None for key in archive.files}
    except MemoryError:
        raise ValueError("its header asks for more memory than there is") from None
    except Exception as error:  # a damaged archive or header can raise almost anything
        if isinstance(error, OSError) and error.filename is not None:
            raise
        if "allow_pickle" in str(error):  # NumPy's own message recommends to execute what the file holds
            objects = str(error).startswith("Object arrays")  # else any file that is not NumPy's
            raise ValueError(
                "it holds pickled objects, which are never read" if objects else "it is no .npy or .npz file"
            ) from None
        raise ValueError(reason(error)) from None
    for key, array in found.items():
        if isinstance(array, bytes):  # a member without NumPy's header
            raise ValueError(f"{key!r} is no array")
    return found


def read_npz(path: Path, name: str | None = None) -> ImageData:
    """An .npz with train_images, train_labels, test_images, test_labels and classes; (N, H, W) means grey."""
    try:
        arrays = load_numpy(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected a readable .npz file, got one that fails with: {reason(error)}") from None
    missing = {"train_images", "train_labels", "test_images", "test_labels"} - arrays.keys()
    if missing:
        raise ValueError(f"{path}: expected the array {min(missing)}, got {name_list(arrays)}")
    for part in ("train", "test"):
        images = arrays[f"{part}_images"]
        # ImageData takes any number of channels: it would read a 28 x 28 colour image as 28 channels of 28 x 3.
        if images.ndim == 4 and 1 <= images.shape[3] <= _MAX_CHANNELS < images.shape[1]:
            raise ValueError(
                f"{path}: {part}_images must be (N, channels, H, W), got {images.shape}, which has the channels last"
            )
        arrays[f"{part}_images"] = images[:, None] if images.ndim == 3 else images
        labels = arrays[f"{part}_labels"]
        if labels.dtype.kind not in "iu" or labels.ndim != 1:
            raise ValueError(f"{path}: {part}_labels must be integers (N,), got {labels.dtype} {labels.shape}")
        arrays[f"{part}_labels"] = labels.astype(np.int64)
    labels = arrays["train_labels"]
    highest = int(labels.max(initial=0))
    if "classes" not in arrays and highest >= len(labels):  # not a name for each of them
        raise ValueError(
            f"{path}: train_labels must be numbers of classes that all have an image, got {highest} in {len(labels)}"
        )
    classes = arrays["classes"] if "classes" in arrays else np.arange(highest + 1)
    if classes.ndim != 1:
        raise ValueError(f"{path}: classes must be names (C,), got shape {classes.shape}")
    try:
        names = [c.decode() if isinstance(c, bytes) else str(c) for c in classes]
    except (SystemError, ValueError) as error:  # a code point beyond Unicode, or bytes that are not UTF-8
        raise ValueError(f"{path}: classes must be names, got others: {reason(error)}") from None
    return ImageData(
        name or path.stem,
        arrays["train_images"],
        arrays["train_labels"],
        arrays["test_images"],
        arrays["test_labels"],
        names,
    )


def read_idx(path: Path) -> np.ndarray:
    """An IDX file of unsigned bytes, gzipped or not, as an array; reads no more than its header announces."""
    body = bytearray()
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(4)
            sizes = file.read(4 * head[3]) if len(head) == 4 else b""
            if not sizes or head[:3] != b"\0\0\x08" or head[3] > _IDX_DIMENSIONS or len(sizes) < 4 * head[3]:
                got = head.hex() or "an empty file"
                raise ValueError(f"{path}: expected an IDX header of unsigned bytes, got {got}")
            shape = [int(n) for n in np.frombuffer(sizes, ">u4")]
            size = math.prod(shape)
            if math.prod(n or 1 for n in shape) >= 2**63:  # numpy has no such array, even without an element
                raise ValueError(f"{path}: expected fewer than 2^63 bytes, got the sizes {'x'.join(map(str, shape))}")
            while len(body) <= size and (chunk := file.read(_CHUNK)):
                body += chunk
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: expected a readable IDX file, got: {reason(error)}") from None
    if len(body) != size:
        got = str(len(body)) if len(body) < size else "more"
        raise ValueError(f"{path}: expected {'x'.join(map(str, shape))} bytes after the header, got {got}")
    return np.frombuffer(body, np.uint8).reshape(shape)


def _idx_file(folder: Path, stems: tuple[str, ...]) -> Path | None:
    for stem in stems:
        for name in (stem, f"{stem}.gz", stem.replace("-idx", ".idx"), stem.replace("-idx", ".idx") + ".gz"):
            if (folder / name).is_file():
                return folder / name
    return None


def read_idx_folder(root: Path) -> ImageData | None:
    """The four IDX files in root, root/raw or root/<name>/raw (torchvision); None when there are none."""
    folders = [
        f for f in (root, root / "raw", *sorted(root.glob("*/raw"))) if _idx_file(f, ("train-images-idx3-ubyte",))
    ]
    if not folders:
        return None
    if len(folders) > 1:
        raise ValueError(
            f"data: expected one data set, got several in {root}: {', '.join(str(f.parent.name) for f in folders)}; "
            "name one of these folders"
        )
    parts: dict[str, np.ndarray] = {}
    for part, prefixes in (("train", ("train",)), ("test", ("t10k", "test"))):
        for kind, dims in (("images", 3), ("labels", 1)):
            stems = tuple(f"{p}-{kind}-idx{dims}-ubyte" for p in prefixes)
            path = _idx_file(folders[0], stems)
            if path is None:
                raise FileNotFoundError(
                    f"data: expected {stems[0]} or {stems[0]}.gz in {folders[0]}, which has neither"
                )
            parts[f"{part}_{kind}"] = read_idx(path)
            if parts[f"{part}_{kind}"].ndim != dims:
                raise ValueError(f"{path}: expected {dims} dimensions, got {parts[f'{part}_{kind}'].ndim}")
    # EMNIST counts some of its classes from 1: labels become positions among those that occur.
    values = np.unique(np.concatenate([parts["train_labels"], parts["test_labels"]]))
    name = folders[0].parent.name if folders[0].name == "raw" else folders[0].name
    return ImageData(
        name,
        parts["train_images"][:, None],
        np.searchsorted(values, parts["train_labels"]),
        parts["test_images"][:, None],
        np.searchsorted(values, parts["test_labels"]),
        [str(v) for v in values],
    )


class _CifarUnpickler(pickle.Unpickler):
    """Rebuilds numpy arrays out of plain containers, and nothing else: a pickle can otherwise run any code."""

    ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy.core.numeric", "_frombuffer"),
        ("numpy._core.numeric", "_frombuffer"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR batch needs")
        return super().find_class(module, name)


def _unpickle(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = _CifarUnpickler(file, encoding="latin1").load()
    except OSError as error:
        raise OSError(f"{path}: cannot be read: {error.strerror}") from None
    except Exception as error:  # a damaged pickle can raise almost anything
        raise ValueError(f"{path}: expected a pickled CIFAR batch, got one that fails with: {reason(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a pickled dict, got {type(content).__name__}")
    return content


def _cifar_part(paths: list[Path], label_key: str) -> tuple[np.ndarray, np.ndarray]:
    images, labels = [], []
    for path in paths:
        batch = _unpickle(path)
        data, label = batch.get("data"), batch.get(label_key)
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
            raise ValueError(
                f"{path}: expected 'data' as uint8 (N, 3072), got {getattr(data, 'shape', type(data).__name__)}"
            )
        if not isinstance(label, list) or len(label) != len(data) or not all(type(v) is int for v in label):
            raise ValueError(
                f"{path}: expected {label_key!r} as a list of {len(data)} labels, got {type(label).__name__}"
            )
        if label and not 0 <= min(label) <= max(label) < 1000:
            raise ValueError(f"{path}: {label_key!r} must be class numbers, got {min(label)} to {max(label)}")
        images.append(data.reshape(-1, 3, 32, 32))
        labels.append(np.asarray(label, np.int64))
    return np.concatenate(images), np.concatenate(labels)


def read_cifar(root: Path) -> ImageData | None:
    """CIFAR-10 or CIFAR-100 in root or in torchvision's subfolder of it; None when there is neither."""
    found = []
    for name, subfolder, marker, train, test in (
        ("CIFAR-10", "cifar-10-batches-py", "batches.meta", [f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]),
        ("CIFAR-100", "cifar-100-python", "meta", ["train"], ["test"]),
    ):
        for folder in (root, root / subfolder):
            if (folder / marker).is_file() and any((folder / file).is_file() for file in train + test):
                found.append((name, folder, marker, train, test))
    if not found:
        return None
    if len(found) > 1:
        raise ValueError(
            f"data: expected one data set, got CIFAR-10 and CIFAR-100 in {root}; name one of the two folders"
        )
    name, folder, marker, train, test = found[0]
    ten = name == "CIFAR-10"
    for file in train + test:
        if not (folder / file).is_file():
            raise FileNotFoundError(f"data: expected the file {file} of {name} in {folder}, which has none")
    label_key = "labels" if ten else "fine_labels"
    classes = _unpickle(folder / marker).get("label_names" if ten else "fine_label_names")
    if not isinstance(classes, list):
        raise ValueError(f"{folder / marker}: expected the list of class names, got {type(classes).__name__}")
    train_images, train_labels = _cifar_part([folder / f for f in train], label_key)
    test_images, test_labels = _cifar_part([folder / f for f in test], label_key)
    return ImageData(name, train_images, train_labels, test_images, test_labels, [str(c) for c in classes])
