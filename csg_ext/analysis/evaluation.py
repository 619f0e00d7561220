"""Every measure of one network, or of two side by side: what `csg-ext evaluate` prints, for any gated module."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from csg_ext import metrics
from csg_ext._text import aligned
from csg_ext.nn.gate import TwoPaths
from csg_ext.nn.locate import evaluating
from csg_ext.remarks import filter_remarks

CONFIDENCE, RESAMPLES, SPLITS, PERMUTATIONS, BINS = 0.95, 2000, 100, 2000, 15
_OWNERS = {"mi": "mutual information", "gate": "the gate"}
_LEAST = 8  # test samples from which the interval of MIS is made
_CLOSE = 0.02  # of the largest logit: half precision, not another layer
_SPLIT_HALF = ("mis", "mis_normalized", "mis_ceiling")


@dataclass
class Evaluation:
    """One network measured on N test samples; docs/evaluation.md says what every number is.

    numbers: every measure by its name, NaN where it has no value. hits: whether each sample is right, (N,) bool, for
    every measure that is an accuracy. features (N, K), logits (N, C), labels (N,): what was measured. confusion (C, C):
    counts, true classes down. similarity (K, K) of the filters' kernels, None where no convolution makes the last map.
    filter_classes (K,): by the gate where one was trained, else by mutual information where training samples were
    given, else None; -1 for dead filters. dead (K,): those with one and the same feature on all test samples. remarks:
    what is said of them, of classes without a filter and of what could not be measured.
    """

    numbers: dict[str, float]
    hits: dict[str, NDArray[np.bool_]]
    features: NDArray[np.float32]
    logits: NDArray[np.float32]
    labels: NDArray[np.int64]
    confusion: NDArray[np.int64]
    similarity: NDArray[np.float64] | None
    filter_classes: NDArray[np.int64] | None
    dead: NDArray[np.bool_]
    remarks: list[str]


class Outputs(NamedTuple):
    """What the STD path gives for N samples: pooled features (N, K), logits (N, C), fp32, and their labels (N,)."""

    features: NDArray[np.float32]
    logits: NDArray[np.float32]
    labels: NDArray[np.int64]


def evaluate_model(
    model: TwoPaths,
    test: Iterable[Any],
    train: Iterable[Any] | None = None,
    *,
    classes: Sequence[str] | None = None,
    seed: int = 0,
) -> Evaluation:
    """Measures a gated module by its STD path: all that `csg-ext evaluate` measures, and its table.

    The module is in evaluation mode meanwhile, batches go to the gate's device, nothing is computed under autocast
    unless the caller opens one. A gate that is constant, as before training, counts as none.

    Args:
        model: a GatedModel, or what csg_ext.attach returned.
        test: a data loader, or any iterable of batches (x, labels), labels int64 (N,) in [0, C).
        train: the same of training samples, from which each filter gets its class by mutual information, so that no
            test label chooses a filter; the first batches count, as many samples as the test set has. None leaves the
            measures by it out.
        classes: the C classes' names for remarks; None numbers them.
        seed: of the draws that mutual information and the permutations need.

    Raises:
        TypeError: a model that is not gated, batches that are not (x, labels).
        ValueError: labels or names that do not fit, fewer than four samples, fewer than two classes.

    Example:
        >>> from csg_ext.analysis import evaluate_model, evaluation_table
        >>> from csg_ext.nn import GatedModel
        >>> model = GatedModel(torch.nn.Conv2d(3, 8, 3), num_classes=2, num_filters=8)
        >>> batches = [(torch.randn(16, 3, 8, 8), torch.arange(16) % 2) for _ in range(4)]
        >>> found = evaluate_model(model, batches)
        >>> len(found.features), evaluation_table({"mine": found}).splitlines()[0].split()
        (64, ['mine'])
    """
    if not callable(getattr(model, "features_and_logits", None)):
        raise TypeError(
            f"evaluate_model: model must be a GatedModel or what csg_ext.attach returned, got {type(model).__name__}"
        )
    measured = collect(model, test, "test")
    training = None if train is None else collect(model, train, "train", len(measured.labels))
    return evaluate_outputs(model, measured, training, classes, seed)


def collect(model: TwoPaths, batches: Iterable[Any], name: str, most: int | None = None) -> Outputs:
    """What the STD path gives for all samples of the batches (x, labels), or for the first `most`; `name` stands in
    the errors."""
    features, logits, labels = [], [], []
    device, count = model.gate.device, 0
    with evaluating(model), torch.inference_mode():
        for batch in batches:
            if not isinstance(batch, (tuple, list)) or len(batch) < 2 or not isinstance(batch[1], Tensor):
                raise TypeError(f"evaluate_model: {name} must give batches (x, labels), got {type(batch).__name__}")
            x, y = batch[0].to(device, non_blocking=True), batch[1]
            if y.dim() != 1 or y.is_floating_point() or len(y) != len(x):
                raise ValueError(
                    f"evaluate_model: {name} must give labels of integers, ({len(x)},) like its samples, "
                    f"got {y.dtype} {tuple(y.shape)}"
                )
            pooled, scores = model.features_and_logits(x)
            if len(y) and not 0 <= int(y.min()) <= int(y.max()) < scores.shape[1]:
                raise ValueError(
                    f"evaluate_model: {name} must give labels in [0, {scores.shape[1]}), got {int(y.min())} to "
                    f"{int(y.max())}"
                )
            features.append(pooled.float().cpu())
            logits.append(scores.float().cpu())
            labels.append(y.cpu().long())
            count += len(y)
            if most is not None and count >= most:
                break
    if not count:
        raise ValueError(f"evaluate_model: {name} must give at least one batch, got none")
    joined = (torch.cat(part)[:most].numpy() for part in (features, logits, labels))
    return Outputs(*joined)


def evaluate_outputs(
    model: TwoPaths, test: Outputs, train: Outputs | None, classes: Sequence[str] | None = None, seed: int = 0
) -> Evaluation:
    """evaluate_model from what the STD path gave; of the model only weights are read."""
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    features, logits, labels = test
    count = logits.shape[1]
    classes = [str(c) for c in range(count)] if classes is None else list(classes)
    if len(classes) != count:
        raise ValueError(f"evaluate_model: classes must be the names of {count} classes, got {len(classes)}")
    gate = model.gate.detach().float().cpu().numpy()
    linear = _classifier(model, test)
    scores, targets = torch.from_numpy(logits), torch.from_numpy(labels)
    mi = metrics.class_mutual_info(features, labels, num_classes=count)
    dead = metrics.dead_filters(features)
    mi[dead] = 0
    numbers = _mutual_information(mi, logits, labels) | {
        "mis_bound": float(metrics.class_entropy(labels, count).max()),
        "calibration_error": _calibration_error(scores, targets),
        "dead_filters": int(dead.sum()),
    }
    ceilings = metrics.class_mutual_info(logits, labels, num_classes=count).diagonal()
    numbers |= metrics.specificity(features, labels, mi, None if linear is None else linear[0], ceilings)
    hits = {"accuracy": logits.argmax(1) == labels}
    owners: dict[str, NDArray[np.int64]] = {}
    if train is not None:
        owners["mi"] = _classes_by_mi(train)
    if (gate != gate[0, 0]).any():
        owners["gate"] = np.where(dead, -1, gate.argmax(0))
        numbers["l1_density"] = model.csg.density()
        numbers["class_agreement"] = metrics.class_agreement(gate, mi, features, labels)
    said = []
    if linear is not None:
        weight, bias = linear
        hits["weight_own_accuracy"] = metrics.own_filter_predictions(features, weight, bias, weight) == labels
        if "gate" in owners:
            hits["one_hot_accuracy"] = metrics.own_filter_predictions(features, weight, bias, gate) == labels
        for key, owner in owners.items():
            for name, kept, complement in (
                ("predicted_class_accuracy", logits.argmax(1), False),
                ("cluster_accuracy", labels, False),
                ("complement_accuracy", labels, True),
            ):
                found = metrics.cluster_predictions(features, weight, bias, owner, kept, complement=complement)
                hits[f"{name}_{key}"] = found == labels
    else:
        said.append("No accuracy of single filters: the logits are not one linear layer of the pooled features.")
    similarity = metrics.kernel_similarity(model, gate.shape[1])
    for key, owner in owners.items():
        live = owner >= 0
        if similarity is not None:
            block = metrics.block_score(similarity[live][:, live], owner[live], permutations=PERMUTATIONS, seed=seed)
            numbers[f"block_score_{key}"], numbers[f"block_score_p_value_{key}"] = block.score, block.p_value
        numbers[f"classes_without_filter_{key}"] = count - len(np.unique(owner[live]))
    numbers |= {name: float(hit.mean()) for name, hit in hits.items()}
    confusion = multiclass_confusion_matrix(scores.argmax(1), targets, count).numpy()
    chosen = owners.get("gate", owners.get("mi"))
    if chosen is not None:
        said += filter_remarks(chosen, dead, classes, _OWNERS["gate" if "gate" in owners else "mi"])
    return Evaluation(numbers, hits, features, logits, labels, confusion, similarity, chosen, dead, said)


def _classifier(model: TwoPaths, outputs: Outputs) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """(weight, bias) of the linear layer that makes the logits from the pooled features; None where none does."""
    layer = getattr(model, "classifier", None)
    if not isinstance(layer, nn.Linear) or layer.in_features != outputs.features.shape[1]:
        return None
    weight = layer.weight.detach().float().cpu().numpy()
    bias = np.zeros(len(weight), np.float32) if layer.bias is None else layer.bias.detach().float().cpu().numpy()
    scores = outputs.features @ weight.T + bias
    close = scores.shape == outputs.logits.shape and np.allclose(
        scores, outputs.logits, rtol=0, atol=_CLOSE * float(np.abs(outputs.logits).max(initial=0))
    )
    return (weight, bias) if close else None


def _calibration_error(logits: Tensor, labels: Tensor) -> float:
    """The expected calibration error of logits (N, C), labels (N,)."""
    from torchmetrics.functional.classification import multiclass_calibration_error

    below = torch.nextafter(torch.ones(()), torch.zeros(()))  # torchmetrics gives what is exactly 1 a bin of its own
    probabilities = logits.softmax(1).minimum(below)
    return float(multiclass_calibration_error(probabilities, labels, logits.shape[1], n_bins=BINS, norm="l1"))


def _mutual_information(mi: NDArray[Any], logits: NDArray[Any], labels: NDArray[np.int64]) -> dict[str, float]:
    """The measures named in _SPLIT_HALF, of mi (K, C)."""
    bound = metrics.class_entropy(labels, mi.shape[1])
    normalized = np.divide(mi, bound, out=np.zeros_like(mi), where=bound > 0)
    return {
        "mis": metrics.mutual_information_score(mi),
        "mis_normalized": metrics.mutual_information_score(normalized),
        "mis_ceiling": metrics.mis_ceiling(logits, labels),
    }


def _classes_by_mi(train: Outputs) -> NDArray[np.int64]:
    """The class that every filter tells most about on training samples, -1 for one that is dead on them."""
    mi = metrics.class_mutual_info(train.features, train.labels, num_classes=train.logits.shape[1])
    own = metrics.best_class(mi, train.features, train.labels)
    return np.where(metrics.dead_filters(train.features), -1, own)


def evaluation_differences(first: Evaluation, second: Evaluation, *, seed: int = 0) -> dict[str, dict[str, Any]]:
    """second - first of every measure that both have: {name: {difference, low, high, method}}; see docs/evaluation.md.

    Both must be measured on the same samples, in the same order: labels that differ raise ValueError. Measures without
    an interval have low, high and method None.
    """
    from tqdm import tqdm

    labels = first.labels
    if not np.array_equal(labels, second.labels) or first.logits.shape != second.logits.shape:
        raise ValueError(
            "evaluation_differences: first and second must be measured on the same samples in the same order, "
            f"got {len(labels)} and {len(second.labels)} samples whose labels differ"
        )
    found: dict[str, dict[str, Any]] = {}
    for name, value in second.numbers.items():
        if name in first.numbers and "p_value" not in name:
            found[name] = {"difference": value - first.numbers[name], "low": None, "high": None, "method": None}
    for name in first.hits.keys() & second.hits.keys():
        interval = metrics.paired_bootstrap(
            first.hits[name], second.hits[name], resamples=RESAMPLES, confidence=CONFIDENCE, seed=seed
        )
        found[name] = interval._asdict() | {"method": "paired bootstrap"}

    def scores(e: Evaluation, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        mi = metrics.class_mutual_info(e.features[rows], labels[rows], num_classes=e.logits.shape[1])
        mi[metrics.dead_filters(e.features[rows])] = 0
        measured = _mutual_information(mi, e.logits[rows], labels[rows])
        return np.array([measured[name] for name in _SPLIT_HALF])

    if len(labels) < _LEAST:  # the estimate needs four samples in every half
        return found
    with tqdm(total=2 * SPLITS + 1, desc="interval of MIS", unit="", disable=None, leave=False) as bar:

        def change(rows: NDArray[np.int64]) -> NDArray[np.float64]:
            bar.update()
            return scores(second, rows) - scores(first, rows)

        intervals = metrics.split_half_interval(change, len(labels), splits=SPLITS, confidence=CONFIDENCE, seed=seed)
    for name, interval in zip(_SPLIT_HALF, intervals, strict=True):
        found[name] = interval._asdict() | {"method": "split halves"}
    return found


_ROWS = (
    ("accuracy", "accuracy (STD path: no label is used)", "%"),
    ("one_hot_accuracy", "  each class scored by its own filters only (one-hot gate)", "%"),
    ("weight_own_accuracy", "  the same, own by the largest classifier weight", "%"),
    ("predicted_class_accuracy_gate", "  filters of the predicted class only, by the gate", "%"),
    ("predicted_class_accuracy_mi", "  filters of the predicted class only, by MI", "%"),
    ("calibration_error", f"expected calibration error, {BINS} bins", "%"),
    ("mis", "MIS: mutual information filter-class, nats", ".4f"),
    ("mis_ceiling", "  its ceiling: the network's own class scores", ".4f"),
    ("mis_bound", "  its bound: the largest entropy of a class", ".4f"),
    ("mis_normalized", "  MIS, each class divided by its own entropy", ".4f"),
    ("mis_of_ceiling", "  a filter's MI over its class's ceiling, mean", ".4f"),
    ("exclusivity", "exclusivity: 1 - second / first MI of a filter, mean", ".4f"),
    ("class_selectivity", "class-selectivity index of the filters, mean", ".4f"),
    ("quiet_filters", "filters that are quiet for their MI class", "%"),
    ("l1_density", "L1-density of the gate", ".4f"),
    ("class_agreement", "filters whose gate class is their MI class", "%"),
    ("weight_agreement", "filters whose largest classifier weight is their MI class's", "%"),
    ("cluster_accuracy_gate", "filters of the true class only (the label is used), by the gate", "%"),
    ("complement_accuracy_gate", "  those filters removed", "%"),
    ("cluster_accuracy_mi", "filters of the true class only (the label is used), by MI", "%"),
    ("complement_accuracy_mi", "  those filters removed", "%"),
    ("dead_filters", "dead filters: one activation on all test images", "d"),
    ("block_score_gate", "similarity of kernels, within less between classes, by the gate", ".4f"),
    ("block_score_p_value_gate", "  p-value (permutation)", ".4f"),
    ("classes_without_filter_gate", "  classes without a filter", "d"),
    ("block_score_mi", "similarity of kernels, within less between classes, by MI", ".4f"),
    ("block_score_p_value_mi", "  p-value (permutation)", ".4f"),
    ("classes_without_filter_mi", "  classes without a filter", "d"),
)


def _show(value: float | None, kind: str, sign: str = "") -> str:
    if value is None or math.isnan(value):
        return "-"
    return f"{value:{sign}.2%}" if kind == "%" else f"{int(value):{sign}d}" if kind == "d" else f"{value:{sign}{kind}}"


def _show_difference(d: dict[str, Any], kind: str) -> str:
    scale, kind, unit = (100, ".2f", " points") if kind == "%" else (1, kind, "")
    low, middle, high = (
        _show(None if d[key] is None else scale * d[key], kind, "+") for key in ("low", "difference", "high")
    )
    return middle + (f" [{low}, {high}]" if d["low"] is not None else "") + (unit if middle != "-" else "")


def evaluation_table(evaluations: Mapping[str, Evaluation], difference: Mapping[str, Any] | None = None) -> str:
    """Aligned text: a line for each measure, a column for each network by its name, and what is said of them below.

    difference: evaluation_differences of the first and the second, as a column more.
    """
    names = list(evaluations)
    lines = [["", *names]]
    if difference:
        lines[0].append(f"{names[1]} - {names[0]} [{CONFIDENCE:.0%} interval]")
    for key, text, kind in _ROWS:
        values = [e.numbers.get(key) for e in evaluations.values()]
        if all(value is None for value in values):
            continue
        cells = [text, *(_show(value, kind) for value in values)]
        if difference and key in difference:
            cells.append(_show_difference(difference[key], kind))
        lines.append(cells)
    remarks = [f"{name}: {said}" for name, e in evaluations.items() for said in e.remarks]
    return "\n".join([*aligned(lines, len(names) + 1), *remarks]) + "\n"
