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
from csg_ext._text import aligned, name_list
from csg_ext.nn.attach import AttachedModel
from csg_ext.nn.gate import GatedModel, TwoPaths
from csg_ext.nn.locate import evaluating
from csg_ext.remarks import filter_remarks

CONFIDENCE, RESAMPLES, SPLITS, PERMUTATIONS, BINS = 0.95, 2000, 100, 2000, 15
_OWNERS = {"mi": "mutual information", "gate": "the gate"}
_FEWEST = 4  # samples that mutual information needs: its neighbours and one more
_LEAST = 8  # test samples from which the interval of MIS is made
_CLOSE = 0.02  # of the largest score without the bias: half precision, not another layer
_SPLIT_HALF = ("mis", "mis_normalized", "mis_ceiling")


@dataclass
class Evaluation:
    """One network measured on N test samples; docs/evaluation.md says what every number is.

    numbers: every measure by its name, NaN where it has no value. hits: whether each sample is right, (N,) bool, for
    every measure that is an accuracy. features (N, K), logits (N, C), labels (N,): what was measured. mi (K, C): mutual
    information in nats, 0 for dead filters. gate (C, K), None where it was not trained. owners: the class of every
    filter, (K,), -1 for none, by "gate" and by "mi", as far as there are a trained gate and training samples. dead
    (K,): the filters with one and the same feature on all test samples. confusion (C, C): counts, true classes down.
    similarity (K, K) of the filters' kernels, None where no convolution makes the map. remarks: what is said of dead
    filters, of classes without a filter and of what could not be measured.
    """

    numbers: dict[str, float]
    hits: dict[str, NDArray[np.bool_]]
    features: NDArray[np.float32]
    logits: NDArray[np.float32]
    labels: NDArray[np.int64]
    mi: NDArray[np.float64]
    gate: NDArray[np.float32] | None
    owners: dict[str, NDArray[np.int64]]
    dead: NDArray[np.bool_]
    confusion: NDArray[np.int64]
    similarity: NDArray[np.float64] | None
    remarks: list[str]

    @property
    def filter_classes(self) -> NDArray[np.int64] | None:
        """The class of every filter, (K,): by the gate, else by mutual information, else None."""
        return self.owners.get("gate", self.owners.get("mi"))


class Outputs(NamedTuple):
    """What the STD path gives for N samples: pooled features (N, K), logits (N, C), fp32, and their labels (N,)."""

    features: NDArray[np.float32]
    logits: NDArray[np.float32]
    labels: NDArray[np.int64]


def evaluate_model(
    model: GatedModel | AttachedModel,
    test: Iterable[Any],
    train: Iterable[Any] | None = None,
    *,
    classes: Sequence[str] | None = None,
    seed: int = 0,
) -> Evaluation:
    """Measures a gated module by its STD path: all that `csg-ext evaluate` measures, and its table.

    The module is in evaluation mode meanwhile, batches go to the gate's device, the network computes in its own
    precision, or in that of the caller's autocast. A gate that is constant, as before training, counts as none.

    Args:
        model: a GatedModel, or what csg_ext.attach returned.
        test: a data loader, or any iterable of batches (x, labels): what the model takes, and labels of integers (N,)
            in [0, C).
        train: the same of training samples, from which each filter gets its class by mutual information, so that no
            test label chooses a filter: all of them count. Compare two networks with the same ones. None leaves the
            measures by it out.
        classes: the C classes' names for remarks; None numbers them.
        seed: of the block score's permutations.

    Raises:
        TypeError: a model that is not gated, batches that are not (x, labels) of tensors, names that are none.
        ValueError: labels or names that do not fit, values that are not finite, fewer than four samples, one class.

    Example:
        >>> from csg_ext.analysis import evaluate_model, evaluation_table
        >>> from csg_ext.nn import GatedModel
        >>> model = GatedModel(torch.nn.Conv2d(3, 8, 3), num_classes=2, num_filters=8)
        >>> batches = [(torch.randn(16, 3, 8, 8), torch.arange(16) % 2) for _ in range(4)]
        >>> found = evaluate_model(model, batches)
        >>> len(found.features), evaluation_table({"mine": found}).splitlines()[0].split()
        (64, ['mine'])
    """
    if not isinstance(model, TwoPaths):
        raise TypeError(
            "evaluate_model: model must be a GatedModel or what csg_ext.attach returned, not what wraps it "
            f"(DistributedDataParallel's .module, GatedTraining's .model), got {type(model).__name__}"
        )
    if isinstance(classes, str) or not all(isinstance(name, str) for name in (() if classes is None else classes)):
        raise TypeError(f"evaluate_model: classes must be the classes' names or None, got {classes!r:.100}")
    if seed < 0:
        raise ValueError(f"evaluate_model: seed must be at least 0, got {seed}")
    measured = collect(model, test, "test")
    training = None if train is None else collect(model, train, "train")
    return evaluate_outputs(model, measured, training, classes, seed)


def collect(model: TwoPaths, batches: Iterable[Any], name: str) -> Outputs:
    """What the STD path gives for all samples of the batches (x, labels); `name` stands in the errors."""
    if not isinstance(batches, Iterable):
        raise TypeError(f"evaluate_model: {name} must give batches (x, labels), got {type(batches).__name__}")
    features, logits, labels = [], [], []
    with evaluating(model), torch.inference_mode():
        for batch in batches:
            x, y = _checked(batch, name)
            if not len(x):
                continue
            pooled, scores = model.features_and_logits(x.to(model.gate.device, non_blocking=True))
            if scores.shape[1] < 2:
                raise ValueError("evaluate_model: model must give two logits or more, got one")
            if not 0 <= int(y.min()) <= int(y.max()) < scores.shape[1]:
                raise ValueError(
                    f"evaluate_model: {name} must give labels in [0, {scores.shape[1]}), got {int(y.min())} to "
                    f"{int(y.max())}"
                )
            features.append(pooled.float().cpu())
            logits.append(scores.float().cpu())
            labels.append(y.cpu().long())
    count = sum(map(len, labels))
    if count < _FEWEST:
        raise ValueError(f"evaluate_model: {name} must give at least {_FEWEST} samples, got {count}")
    found = Outputs(*(torch.cat(part).numpy() for part in (features, logits, labels)))
    if len(np.unique(found.labels)) < 2:
        raise ValueError(f"evaluate_model: {name} must give two classes or more, got class {found.labels[0]} only")
    bad = int((~np.isfinite(found.features)).sum() + (~np.isfinite(found.logits)).sum())
    if bad:
        raise ValueError(f"evaluate_model: model must give finite features and logits, got {bad} others on {name}")
    return found


def _checked(batch: Any, name: str) -> tuple[Tensor, Tensor]:
    """The batch's x (N, ...) and labels (N,)."""
    if not isinstance(batch, tuple | list) or len(batch) < 2 or not all(isinstance(t, Tensor) for t in batch[:2]):
        inside = f" of {', '.join(type(t).__name__ for t in batch)}" if isinstance(batch, tuple | list) else ""
        raise TypeError(
            f"evaluate_model: {name} must give batches (x, labels) of tensors, got {type(batch).__name__}{inside}"
        )
    x, y = batch[:2]
    integers = not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool)
    if y.dim() != 1 or not integers or x.dim() < 1 or len(y) != len(x):
        raise ValueError(
            f"evaluate_model: {name} must give labels of integers, one for each sample of x {tuple(x.shape)}, "
            f"got {y.dtype} {tuple(y.shape)}"
        )
    return x, y


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
    if not np.isfinite(gate).all():
        raise ValueError(f"evaluate_model: model must have a finite gate, got {int((~np.isfinite(gate)).sum())} others")
    trained = bool((gate != gate[0, 0]).any())
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
    said = []
    if train is not None:
        owners["mi"] = _classes_by_mi(train)
        unseen = np.setdiff1d(np.arange(count), train.labels)
        if len(unseen):
            names = name_list([classes[c] for c in unseen])
            said.append(f"No filter gets these classes by mutual information, as no training sample has them: {names}.")
    if trained:
        owners["gate"] = np.where(dead, -1, gate.argmax(0))
        numbers["l1_density"] = model.csg.density()
        numbers["class_agreement"] = metrics.class_agreement(gate, mi, features, labels)
    if linear is not None:
        weight, bias = linear
        hits["weight_own_accuracy"] = metrics.own_filter_predictions(features, weight, bias, weight) == labels
        if trained:
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
        said.append(
            "No accuracy of single filters: the logits are not one linear layer of the pooled features (another head, "
            "an earlier layer, or filters that are forgotten)."
        )
    similarity = _kernel_similarity(model)
    for key, owner in owners.items():
        live = owner >= 0
        if similarity is not None:
            block = metrics.block_score(similarity[live][:, live], owner[live], permutations=PERMUTATIONS, seed=seed)
            numbers[f"block_score_{key}"], numbers[f"block_score_p_value_{key}"] = block.score, block.p_value
        numbers[f"classes_without_filter_{key}"] = count - len(np.unique(owner[live]))
    numbers |= {name: float(hit.mean()) for name, hit in hits.items()}
    confusion = multiclass_confusion_matrix(scores.argmax(1), targets, count).numpy()
    key = next((key for key in ("gate", "mi") if key in owners), "")
    if key:
        said += filter_remarks(owners[key], dead, classes, _OWNERS[key])
    return Evaluation(
        numbers=numbers,
        hits=hits,
        features=features,
        logits=logits,
        labels=labels,
        mi=mi,
        gate=gate if trained else None,
        owners=owners,
        dead=dead,
        confusion=confusion,
        similarity=similarity,
        remarks=said,
    )


def _kernel_similarity(model: TwoPaths) -> NDArray[np.float64] | None:
    """metrics.kernel_similarity of the convolution that makes the gated map; None for tokens, and where none makes
    it."""
    if not isinstance(model, AttachedModel):
        return metrics.kernel_similarity(model, model.csg.num_filters)
    plan = model.plan
    if plan.channel_dim != 1:
        return None
    return metrics.kernel_similarity(model.model, plan.num_filters, plan.layer.name, plan.layer.side)


def _classifier(model: TwoPaths, outputs: Outputs) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """(weight, bias) of the linear layer that makes the logits from the pooled features; None where none does."""
    layer = getattr(model, "classifier", None)
    if not isinstance(layer, nn.Linear) or layer.in_features != outputs.features.shape[1]:
        return None
    weight = layer.weight.detach().float().cpu().numpy()
    bias = np.zeros(len(weight), np.float32) if layer.bias is None else layer.bias.detach().float().cpu().numpy()
    scores, said = outputs.features @ weight.T, outputs.logits - bias if len(bias) == outputs.logits.shape[1] else None
    if said is None or np.abs(scores - said).max() > _CLOSE * np.abs(scores).max():
        return None
    return weight, bias


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

    Both must be measured on the same test samples, in the same order, and with the same training samples: labels that
    differ raise ValueError, what else differs is not seen. Measures without an interval have low, high and method None.
    """
    from tqdm import tqdm

    if not isinstance(first, Evaluation) or not isinstance(second, Evaluation):
        kinds = f"{type(first).__name__} and {type(second).__name__}"
        raise TypeError(f"evaluation_differences: first and second must be what evaluate_model returned, got {kinds}")
    labels = first.labels
    if not np.array_equal(labels, second.labels):
        raise ValueError(
            "evaluation_differences: first and second must be measured on the same samples in the same order, "
            f"got {len(labels)} and {len(second.labels)} samples whose labels differ"
        )
    if first.logits.shape != second.logits.shape:
        raise ValueError(
            "evaluation_differences: first and second must have as many classes, "
            f"got {first.logits.shape[1]} and {second.logits.shape[1]}"
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
    if not isinstance(evaluations, Mapping):
        raise TypeError(
            "evaluation_table: evaluations must be a mapping from names to what evaluate_model returned, "
            f"got {type(evaluations).__name__}"
        )
    names = list(evaluations)
    if not names or not all(isinstance(e, Evaluation) for e in evaluations.values()):
        kinds = ", ".join(type(e).__name__ for e in evaluations.values()) or "none"
        raise TypeError(f"evaluation_table: evaluations must be what evaluate_model returned, by name, got {kinds}")
    if difference is not None and len(names) != 2:
        raise ValueError(f"evaluation_table: difference must be that of two evaluations, got {len(names)}")
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
