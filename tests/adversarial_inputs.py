"""What the tests of attacks and detectors share: images whose bright quarter is their class, and a network for them."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from csg_ext import nn as csg_nn
from csg_ext.data.images import ImageData

CLASSES, FILTERS = 4, 8
STATISTICS = ([0.4], [0.3])


def fresh_rng():
    return np.random.default_rng(int(torch.randint(2**31, ())))


def quarters_data(n=120, seed=0):
    """Images whose class is the quarter that is bright, with noise."""
    rng = np.random.default_rng(seed)

    def part(n):
        labels = rng.integers(0, CLASSES, n)
        images = rng.integers(0, 90, (n, 1, 8, 8), np.uint8)
        for image, label in zip(images, labels, strict=True):
            top, left = divmod(int(label), 2)
            image[0, 4 * top : 4 * top + 4, 4 * left : 4 * left + 4] += 60
        return images, labels.astype(np.int64)

    return ImageData("quarters", *part(n), *part(n // 2), [f"quarter {c}" for c in range(CLASSES)])


class _Quarters(nn.Module):
    """Two filters for each quarter: its pixels, brighter than a level, and nothing of the others."""

    num_filters = FILTERS

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        mask = torch.zeros(CLASSES, 8, 8)
        for c in range(CLASSES):
            top, left = divmod(c, 2)
            mask[c, 4 * top : 4 * top + 4, 4 * left : 4 * left + 4] = 1
        self.register_buffer("mask", mask.repeat_interleave(2, 0))

    def forward(self, x):
        return F.relu(self.scale * x * self.mask + 0.2 * self.mask)


def quarters_model():
    """A network that gets quarters_data right by its filters' classes."""
    model = csg_nn.GatedModel(_Quarters(), CLASSES)
    with torch.no_grad():
        model.gate.copy_(torch.eye(CLASSES).repeat_interleave(2, 1))
        model.classifier.weight.copy_(20 * model.gate)
        model.classifier.bias.zero_()
    return model
