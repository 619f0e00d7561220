"""The sets of the reproduction study that are made from the embedded images: scenes, many classes, shared items."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from csg_ext.data import ImageData

ROOT = Path(__file__).resolve().parents[2]


def scenes(folder: Path) -> Path:
    """The set of csg_ext.analysis.scenes, made where it is not there; needs scikit-image."""
    path = folder / "scenes.npz"
    if not path.exists():
        command = [sys.executable, "-m", "csg_ext.analysis.scenes", str(path), "--seed", "0"]
        subprocess.run(command, cwd=ROOT, check=True)
    return path


def crowded(data: ImageData) -> ImageData:
    """More classes than the network has filters: images upright or upside down, positive or negative, whole or half.

    Eight variants of ten items are 80 classes. Which variant an image becomes is drawn at random, always the same.
    """
    import numpy as np

    from csg_ext.data import ImageData

    rng = np.random.default_rng(0)

    def varied(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        variant = rng.integers(8, size=len(labels))
        upside_down, negative, half = (variant >> bit & 1 == 1 for bit in range(3))
        channels, height, width = images.shape[1:]
        halves = images[half].reshape(-1, channels, height // 2, 2, width // 2, 2).mean((3, 5))
        top, left = height // 4, width // 4
        images = images.copy()
        images[half] = 0
        images[half, :, top : top + height // 2, left : left + width // 2] = halves.round()
        images[upside_down] = images[upside_down, :, ::-1]
        images[negative] = 255 - images[negative]
        return images, 8 * labels + variant

    train_images, train_labels = varied(data.train_images, data.train_labels)
    test_images, test_labels = varied(data.test_images, data.test_labels)
    names = [
        f"{item}, {way}, {tone}, {size}"
        for item in data.classes
        for size in ("whole", "half")
        for tone in ("positive", "negative")
        for way in ("upright", "upside down")
    ]
    return ImageData("crowded", train_images, train_labels, test_images, test_labels, names)


PAIRS = {  # the two items of every class, by the number of classes that an item is in
    1: [(item, item) for item in range(10)],
    2: [(item, (item + 1) % 10) for item in range(10)],
    4: list(itertools.combinations(range(5), 2)),
}


def filters_of_items(
    features: NDArray[np.float32], labels: NDArray[np.int64], mi: NDArray[np.float64], sharing: int
) -> float:
    """The share of filters that say more of an item than of a class, each in shares of the entropy of what it is about.

    features (N, K) and labels (N,) of a set of shared items; mi (K, C), with its classes.
    """
    import numpy as np

    from csg_ext import metrics

    items = np.array(PAIRS[sharing])[labels]
    seen = [(items == item).any(1).astype(np.int64) for item in np.unique(items)]
    of_items = [metrics.class_mutual_info(features, s)[:, 1] / metrics.class_entropy(s)[1] for s in seen]
    return float((np.max(of_items, axis=0) > (mi / metrics.class_entropy(labels)).max(1)).mean())


def shared(data: ImageData, sharing: int) -> ImageData:
    """Ten classes of scenes of two items, 40 x 40; every item is in `sharing` of the classes.

    With 1 a class is two images of one item, with 2 the classes are a ring of all ten items, with 4 all pairs of the
    first five. The items, 20 x 20, lie in two of the four quadrants. Which images and where is drawn at random, always
    the same; classes take turns.
    """
    import numpy as np
    import torch
    import torch.nn.functional as F

    from csg_ext.data import ImageData

    pairs, rng = PAIRS[sharing], np.random.default_rng(0)

    def composed(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        small = F.interpolate(torch.from_numpy(images).float(), size=20, mode="bilinear", antialias=True)
        items = small.round().clamp(0, 255).to(torch.uint8).numpy()
        members = [np.flatnonzero(labels == item) for item in range(10)]
        classes = np.arange(len(labels)) % len(pairs)
        out = np.zeros((len(labels), 1, 40, 40), np.uint8)
        for scene, c in zip(out, classes, strict=True):
            for item, quadrant in zip(pairs[c], rng.permutation(4), strict=False):
                top, left = 20 * (quadrant // 2), 20 * (quadrant % 2)
                scene[:, top : top + 20, left : left + 20] = items[rng.choice(members[item])]
        return out, classes

    train_images, train_labels = composed(data.train_images, data.train_labels)
    test_images, test_labels = composed(data.test_images, data.test_labels)
    names = [f"{data.classes[a]} + {data.classes[b]}" for a, b in pairs]
    return ImageData(f"shared-{sharing}", train_images, train_labels, test_images, test_labels, names)
