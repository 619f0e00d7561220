"""Attacks in pixel space: FGSM, PGD and DeepFool of the Adversarial Robustness Toolbox, and an adaptive PGD.

Images are float32 (N, channels, H, W) in [0, 1]; the normalisation is a part of the attacked model, so that strengths
are in pixels. Needs the package adversarial-robustness-toolbox (pip install 'csg-ext[analysis]').
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

ATTACKS = ("fgsm", "pgd", "deepfool")
BATCH = 100
_STEP = 2.5  # PGD's step is this times epsilon / steps, so that it can cross the ball (Madry et al., ICLR 2018)


class PixelModel(nn.Module):
    """A frozen copy of a gated model in evaluation mode on images in [0, 1]: logits (N, C) of its STD path.

    mean, std: per channel, in units of [0, 1]: what the model was trained with.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model: Any = copy.deepcopy(model).eval().requires_grad_(False)
        device = next(self.model.parameters()).device
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32, device=device).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32, device=device).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, C)."""
        return self.model((x - self.mean) / self.std)

    def features_and_logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled features (N, K) of the gated layer and logits (N, C)."""
        features = self.model.pooled_features((x - self.mean) / self.std)
        return features, self.model.classifier(features)


@dataclass(frozen=True)
class Attack:
    """method: one of ATTACKS. epsilon: the largest change of a pixel, in units of 1/255 (DeepFool has none: it looks
    for the smallest change). targeted: towards a given class (FGSM and PGD). steps: of PGD, or the most of DeepFool.

    Sources: FGSM: Goodfellow et al., ICLR 2015. PGD, from a random start: Madry et al., ICLR 2018. DeepFool, overshoot
    0.02: Moosavi-Dezfooli et al., CVPR 2016. Raises ValueError for a method, an epsilon or steps out of range.
    """

    method: str
    epsilon: float | None = None
    targeted: bool = False
    steps: int = 10

    def __post_init__(self) -> None:
        if self.method not in ATTACKS:
            raise ValueError(f"Attack: method must be one of {', '.join(ATTACKS)}, got {self.method!r}")
        if self.method == "deepfool" and (self.epsilon is not None or self.targeted):
            raise ValueError("Attack: deepfool has neither an epsilon nor a target")
        if self.method != "deepfool" and not (self.epsilon is not None and 0 < self.epsilon <= 255):
            raise ValueError(f"Attack: epsilon must lie in (0, 255], in units of 1/255, got {self.epsilon}")
        if self.steps < 1:
            raise ValueError(f"Attack: steps must be at least 1, got {self.steps}")


@contextlib.contextmanager
def _numpy_seed(seed: int) -> Iterator[None]:
    """The toolbox draws from NumPy's global generator: seeded inside, as before outside."""
    state = np.random.get_state()
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        np.random.set_state(state)


@torch.enable_grad()
def run_attack(
    model: PixelModel, images: NDArray[np.float32], labels: NDArray[np.int64], attack: Attack, seed: int = 0
) -> NDArray[np.float32]:
    """The attacked images (N, channels, H, W), in [0, 1].

    images: float32 in [0, 1]. labels int64 (N,): the classes to leave or, if attack.targeted, to reach. The same seed
    gives the same images. Raises ValueError for images or labels that do not fit.
    """
    from art.attacks import evasion
    from art.estimators.classification import PyTorchClassifier

    logging.getLogger("art").setLevel(logging.ERROR)
    classes = model.model.gate.shape[0]
    _check(images, labels, classes)
    device = "cpu" if model.mean.device.type == "cpu" else "gpu"
    estimator = PyTorchClassifier(
        model, nn.CrossEntropyLoss(), images.shape[1:], classes, clip_values=(0.0, 1.0), device_type=device
    )
    if attack.method == "deepfool":
        found = evasion.DeepFool(
            estimator, max_iter=attack.steps, epsilon=0.02, nb_grads=classes, batch_size=BATCH, verbose=False
        )
        return found.generate(images)
    assert attack.epsilon is not None
    eps = attack.epsilon / 255
    if attack.method == "fgsm":
        found = evasion.FastGradientMethod(estimator, eps=eps, targeted=attack.targeted, batch_size=BATCH)
    else:
        found = evasion.ProjectedGradientDescent(
            estimator,
            eps=eps,
            eps_step=min(eps, _STEP * eps / attack.steps),
            max_iter=attack.steps,
            targeted=attack.targeted,
            num_random_init=1,
            batch_size=BATCH,
            verbose=False,
        )
    with _numpy_seed(seed):
        return found.generate(images, labels)


@torch.enable_grad()
def adaptive_attack(
    model: PixelModel,
    images: NDArray[np.float32],
    labels: NDArray[np.int64],
    score: Callable[[Tensor, Tensor], Tensor],
    *,
    epsilon: float,
    weight: float,
    steps: int = 20,
) -> NDArray[np.float32]:
    """PGD that knows the detector: it ascends cross-entropy(logits, labels) - weight * score; (N, channels, H, W).

    The score counts once the prediction is wrong: before, lowering it would strengthen the true class (selective
    descent: Bryniarski et al., ICLR 2022).

    score(features (N, K), logits (N, C)) -> (N,), differentiable, large for suspicious images. epsilon: the largest
    change of a pixel, in units of 1/255. Of the images on the way, the one with the lowest score whose prediction is
    wrong is returned, where there is one, otherwise the last. steps: how many the attack takes, each 2.5 epsilon /
    steps long, but epsilon at most. Raises ValueError for images or labels that do not fit, and for steps, an epsilon
    or a weight out of range.
    """
    _check(images, labels, model.model.gate.shape[0])
    if steps < 1 or not 0 < epsilon <= 255 or not 0 <= weight < float("inf"):
        raise ValueError(
            "adaptive_attack: steps, epsilon and weight must be at least 1, in (0, 255] and finite and at least 0, got "
            f"{steps}, {epsilon} and {weight}"
        )
    eps, step = epsilon / 255, min(epsilon, _STEP * epsilon / steps) / 255
    found = []
    for begin in range(0, len(images), BATCH):
        x = torch.from_numpy(images[begin : begin + BATCH]).to(model.mean.device)
        y = torch.from_numpy(labels[begin : begin + BATCH]).to(x.device)
        now, best = x, x
        lowest = torch.full((len(x),), torch.inf, device=x.device)
        for i in range(steps + 1):
            now = now.detach().requires_grad_()
            features, logits = model.features_and_logits(now)
            suspicion = score(features, logits)
            wrong = logits.argmax(1) != y
            better = wrong & (suspicion < lowest)
            lowest = torch.where(better, suspicion.detach(), lowest)
            keep = better | (lowest.isinf() if i == steps else torch.zeros_like(better))
            best = torch.where(keep.view(-1, 1, 1, 1), now.detach(), best)
            if i < steps:
                aim = F.cross_entropy(logits, y, reduction="sum") - weight * (suspicion * wrong).sum()
                (gradient,) = torch.autograd.grad(aim, now)
                moved = now.detach() + step * gradient.sign()
                now = torch.minimum(torch.maximum(moved, x - eps), x + eps).clamp(0, 1)
        found.append(best.cpu().numpy())
    return np.concatenate(found)


def _check(images: NDArray[np.float32], labels: NDArray[np.int64], classes: int) -> None:
    if images.ndim != 4 or images.dtype != np.float32 or not len(images):
        raise ValueError(f"images must be float32 (N, channels, H, W), N > 0, got {images.dtype} {images.shape}")
    if not (images.min() >= 0 and images.max() <= 1):  # also NaN
        raise ValueError(f"images must lie in [0, 1], got values from {images.min():g} to {images.max():g}")
    if labels.shape != (len(images),) or labels.dtype != np.int64:
        raise ValueError(f"labels must be int64 ({len(images)},), got {labels.dtype} {labels.shape}")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"labels must lie in [0, {classes}), got {labels.min()} to {labels.max()}")


def draw_targets(labels: NDArray[np.int64], classes: int, seed: int = 0) -> NDArray[np.int64]:
    """For every label (N,) in [0, classes) another class, each with the same chance, int64 (N,); seed: of the draw."""
    shift = np.random.default_rng(seed).integers(1, classes, len(labels))
    return (labels + shift) % classes
