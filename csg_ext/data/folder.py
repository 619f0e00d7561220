"""Image folders: train/ with val/ or test/, or one folder per class; and decoding an index into memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from csg_ext.data import decode
from csg_ext.data.images import ImageData
from csg_ext.data.index import PARTS, ImageIndex, ImageList

KEPT_SIZE = 64  # images up to this side are used as they are when they all share one size
DEFAULT_SIZE = 32
_GIB = 2**30


def _image_files(folder: Path, below: str) -> list[str]:
    """Paths of the image files in a folder and its subfolders, each after `below`; follows no links to folders."""
    found: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                found += _image_files(Path(entry.path), f"{below}{entry.name}/")
            elif os.path.splitext(entry.name)[1].lower() in decode.EXTENSIONS and entry.is_file():
                found.append(below + entry.name)
    return found


def _class_folders(root: Path) -> dict[str, list[str]]:
    """The image files of every subfolder of root, sorted, as paths below root."""
    return {
        folder.name: sorted(_image_files(folder, f"{folder.name}/"), key=lambda path: path.split("/"))
        for folder in sorted(root.iterdir())
        if folder.is_dir() and not folder.name.startswith(".")
    }


def index_folder(root: Path) -> ImageIndex[ImageList]:
    """The parts of an image folder; "train" alone where the folders of the classes lie in root itself."""
    folders = {"train": root}
    if (root / "train").is_dir():
        folders = {part: root / name for name, part in reversed(PARTS.items()) if (root / name).is_dir()}
        if len(folders) == 1:
            raise FileNotFoundError(
                f"data: expected {root / 'val'} or {root / 'test'} beside {root / 'train'}, got neither"
            )
    found = {part: _class_folders(folder) for part, folder in folders.items()}
    classes = sorted(found["train"])
    if not any(found["train"].values()):
        raise ValueError(
            f"data: expected folders of images ({', '.join(sorted(decode.EXTENSIONS))}) in {root}, got no image"
        )
    parts = {}
    for part, files in found.items():
        unknown = sorted(files.keys() - found["train"].keys())
        if unknown:
            raise ValueError(
                f"data: every class of {folders[part]} must be in {folders['train']}, got {unknown[0]!r} only there"
            )
        names = [os.fsencode(path) for name in classes for path in files.get(name, [])]
        counts = [len(files.get(name, [])) for name in classes]
        parts[part] = ImageList(
            folders[part], np.array(names, np.bytes_), np.repeat(np.arange(len(classes), dtype=np.int64), counts)
        )
    return ImageIndex(root.name, root, parts, classes)


def read_into_memory(
    index: ImageIndex[ImageList],
    *,
    image_size: int | None,
    channels: int | None,
    strict: bool,
    progress: Callable[[Any], Any],
    memory_limit: float,
) -> ImageData:
    """Decodes the train part and the part that is measured on; see load_images."""
    test = "val" if "val" in index.parts else "test"
    parts: dict[str, ImageList] = {"train": index.parts["train"], "test": index.parts[test]}
    skipped = list(index.skipped)

    def skip(images: ImageList, position: int, error: Exception) -> None:
        name = images.name(position)
        if images.root != index.root:
            name = f"{os.path.relpath(images.root, index.root)}/{name}"
        line = f"{name}: {decode.reason(error)}"
        if strict:
            raise ValueError(f"data: with strict every image must decode, got {line}") from None
        skipped.append(line)

    todo: list[tuple[str, int]] = []
    modes, sizes = set(), set()
    for part, images in parts.items():
        for position in range(len(images)):
            try:
                mode, size = images.header(position)
            except Exception as error:  # Pillow raises many types for a damaged file
                skip(images, position, error)
            else:
                modes.add(mode)
                sizes.add(size)
                todo.append((part, position))
    if channels is None:
        channels = 1 if all(map(decode.is_grey, modes)) else 3
    if image_size is None and (len(sizes) != 1 or max(next(iter(sizes))) > KEPT_SIZE):
        image_size = DEFAULT_SIZE
    width, height = (image_size, image_size) if image_size is not None else next(iter(sizes))
    need = len(todo) * channels * height * width / _GIB
    if need > memory_limit:
        raise ValueError(
            f"data: {len(todo)} images of {channels} x {height} x {width} take {need:.1f} GiB in memory, more than the "
            f"memory_limit of {memory_limit:g} GiB; a smaller image_size or fewer classes take less, and "
            "csg_ext.data.image_loader streams them"
        )

    pixels: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    labels: dict[str, list[int]] = {"train": [], "test": []}
    for part, position in progress(todo):
        images = parts[part]
        try:
            image = images.image(position, channels)
        except Exception as error:
            skip(images, position, error)
        else:
            pixels[part].append(decode.to_array(image if image_size is None else decode.fit(image, image_size)))
            labels[part].append(int(images.labels[position]))
    for part, images in parts.items():
        for label in range(len(index.classes)):
            if label not in labels[part]:
                raise ValueError(
                    f"data: no image of class {index.classes[label]!r} in {images.root} decodes, "
                    f"the first failure is: {skipped[0]}"
                )
    return ImageData(
        index.name,
        np.stack(pixels["train"]),
        np.asarray(labels["train"], np.int64),
        np.stack(pixels["test"]),
        np.asarray(labels["test"], np.int64),
        index.classes,
        skipped,
    )
