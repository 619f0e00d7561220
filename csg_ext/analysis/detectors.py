"""Detectors of adversarial images on a gated layer's pooled features: a score for each image, larger = more suspicious.

A fitted detector is a few arrays. They are saved as .safetensors and checked when they are read, so a file can neither
execute code nor lead an index out of its array; scikit-learn fits them and is not needed to use them.
"""

from __future__ import annotations

import abc
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from csg_ext._text import name_list, reason
from csg_ext.training.files import atomic_file

Array = NDArray[Any]


class Outputs(NamedTuple):
    """What a network says of N images: pooled features (N, K) and logits (N, C)."""

    features: NDArray[np.float32]
    logits: NDArray[np.float32]


def row_shares(features: Tensor, rows: Tensor) -> Tensor:
    """Share of the activation that lies inside each class's row: sum_k rows[c, k] f_k / sum_k f_k; (N, C).

    features (N, K): pooled features, negative ones count as 0. rows (C, K): the gate, or any weights in [0, 1]. A
    network without any activation has shares of 0.
    """
    active = features.clamp(min=0)
    return active @ rows.T / active.sum(1, keepdim=True).clamp(min=torch.finfo(active.dtype).tiny)


def outside_share(features: Tensor, logits: Tensor, rows: Tensor) -> Tensor:
    """The label-free score: the share of activation outside the predicted class's row, in [0, 1]; (N,).

    A class's filters fire for that class; an attack changes the prediction, but the filters of the true class stay
    active. Differentiable in the features. Arguments as row_shares; logits (N, C).
    """
    return 1 - row_shares(features, rows).gather(1, logits.argmax(1, keepdim=True))[:, 0]


def consistency_features(outputs: Outputs, rows: Array) -> NDArray[np.float64]:
    """How the features agree with the gate's rows, (N, 6): share of activation inside the predicted class's row, the
    largest share of another class, their difference, the entropy of the normalised shares (nats), whether the class of
    the largest share is the predicted one, and the logarithm of the whole activation."""
    features = np.maximum(outputs.features.astype(np.float64), 0)
    shares = row_shares(torch.from_numpy(features), torch.from_numpy(rows.astype(np.float64))).numpy()
    predicted, images = outputs.logits.argmax(1), np.arange(len(features))
    own = shares[images, predicted]
    others = shares.copy()
    others[images, predicted] = -np.inf
    other = others.max(1)
    total = shares.sum(1, keepdims=True)
    p = np.divide(shares, total, out=np.zeros_like(shares), where=total > 0)
    entropy = -(p * np.log(np.where(p > 0, p, 1))).sum(1)
    agrees = (shares.argmax(1) == predicted).astype(np.float64)
    return np.stack([own, other, own - other, entropy, agrees, np.log(features.sum(1) + 1e-12)], 1)


@dataclass
class Detector(abc.ABC):
    """A score and the threshold above which an image is called attacked (infinite until `calibrate`)."""

    name: ClassVar[str]
    threshold: float = dataclasses.field(default=float("inf"), kw_only=True)

    @abc.abstractmethod
    def score(self, outputs: Outputs) -> NDArray[np.float64]:
        """(N,), larger = more suspicious."""

    @abc.abstractmethod
    def check(self) -> None:
        """ValueError if the arrays do not fit together."""

    def calibrate(self, benign: Outputs, false_positives: float = 0.05) -> None:
        """Sets the threshold that this share of these benign images exceeds; give images that fitted nothing."""
        if not 0 < false_positives < 1:
            raise ValueError(f"calibrate: false_positives must lie in (0, 1), got {false_positives}")
        self.threshold = float(np.quantile(self.score(benign), 1 - false_positives, method="higher"))

    def flags(self, outputs: Outputs) -> NDArray[np.bool_]:
        """Which images are called attacked, (N,)."""
        return self.score(outputs) > self.threshold

    def arrays(self) -> dict[str, Array]:
        """Every field as an array."""
        return {f.name: np.asarray(getattr(self, f.name)) for f in dataclasses.fields(self)}

    def save(self, path: str | Path) -> None:
        """Writes a .safetensors file atomically; see load_detector."""
        from safetensors.numpy import save

        content = {name: np.array(array, order="C") for name, array in self.arrays().items()}
        with atomic_file(path) as file:
            file.write(save(content, {"detector": self.name}))


@dataclass
class OutsideShare(Detector):
    """The label-free score (outside_share); rows (C, K) float32. Nothing is fitted but the threshold."""

    name = "score"
    rows: Array

    def score(self, outputs: Outputs) -> NDArray[np.float64]:
        tensors = (torch.from_numpy(a.astype(np.float64)) for a in (*outputs, self.rows))
        return outside_share(*tensors).numpy()

    def check(self) -> None:
        _shaped(self, "rows", np.float32, 2)


@dataclass
class GateRegression(Detector):
    """Logistic regression on consistency_features: the log odds. rows (C, K) float32, weight (6,), bias () float64."""

    name = "gate regression"
    rows: Array
    weight: Array
    bias: Array

    @classmethod
    def fit(cls, benign: Outputs, attacked: Outputs, rows: Array) -> GateRegression:
        """Both classes weigh the same, however many attacks succeeded. Needs scikit-learn."""
        from sklearn.linear_model import LogisticRegression

        x = np.concatenate([consistency_features(o, rows) for o in (benign, attacked)])
        mean, std = x.mean(0), np.maximum(x.std(0), 1e-9)
        model = LogisticRegression(class_weight="balanced", max_iter=1000)
        model.fit((x - mean) / std, _targets(benign, attacked))
        weight = model.coef_[0] / std
        return cls(rows, weight, np.asarray(model.intercept_[0] - weight @ mean))

    def score(self, outputs: Outputs) -> NDArray[np.float64]:
        return consistency_features(outputs, self.rows) @ self.weight + self.bias

    def check(self) -> None:
        _shaped(self, "rows", np.float32, 2)
        _shaped(self, "weight", np.float64, 1)
        _shaped(self, "bias", np.float64, 0)
        if len(self.weight) != 6:
            raise ValueError(f"{self.name}: weight must be (6,), got {self.weight.shape}")


@dataclass
class Forest(Detector):
    """Random forest on the pooled features: the mean share of attacked training images in an image's leaves.

    The trees' nodes lie one after the other, a parent before its children. roots (T,), left, right and feature (M,)
    int64, left = right = 0 in a leaf; threshold of a node cut (M,), share (M,) float64.
    """

    name = "forest"
    roots: Array
    left: Array
    right: Array
    feature: Array
    cut: Array
    share: Array

    @classmethod
    def fit(cls, benign: Outputs, attacked: Outputs, seed: int = 0, trees: int = 200) -> Forest:
        """Both classes weigh the same, however many attacks succeeded. Needs scikit-learn."""
        from sklearn.ensemble import RandomForestClassifier

        model = RandomForestClassifier(trees, class_weight="balanced", min_samples_leaf=2, random_state=seed)
        model.fit(np.concatenate([benign.features, attacked.features]), _targets(benign, attacked))
        grown = [estimator.tree_ for estimator in model.estimators_]
        roots = np.cumsum([0] + [t.node_count for t in grown[:-1]])

        def children(name: str) -> Array:
            found = [np.where(getattr(t, name) < 0, 0, getattr(t, name) + r) for t, r in zip(grown, roots, strict=True)]
            return np.concatenate(found).astype(np.int64)

        values = np.concatenate([t.value[:, 0] for t in grown])
        return cls(
            roots.astype(np.int64),
            children("children_left"),
            children("children_right"),
            np.concatenate([np.maximum(t.feature, 0) for t in grown]).astype(np.int64),
            np.concatenate([t.threshold for t in grown]),
            values[:, 1] / values.sum(1),
        )

    def score(self, outputs: Outputs) -> NDArray[np.float64]:
        features, images = outputs.features, np.arange(len(outputs.features))[:, None]
        if features.shape[1] <= self.feature.max():
            raise ValueError(f"forest: expected at least {self.feature.max() + 1} features, got {features.shape[1]}")
        node = np.broadcast_to(self.roots, (len(features), len(self.roots)))
        while (inner := self.left[node] > 0).any():
            below = features[images, self.feature[node]] <= self.cut[node]
            node = np.where(inner, np.where(below, self.left[node], self.right[node]), node)
        return self.share[node].mean(1)

    def check(self) -> None:
        for field in ("roots", "left", "right", "feature"):
            _shaped(self, field, np.int64, 1)
        _shaped(self, "cut", np.float64, 1)
        _shaped(self, "share", np.float64, 1)
        nodes, leaf = np.arange(len(self.left)), self.left == 0
        if any(len(a) != len(nodes) for a in (self.right, self.feature, self.cut, self.share)) or not len(self.roots):
            raise ValueError("forest: expected left, right, feature, cut and share of one length, and a root")
        later = [(a[~leaf] > nodes[~leaf]).all() and (a < len(nodes)).all() for a in (self.left, self.right)]
        rooted = ((self.roots >= 0) & (self.roots < len(nodes))).all()
        if not all(later) or not rooted or (self.left < 0).any() or (self.feature < 0).any():
            raise ValueError("forest: expected every child behind its parent, got other indices")


@dataclass
class Softmax(Detector):
    """1 - the maximum softmax probability (Hendrycks and Gimpel, ICLR 2017), a baseline that needs no gate."""

    name = "softmax"

    def score(self, outputs: Outputs) -> NDArray[np.float64]:
        logits = torch.from_numpy(outputs.logits.astype(np.float64))
        return 1 - logits.softmax(1).max(1).values.numpy()

    def check(self) -> None:
        pass


@dataclass
class Mahalanobis(Detector):
    """Squared Mahalanobis distance of the features to the nearest class mean (Lee et al., NeurIPS 2018; the last layer
    alone), a baseline that needs no gate. means (C, K), precision (K, K) float64."""

    name = "mahalanobis"
    means: Array
    precision: Array

    @classmethod
    def fit(cls, benign: Outputs, labels: NDArray[np.int64]) -> Mahalanobis:
        """Class means and their common covariance, shrunk (Ledoit and Wolf) as there are few images a filter; classes
        without an image are left out. Needs scikit-learn."""
        from sklearn.covariance import ledoit_wolf

        features, seen = benign.features.astype(np.float64), np.unique(labels)
        means = np.stack([features[labels == c].mean(0) for c in seen])
        covariance, _ = ledoit_wolf(features - means[np.searchsorted(seen, labels)], assume_centered=True)
        return cls(means, np.linalg.pinv(covariance, hermitian=True))

    def score(self, outputs: Outputs) -> NDArray[np.float64]:
        gap = outputs.features.astype(np.float64)[:, None] - self.means
        return ((gap @ self.precision) * gap).sum(2).min(1)

    def check(self) -> None:
        _shaped(self, "means", np.float64, 2)
        _shaped(self, "precision", np.float64, 2)
        if not len(self.means) or self.precision.shape != (self.means.shape[1],) * 2:
            raise ValueError(f"mahalanobis: means {self.means.shape} and precision {self.precision.shape} do not fit")


DETECTORS: dict[str, type[Detector]] = {c.name: c for c in (Forest, GateRegression, OutsideShare, Softmax, Mahalanobis)}


def _targets(benign: Outputs, attacked: Outputs) -> NDArray[np.int64]:
    if not len(benign.features) or not len(attacked.features):
        raise ValueError(
            f"a detector is fitted on benign and attacked images, got {len(benign.features)} and "
            f"{len(attacked.features)}"
        )
    return np.repeat([0, 1], [len(benign.features), len(attacked.features)])


def _shaped(detector: Detector, field: str, dtype: type, dims: int) -> None:
    array = getattr(detector, field)
    if array.dtype != dtype or array.ndim != dims or not np.isfinite(array).all():
        raise ValueError(
            f"{detector.name}: {field} must be finite {np.dtype(dtype).name} with {dims} dimensions, got {array.dtype} "
            f"{array.shape}"
        )


def load_detector(path: str | Path) -> Detector:
    """The detector in a file that Detector.save wrote; OSError or ValueError with one sentence."""
    from safetensors import SafetensorError, safe_open

    file = Path(path)
    try:
        with safe_open(file, framework="np") as archive:
            name = (archive.metadata() or {}).get("detector")
            arrays = {key: archive.get_tensor(key) for key in archive.keys()}
    except SafetensorError as error:
        raise ValueError(
            f"{file}: expected a readable .safetensors file, got one that fails with: {reason(error)}"
        ) from None
    if name not in DETECTORS:
        raise ValueError(f"{file}: expected one of the detectors {', '.join(DETECTORS)}, got {name!r}")
    kind = DETECTORS[name]
    fields = {f.name for f in dataclasses.fields(kind)}
    if arrays.keys() != fields or arrays["threshold"].shape != ():
        raise ValueError(f"{file}: expected the arrays {', '.join(sorted(fields))}, got {name_list(arrays)}")
    threshold = float(arrays.pop("threshold"))
    if np.isnan(threshold):
        raise ValueError(f"{file}: threshold must be a number, got NaN")
    detector = kind(**arrays, threshold=threshold)
    try:
        detector.check()
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return detector
