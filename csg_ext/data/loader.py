"""Batches of images that are decoded as they are needed: for sets that do not fit in memory, and for any training loop.

The order of an epoch, the augmentation and what a rank gets are functions of (seed, epoch) alone: the number of worker
processes changes nothing, and several ranks together see what one would.
"""

from __future__ import annotations

import math
import os
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from csg_ext._text import reason
from csg_ext.data import decode, select
from csg_ext.data.batches import derive_seed, normalise
from csg_ext.data.images import ImageData, channel_statistics, check_settings, find_images, with_channels
from csg_ext.data.index import ArrayList, ImageIndex, ImageList

SPLITS = ("train", "val", "test")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DEFAULT_SIZE = 224
SHUFFLE_BUFFER = 10_000
_CROP = 5  # random stream of the augmentation
_MIN_AREA, _MAX_ASPECT, _CROP_TRIALS = 0.08, 4 / 3, 10
_MAX_WORKERS = 4
_LUMA = (0.299, 0.587, 0.114)

Transform = Callable[[Image.Image], Tensor]
Batch = tuple[int, NDArray[np.int64]]


def random_crop(image: Image.Image, size: int, generator: np.random.Generator) -> Image.Image:
    """A crop of 8 to 100 % of the area and an aspect ratio of 3/4 to 4/3, scaled to size x size and mirrored at random.

    Source: Szegedy et al., Going deeper with convolutions, CVPR 2015, section 6. Where ten draws do not fit into the
    image, its centre is taken.
    """
    width, height = image.size
    mirrored = generator.random() < 0.5
    box = None
    for _ in range(_CROP_TRIALS):
        area = width * height * generator.uniform(_MIN_AREA, 1)
        aspect = math.exp(generator.uniform(-math.log(_MAX_ASPECT), math.log(_MAX_ASPECT)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 1 <= w <= width and 1 <= h <= height:
            left, top = generator.integers(width - w, endpoint=True), generator.integers(height - h, endpoint=True)
            box = (int(left), int(top), int(left) + w, int(top) + h)
            break
    if box is None:
        image = decode.fit(image, size)
    else:
        image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image


def _seeded(transform: Transform, image: Image.Image, seed: int) -> Tensor:
    """transform(image) with torch's and Python's generators seeded; the caller's states survive."""
    state = random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        try:
            return transform(image)
        finally:
            random.setstate(state)


class _Images(Dataset[tuple[Tensor, Tensor, list[str]]]):
    """dataset[epoch, positions] is a whole batch: (x, labels, a line for every image that does not decode)."""

    def __init__(
        self,
        images: ImageList | ArrayList,
        *,
        size: int | None,
        channels: int,
        mean: Sequence[float],
        std: Sequence[float],
        augment: bool,
        transform: Transform | None,
        seed: int,
    ) -> None:
        self.images, self.size, self.channels, self.mean, self.std = images, size, channels, mean, std
        self.augment, self.transform, self.seed = augment, transform, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, batch: Batch) -> tuple[Tensor, Tensor, list[str]]:
        epoch, positions = batch
        pixels: list[Any] = []
        kept, failed = [], []
        for position in positions.tolist():
            try:
                image = self.images.image(position, self.channels)
            except Exception as error:  # Pillow raises many types for a damaged file
                failed.append(f"{self.images.name(position)}: {reason(error)}")
                continue
            kept.append(position)
            seed = derive_seed(self.seed, _CROP, epoch, position)
            if self.transform is not None:
                pixels.append(_seeded(self.transform, image, seed))
                continue
            if self.augment:
                image = random_crop(image, self.size or min(image.size), np.random.default_rng(seed))
            elif self.size is not None and image.size != (self.size, self.size):
                image = decode.fit(image, self.size)
            pixels.append(decode.to_array(image))
        labels = torch.from_numpy(self.images.labels[kept])
        if not pixels:
            return torch.empty(0), labels, failed
        x = torch.stack(pixels) if self.transform is not None else normalise(np.stack(pixels), self.mean, self.std)
        return x, labels, failed


class _Order(DistributedSampler[Batch]):
    """The batches of one rank. A DistributedSampler in name, so that trainers leave it alone and call set_epoch.

    Every pass is the next epoch. A global batch holds world_size x batch_size images, of which each rank takes its
    share; the incomplete last one is left out or divided evenly.
    """

    def __init__(
        self,
        dataset: _Images,
        *,
        batch_size: int,
        shuffle: bool,
        buffer: int | None,
        drop_last: bool,
        seed: int,
        ranks: tuple[int, int] | None,
        part: str,
    ) -> None:
        rank, world_size = ranks or _process_group()
        super().__init__(dataset, world_size, rank, shuffle, seed, drop_last)
        self.count, self.shard, self.batch_size, self.buffer = len(dataset), dataset.images.shard, batch_size, buffer
        self.fixed, self.part = ranks is not None, part

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Every position once, in the order of an epoch for all ranks together."""
        if not self.shuffle:
            return np.arange(self.count)
        generator = np.random.default_rng([self.seed, epoch])
        if self.shard is None or self.buffer is None:
            return generator.permutation(self.count)
        # Shards in random order, and every image up to `buffer` places later: nearby reads, as of a shuffle buffer.
        shards = generator.permutation(int(self.shard.max()) + 1)[self.shard]
        delay = generator.uniform(0, self.buffer, self.count)
        return np.argsort(shards, kind="stable")[np.argsort(np.arange(self.count) + delay, kind="stable")]

    def _share(self, part: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.array_split(part, self.num_replicas)[self.rank]

    def __len__(self) -> int:
        if not self.fixed:  # a trainer makes the process group after the loaders
            self.rank, self.num_replicas = _process_group()
        full, rest = divmod(self.count, self.num_replicas * self.batch_size)
        return full + (not self.drop_last and len(self._share(np.arange(rest))) > 0)

    def check(self) -> int:
        """The number of batches; raises ValueError where it is 0."""
        batches = len(self)
        if batches == 0:
            raise ValueError(
                f"data: {self.count} images of the {self.part} part give rank {self.rank} of {self.num_replicas} no "
                f"batch of {self.batch_size}"
            )
        return batches

    def __iter__(self) -> Iterator[Batch]:
        batches, epoch, step = self.check(), self.epoch, self.num_replicas * self.batch_size
        self.epoch += 1  # runs when the first batch is asked for: DataLoader makes iterators that it never starts
        order = self.order(epoch)
        for index in range(batches):
            yield epoch, self._share(order[index * step : (index + 1) * step])


class ImageLoader(DataLoader[tuple[Tensor, Tensor]]):
    """What image_loader returns: a DataLoader of (x, labels) with `classes`, `skipped` and `set_epoch`.

    skipped: a line for every shard or image that could not be used so far.
    """

    def __init__(
        self, dataset: _Images, order: _Order, classes: list[str], skipped: list[str], strict: bool, **options: Any
    ):
        super().__init__(
            dataset,  # type: ignore[arg-type]  # the third part of its items ends here
            sampler=order,
            batch_size=None,
            generator=torch.Generator(),  # else every pass would draw from the global one
            **options,
        )
        self.order, self.classes, self.skipped, self.strict = order, classes, skipped, strict

    def set_epoch(self, epoch: int) -> None:
        """Makes the next pass that of this epoch, counted from 0; without it every pass is the next epoch."""
        self.order.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:  # type: ignore[override]
        """Raises ValueError: with strict for an image that does not decode, else for a batch without any that does.

        RuntimeError where a worker dies.
        """
        for x, labels, failed in _received(super().__iter__()):
            for line in failed:
                if self.strict:
                    raise ValueError(f"data: with strict every image must decode, got {line}")
                if line not in self.skipped:
                    self.skipped.append(line)
                    warnings.warn(f"data: an image is left out: {line}", stacklevel=2)
            if len(labels) == 0:
                raise ValueError(
                    f"data: no image of a batch of {len(failed)} decodes, the first failure is: {failed[0]}"
                )
            yield x, labels


def _received(batches: Iterator[Any]) -> Iterator[Any]:
    """The batches. Where a worker dies while it hands one over, torch lets the connection's own error through."""
    try:
        yield from batches
    except (ConnectionError, EOFError) as error:  # a transform may raise them, too
        if not wait([worker.sentinel for worker in getattr(batches, "_workers", [])], timeout=1):
            raise
        raise RuntimeError("data: a DataLoader worker exited unexpectedly while it handed over a batch") from error


def _process_group() -> tuple[int, int]:
    """(rank, world_size) of torch.distributed now."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _given(rank: int | None, world_size: int | None) -> tuple[int, int] | None:
    if (rank is None) != (world_size is None):
        raise ValueError(f"data: rank and world_size must be given together, got {rank} and {world_size}")
    if rank is None or world_size is None:
        return None
    if not 0 <= rank < world_size:
        raise ValueError(f"data: rank must lie in [0, {world_size}), the world_size, got {rank}")
    return rank, world_size


def _check(split: str, **counts: int | None) -> None:
    if split not in SPLITS:
        raise ValueError(f"data: split must be one of {', '.join(SPLITS)}, got {split!r}")
    for name, count in counts.items():
        low = 0 if name in ("seed", "num_workers") else 1
        if count is not None and count < low:
            raise ValueError(f"data: {name} must be at least {low}, got {count}")


def _cpus() -> int:
    """The CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _imagenet(channels: int) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of ImageNet's channels; for grey their averages with the weights of luma."""
    if channels == 3:
        return list(IMAGENET_MEAN), list(IMAGENET_STD)
    return [float(np.dot(_LUMA, IMAGENET_MEAN))], [float(np.dot(_LUMA, IMAGENET_STD))]


def _normalisation(
    found: ImageData | ImageIndex[Any],
    index: ImageIndex[Any],
    channels: int | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> tuple[int, Sequence[float], Sequence[float]]:
    """(channels, mean, std), by default a packed set's own, of the train images that are used, else ImageNet's."""
    if isinstance(found, ImageData):
        channels = channels or found.channels
        used = found.train_images[index.parts["train"].positions]
        own_mean, own_std = channel_statistics(with_channels(used, channels))
    else:
        channels = channels or 3
        own_mean, own_std = _imagenet(channels)
    mean, std = own_mean if mean is None else mean, own_std if std is None else std
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            raise ValueError(f"data: {name} must have {channels} values, one per channel, got {len(values)}")
    if not all(value > 0 for value in std):
        raise ValueError(f"data: std must be positive, got {list(std)}")
    return channels, mean, std


def _parts(
    index: ImageIndex[Any], split: str, test_share: float, val_share: float | None, seed: int
) -> ImageIndex[Any]:
    """The set with the part that is asked for, held out of the train part where that is wanted."""
    if len(index.parts) == 1:
        index = index.split("test", test_share, seed)
    elif "test" not in index.parts:  # train/ with val/ alone, as ImageNet has it
        index = replace(index, parts=index.parts | {"test": index.parts["val"]})
    if val_share is not None:
        index = index.split("val", val_share, seed)
    if split not in index.parts:
        raise ValueError(
            f"data: {index.root} has no {split} part: give val_share, the share of its train part to hold out"
        )
    return index.check()


def image_loader(
    path: str | Path | None,
    split: str = "train",
    *,
    batch_size: int,
    classes: Sequence[str] | None = None,
    imbalance: float | None = None,
    channels: int | None = None,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    augment: bool | None = None,
    transform: Transform | None = None,
    test_share: float = select.TEST_SHARE,
    val_share: float | None = None,
    split_seed: int = 0,
    shuffle: bool | None = None,
    shuffle_buffer: int = SHUFFLE_BUFFER,
    drop_last: bool | None = None,
    seed: int = 0,
    rank: int | None = None,
    world_size: int | None = None,
    num_workers: int | None = None,
    prefetch_factor: int = 2,
    pin_memory: bool | None = None,
    strict: bool = False,
    progress: Callable[[Any], Any] = iter,
) -> ImageLoader:
    """A DataLoader over images that are decoded as they are needed: (x, labels) with x float32 (N, channels, H, W),
    normalised, channels-last, and labels int64 (N,).

    path, classes, imbalance, channels, test_share, strict: as in load_images, except that channels is 3 by default for
    folders and shards, whose headers are not read beforehand. split_seed: load_images' seed.
    split: "train", "val" or "test". val_share: what is held out of every class of the train part as "val", in place of
    a val part of the set's own. A set with train/ and val/ alone has its val part for "test", too.
    image_size: side of x in pixels; 224 by default for folders and shards, else the set's own.
    mean, std: per channel, in units of [0, 1]; ImageNet's by default for folders and shards, else the train part's own,
    of the images that classes, val_share and imbalance leave in it (the same for every split, given the same three).
    augment (default: for "train" of folders and shards): random_crop; otherwise the shorter side is scaled to
    image_size and the centre cropped. transform: maps the decoded Pillow image to x of one sample, in place of
    augmentation, size and normalisation; torch's and Python's random numbers in it are reproducible.
    shuffle, drop_last (default: for "train"): a new order every epoch; leave the incomplete last batch out.
    shuffle_buffer: shards come in random order, and their images up to this many places later. Other sets are shuffled
    as a whole. seed: of the order and the augmentation.
    rank, world_size: by default those of torch.distributed when a pass begins. Ranks share the images without
    overlap and without rest: a global batch has world_size x batch_size of them.
    num_workers (default: one per CPU, at most 4), prefetch_factor (batches per worker), pin_memory (default: where
    there is a GPU): see torch.utils.data.DataLoader. They change no result.
    progress: wraps the list of shards while their headers are read, e.g. tqdm.

    An image that does not decode makes its batch smaller, is warned of once and is listed in loader.skipped.
    Raises FileNotFoundError, OSError or ValueError, each with one sentence that names the path or the argument.
    """
    _check(
        split,
        batch_size=batch_size,
        seed=seed,
        shuffle_buffer=shuffle_buffer,
        num_workers=num_workers,
        prefetch_factor=prefetch_factor,
    )
    check_settings(channels, image_size, test_share)
    ranks = _given(rank, world_size)
    found = find_images(path, strict=strict, progress=progress)
    packed = isinstance(found, ImageData)
    index: ImageIndex[Any] = found.index() if isinstance(found, ImageData) else found
    index = _parts(index.subset(classes), split, test_share, val_share, split_seed).imbalanced(imbalance, split_seed)
    channels, mean, std = _normalisation(found, index, channels, mean, std)
    training = split == "train"
    dataset = _Images(
        index.parts[split],
        size=image_size if packed else image_size or DEFAULT_SIZE,
        channels=channels,
        mean=mean,
        std=std,
        augment=training and not packed if augment is None else augment,
        transform=transform,
        seed=seed,
    )
    order = _Order(
        dataset,
        batch_size=batch_size,
        shuffle=training if shuffle is None else shuffle,
        buffer=shuffle_buffer,
        drop_last=training if drop_last is None else drop_last,
        seed=seed,
        ranks=ranks,
        part=split,
    )
    order.check()
    if index.skipped:
        warnings.warn(f"data: {len(index.skipped)} left out while indexing, first {index.skipped[0]}", stacklevel=2)
    workers = min(_MAX_WORKERS, _cpus()) if num_workers is None else num_workers
    return ImageLoader(
        dataset,
        order,
        index.classes,
        index.skipped,
        strict,
        num_workers=workers,
        prefetch_factor=prefetch_factor if workers else None,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
    )
