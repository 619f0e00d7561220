"""Localization on the generated scenes: CSG beside STD beside Grad-CAM of pytorch-grad-cam, into docs/localization.md.

    python examples/reproduction/localize.py run [--seeds 0 1] [--epochs 24]   trains and scores what is not there yet
    python examples/reproduction/localize.py report                            writes the tables

`run` makes the scenes, calls `csg-ext train` (one thread an arm) and `csg-ext localize`, scores Grad-CAM with the same
masks and thresholds, and keeps the numbers in results/localize/seed-S.json. It needs scikit-image and what `make test`
installs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from marks import write_between

from csg_ext.info import processor

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results" / "localize"
PAGE = ROOT / "docs" / "localization.md"
BEGIN = "<!-- begin: examples/reproduction/localize.py report -->"
ARMS = ("std", "csg")
METHODS = {
    "cam": "CAM",
    "gradient": "GradMap",
    "grad_cam": "Grad-CAM of pytorch-grad-cam",
    "gate": "the gate's map",
}
SCORES = {
    "iou": "IoU",
    "box_iou": "box IoU",
    "best_iou": "best IoU of the sweep",
    "ap": "AP at 0.5",
    "pointing": "pointing",
    "energy": "energy",
}


def grad_cam(file: Path, scenes: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The scores of pytorch-grad-cam's GradCAM, true classes as targets: on the test part, and on two objects."""
    sys.path.insert(0, str(ROOT / "tests"))
    import model_zoo  # makes torchvision, which the library imports, importable
    import torch

    sys.path.append(str(model_zoo.ZOO))
    try:
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    finally:  # the torchvision there does not go with this torch
        sys.path.remove(str(model_zoo.ZOO))

    from csg_ext import localize
    from csg_ext.data import load_images
    from csg_ext.data.batches import normalise
    from csg_ext.runs import read_checkpoint, restore, training_statistics

    stored, data = read_checkpoint(file), load_images(scenes)
    model = restore(stored, data).eval()
    found = localize.masked_scenes(data, localize.read_arrays(scenes))
    assert found.pairs is not None

    def maps(images: Any, classes: torch.Tensor) -> torch.Tensor:
        parts = []
        with GradCAM(model=model, target_layers=[model.backbone]) as method:
            for start in range(0, len(classes), 250):
                rows = slice(start, start + 250)
                x = normalise(images[rows], *training_statistics(stored, data))
                targets = [ClassifierOutputTarget(int(c)) for c in classes[rows]]
                parts.append(torch.from_numpy(method(input_tensor=x, targets=targets)))
        return torch.cat(parts)

    part, pairs, classes = found.scored, found.pairs, len(data.classes)
    scored = localize.score_maps(
        maps(part.images, part.labels), part.masks, part.labels, classes, None, localize.Settings()
    )
    queried = torch.stack([maps(pairs.images, c) for c in pairs.labels.unbind(1)], 1)
    return scored, localize.query(queried, pairs, classes)


def reduced(report: dict[str, Any], run: Path, scenes: Path) -> dict[str, Any]:
    """What is kept of localization.json, with Grad-CAM beside it."""
    kept: dict[str, Any] = {"versions": report["versions"], "empty_masks": report["data"]["empty_masks"], "arms": {}}
    for arm in report["checkpoints"]:
        single, query = dict(arm["methods"]), dict(arm["query"])
        single["grad_cam"], query["grad_cam"] = grad_cam(run / arm["name"] / "model.safetensors", scenes)
        kept["arms"][arm["name"]] = {
            "images": arm["images"],
            "images_wrong": arm["images_wrong"],
            "mask_area": arm["mask_area"],
            "single": {
                name: {key: m["average_precision"]["0.5"] if key == "ap" else m[key] for key in SCORES}
                for name, m in single.items()
                if "unavailable" not in m
            },
            "query": {
                name: {key: m[key] for key in ("energy", "standard_error", "picked")}
                for name, m in query.items()
                if name in METHODS and "unavailable" not in m
            },
            "scenes_of_two": arm["query"]["images"],
            "filters": {key: arm["filters"].get(key) for key in ("mean", "mean_on_gate_class", "without_class")}
            | {"count": arm["filters"]["count"], "dead": len(arm["filters"]["dead"])},
        }
    return kept


def run(seeds: list[int], epochs: int, lambda_2: float, scratch: Path) -> None:
    """Trains and scores the seeds that have no result."""
    scratch.mkdir(parents=True, exist_ok=True)
    scenes = scratch / "scenes.npz"
    if not scenes.exists():
        subprocess.run([sys.executable, "-m", "csg_ext.analysis.scenes", scenes, "--seed", "0"], cwd=ROOT, check=True)
    command = [sys.executable, "-m", "csg_ext"]
    for seed in seeds:
        target = RESULTS / f"seed-{seed}.json"
        if target.exists():
            continue
        folder = scratch / f"scenes-{seed}"
        if not (folder / "summary.json").exists():
            settings = ["--data", scenes, "--epochs", str(epochs), "--seed", str(seed), "--lambda-2", str(lambda_2)]
            settings += ["--precision", "bf16"]  # as the results that are kept, whatever the processor prefers
            again = ["--resume"] if (folder / "run.json").exists() else settings
            options = ["--threads", "1", "--device", "cpu", "--output", folder]
            subprocess.run([*command, "train", *again, *options], cwd=ROOT, check=True)
        scored = folder / "localize"
        options = ["--data", scenes, "--output", scored, "--device", "cpu"]
        subprocess.run([*command, "localize", folder, *options], cwd=ROOT, check=True)
        kept = reduced(json.loads((scored / "localization.json").read_text()), folder, scenes)
        summary = json.loads((folder / "summary.json").read_text())
        kept |= {
            "seed": seed,
            "config": summary["config"],
            "accuracy": {arm: summary[arm]["accuracy"] for arm in ARMS},
            "machine": f"{summary['machine']}, {processor()}",
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
        }
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(kept, indent=1, allow_nan=False) + "\n")


def spread(values: list[float]) -> str:
    """Mean and standard deviation over the seeds, or the one value."""
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.3f}"


def tables(found: list[dict[str, Any]]) -> str:
    """The Markdown about these seeds."""
    first, config = found[0], found[0]["config"]
    seeds = ", ".join(str(f["seed"]) for f in found)

    def over(get: Callable[[dict[str, Any]], float], arm: str) -> str:
        return spread([get(f["arms"][arm]) for f in found])

    lines = [
        f"`python examples/reproduction/localize.py run --seeds {seeds.replace(',', '')} --epochs {config['epochs']} "
        f"--lambda-2 {config['lambda_2']:g}` ({config['model']}); {first['machine']}; "
        f"torch {first['versions']['torch']}; {max(f['date'] for f in found)}. "
        + ("Mean ± standard deviation over the seeds. " if len(found) > 1 else "One seed: no spread is known. ")
        + "Accuracy: "
        + ", ".join(f"{arm.upper()} {spread([f['accuracy'][arm] for f in found])}" for arm in ARMS)
        + ".",
        "",
        f"One object, {first['arms']['std']['images']} test images, all of them scored, also those that a network gets "
        f"wrong; chance of pointing and energy: {first['arms']['std']['mask_area']:.3f}.",
        "",
        "| map | network | " + " | ".join(SCORES.values()) + " |",
        "|---" * (len(SCORES) + 2) + "|",
    ]
    for method, text in METHODS.items():
        for arm in ARMS:
            if method in first["arms"][arm]["single"]:
                cells = [over(lambda a, m=method, k=key: a["single"][m][k], arm) for key in SCORES]
                lines.append(f"| {text} | {arm.upper()} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Each filter alone (ActivMap): means over the filters, each on the images of its class.",
        "",
        "| filters | network | IoU | share found | pointing | energy |",
        "|---|---|---|---|---|---|",
    ]
    for key, text in (("mean", "class by ActivMap"), ("mean_on_gate_class", "class by the gate")):
        for arm in ARMS:
            if first["arms"][arm]["filters"][key]:
                scores = ("iou", "success", "pointing", "energy")
                cells = [over(lambda a, k=key, s=score: a["filters"][k][s], arm) for score in scores]
                lines.append(f"| {text} | {arm.upper()} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Two objects in view, {first['arms']['std']['scenes_of_two']} scenes, both queried: the share of the energy "
        "on both that lies on the queried one (chance 0.5), its standard error over the scenes (the largest over the "
        "seeds), and how often it is more than half.",
        "",
        "| map | network | energy on the queried one | standard error | more than half |",
        "|---|---|---|---|---|",
    ]
    for method, text in METHODS.items():
        for arm in ARMS:
            if method in first["arms"][arm]["query"]:
                error = max(f["arms"][arm]["query"][method]["standard_error"] for f in found)
                energy, picked = (over(lambda a, m=method, k=k: a["query"][m][k], arm) for k in ("energy", "picked"))
                lines.append(f"| {text} | {arm.upper()} | {energy} | {error:.3f} | {picked} |")
    return "\n".join([*lines, "", *verdicts(found)])


def verdicts(found: list[dict[str, Any]]) -> list[str]:
    """The claim and the comparisons, each answered by the numbers of every seed."""

    def holds(test: Callable[[dict[str, Any]], bool]) -> str:
        held = sum(test(f["arms"]) for f in found)
        return "yes" if held == len(found) else "no" if not held else f"in {held} of {len(found)} seeds"

    def more(key: str, score: str, method: str, other: str, arm: str) -> Callable[[dict[str, Any]], bool]:
        return lambda arms: arms["csg"][key][method][score] > arms[arm][key][other][score]

    def above_chance(arms: dict[str, Any]) -> bool:
        gate = arms["csg"]["query"]["gate"]
        return bool(gate["energy"] - 2 * gate["standard_error"] > 0.5)

    rows = [
        ("The gate's map picks the queried one of two objects (energy above 0.5 by two standard errors)", above_chance)
    ]
    for key, score, text in (
        ("query", "energy", "energy on the queried one of two objects"),
        ("single", "energy", "energy on a single object"),
        ("single", "best_iou", "best IoU of the sweep on a single object"),
        ("single", "pointing", "pointing game on a single object"),
    ):
        rows += [
            (f"The gate's map exceeds STD's CAM: {text}", more(key, score, "gate", "cam", "std")),
            (f"CSG's CAM exceeds STD's CAM: {text}", more(key, score, "cam", "cam", "std")),
            (f"The gate's map exceeds CSG's own CAM: {text}", more(key, score, "gate", "cam", "csg")),
            (f"CSG's GradMap exceeds STD's GradMap: {text}", more(key, score, "gradient", "gradient", "std")),
        ]
    note = "Answers compare the numbers of each seed as they are; only the first allows for chance."
    return [note, "", "| question | answer |", "|---|---|", *(f"| {text} | {holds(test)} |" for text, test in rows)]


def report() -> None:
    """Writes the tables between the marks in docs/localization.md."""
    found = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("seed-*.json"))]
    if not found:
        raise SystemExit(f"localize: expected results of `run` in {RESULTS}, got none")
    write_between(PAGE, BEGIN, tables(found))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], metavar="S")
    parser.add_argument("--epochs", type=int, default=24, metavar="N")
    parser.add_argument("--lambda-2", type=float, default=0.01, metavar="L", help="weight of the gate's penalty")
    parser.add_argument("--scratch", type=Path, default=ROOT / "runs" / "reproduction" / "localize", metavar="DIR")
    arguments = parser.parse_args()
    if arguments.command == "run":
        sys.path.insert(0, str(ROOT))
        run(arguments.seeds, arguments.epochs, arguments.lambda_2, arguments.scratch.resolve())
    else:
        report()


if __name__ == "__main__":
    main()
