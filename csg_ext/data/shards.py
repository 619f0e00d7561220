"""WebDataset shards: tar files whose members share a key, as in 000123.jpg with 000123.cls or 000123.json.

The headers are read once, which finds damaged and hostile shards before any training; pixels are read where they lie.
Nothing is extracted to the disk.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from csg_ext._text import name_list, reason
from csg_ext.data import decode
from csg_ext.data.index import PARTS, ImageIndex, ImageList, hidden, holds_run, part_folders, subfolders

CLASSES = "classes.json"
_LABELS = ("cls", "json")
_LABEL_BYTES = 2**20
_IMAGE_BYTES = 2**28
_BLOCK = tarfile.BLOCKSIZE
_KINDS = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}
_PART = re.compile(rf"(?:^|[-_.])({'|'.join(PARTS)})(?=[-_.\d]|$)", re.IGNORECASE)
_DIGITS = re.compile(r"\d{1,9}")

Label = int | str


def _check_member(shard: Path, member: tarfile.TarInfo) -> None:
    """Raises ValueError for a member that no set of images needs."""
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{shard}: members must lie below the shard, got the path {member.name!r}")
    if member.size < 0:
        raise ValueError(f"{shard}: members must have a size of at least 0, got {member.size} for {member.name!r}")
    if not (member.isreg() or member.isdir()) or member.issparse():
        kind = _KINDS.get(member.type, f"of the type {member.type!r}")
        raise ValueError(f"{shard}: members must be regular files, got {member.name!r}, which is {kind}")


def _label_content(shard: Path, file: BinaryIO, member: tarfile.TarInfo) -> bytes | None:
    """What a member holds that may be a label; None for any other."""
    if not member.name.lower().endswith(tuple(f".{suffix}" for suffix in _LABELS)):
        return None
    if member.size > _LABEL_BYTES:
        raise ValueError(
            f"{shard}: a label must take at most {_LABEL_BYTES} bytes, got {member.size} in {member.name!r}"
        )
    file.seek(member.offset_data)
    return file.read(member.size)


def _members(shard: Path, below: str, skip: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """The regular files of a shard as webdataset groups them; `skip` hears where the shard ends too early.

    "data" is (name, offset, size, content), the content None unless it may be a label.
    """
    done = ""
    with shard.open("rb") as file:
        end = os.fstat(file.fileno()).st_size
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                while (member := archive.next()) is not None:
                    _check_member(shard, member)
                    if member.offset_data + member.size > end:
                        skip(f"{below}: truncated in {member.name!r}")
                        return
                    if member.isreg():
                        content = _label_content(shard, file, member)
                        found = (member.name, member.offset_data, member.size, content)
                        yield {"fname": member.name, "data": found, "__url__": below}
                    done = repr(member.name)
                file.seek(archive.offset)
        except tarfile.TarError as error:
            what = f"truncated or damaged after {done}" if done else "no tar file"
            skip(f"{below}: {what}: {reason(error)}")
            return
        # tarfile takes a damaged or incomplete header for the end.
        if file.read(_BLOCK) != bytes(_BLOCK):
            skip(f"{below}: truncated or damaged after {done or 'its beginning'}: there is no end-of-archive marker")


def _text(sample: dict[str, Any], suffix: str) -> str:
    return sample[suffix][3].decode("utf-8-sig", "replace").strip()


def _label(sample: dict[str, Any], suffix: str) -> Label:
    """The class number or name in a sample's .cls, or in its .json: a number, a name, or an object with "label"."""
    text = _text(sample, suffix)
    value: Any = text
    if suffix == "json":
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            raise ValueError(f"expected JSON in {sample[suffix][0]!r}, got {text[:40]!r}") from None
        if isinstance(value, dict):
            value = value.get("label")
    elif _DIGITS.fullmatch(text):
        value = int(text)
    named = isinstance(value, str) and value != ""
    if not named and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise ValueError(f"expected a class number or name in {sample[suffix][0]!r}, got {text[:40]!r}")
    return value


def _class_names(folders: set[Path]) -> list[str] | None:
    """The names in classes.json in one of the folders, in the order of the class numbers; None where there is none."""
    path = next((folder / CLASSES for folder in sorted(folders) if (folder / CLASSES).is_file()), None)
    if path is None:
        return None
    try:
        names = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, got: {error}") from None
    if isinstance(names, dict):
        numbered = {number: name for name, number in names.items() if isinstance(number, int)}
        names = [numbered.get(number) for number in range(len(names))]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
        raise ValueError(
            f"{path}: expected a list of class names that differ, or an object that numbers the names from 0 on, "
            f"got {str(names)[:60]}"
        )
    return names


class _Reader:
    """Collects the samples of the shards below root; `skipped` names what cannot be used.

    classes: the names in classes.json, if there is one.
    """

    def __init__(self, root: Path, strict: bool, classes: list[str] | None) -> None:
        self.root, self.strict, self.classes = root, strict, classes or []
        self.positions = {name: position for position, name in enumerate(self.classes)}
        self.skipped: list[str] = []

    def skip(self, line: str) -> None:
        if self.strict:
            raise ValueError(f"with strict every shard and image must be whole, got {line}")
        self.skipped.append(line)

    def _check_digits(self, where: str, sample: dict[str, Any]) -> None:
        """Raises ValueError for digits in a .cls that are the number of one class and the name of another."""
        text = _text(sample, "cls") if "cls" in sample else ""
        named = self.positions.get(text)
        if named is not None and _DIGITS.fullmatch(text) and int(text) != named and int(text) < len(self.classes):
            raise ValueError(
                f"{where}: expected a label that means one class in {sample['cls'][0]!r}, got {text!r}, which is the "
                f"number of class {self.classes[int(text)]!r} and the name of class number {named} in {CLASSES}"
            )

    def _check_agreement(self, where: str, sample: dict[str, Any]) -> None:
        """Raises ValueError for a .cls and a .json that name two classes; a .json may also hold something else."""
        try:
            labels = [_label(sample, suffix) for suffix in _LABELS]
        except ValueError:
            return
        if isinstance(labels[0], int) != isinstance(labels[1], int):  # a number and a name: comparable by classes.json
            numbers = [label if isinstance(label, int) else self.positions.get(label) for label in labels]
            if None in numbers or numbers[0] == numbers[1]:
                return
        if labels[0] != labels[1]:
            raise ValueError(
                f"{where}: expected one label in .cls and .json, got {labels[0]!r:.100} and {labels[1]!r:.100}"
            )

    def _sample(self, shard: str, sample: dict[str, Any], keys: set[str]) -> tuple[bytes, Label, int, int] | None:
        """(name, label, offset, size) of a sample that can be used; `keys`: of the shard's images so far."""
        images = [suffix for suffix in sample if f".{suffix.rpartition('.')[2]}" in decode.EXTENSIONS]
        where = f"{shard}: {sample['__key__']}"
        if len(images) > 1:
            raise ValueError(
                f"{where}: expected one image per key, which ends at the first dot, got {name_list(images)}"
            )
        if not images:
            if any(suffix in sample for suffix in _LABELS):
                self.skip(f"{where}: a label without an image")
            return None
        if sample["__key__"] in keys:
            raise ValueError(f"{where}: expected one image per key, got a second one in {sample[images[0]][0]!r}")
        keys.add(sample["__key__"])
        name, offset, size, _ = sample[images[0]]
        if size > _IMAGE_BYTES:
            self.skip(f"{shard}: {name}: {size} bytes exceed the {_IMAGE_BYTES} that an image may take")
            return None
        labels = [suffix for suffix in _LABELS if suffix in sample]
        if not labels:
            self.skip(f"{shard}: {name}: expected a .cls or .json with the label beside the image, got neither")
            return None
        self._check_digits(where, sample)
        if len(labels) > 1:
            self._check_agreement(where, sample)
        try:
            return os.fsencode(name), _label(sample, labels[0]), offset, size
        except ValueError as error:
            self.skip(f"{shard}: {name}: {error}")
            return None

    def samples(self, shard: Path) -> Iterator[tuple[bytes, Label, int, int]]:
        """(name, label, offset, size) of every image of a shard."""
        from webdataset.tariterators import group_by_keys

        below = shard.relative_to(self.root).as_posix()

        def refuse(error: Exception) -> bool:  # what webdataset raises for a member whose name it has just seen
            name = str(error.args[0]).partition(": duplicate")[0]
            raise ValueError(f"{below}: expected one member per key and extension, got a second {name!r}") from None

        keys: set[str] = set()
        try:
            for sample in group_by_keys(_members(shard, below, self.skip), handler=refuse):
                row = self._sample(below, sample, keys)
                if row is not None:
                    yield row
        except OSError as error:
            raise OSError(f"data: {shard} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise ValueError(f"data: {error.args[0]}") from None

    def part(self, shards: list[Path], progress: Callable[[Any], Any]) -> tuple[ImageList, list[Label]]:
        """The images of these shards, unlabelled, and their labels."""
        rows = [(index, *sample) for index, shard in enumerate(progress(shards)) for sample in self.samples(shard)]
        images = ImageList(
            self.root,
            np.array([row[1] for row in rows], np.bytes_),
            np.zeros(len(rows), np.int64),
            [shard.relative_to(self.root).as_posix() for shard in shards],
            np.array([row[0] for row in rows], np.int32),
            np.array([row[3] for row in rows], np.int64),
            np.array([row[4] for row in rows], np.int64),
        )
        return images, [row[2] for row in rows]


def _numbered(images: ImageList, found: list[Label], classes: list[str], numbers: dict[Label, int]) -> ImageList:
    """The images with their labels as positions among the classes."""
    for position, label in enumerate(found):
        if label not in numbers:
            alike = [str(key) for key in numbers if isinstance(key, type(label))] or classes
            known = ", ".join(alike[:10]) + (", ..." if len(alike) > 10 else "")
            raise ValueError(f"data: {images.name(position)}: expected a label among {known:.300}, got {label!r:.100}")
    return images.take(np.arange(len(images)), np.array([numbers[label] for label in found], np.int64))


def _shards(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.tar") if not hidden(path.name))


def _first_image(folder: Path) -> Path | None:
    found = (p for p in sorted(folder.glob("*")) if p.suffix.lower() in decode.EXTENSIONS and not hidden(p.name))
    return next(found, None)


def find_shards(root: Path) -> dict[str, list[Path]]:
    """The shards of every part below root, sorted; "train" alone where their names say no part; none: no shards.

    train/*.tar with val/*.tar or test/*.tar, or *.tar whose names hold the part, as in train-000000.tar.
    """
    folders = part_folders(root)
    parts = {part: shards for part, folder in folders.items() if (shards := _shards(folder))}
    if "train" in parts:
        return parts
    if "train" in folders:  # a folder of images, perhaps beside the archive that it came in
        return {}
    shards = _shards(root)
    folders_of_images = [folder for folder in subfolders(root) if not holds_run(folder)] if shards else []
    image = next(filter(None, map(_first_image, folders_of_images)), None)
    if image:
        raise ValueError(f"data: expected shards or folders of images, got {shards[0]} and {image}; name the shards")
    return parts_by_name(shards)


def parts_by_name(shards: list[Path]) -> dict[str, list[Path]]:
    """Shards by the part that their names hold; all of them "train" where no name holds one."""
    parts: dict[str, list[Path]] = {}
    for shard in shards:
        match = _PART.search(shard.stem)
        parts.setdefault(PARTS[match[1].lower()] if match else "", []).append(shard)
    if "" in parts and len(parts) > 1:
        raise ValueError(
            f"data: expected train, val or test in the name of every shard or of none, got {parts[''][0].name} "
            f"beside {next(shards for part, shards in parts.items() if part)[0].name}"
        )
    return {"train": parts[""]} if "" in parts else parts


def index_shards(
    root: Path,
    parts: dict[str, list[Path]],
    *,
    strict: bool = False,
    progress: Callable[[Any], Any] = iter,
) -> ImageIndex[ImageList]:
    """Reads the headers and labels of all shards, which lie below root.

    Raises ModuleNotFoundError without the webdataset library, ValueError for a hostile member, OSError.
    """
    if "train" not in parts:
        raise ValueError(f"data: expected shards of the train part in {root}, got {', '.join(parts)} alone")
    classes = _class_names({root, parts["train"][0].parent})
    reader = _Reader(root, strict, classes)
    read = {part: reader.part(shards, progress) for part, shards in parts.items()}
    labels = read["train"][1]
    if not labels:
        failure = f"; the first failure is: {reader.skipped[0]}" if reader.skipped else ""
        raise ValueError(f"data: expected labelled images in the train shards of {root}, got none{failure}")
    if classes is None:
        if len({type(label) for label in labels}) > 1:
            raise ValueError(f"data: without {CLASSES} in {root} labels must be all numbers or all names, got both")
        values = sorted(set(labels))
        classes = [str(value) for value in values]
        numbers: dict[Label, int] = {value: position for position, value in enumerate(values)}
    else:
        numbers = {key: position for position, name in enumerate(classes) for key in (position, name)}
    numbered = {part: _numbered(images, labels, classes, numbers) for part, (images, labels) in read.items()}
    return ImageIndex(root.name, root, numbered, classes, reader.skipped)
