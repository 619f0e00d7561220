"""Where the images of a set lie, without their pixels: what image folders and shards have in common."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from csg_ext.data import decode, select

# What the names of folders and shards say, in upper or lower case; "val" is measured on where there is "test", too.
PARTS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}

Positions = NDArray[np.int64] | NDArray[np.bool_]


def hidden(name: str) -> bool:
    """Whether a file or folder holds none of the user's images: caches and macOS's metadata, often copies of them."""
    return name.startswith(".") or name == "__MACOSX"


def subfolders(root: Path) -> list[Path]:
    """The folders in root that are not hidden, sorted."""
    return [entry for entry in sorted(root.iterdir()) if entry.is_dir() and not hidden(entry.name)]


def holds_run(folder: Path) -> bool:
    """Whether csg-ext train wrote into a folder or one directly below it: the pictures there are its results."""
    return (folder / "run.json").is_file() or any(folder.glob("*/run.json"))


def part_folders(root: Path) -> dict[str, Path]:
    """The folders in root that are named after a part, by part; ValueError where two are named after the same."""
    found: dict[str, Path] = {}
    for folder in subfolders(root):
        part = PARTS.get(folder.name.lower())
        if part in found:
            raise ValueError(
                f"data: expected one folder of the {part} part in {root}, got {found[part].name}/ and {folder.name}/"
            )
        if part is not None:
            found[part] = folder
    return found


@dataclass
class ImageList:
    """References to N encoded images: files below `root`, or members of the shards there.

    names: (N,) bytes. A file's path below root; a member's name. labels: int64 (N,).
    shards: paths of the shards below root, none for files; shard, offset, size: (N,) which shard, and the bytes in it.
    """

    root: Path
    names: NDArray[np.bytes_]
    labels: NDArray[np.int64]
    shards: list[str] = field(default_factory=list)
    shard: NDArray[np.int32] | None = None
    offset: NDArray[np.int64] | None = None
    size: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, positions: Positions, labels: NDArray[np.int64] | None = None) -> ImageList:
        """The images at these positions (or of this mask), with other labels where given."""

        def chosen(array: Any) -> Any:
            return None if array is None else array[positions]

        return replace(
            self,
            names=chosen(self.names),
            labels=chosen(self.labels) if labels is None else labels,
            shard=chosen(self.shard),
            offset=chosen(self.offset),
            size=chosen(self.size),
        )

    def hashes(self, seed: int) -> NDArray[np.uint64]:
        """See select.hashes."""
        return select.hashes(self.names, seed)

    def name(self, position: int) -> str:
        """What a message calls the image."""
        name = os.fsdecode(self.names[position])
        return name if self.shard is None else f"{self.shards[self.shard[position]]}: {name}"

    def _file(self, position: int) -> Path | BinaryIO:
        if self.shard is None or self.offset is None or self.size is None:
            return self.root / os.fsdecode(self.names[position])
        size = int(self.size[position])
        with open(self.root / self.shards[self.shard[position]], "rb", buffering=0) as file:
            file.seek(int(self.offset[position]))
            content = file.read(size)
        if len(content) != size:
            raise ValueError(f"expected {size} bytes in the shard, got {len(content)}")
        return io.BytesIO(content)

    def header(self, position: int) -> tuple[bool, tuple[int, int]]:
        """Whether the image is grey, and (width, height), without decoding."""
        with decode.open_image(self._file(position)) as image:
            return decode.is_grey(image), image.size

    def image(self, position: int, channels: int) -> Image.Image:
        """The decoded image; raises many types for a damaged one."""
        return decode.decode(self._file(position), channels)


@dataclass
class ArrayList:
    """N images of a packed set, already decoded: pixels[positions], uint8 (., channels, H, W)."""

    part: str
    pixels: NDArray[np.uint8]
    positions: NDArray[np.int64]
    labels: NDArray[np.int64]
    shard: None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, positions: Positions, labels: NDArray[np.int64] | None = None) -> ArrayList:
        """As ImageList.take."""
        labels = self.labels[positions] if labels is None else labels
        return replace(self, positions=self.positions[positions], labels=labels)

    def hashes(self, seed: int) -> NDArray[np.uint64]:
        """See select.hashes; an image's position in its file is its name."""
        return select.hashes((str(position).encode() for position in self.positions), seed)

    def name(self, position: int) -> str:
        """What a message calls the image."""
        return f"{self.part} image {self.positions[position]}"

    def image(self, position: int, channels: int) -> Image.Image:
        """The image in mode "L" (channels 1) or "RGB" (3)."""
        pixels = self.pixels[self.positions[position]]
        image = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
        return image.convert("RGB" if channels == 3 else "L")


Images = TypeVar("Images", ImageList, ArrayList)


@dataclass
class ImageIndex(Generic[Images]):
    """A set: parts has "train" and, where the set has them, "val" and "test"; `skipped` names what cannot be used."""

    name: str
    root: Path
    parts: dict[str, Images]
    classes: list[str]
    skipped: list[str] = field(default_factory=list)

    def check(self) -> ImageIndex[Images]:
        """This set, after a check that every class has an image in every part.

        Raises ValueError that names the first empty class.
        """
        for part, images in self.parts.items():
            counts = np.bincount(images.labels, minlength=len(self.classes))
            if counts.min() == 0:
                empty = self.classes[int(counts.argmin())]
                raise ValueError(
                    f"data: expected at least one image of every class in the {part} part of {self.root}, "
                    f"got none in class {empty!r}"
                )
        return self

    def subset(self, classes: Sequence[str] | None) -> ImageIndex[Images]:
        """The set with these classes alone, labelled in this order; all of them for None."""
        if classes is None:
            return self
        parts = {
            part: images.take(*select.class_subset(images.labels, self.classes, classes))
            for part, images in self.parts.items()
        }
        return replace(self, parts=parts, classes=list(classes))

    def split(self, part: str, share: float, seed: int) -> ImageIndex[Images]:
        """The set with `share` of every class of its train part as the part `part`."""
        select.check_share(f"{part}_share", share)
        train = self.parts["train"]
        mask = select.held_out(train.labels, train.hashes(seed), share)
        return replace(self, parts=self.parts | {"train": train.take(~mask), part: train.take(mask)})

    def imbalanced(self, ratio: float | None, seed: int) -> ImageIndex[Images]:
        """The set with a long-tailed train part (see select.long_tail); unchanged for None."""
        if ratio is None:
            return self
        train = self.parts["train"]
        kept = select.long_tail(train.labels, self.classes, ratio, train.hashes(seed))
        return replace(self, parts=self.parts | {"train": train.take(kept)})
