"""The command `csg-ext evaluate`: one checkpoint measured, or two side by side with their difference."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from csg_ext.analysis import evaluation
from csg_ext.analysis.evaluation import Evaluation, Outputs, evaluate_outputs, evaluation_differences, evaluation_table
from csg_ext.data import ImageData
from csg_ext.nn.gate import GatedModel
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


def evaluate_images(
    model: GatedModel, data: ImageData, statistics: tuple[list[float], list[float]], seed: int = 0
) -> Evaluation:
    """Measures a model on the test part; the filters' classes by mutual information come from as many train images.

    statistics: mean and deviation of the channels that the model was trained with (ImageData.statistics).
    """
    from csg_ext.training.arm import predict

    rows = np.random.default_rng(seed).permutation(len(data.train_labels))[: len(data.test_labels)]
    test, train = (
        Outputs(*predict(model, images, statistics), labels)
        for images, labels in (
            (data.test_images, data.test_labels),
            (data.train_images[rows], data.train_labels[rows]),
        )
    )
    return evaluate_outputs(model, test, train, data.classes, seed)


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
        measured.append(evaluate_images(model, data, training_statistics(s, data), seed))
        if why := s.why_no_gate():
            measured[-1].remarks.insert(0, f"No measure by the gate: {why}.")
    report = _report(files, stored, measured, data, seed, device)
    written = _write(Path(arguments["output"]), report, dict(zip(files, measured, strict=True)), data.classes)
    print("\n" + evaluation_table(dict(zip(map(heading, files), measured, strict=True)), report.get("difference")))
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
                "remarks": m.remarks,
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
            "confidence": evaluation.CONFIDENCE,
            "resamples": evaluation.RESAMPLES,
            "splits": evaluation.SPLITS,
            "permutations": evaluation.PERMUTATIONS,
            "calibration_bins": evaluation.BINS,
            "device": device,
        },
        "versions": versions(),
    }
    if len(measured) == 2:
        report["difference"] = evaluation_differences(*measured, seed=seed)
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
        if m.similarity is not None and m.filter_classes is not None:
            drawn["filter_similarity"] = plots.plot_filter_similarity(m.similarity, m.filter_classes, classes, top)
        for stem, (figure, axes) in drawn.items():
            if len(measured) > 1:
                axes.set_title(f"{heading(name)}: {axes.get_title(loc='left')}", loc="left")
            written.append(f"{stem}_{name}.png" if len(measured) > 1 else f"{stem}.png")
            with atomic_file(folder / written[-1]) as file:
                figure.savefig(file, format="png")
    return written
