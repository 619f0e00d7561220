"""The command `csg-ext evaluate`: one checkpoint measured, or two side by side with their difference."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from csg_ext import metrics
from csg_ext._text import aligned
from csg_ext.data import ImageData
from csg_ext.nn.gate import GatedModel
from csg_ext.remarks import filter_remarks
from csg_ext.runs import (
    StoredModel,
    chosen_files,
    heading,
    read_checkpoint,
    restore,
    source_images,
    training_statistics,
)
from csg_ext.training.files import atomic_file, write_text

NUMBERS = "evaluation.json"
CONFIDENCE, RESAMPLES, SPLITS, PERMUTATIONS, BINS = 0.95, 2000, 100, 2000, 15
_OWNERS = {"mi": "mutual information", "gate": "the gate"}
_LEAST = 8  # test images from which the interval of MIS is made
_SPLIT_HALF = ("mis", "mis_normalized", "mis_ceiling")
Statistics = tuple[list[float], list[float]]


@dataclass
class Evaluation:
    """One network measured on N test samples.

    numbers: every measure by its name, NaN where it has no value. hits: whether each sample is right, (N,) bool, for
    every measure that is an accuracy. confusion (C, C): counts, true classes down. similarity (K, K) of the filters'
    kernels, None where no convolution makes the last map. filter_classes (K,): by the gate where one was trained, else
    by mutual information; -1 for dead filters. dead (K,): those with one and the same feature on all test samples.
    remarks: what is said of them and of classes without a filter.
    """

    numbers: dict[str, float]
    hits: dict[str, NDArray[np.bool_]]
    features: NDArray[np.float32]
    logits: NDArray[np.float32]
    confusion: NDArray[np.int64]
    similarity: NDArray[np.float64] | None
    filter_classes: NDArray[np.int64]
    dead: NDArray[np.bool_]
    remarks: list[str]


def evaluate_model(model: GatedModel, data: ImageData, statistics: Statistics, seed: int = 0) -> Evaluation:
    """Measures a model on the test part through its STD path; docs/evaluation.md says what every number is.

    statistics: mean and deviation of the channels that the model was trained with (ImageData.statistics). The filters'
    classes by mutual information come from images of the train part, so that no test label chooses a filter. A gate
    that is constant, as before training, counts as none.
    """
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    from csg_ext.training.arm import predict

    features, logits = predict(model, data.test_images, statistics)
    labels, classes = data.test_labels, len(data.classes)
    weight, bias, gate = (
        p.detach().cpu().numpy() for p in (model.classifier.weight, model.classifier.bias, model.gate)
    )
    scores, targets = torch.from_numpy(logits), torch.from_numpy(labels)
    mi = metrics.class_mutual_info(features, labels, num_classes=classes)
    dead = metrics.dead_filters(features)
    mi[dead] = 0
    numbers = _mutual_information(mi, logits, labels) | {
        "mis_bound": float(metrics.class_entropy(labels, classes).max()),
        "calibration_error": _calibration_error(scores, targets),
        "dead_filters": int(dead.sum()),
    }
    ceilings = metrics.class_mutual_info(logits, labels, num_classes=classes).diagonal()
    numbers |= metrics.specificity(features, labels, mi, weight, ceilings)
    own = metrics.own_filter_predictions(features, weight, bias, weight)
    hits = {"accuracy": logits.argmax(1) == labels, "weight_own_accuracy": own == labels}
    owners = {"mi": _classes_on_train_part(model, data, statistics, seed)}
    if (gate != gate[0, 0]).any():
        owners["gate"] = np.where(dead, -1, gate.argmax(0))
        hits["one_hot_accuracy"] = metrics.own_filter_predictions(features, weight, bias, gate) == labels
        numbers["l1_density"] = model.csg.density()
        numbers["class_agreement"] = metrics.class_agreement(gate, mi, features, labels)
    similarity = metrics.kernel_similarity(model, gate.shape[1])
    for key, owner in owners.items():
        for name, kept, complement in (
            ("predicted_class_accuracy", logits.argmax(1), False),
            ("cluster_accuracy", labels, False),
            ("complement_accuracy", labels, True),
        ):
            found = metrics.cluster_predictions(features, weight, bias, owner, kept, complement=complement)
            hits[f"{name}_{key}"] = found == labels
        live = owner >= 0
        if similarity is not None:
            block = metrics.block_score(similarity[live][:, live], owner[live], permutations=PERMUTATIONS, seed=seed)
            numbers[f"block_score_{key}"], numbers[f"block_score_p_value_{key}"] = block.score, block.p_value
        numbers[f"classes_without_filter_{key}"] = classes - len(np.unique(owner[live]))
    numbers |= {name: float(hit.mean()) for name, hit in hits.items()}
    confusion = multiclass_confusion_matrix(scores.argmax(1), targets, classes).numpy()
    key = "gate" if "gate" in owners else "mi"
    said = filter_remarks(owners[key], dead, data.classes, _OWNERS[key])
    return Evaluation(numbers, hits, features, logits, confusion, similarity, owners[key], dead, said)


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


def _classes_on_train_part(model: GatedModel, data: ImageData, statistics: Statistics, seed: int) -> NDArray[np.int64]:
    """The class that every filter tells most about on train images, -1 for one that is dead on them: as many as there
    are test images, at most."""
    from csg_ext.training.arm import predict

    rows = np.random.default_rng(seed).permutation(len(data.train_labels))[: len(data.test_labels)]
    features, _ = predict(model, data.train_images[rows], statistics)
    labels = data.train_labels[rows]
    mi = metrics.class_mutual_info(features, labels, num_classes=len(data.classes))
    return np.where(metrics.dead_filters(features), -1, metrics.best_class(mi, features, labels))


def differences(
    first: Evaluation, second: Evaluation, labels: NDArray[np.int64], seed: int = 0
) -> dict[str, dict[str, Any]]:
    """second - first of every measure that both have, with its interval and how that was made; see docs/evaluation.md.

    Both must be measured on the same samples, in the same order. Measures without an interval have low and high None.
    """
    from tqdm import tqdm

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


def table(report: dict[str, Any]) -> str:
    """The report as aligned text: a line for each measure that a checkpoint has."""
    checkpoints, change = report["checkpoints"], report.get("difference")
    names = [heading(c["name"]) for c in checkpoints]
    lines = [["", *names]]
    if change:
        lines[0].append(f"{names[1]} - {names[0]} [{CONFIDENCE:.0%} interval]")
    for key, text, kind in _ROWS:
        values = [c["measures"].get(key) for c in checkpoints]
        if all(value is None for value in values):
            continue
        cells = [text, *(_show(value, kind) for value in values)]
        if change and key in change:
            cells.append(_show_difference(change[key], kind))
        lines.append(cells)
    remarks = [f"{c['name']}: {said}" for c in checkpoints for said in c["remarks"]]
    return "\n".join([*aligned(lines, len(checkpoints) + 1), *remarks]) + "\n"


def main(arguments: dict[str, Any]) -> int:
    """Runs `csg-ext evaluate` with the parsed arguments; returns the exit status."""
    from csg_ext.training.compare import pick_device

    device, seed = pick_device(arguments["device"]), arguments["seed"]
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    files = chosen_files(arguments["checkpoints"])
    stored = [read_checkpoint(file) for file in files.values()]
    data = source_images(stored, arguments)
    models = [restore(s, data).to(device) for s in stored]
    height, width = data.test_images.shape[2:]
    print(
        f"Measuring on {data.name}: {len(data.test_labels)} test images, {height}x{width}, "
        f"{len(data.classes)} classes.",
        flush=True,
    )
    for name, file in files.items():
        print(f"  {name}: {file}", flush=True)
    measured = []
    for s, model in zip(stored, models, strict=True):
        measured.append(evaluate_model(model, data, training_statistics(s, data), seed))
    report = _report(files, stored, measured, data, seed, device)
    written = _write(Path(arguments["output"]), report, dict(zip(files, measured, strict=True)), data.classes)
    print("\n" + table(report))
    print(f"Written to {arguments['output']}: {', '.join(written)}")
    return 0


def _report(
    files: dict[str, Path],
    stored: list[StoredModel],
    measured: list[Evaluation],
    data: ImageData,
    seed: int,
    device: str,
) -> dict[str, Any]:
    """What evaluation.json holds."""
    from csg_ext.training.compare import versions

    report = {
        "checkpoints": [
            {
                "name": name,
                "file": str(file),
                "model": s.config.model,
                "measures": m.numbers,
                "dead": np.flatnonzero(m.dead).tolist(),
                "remarks": ([f"No measure by the gate: {why}."] if (why := s.why_no_gate()) else []) + m.remarks,
                "confusion": m.confusion.tolist(),
            }
            for (name, file), s, m in zip(files.items(), stored, measured, strict=True)
        ],
        "data": {
            "name": data.name,
            "test": len(data.test_labels),
            "shape": list(data.test_images.shape[1:]),
            "classes": data.classes,
            "sha256": data.fingerprint(),
        },
        "settings": {
            "seed": seed,
            "confidence": CONFIDENCE,
            "resamples": RESAMPLES,
            "splits": SPLITS,
            "permutations": PERMUTATIONS,
            "calibration_bins": BINS,
            "device": device,
        },
        "versions": versions(),
    }
    if len(measured) == 2:
        first, second = measured
        report["difference"] = differences(first, second, data.test_labels, seed)
    return report


def _finite(value: Any) -> Any:
    """The same with None in place of NaN, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(folder: Path, report: dict[str, Any], measured: dict[str, Evaluation], classes: list[str]) -> list[str]:
    from csg_ext import plots

    found = [m.similarity for m in measured.values() if m.similarity is not None]
    top = max((float(np.max(s - np.eye(len(s)))) for s in found), default=0.0)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / NUMBERS, json.dumps(_finite(report), indent=1) + "\n")
    written = [NUMBERS]
    for name, m in measured.items():
        drawn = {"confusion": plots.plot_confusion(m.confusion, classes)}
        if m.similarity is not None:
            drawn["filter_similarity"] = plots.plot_filter_similarity(m.similarity, m.filter_classes, classes, top)
        for stem, (figure, _) in drawn.items():
            written.append(f"{stem}_{name}.png" if len(measured) > 1 else f"{stem}.png")
            with atomic_file(folder / written[-1]) as file:
                figure.savefig(file, format="png")
    return written
