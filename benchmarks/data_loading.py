"""Images per second of csg_ext.data.image_loader beside a plain loop over the same files with Pillow, in turns.

    python benchmarks/data_loading.py [IMAGES] [ROUNDS]

Writes JPEG images of 500 x 375 into a temporary folder and into WebDataset shards, reads them once, and then measures
every way in turns. Prints the median over the rounds and its ratio to the plain loop's in the same round.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image, ImageOps

from csg_ext.data import image_loader

BATCH, SIZE = 32, 224
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def write(root: Path, count: int) -> tuple[Path, Path]:
    """The same images as a folder and as four shards."""
    generator = np.random.default_rng(0)
    folder, shards = root / "folder", root / "shards"
    shards.mkdir()
    writers = [webdataset.TarWriter(str(shards / f"{part}-{i}.tar")) for part in ("train", "val") for i in range(4)]
    for number in range(count):
        small = Image.fromarray(generator.integers(0, 256, (24, 32, 3), np.uint8))  # scaled up: as smooth as a photo
        for part in ("train", "val"):
            path = folder / part / str(number % 4) / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            if part == "train" or number < 4:
                small.resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)
                writer = writers[4 * (part == "val") + number % 4]
                writer.write({"__key__": f"{number:05d}", "jpg": path.read_bytes(), "cls": number % 4})
    for writer in writers:
        writer.close()
    return folder, shards


def plain(folder: Path) -> int:
    """One process: open, scale, crop, stack, normalise."""
    seen, batch = 0, []
    for path in sorted((folder / "train").rglob("*.jpg")):
        image = ImageOps.fit(Image.open(path).convert("RGB"), (SIZE, SIZE), Image.Resampling.BILINEAR)
        batch.append((torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - MEAN) / STD)
        if len(batch) == BATCH:
            seen += len(torch.stack(batch))
            batch = []
    return seen


def streamed(path: Path, workers: int) -> Callable[[], int]:
    loader = image_loader(path, batch_size=BATCH, image_size=SIZE, augment=False, num_workers=workers)
    return lambda: sum(len(y) for _, y in loader)


def main(count: int = 512, rounds: int = 7) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder, shards = write(Path(scratch), count)
        ways = {"plain loop with Pillow": lambda: plain(folder)}
        for workers in (0, 1, 2):
            ways[f"folder, num_workers={workers}"] = streamed(folder, workers)
            ways[f"shards, num_workers={workers}"] = streamed(shards, workers)
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(rounds + 1):
            for name, way in ways.items():
                begun = time.perf_counter()
                seen = way()
                if turn:  # the first starts the workers and fills the page cache
                    rates[name].append(seen / (time.perf_counter() - begun))
        base = rates["plain loop with Pillow"]
        for name, rate in rates.items():
            ratio = statistics.median(a / b for a, b in zip(rate, base, strict=True))
            print(f"{name:26} {statistics.median(rate):7.0f} images/s  {ratio:5.2f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
