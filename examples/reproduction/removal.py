"""What is left of a class whose filters are taken away: STD beside CSG, beside controls, into docs/removal.md.

    python examples/reproduction/study.py run --only demo          trains what is measured here
    python examples/reproduction/removal.py run                    measures every seed of it
    python examples/reproduction/removal.py report                 writes the tables

Every class of every seed is forgotten in turn (csg_ext.analysis.forget does the same to a model): the features of its
filters are set to 0. Whose filters they are is said by mutual information on train images, by the classifier's largest
weight, or by the gate. Two controls: as many filters drawn at random, and all filters left while the class's own logit
is taken away. A probe, a logistic regression on the features of the filters that are left, fitted on train images,
shows what these still tell of the class. Accuracies are those of test images. Numbers: results/removal/seed-S.json,
under "classes" those of every class instead of their mean.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from marks import write_between
from numpy.typing import NDArray
from studies import MAIN_SEEDS, PRECISION

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results" / "removal"
PAGE = ROOT / "docs" / "removal.md"
BEGIN = "<!-- begin: examples/reproduction/removal.py report -->"
BEGIN_CLASSES = "<!-- begin: examples/reproduction/removal.py report, classes -->"
RUNS = ROOT / "runs" / "reproduction" / "demo"
PROBED = 4000  # train images that say whose the filters are and that a probe is fitted on
NAMES = {
    "weight": "filters by the classifier's weights",
    "mi": "filters by mutual information",
    "gate": "filters by the gate",
    "random": "as many filters at random",
    "logit": "no filter, but the class's logit",
}
MEASURES = ("filters", "class", "others", "probe")
SHOWN = (("std", "mi"), ("csg", "mi"), ("csg", "gate"))  # in the table of the classes

Features = tuple[NDArray[np.float32], NDArray[np.int64]]


def after_removal(
    train: Features, test: Features, weight: NDArray[Any], bias: NDArray[Any], lost: NDArray[np.bool_], c: int
) -> dict[str, float]:
    """What is left of class c without the filters `lost` (K,): accuracy on its test images and on the others, and the
    recall of a probe of the filters that are left."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    right = ((test[0] * ~lost) @ weight.T + bias).argmax(1) == test[1]
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
    probe.fit(train[0][:, ~lost], train[1])
    own = test[1] == c
    found = probe.predict(test[0][own][:, ~lost]) == c
    return {
        "filters": float(lost.sum()),
        "class": float(right[own].mean()),
        "others": float(right[~own].mean()),
        "probe": float(found.mean()),
    }


def measure(
    train: Features, test: Features, weight: NDArray[Any], bias: NDArray[Any], gate: NDArray[Any] | None, seed: int
) -> dict[str, dict[str, Any]]:
    """Every way to take a class away, means over the classes; "classes": each class, with nothing taken away, too."""
    from csg_ext.metrics import best_class, class_mutual_info

    classes = len(weight)
    owners = {"weight": weight.argmax(0), "mi": best_class(class_mutual_info(*train, num_classes=classes), *train)}
    if gate is not None:
        owners["gate"] = gate.argmax(0)
    draw = np.random.default_rng(seed).permutation
    losts = {name: [owner == c for c in range(classes)] for name, owner in owners.items()}
    losts["random"] = [draw(lost) for lost in losts[next(reversed(owners))]]
    logits = test[0] @ weight.T + bias
    right, own = logits.argmax(1) == test[1], [test[1] == c for c in range(classes)]
    each: dict[str, dict[str, list[float]]] = {
        "before": {"class": [float(right[o].mean()) for o in own], "others": [float(right[~o].mean()) for o in own]}
    }
    found: dict[str, dict[str, Any]] = {}
    for name, lost in losts.items():
        left = [after_removal(train, test, weight, bias, lost[c], c) for c in range(classes)]
        each[name] = {key: [one[key] for one in left] for key in MEASURES}
        found[name] = {key: statistics.mean(values) for key, values in each[name].items()}
    others = []
    for c in range(classes):
        without = np.where(np.arange(classes) == c, -np.inf, logits).argmax(1)
        others.append(float((without == test[1])[test[1] != c].mean()))
    found["logit"] = {"filters": 0.0, "class": 0.0, "others": statistics.mean(others)}  # a probe would see all
    return found | {"classes": each}


def run(runs: Path) -> None:
    """Measures the seeds of the demo that are trained and have no result."""
    from csg_ext.data import load_images
    from csg_ext.training.arm import predict
    from csg_ext.training.config import TrainConfig
    from csg_ext.training.network import build_model
    from csg_ext.training.weights import load_weights

    data = load_images()
    data_statistics = data.statistics()
    for seed in MAIN_SEEDS:
        path = RESULTS / f"seed-{seed}.json"
        files = {arm: runs / f"{arm}-{seed}" / "model.safetensors" for arm in ("std", "csg")}
        if path.exists() or not all(file.exists() for file in files.values()):
            continue
        found = {}
        for arm, file in files.items():
            model = build_model(TrainConfig(seed=seed, **PRECISION), data)
            load_weights(model, file)
            weight, bias, gate = (
                p.detach().numpy() for p in (model.classifier.weight, model.classifier.bias, model.gate)
            )
            train = predict(model, data.train_images[:PROBED], data_statistics)[0], data.train_labels[:PROBED]
            test = predict(model, data.test_images, data_statistics)[0], data.test_labels
            found[arm] = measure(train, test, weight, bias, gate if arm == "csg" else None, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")
        print(f"removal: seed {seed} done", flush=True)


def tables(found: list[dict[str, Any]]) -> str:
    """Means and standard deviations over the seeds."""
    lines = [
        f"`python examples/reproduction/removal.py run`, {len(found)} seeds of the demo; mean ± standard deviation.",
        "",
        "| network | what is taken away | filters | accuracy: the class | the others | probe's recall of the class |",
        "|---" * 6 + "|",
    ]
    for arm in ("std", "csg"):
        for name, text in NAMES.items():
            if name not in found[0][arm]:
                continue
            cells = []
            for key in MEASURES:
                if key not in found[0][arm][name]:
                    cells.append("")
                    continue
                values = [seed[arm][name][key] for seed in found]
                form = ".1f" if key == "filters" else ".1%"
                spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 and key != "filters" else ""
                cells.append(f"{statistics.mean(values):{form}}{spread}")
            lines.append("| " + " | ".join([arm.upper(), text, *cells]) + " |")
    return "\n".join(lines)


def class_table(found: dict[str, Any], names: Sequence[str]) -> str:
    """Every class of one seed: accuracy before and after."""
    rules = {"mi": "MI", "gate": "the gate"}
    heads = [f"{arm.upper()}, by {rules[rule]}: filters | class | others" for arm, rule in SHOWN]
    lines = [f"| forgotten | {' | '.join(heads)} |", "|---" * (1 + 3 * len(SHOWN)) + "|"]
    chosen = [(found[arm]["classes"]["before"], found[arm]["classes"][rule]) for arm, rule in SHOWN]

    def change(before: float, after: float) -> str:
        return f"{before:.1%} → {after:.1%}"

    for c, name in enumerate(names):
        cells = [name]
        for before, after in chosen:
            cells.append(f"{after['filters'][c]:.0f}")
            cells += [change(before[key][c], after[key][c]) for key in ("class", "others")]
        lines.append(f"| {' | '.join(cells)} |")
    cells = ["**mean**"]
    for before, after in chosen:
        cells.append("")
        cells += [change(statistics.mean(before[key]), statistics.mean(after[key])) for key in ("class", "others")]
    return "\n".join([*lines, f"| {' | '.join(cells)} |"])


def report() -> None:
    """Writes the tables between the marks in docs/removal.md: the classes of the first seed, the means of all."""
    from csg_ext.data import load_images

    found = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("seed-*.json"))]
    if not found:
        raise SystemExit(f"removal: expected results of `run` in {RESULTS}, got none")
    write_between(PAGE, BEGIN_CLASSES, class_table(found[0], load_images().classes))
    write_between(PAGE, BEGIN, tables(found))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("--runs", type=Path, default=RUNS, metavar="DIR", help="folder of the study's runs")
    arguments = parser.parse_args()
    if arguments.command == "run":
        run(arguments.runs)
    else:
        report()


if __name__ == "__main__":
    main()
