"""Image folders: train/ with val/ or test/, or one folder per class; and decoding an index into memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from csg_ext._text import name_list, reason
from csg_ext.data import decode
from csg_ext.data.images import ImageData
from csg_ext.data.index import PARTS, ImageIndex, ImageList, hidden, holds_run, part_folders, subfolders

KEPT_SIZE = 64  # images up to this side are used as they are when they all share one size
DEFAULT_SIZE = 32
_GIB = 2**30


def _is_image_file(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is to be read. A link that leads nowhere is: it does not decode, and so is named."""
    if os.path.splitext(entry.name)[1].lower() not in decode.EXTENSIONS:
        return False
    return (entry.is_symlink() and not os.path.exists(entry.path)) or entry.is_file()


def _image_files(folder: Path, below: str) -> list[str]:
    """Paths of the image files in a folder and its subfolders, each after `below`; follows no links to folders."""
    found: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if hidden(entry.name):
                continue
            if entry.is_dir(follow_symlinks=False):
                found += _image_files(Path(entry.path), f"{below}{entry.name}/")
            elif _is_image_file(entry):
                found.append(below + entry.name)
    return found


def _class_folders(root: Path, skip: Callable[[Path], None]) -> dict[str, list[str]]:
    """The image files of every subfolder of root, sorted, as paths below root; `skip` hears of folders of results."""
    found = {}
    for folder in subfolders(root):
        if holds_run(folder):
            skip(folder)
        else:
            found[folder.name] = sorted(_image_files(folder, f"{folder.name}/"), key=lambda path: path.split("/"))
    return found


def index_folder(root: Path) -> ImageIndex[ImageList]:
    """The parts of an image folder; "train" alone where the folders of the classes lie in root itself."""
    folders = part_folders(root)
    if folders.keys() == {"train"}:
        raise FileNotFoundError(
            f"data: expected {root / 'val'} or {root / 'test'} beside {folders['train']}, got neither"
        )
    if folders and "train" not in folders:
        raise ValueError(
            f"data: expected train/ with val/ or test/ in {root}, or folders of classes with other names than the "
            f"parts' ({', '.join(PARTS)}), got {name_list(f'{folder.name}/' for folder in subfolders(root))}"
        )
    beside = [folder for folder in subfolders(root) if folders and folder not in folders.values()]
    folders = folders or {"train": root}
    results: list[Path] = []
    found = {part: _class_folders(folder, results.append) for part, folder in folders.items()}
    classes = sorted(found["train"])
    if not any(found["train"].values()):
        raise ValueError(
            f"data: expected folders of images ({', '.join(sorted(decode.EXTENSIONS))}) in {root}, got no image"
        )
    mixed = [folder for folder in beside if folder.name in found["train"]]
    if mixed:
        raise ValueError(f"data: expected the folders of the classes in {folders['train']} alone, got {mixed[0]}, too")
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
    skipped = [f"{folder.relative_to(root).as_posix()}: results of csg-ext train, no class" for folder in results]
    return ImageIndex(root.name, root, parts, classes, skipped)


class _Failures:
    """Names what does not decode, or raises where that is an error."""

    def __init__(self, index: ImageIndex[ImageList], strict: bool) -> None:
        self.root, self.strict = index.root, strict
        self.lines: list[str] = []

    def add(self, images: ImageList, position: int, error: Exception) -> None:
        line = f"{_name(images, position, self.root)}: {reason(error)}"
        if self.strict:
            raise ValueError(f"data: with strict every image must decode, got {line}") from None
        self.lines.append(line)


def _name(images: ImageList, position: int, root: Path) -> str:
    name = images.name(position)
    return name if images.root == root else f"{os.path.relpath(images.root, root)}/{name}"


def _check_memory(count: int, channels: int, height: int, width: int, limit: float) -> None:
    need = count * channels * height * width / _GIB
    if not need <= limit:
        raise ValueError(
            f"data: {count} images of {channels} x {height} x {width} take {need:.1f} GiB in memory, more than the "
            f"memory_limit of {limit:g} GiB; a smaller image_size or fewer classes take less, and "
            "csg_ext.data.image_loader streams them"
        )


def _common_format(
    parts: dict[str, ImageList], image_size: int | None, channels: int | None, failures: _Failures
) -> tuple[int, int, int, bool, dict[str, list[int]]]:
    """(channels, height, width, whether images are fitted to it, the positions to decode), from the images' headers."""
    all_grey, sizes = True, set()
    positions: dict[str, list[int]] = {part: [] for part in parts}
    for part, images in parts.items():
        for position in range(len(images)):
            try:
                grey, size = images.header(position)
            except Exception as error:  # Pillow raises many types for a damaged file
                failures.add(images, position, error)
            else:
                all_grey &= grey
                sizes.add(size)
                positions[part].append(position)
    if channels is None:
        channels = 1 if all_grey else 3
    if image_size is None and len(sizes) == 1 and max(next(iter(sizes))) <= KEPT_SIZE:
        width, height = next(iter(sizes))
        return channels, height, width, False, positions
    side = image_size or DEFAULT_SIZE
    return channels, side, side, True, positions


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
    parts: dict[str, ImageList] = {
        "train": index.parts["train"],
        "test": index.parts["val" if "val" in index.parts else "test"],
    }
    count = sum(map(len, parts.values()))
    if image_size is not None:  # before the headers of a set that is far too large are read
        _check_memory(count, channels or 1, image_size, image_size, memory_limit)
    failures = _Failures(index, strict)
    channels, height, width, fitted, positions = _common_format(parts, image_size, channels, failures)
    _check_memory(sum(map(len, positions.values())), channels, height, width, memory_limit)

    pixels = {part: np.empty((len(todo), channels, height, width), np.uint8) for part, todo in positions.items()}
    kept: dict[str, list[int]] = {part: [] for part in parts}
    for part, position in progress([(part, position) for part, todo in positions.items() for position in todo]):
        try:
            image = parts[part].image(position, channels)
            pixels[part][len(kept[part])] = decode.to_array(decode.fit(image, width) if fitted else image)
        except Exception as error:
            failures.add(parts[part], position, error)
        else:
            kept[part].append(position)
    labels = {part: images.labels[kept[part]] for part, images in parts.items()}
    for part, images in parts.items():
        counts = np.bincount(labels[part], minlength=len(index.classes))
        if counts.min() == 0:
            raise ValueError(
                f"data: no image of class {index.classes[int(counts.argmin())]!r} in {images.root} decodes, "
                f"the first failure is: {failures.lines[0]}"
            )
    return ImageData(
        index.name,
        pixels["train"][: len(kept["train"])],
        labels["train"],
        pixels["test"][: len(kept["test"])],
        labels["test"],
        index.classes,
        index.skipped + failures.lines,
        *([_name(images, position, index.root) for position in kept[part]] for part, images in parts.items()),
    )
