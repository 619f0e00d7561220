"""The command `csg-ext detect`: how well attacked images are found by a network's features, arms side by side."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from csg_ext._text import aligned
from csg_ext.analysis import adversarial as adv
from csg_ext.analysis.detectors import DETECTORS
from csg_ext.runs import chosen_files, heading, read_checkpoint, restore, source_images, training_statistics
from csg_ext.training.files import write_text

NUMBERS = "detection.json"
Estimates = dict[str, dict[str, dict[str, adv.Estimate]]]


def differences(first: Estimates, second: Estimates) -> dict[str, dict[str, dict[str, Any]]]:
    """second - first of every measure with its interval, by attack, detector and measure."""
    return {
        attack: {
            detector: {key: second[attack][detector][key].minus(e).interval() for key, e in found.items()}
            for detector, found in by_detector.items()
        }
        for attack, by_detector in first.items()
    }


def _show(interval: dict[str, float | None]) -> str:
    value, low, high = interval["value"], interval["low"], interval["high"]
    return "-" if value is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def table(report: dict[str, Any]) -> str:
    """The report as aligned text: for every attack and detector AUROC and, at the threshold, TPR, FPR and evaded."""
    arms, change = report["checkpoints"], report.get("difference")
    names = [heading(a["name"]) for a in arms]
    head = ["", *names] + ([f"{names[1]} - {names[0]}"] if change else [])
    rows: list[list[str]] = [head]
    for i, attack in enumerate(arms[0]["attacks"]):
        counts = [f"{a['attacks'][i]['changed']} of {a['benign']}" for a in arms]
        rows.append([f"{attack['name']}: predictions changed", *counts])
        if attack["targeted"]:
            rows.append(["  target reached", *(str(a["attacks"][i]["target_reached"]) for a in arms)])
        for detector in DETECTORS:
            for key, text in (("auroc", "AUROC"), ("tpr", "TPR"), ("evaded", "evaded")):
                cells = [_show(a["attacks"][i]["detectors"][detector][key]) for a in arms]
                if change:
                    cells.append(_show(change[attack["name"]][detector][key]))
                rows.append([f"  {detector}, {text}" if key == "auroc" else f"    {text}", *cells])
    rows.append([f"false positives among benign test images (aim: {adv.FALSE_POSITIVES:.2f})"])
    for detector in DETECTORS:
        rows.append([f"  {detector}", *(_show(a["attacks"][0]["detectors"][detector]["fpr"]) for a in arms)])
    return "\n".join(aligned(rows, len(head))) + "\n"


class _Progress:
    """The steps of one network, called with each as it begins: a bar on a terminal, a line for each elsewhere."""

    def __init__(self, network: str, steps: int) -> None:
        from tqdm import tqdm

        self.network, self.steps, self.begun = network, steps, 0
        self.bar = tqdm(total=steps, unit="attack", disable=None, leave=False, dynamic_ncols=True)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def __call__(self, step: str) -> None:
        if self.bar.disable:
            print(f"  {self.network}, {self.begun + 1} of {self.steps}: {step}", file=sys.stderr, flush=True)
        else:
            self.bar.set_description(f"{self.network}: {step}", refresh=False)
            self.bar.n = self.begun  # what begins is not done yet
            self.bar.refresh()
        self.begun += 1


def main(arguments: dict[str, Any]) -> int:
    """Runs `csg-ext detect` with the parsed arguments; returns the exit status."""
    import art
    import sklearn

    from csg_ext.training.compare import pick_device, versions

    device = pick_device(arguments["device"])
    names = ("images", "epsilons", "train_attack", "train_epsilon", "weights", "steps", "seed")
    options: dict[str, Any] = {n: tuple(v) if isinstance(v := arguments[n], list) else v for n in names}
    settings = adv.Settings(**options)
    files = chosen_files(arguments["checkpoints"])
    stored = [read_checkpoint(file) for file in files.values()]
    data = source_images(stored, arguments)
    height, width = data.test_images.shape[2:]
    print(f"Attacking networks on {data.name}: {height}x{width}, {len(data.classes)} classes.", flush=True)
    folder = Path(arguments["output"])
    reports, estimates, fitted = [], [], {}
    for (name, file), s in zip(files.items(), stored, strict=True):
        print(f"  {name}: {file}", flush=True)
        statistics = training_statistics(s, data)
        with _Progress(name, 1 + len(settings.attacks()) + len(settings.weights)) as progress:
            progress(f"fitting the detectors on {adv.attack_name(settings.training())}")
            try:
                network, detectors, counts = adv.fit_detectors(restore(s, data).to(device), data, statistics, settings)
            except ValueError as error:
                raise ValueError(f"{file}: {error}") from None
            report, found = adv.measure(network, detectors, data, settings, progress)
        thresholds = {d.name: d.threshold for d in detectors}
        facts = {"name": name, "file": str(file), "model": s.config.model, "train_images": counts}
        reports.append(facts | {"thresholds": thresholds} | report)
        estimates.append(found)
        for d in detectors:
            stem = d.name.replace(" ", "_")
            fitted[f"{stem}_{name}.safetensors" if len(files) > 1 else f"{stem}.safetensors"] = d
    result = {
        "checkpoints": reports,
        "data": {"name": data.name, "classes": data.classes, "sha256": data.fingerprint()},
        "settings": vars(settings)
        | {"confidence": adv.CONFIDENCE, "resamples": adv.RESAMPLES, "false_positives": adv.FALSE_POSITIVES}
        | {"device": device},
        "versions": versions()
        | {"adversarial-robustness-toolbox": art.__version__, "scikit-learn": sklearn.__version__},
    }
    if len(estimates) == 2:
        result["difference"] = differences(*estimates)
    folder.mkdir(parents=True, exist_ok=True)
    for file_name, detector in fitted.items():
        detector.save(folder / file_name)
    write_text(folder / NUMBERS, json.dumps(result, indent=1, allow_nan=False) + "\n")
    print("\n" + table(result))
    print(f"Written to {folder}: {', '.join([NUMBERS, *fitted])}")
    return 0
