"""How well detectors find adversarial images: attacks on a network, AUROC and rates with bootstrap intervals.

docs/adversarial.md says what is measured and on which images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from csg_ext import metrics
from csg_ext.analysis.attacks import BATCH, Attack, PixelModel, adaptive_attack, draw_targets, run_attack
from csg_ext.analysis.detectors import (
    Detector,
    Forest,
    GateRegression,
    Mahalanobis,
    Outputs,
    OutsideShare,
    Softmax,
    outside_share,
)
from csg_ext.data import ImageData
from csg_ext.nn.gate import GatedModel

Statistics = tuple[list[float], list[float]]
Progress = Callable[[str], None]
CONFIDENCE, RESAMPLES, FALSE_POSITIVES = 0.95, 1000, 0.05


@dataclass(frozen=True)
class Settings:
    """What is attacked, how, and on how many images; raises ValueError for what is out of range.

    images: of the test part that are attacked, and of the train part that fit the detectors (as many again set the
    thresholds). epsilons: strengths of FGSM and PGD, train_epsilon that of train_attack, on which the detectors are
    fitted; in units of 1/255. weights: of the score in the adaptive attack, at train_epsilon. steps: of PGD, half of
    the adaptive attack's, and the most of DeepFool. seed: of all that is drawn.
    """

    images: int = 300
    epsilons: tuple[float, ...] = (2, 4, 8, 16)
    train_attack: str = "pgd"
    train_epsilon: float = 8
    weights: tuple[float, ...] = (1, 10, 100)
    steps: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("images", 2), ("steps", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if any(not 0 <= w < float("inf") for w in self.weights):
            raise ValueError(f"weights must be finite and at least 0, got {list(self.weights)}")
        if self.train_attack not in ("fgsm", "pgd"):
            raise ValueError(f"train_attack must be fgsm or pgd, got {self.train_attack!r}")
        for name, strengths in (("epsilons", self.epsilons), ("train_epsilon", [self.train_epsilon])):
            if wrong := [e for e in strengths if not 0 < e <= 255]:
                raise ValueError(f"{name} must lie in (0, 255], in units of 1/255, got {wrong[0]:g}")

    def training(self) -> Attack:
        """The attack that the detectors are fitted on."""
        return Attack(self.train_attack, self.train_epsilon, steps=self.steps)

    def attacks(self) -> list[Attack]:
        """The attacks that the detectors are tested on, which do not know them."""
        found = [self.training()]
        for targeted in (False, True):
            for method in ("fgsm", "pgd"):
                found += [Attack(method, e, targeted, self.steps) for e in self.epsilons]
        return list(dict.fromkeys(found)) + [Attack("deepfool", steps=self.steps)]


# ---- measures


def bootstrap_counts(images: int, resamples: int = RESAMPLES, seed: int = 0) -> NDArray[np.float64]:
    """How often each image is drawn in each resample, (resamples, images)."""
    return np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), resamples).astype(np.float64)


class Estimate(NamedTuple):
    """A measure on all images and on every resample, (R,); NaN where it has no value."""

    value: float
    samples: NDArray[np.float64]

    def interval(self) -> dict[str, float | None]:
        """The value and the ends of its percentile interval, None where there is none."""
        seen = self.samples[np.isfinite(self.samples)]
        if not np.isfinite(self.value) or not len(seen):
            return {"value": None, "low": None, "high": None}
        low, high = np.quantile(seen, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        return {"value": float(self.value), "low": float(low), "high": float(high)}

    def minus(self, other: Estimate) -> Estimate:
        """The difference, resample by resample; both must come from the same resamples."""
        return Estimate(self.value - other.value, self.samples - other.samples)


def _mean(values: NDArray[Any], counts: NDArray[np.float64]) -> Estimate:
    """The mean of values (n,), drawn counts (R, n) times."""
    if not len(values):
        return Estimate(float("nan"), np.full(len(counts), np.nan))
    with np.errstate(invalid="ignore"):
        return Estimate(float(values.mean()), counts @ values / counts.sum(1))


def auroc(
    benign: NDArray[np.float64],
    attacked: NDArray[np.float64],
    benign_counts: NDArray[np.float64],
    attacked_counts: NDArray[np.float64],
) -> Estimate:
    """Chance that an attacked image scores above a benign one, ties counted half.

    benign (n,), attacked (m,): scores. Their counts, (R, n) and (R, m): how often each is drawn in each resample.
    """
    if not len(benign) or not len(attacked):
        return Estimate(float("nan"), np.full(len(benign_counts), np.nan))
    above = (attacked[:, None] > benign) + 0.5 * (attacked[:, None] == benign)
    weights = attacked_counts.sum(1) * benign_counts.sum(1)
    with np.errstate(invalid="ignore"):
        samples = ((attacked_counts @ above) * benign_counts).sum(1) / weights
    return Estimate(float(above.mean()), samples)


def rates(
    detector: Detector, benign: Outputs, attacked: Outputs, changed: NDArray[np.bool_], counts: NDArray[np.float64]
) -> dict[str, Estimate]:
    """auroc, tpr and fpr at the detector's threshold, and evaded: the share of all images whose attack both changed the
    prediction and stayed below the threshold.

    benign and attacked: of the same n images, in one order; of the attacked ones those that are `changed` (n,) count.
    counts (R, n): see bootstrap_counts.
    """
    scores = detector.score(benign), detector.score(attacked)
    clean, hit = (s > detector.threshold for s in scores)
    return {
        "auroc": auroc(scores[0], scores[1][changed], counts, counts[:, changed]),
        "tpr": _mean(hit[changed], counts[:, changed]),
        "fpr": _mean(clean, counts),
        "evaded": _mean(changed & ~hit, counts),
    }


# ---- one network


class Network:
    """A model on images in [0, 1], and the rows (C, K) that say which filters speak for a class.

    The rows are the gate's. Where it is constant (an STD network has none), they are the mutual information of a filter
    with each class on these train images, divided by the filter's largest: like the gate, 1 for its own class. A dead
    filter has none.
    """

    def __init__(self, model: GatedModel, statistics: Statistics, images: NDArray[np.float32], labels: Any) -> None:
        self.model = PixelModel(model, *statistics)
        gate = model.gate.detach().float().cpu().numpy()
        self.gated = bool((gate != gate[0, 0]).any())
        if self.gated:
            self.rows = np.ascontiguousarray(gate)
        else:
            features = self.outputs(images).features
            mi = metrics.class_mutual_info(features, labels, num_classes=len(gate))
            mi[metrics.dead_filters(features)] = 0  # the estimate's noise would be divided by itself
            self.rows = (mi / np.maximum(mi.max(1, keepdims=True), 1e-12)).T.astype(np.float32)

    @torch.no_grad()
    def outputs(self, images: NDArray[np.float32]) -> Outputs:
        """What the network says of images in [0, 1]."""
        found = []
        for begin in range(0, len(images), BATCH):
            x = torch.from_numpy(images[begin : begin + BATCH]).to(self.model.mean.device)
            found.append([t.cpu().numpy() for t in self.model.features_and_logits(x)])
        return Outputs(*(np.concatenate(parts) for parts in zip(*found, strict=True)))

    def score(self, features: Tensor, logits: Tensor) -> Tensor:
        """The label-free score, differentiable."""
        return outside_share(features, logits, torch.from_numpy(self.rows).to(features))


def _pixels(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    return images.astype(np.float32) / np.float32(255)


def _take(outputs: Outputs, rows: NDArray[Any]) -> Outputs:
    return Outputs(outputs.features[rows], outputs.logits[rows])


def _right(outputs: Outputs, labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    return outputs.logits.argmax(1) == labels


def fit_detectors(
    model: GatedModel, data: ImageData, statistics: Statistics, settings: Settings
) -> tuple[Network, list[Detector], dict[str, int]]:
    """The network, its detectors fitted on attacked train images, and the counts of images.

    Half of 2 * images train images (those of one seed are the same for every network) fit, the other half, not
    attacked, set the thresholds; the network gets all that are used right. Raises ValueError if no attack succeeds.
    """
    order = np.random.default_rng([settings.seed, 1]).permutation(len(data.train_labels))[: 2 * settings.images]
    images, labels = _pixels(data.train_images[order]), data.train_labels[order]
    half = len(order) // 2
    network = Network(model, statistics, images[:half], labels[:half])
    clean = network.outputs(images)
    right = _right(clean, labels)
    fits = np.flatnonzero(right[:half])
    calibrates = half + np.flatnonzero(right[half:])
    if not len(fits) or not len(calibrates):
        raise ValueError(f"the network gets none of {half} train images right, which a detector is fitted on")
    attacked = network.outputs(
        run_attack(network.model, images[fits], labels[fits], settings.training(), settings.seed)
    )
    changed = ~_right(attacked, labels[fits])
    if not changed.any():
        raise ValueError(
            f"{settings.train_attack} at {settings.train_epsilon:g}/255 changes none of {len(fits)} predictions: a "
            "detector cannot be fitted; give a larger train_epsilon (--train-epsilon of csg-ext detect)"
        )
    benign, successful = _take(clean, fits), _take(attacked, changed)
    detectors: list[Detector] = [
        Forest.fit(benign, successful, settings.seed),
        GateRegression.fit(benign, successful, network.rows),
        OutsideShare(network.rows),
        Softmax(),
        Mahalanobis.fit(benign, labels[fits]),
    ]
    for detector in detectors:
        detector.calibrate(_take(clean, calibrates), FALSE_POSITIVES)
    counts = {"fit_benign": len(fits), "fit_attacked": int(changed.sum()), "calibrate": len(calibrates)}
    return network, detectors, counts


def measure(
    network: Network,
    detectors: list[Detector],
    data: ImageData,
    settings: Settings,
    progress: Progress = lambda _: None,
) -> tuple[dict[str, Any], dict[str, dict[str, dict[str, Estimate]]]]:
    """(report, estimates by attack, detector and measure) on test images that the network gets right.

    The images and the resamples are the same for every network, so that estimates of two can be subtracted.
    """
    order = np.random.default_rng([settings.seed, 2]).permutation(len(data.test_labels))[: settings.images]
    images, labels = _pixels(data.test_images[order]), data.test_labels[order]
    clean = network.outputs(images)
    right = _right(clean, labels)
    if not right.any():
        raise ValueError(f"the network gets none of {len(order)} test images right: there is nothing to attack")
    counts = bootstrap_counts(len(order), RESAMPLES, settings.seed)[:, right]
    images, labels, clean = images[right], labels[right], _take(clean, right)
    targets = draw_targets(labels, network.rows.shape[0], settings.seed)
    rows: list[dict[str, Any]] = []
    estimates: dict[str, dict[str, dict[str, Estimate]]] = {}

    def add(name: str, facts: dict[str, Any], moved: NDArray[np.float32]) -> None:
        seen = network.outputs(moved)
        changed = ~_right(seen, labels)
        found = {d.name: rates(d, clean, seen, changed, counts) for d in detectors}
        estimates[name] = found
        gap = np.abs(moved - images).reshape(len(images), -1).max(1)[changed]
        rows.append(
            {
                "name": name,
                **facts,
                "changed": int(changed.sum()),
                "target_reached": int(_right(seen, targets).sum()) if facts["targeted"] else None,
                "median_change": float(np.median(gap)) * 255 if len(gap) else None,
                "detectors": {d: {key: e.interval() for key, e in r.items()} for d, r in found.items()},
            }
        )

    for name, facts, moved in _attacked(network, detectors, images, labels, targets, settings, progress):
        add(name, facts, moved)
    return {"test_images": len(order), "benign": len(images), "gated": network.gated, "attacks": rows}, estimates


def _attacked(
    network: Network,
    detectors: list[Detector],
    images: NDArray[np.float32],
    labels: NDArray[np.int64],
    targets: NDArray[np.int64],
    settings: Settings,
    progress: Progress,
) -> Iterator[tuple[str, dict[str, Any], NDArray[np.float32]]]:
    """(name, facts, attacked images) of every attack, the adaptive ones last."""
    for attack in settings.attacks():
        name = attack_name(attack)
        progress(name)
        aims = targets if attack.targeted else labels
        yield name, vars(attack) | {"weight": None}, run_attack(network.model, images, aims, attack, settings.seed)
    strength: dict[str, Any] = {"epsilon": settings.train_epsilon, "steps": 2 * settings.steps}
    facts = {"method": "adaptive", "targeted": False} | strength
    label_free = next(d for d in detectors if isinstance(d, OutsideShare))
    tries, scores = [], []
    for weight in settings.weights:
        name = f"adaptive {settings.train_epsilon:g}/255, weight {weight:g}"
        progress(name)
        moved = adaptive_attack(network.model, images, labels, network.score, weight=weight, **strength)
        seen = network.outputs(moved)
        tries.append(moved)
        scores.append(np.where(_right(seen, labels), np.inf, label_free.score(seen)))
        yield name, facts | {"weight": weight}, moved
    if len(tries) > 1:
        best = np.stack(tries)[np.argmin(scores, 0), np.arange(len(images))]
        yield f"adaptive {settings.train_epsilon:g}/255, best weight of each image", facts | {"weight": None}, best


def attack_name(attack: Attack) -> str:
    """Such as "pgd 8/255, targeted"."""
    strength = "" if attack.epsilon is None else f" {attack.epsilon:g}/255"
    return attack.method + strength + (", targeted" if attack.targeted else "")
