"""Tests of the augmented batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from csg_ext.data import Batches
from csg_ext.data.batches import normalise

RNG = np.random.default_rng(7)


def _toy_batches(**options) -> tuple[np.ndarray, Batches]:
    images = RNG.integers(0, 256, (50, 2, 9, 7), np.uint8)
    return images, Batches(images, np.arange(50), 8, mean=[0.4, 0.5], std=[0.2, 0.3], **options)


def test_batches_are_a_function_of_seed_and_step():
    _, a = _toy_batches(shift=2, flip=True)
    b = Batches(a.images.numpy(), a.labels.numpy(), 8, mean=[0.4, 0.5], std=[0.2, 0.3], shift=2, flip=True)
    forwards = [a[s] for s in range(14)]
    backwards = [b[s] for s in reversed(range(14))][::-1]
    for (x, y), (u, v) in zip(forwards, backwards, strict=True):
        assert torch.equal(x, u) and torch.equal(y, v)
    other = Batches(a.images.numpy(), a.labels.numpy(), 8, mean=[0.4, 0.5], std=[0.2, 0.3], shift=2, flip=True, seed=1)
    assert not torch.equal(forwards[0][1], other[0][1])


def test_an_epoch_shows_no_image_twice():
    _, batches = _toy_batches()
    assert len(batches) == 6
    epochs = [torch.cat([batches[6 * e + s][1] for s in range(6)]) for e in range(3)]
    for epoch in epochs:
        assert len(set(epoch.tolist())) == 48
    assert not torch.equal(epochs[0], epochs[1])


def test_augmentation_is_a_shift_and_a_flip_of_the_image():
    images, batches = _toy_batches(shift=2, flip=True)
    seen = set()
    for step in range(12):
        x, y = batches[step]
        assert x.is_contiguous(memory_format=torch.channels_last)
        for sample, index in zip(x, y, strict=True):
            image = np.pad(images[index], ((0, 0), (2, 2), (2, 2)))
            matches = []
            for flip in (False, True):
                for dy in range(5):
                    for dx in range(5):
                        # the mirrored image is shifted after mirroring
                        source = np.pad(images[index][:, :, ::-1], ((0, 0), (2, 2), (2, 2))) if flip else image
                        crop = source[:, dy : dy + 9, dx : dx + 7]
                        if torch.allclose(normalise(crop[None].copy(), [0.4, 0.5], [0.2, 0.3])[0], sample, atol=1e-5):
                            matches.append((flip, dy, dx))
            assert len(matches) == 1
            seen.add(matches[0])
    assert len({m[0] for m in seen}) == 2 and len({m[1] for m in seen}) == 5 and len({m[2] for m in seen}) == 5


def test_batches_without_augmentation_and_with_smaller_sizes():
    images, plain = _toy_batches()
    x, y = plain[0]
    assert torch.equal(x, normalise(images[y], [0.4, 0.5], [0.2, 0.3]))
    square = RNG.integers(0, 256, (16, 1, 8, 8), np.uint8)
    sized = Batches(square, np.zeros(16), 8, mean=[0], std=[1], sizes=[4, 8])
    x, _ = sized[0]
    assert x.shape == (8, 1, 4, 4) and sized[2][0].shape == (8, 1, 8, 8) and sized[9][0].shape == (8, 1, 8, 8)
    full = Batches(square, np.zeros(16), 8, mean=[0], std=[1])[0][0]
    assert torch.allclose(x, full.unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5)), atol=1e-6)


@pytest.mark.parametrize(
    "side, size, scaled",
    [
        ((24, 12), 16, (16, 8)),
        ((12, 24), 8, (8, 16)),
        ((24, 5), 16, (16, 4)),
        ((24, 3), 16, (16, 3)),  # narrower than that already
        ((8, 16), 12, (12, 24)),
        ((8, 8), 2, (2, 2)),
    ],
)
def test_smaller_sizes_keep_the_proportions(side, size, scaled):
    images = RNG.integers(0, 256, (8, 1, *side), np.uint8)
    low, full = (Batches(images, np.arange(8), 8, mean=[0], std=[1], sizes=s)[0][0] for s in ([size], None))
    assert low.shape[2:] == scaled
    if side == (24, 12):
        assert torch.equal(low, torch.nn.functional.interpolate(full, size=scaled, mode="area"))


def test_batch_size_is_checked():
    with pytest.raises(ValueError, match=r"batch_size must lie in \[1, 3\], the number of images, got 4"):
        Batches(np.zeros((3, 1, 2, 2), np.uint8), np.zeros(3), 4, mean=[0], std=[1])
