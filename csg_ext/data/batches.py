"""Augmented training batches as a pure function of (seed, step): reproducible, and resumable without saved state."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_SHUFFLE, _AUGMENT = 1, 2  # separate random streams


def derive_seed(*key: int) -> int:
    """A 63-bit seed that depends on every integer of the key."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def scaled_width(height: int, width: int, size: int) -> int:
    """The width of images (height, width) that are scaled to a height of `size`: in proportion, at least 4 pixels."""
    return max(min(4, width, size), round(width * size / height))


def _levels(values: Sequence[float], device: torch.device | str) -> Tensor:
    """One value per channel, in units of [0, 1], as levels of 0 to 255 that broadcast over images."""
    return torch.tensor(values, device=device).mul(255).view(-1, 1, 1)


class Batches:
    """Training batches: shuffled, shifted by up to `shift` pixels, flipped left-right, normalised.

    batches[step] is (x, y): x float32 (batch_size, channels, H, W), channels-last, y int64 (batch_size,). An epoch is
    len(batches) steps; every epoch draws a new permutation and leaves its incomplete last batch out, so all batches
    weigh the same.

    images: uint8 (N, channels, H, W), labels: integers (N,), both moved to `device`. seed: of the order and the
    augmentation. flip: mirror at random. sizes: the height in pixels that epoch e's images are scaled to, sizes[e] (the
    last entry serves all later epochs), and the width in proportion, but to no less than 4 pixels; None keeps the
    native size. mean, std: per channel, in units of [0, 1].
    Raises ValueError for a batch_size outside [1, N].
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        batch_size: int,
        *,
        seed: int = 0,
        mean: Sequence[float],
        std: Sequence[float],
        shift: int = 0,
        flip: bool = False,
        sizes: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if not 1 <= batch_size <= len(images):
            raise ValueError(
                f"Batches: batch_size must lie in [1, {len(images)}], the number of images, got {batch_size}"
            )
        self.images = torch.as_tensor(images, device=device)
        self.labels = torch.as_tensor(labels, dtype=torch.int64, device=device)
        self.batch_size, self.seed, self.shift, self.flip, self.sizes = batch_size, seed, shift, flip, sizes
        self.mean, self.std = _levels(mean, device), _levels(std, device)
        self._epoch, self._order = -1, torch.empty(0)

    def __len__(self) -> int:
        """Steps per epoch."""
        return len(self.images) // self.batch_size

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        """The batch of optimisation step `step`, counted from the run's beginning."""
        epoch, position = divmod(step, len(self))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, _SHUFFLE, epoch))
            self._order = torch.randperm(len(self.images), generator=generator).to(self.images.device)
            self._epoch = epoch
        index = self._order[position * self.batch_size : (position + 1) * self.batch_size]
        x = (self.images[index].float() - self.mean) / self.std
        x = self._augment(x, torch.Generator().manual_seed(derive_seed(self.seed, _AUGMENT, step)))
        if self.sizes is not None:
            size = self.sizes[min(epoch, len(self.sizes) - 1)]
            height, width = x.shape[2:]
            if size != height:
                x = F.interpolate(x, size=(size, scaled_width(height, width, size)), mode="area")
        return x.contiguous(memory_format=torch.channels_last), self.labels[index]

    def _augment(self, x: Tensor, generator: torch.Generator) -> Tensor:
        n, channels, height, width = x.shape
        device, shift = x.device, self.shift
        offsets = torch.randint(-shift, shift + 1, (2, n, 1, 1), generator=generator).to(device)
        mirrored = (torch.rand(n, 1, 1, generator=generator) < 0.5).to(device)
        if not shift and not self.flip:
            return x
        row = torch.arange(height, device=device).view(1, -1, 1) + offsets[0] + shift
        column = torch.arange(width, device=device).view(1, 1, -1)
        if self.flip:
            column = torch.where(mirrored, width - 1 - column, column)
        column = column + offsets[1] + shift
        if shift:
            black = (-self.mean / self.std).expand(channels, height + 2 * shift, width + 2 * shift)
            padded = black.expand(n, -1, -1, -1).clone()
            padded[:, :, shift : shift + height, shift : shift + width] = x
            x = padded
        sample = torch.arange(n, device=device).view(-1, 1, 1, 1)
        channel = torch.arange(channels, device=device).view(1, -1, 1, 1)
        return x[sample, channel, row.unsqueeze(1), column.unsqueeze(1)]


def normalise(
    images: np.ndarray, mean: Sequence[float], std: Sequence[float], device: torch.device | str = "cpu"
) -> Tensor:
    """uint8 images (N, channels, H, W) as the float32 channels-last tensor that a model trained on Batches expects.

    mean, std: per channel, in units of [0, 1], those of the images that the model was trained on (ImageData.statistics,
    or csg_ext.runs.training_statistics of a run). device: where the tensor is to be.
    """
    x = (torch.as_tensor(images, device=device).float() - _levels(mean, device)) / _levels(std, device)
    return x.contiguous(memory_format=torch.channels_last)
