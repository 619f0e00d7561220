"""Mixup and cutmix: batches with soft labels, which the gate takes as soft rows, labels @ G."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


class Mix:
    """Mixes every batch with a permutation of itself: (x, labels) to (x, float labels (N, C)).

    With both alphas positive, each batch takes mixup or cutmix with equal chance; 0 leaves one out. x: (N, channels, H,
    W), (for mixup any shape); labels: integers (N,) in [0, num_classes) or float (N, C). Draws from torch's global CPU
    generator. torchvision.transforms.v2.MixUp and CutMix have the same interface and can take its place. Raises
    ValueError for alphas that are negative, infinite or both 0, for labels that are no classes, and with cutmix for x
    of another shape.
    Sources: Zhang et al., mixup, ICLR 2018; Yun et al., CutMix, ICCV 2019.
    """

    def __init__(self, num_classes: int, mixup: float = 0.0, cutmix: float = 0.0) -> None:
        if not mixup >= 0 or not cutmix >= 0 or mixup + cutmix == 0:
            raise ValueError(f"Mix: mixup and cutmix must be >= 0 and not both 0, got {mixup} and {cutmix}")
        if math.isinf(mixup) or math.isinf(cutmix):
            raise ValueError(f"Mix: mixup and cutmix must be finite, got {mixup} and {cutmix}")
        self.num_classes, self.mixup, self.cutmix = num_classes, mixup, cutmix

    def __call__(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The mixed batch."""
        whole = not labels.is_floating_point()
        if whole and (labels.dim() != 1 or labels.dtype == torch.bool):
            raise ValueError(
                "Mix: labels must be class indices (N,), integers, or float rows (N, C), got "
                f"{labels.dtype} of shape {tuple(labels.shape)}"
            )
        if self.cutmix > 0 and x.dim() != 4:
            raise ValueError(f"Mix: cutmix expects x of shape (N, channels, H, W), got {tuple(x.shape)}")
        if whole:
            # On a GPU a look at the values would wait for it.
            if labels.device.type == "cpu" and ((labels < 0) | (labels >= self.num_classes)).any():
                raise ValueError(
                    f"Mix: labels must be in [0, {self.num_classes}), got {int(labels.min())} to {int(labels.max())}"
                )
            labels = F.one_hot(labels.long(), self.num_classes).float()
        other = torch.randperm(len(x)).to(x.device)
        cut = self.cutmix > 0 and (self.mixup == 0 or torch.rand(()).item() < 0.5)
        alpha = self.cutmix if cut else self.mixup
        share = float(torch.distributions.Beta(alpha, alpha).sample())  # of the sample itself
        if cut:
            x, share = _paste(x, x[other], share)
        else:
            x = torch.lerp(x[other], x, share)
        return x, torch.lerp(labels[other], labels, share)


def _paste(x: Tensor, source: Tensor, share: float) -> tuple[Tensor, float]:
    """x with a rectangle of `source` of about 1 - share of the area, and the share that is x's in the end."""
    height, width = x.shape[2:]
    half = math.sqrt(1 - share) / 2
    row, column = (torch.rand(2) * torch.tensor([height, width])).tolist()
    top, bottom = max(0, round(row - half * height)), min(height, round(row + half * height))
    left, right = max(0, round(column - half * width)), min(width, round(column + half * width))
    x = x.clone()
    x[:, :, top:bottom, left:right] = source[:, :, top:bottom, left:right]
    return x, 1 - (bottom - top) * (right - left) / (height * width)
