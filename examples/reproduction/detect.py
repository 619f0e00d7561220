"""Adversarial-sample detection over seeds: CSG beside STD beside published baselines, into docs/adversarial.md.

    python examples/reproduction/detect.py run [--seeds 0 1 2] [--images 500] trains and attacks what is not there yet
    python examples/reproduction/detect.py report                          writes the tables

`run` calls `csg-ext train` with the defaults of `make demo` (one thread an arm) and `csg-ext detect` on both arms, and
keeps the numbers in results/detect/seed-S.json. It needs what `pip install 'csg-ext[train,analysis]'` installs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from marks import write_between

from csg_ext.info import processor

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results" / "detect"
PAGE = ROOT / "docs" / "adversarial.md"
BEGIN = "<!-- begin: examples/reproduction/detect.py report -->"
ARMS = ("std", "csg")
DETECTORS = ("forest", "gate regression", "score", "softmax", "mahalanobis")
GATED, BASELINES = DETECTORS[:3], DETECTORS[3:]  # what uses the gate's rows or learned from attacks; published, neither
MEASURES = ("auroc", "tpr", "evaded")

Interval = list[float | None]  # a value and the ends of its 95 % interval


def triple(interval: dict[str, float | None]) -> Interval:
    """An interval of detection.json, rounded to what is worth keeping."""
    return [None if (v := interval[key]) is None else round(v, 4) for key in ("value", "low", "high")]


def reduced(report: dict[str, Any]) -> dict[str, Any]:
    """What is kept of detection.json."""
    kept: dict[str, Any] = {key: report[key] for key in ("settings", "versions")} | {"arms": {}}
    for arm in report["checkpoints"]:
        kept["arms"][arm["name"]] = {
            **{key: arm[key] for key in ("test_images", "benign", "train_images")},
            "fpr": {d: triple(arm["attacks"][0]["detectors"][d]["fpr"]) for d in DETECTORS},
            "attacks": {
                attack["name"]: {
                    "changed": attack["changed"],
                    "target_reached": attack["target_reached"],
                    **{key: {d: triple(attack["detectors"][d][key]) for d in DETECTORS} for key in MEASURES},
                }
                for attack in arm["attacks"]
            },
        }
    kept["difference"] = {
        attack: {key: {d: triple(by_detector[d][key]) for d in DETECTORS} for key in MEASURES}
        for attack, by_detector in report["difference"].items()
    }
    return kept


def run(seeds: list[int], settings: dict[str, list[str]], scratch: Path) -> None:
    """Trains and attacks the seeds that have no result; settings: options of csg-ext detect and their values."""
    command = [sys.executable, "-m", "csg_ext"]
    for seed in seeds:
        target = RESULTS / f"seed-{seed}.json"
        if target.exists():
            continue
        folder = scratch / f"demo-{seed}"
        if not (folder / "summary.json").exists():
            again = ["--resume"] if (folder / "run.json").exists() else ["--seed", str(seed), "--precision", "bf16"]
            options = ["--threads", "1", "--device", "cpu", "--output", folder]
            subprocess.run([*command, "train", *again, *options], cwd=ROOT, check=True)
        options = [part for name, values in settings.items() for part in (name, *values)]
        output = ["--device", "cpu", "--output", folder / "detect"]
        begun = time.monotonic()
        subprocess.run([*command, "detect", folder, *options, *output], cwd=ROOT, check=True)
        kept = reduced(json.loads((folder / "detect" / "detection.json").read_text()))
        summary = json.loads((folder / "summary.json").read_text())
        kept |= {
            "seed": seed,
            "options": options,
            "config": summary["config"],
            "accuracy": {arm: summary[arm]["accuracy"] for arm in ARMS},
            "seconds": round(time.monotonic() - begun),
            "machine": f"{summary['machine']}, {processor()}",
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
        }
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(kept, allow_nan=False) + "\n")


# ---- numbers over the seeds


def over(intervals: Sequence[Interval]) -> tuple[float, float, float] | None:
    """The mean over the seeds, the lowest lower and the highest upper end; None where no seed has a value."""
    seen = [(v, low, high) for v, low, high in intervals if v is not None and low is not None and high is not None]
    if not seen:
        return None
    values, lows, highs = zip(*seen, strict=True)
    return statistics.mean(values), min(lows), max(highs)


def mean(found: list[dict[str, Any]], arm: str, attack: str, key: str, detector: str) -> float:
    """The mean of a measure over the seeds, -inf where it has no value."""
    seen = over([f["arms"][arm]["attacks"][attack][key][detector] for f in found])
    return seen[0] if seen else float("-inf")


def direction(intervals: Sequence[Interval]) -> int:
    """1 or -1 where the interval of every seed lies above or below 0, else 0."""
    above = all(low is not None and low > 0 for _, low, _ in intervals)
    below = all(high is not None and high < 0 for _, _, high in intervals)
    return above - below


def cell(intervals: Sequence[Interval], form: str = ".2f") -> str:
    """Such as 0.81 [0.72, 0.88]."""
    seen = over(intervals)
    return "-" if seen is None else "{} [{}, {}]".format(*(format(v, form) for v in seen))


# ---- Markdown


def heading(columns: Sequence[str]) -> list[str]:
    """The first two lines of a table."""
    return ["", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]


def arm_rows(found: list[dict[str, Any]], key: str, attacks: Sequence[str]) -> Iterator[str]:
    """One line for every attack and arm: the share changed, and the measure of every detector."""
    for attack in attacks:
        for arm in ARMS:
            rows = [f["arms"][arm]["attacks"][attack] for f in found]
            changed = statistics.mean(r["changed"] / f["arms"][arm]["benign"] for r, f in zip(rows, found, strict=True))
            cells = [cell([r[key][d] for r in rows]) for d in DETECTORS]
            yield f"| {attack} | {arm.upper()} | {changed:.0%} | " + " | ".join(cells) + " |"


def difference_rows(found: list[dict[str, Any]], attacks: Sequence[str]) -> Iterator[str]:
    """CSG - STD in AUROC, bold where the interval of every seed excludes 0."""
    for attack in attacks:
        cells = []
        for d in DETECTORS:
            intervals = [f["difference"][attack]["auroc"][d] for f in found]
            mark = "**" if direction(intervals) else ""
            cells.append(f"{mark}{cell(intervals, '+.2f')}{mark}")
        yield f"| {attack} | " + " | ".join(cells) + " |"


def tables(found: list[dict[str, Any]]) -> str:
    """The Markdown about these seeds."""
    first = found[0]
    attacks = list(first["arms"]["std"]["attacks"])
    adaptive = [a for a in attacks if a.startswith("adaptive")]
    plain = [a for a in attacks if a not in adaptive]
    seeds = " ".join(str(f["seed"]) for f in found)
    counts = ", ".join(f"{arm.upper()} " + " and ".join(str(f["arms"][arm]["benign"]) for f in found) for arm in ARMS)
    accuracy = ", ".join(f"{arm.upper()} " + " and ".join(f"{f['accuracy'][arm]:.3f}" for f in found) for arm in ARMS)
    fitted = ", ".join(
        f"{arm.upper()} " + " and ".join(str(f["arms"][arm]["train_images"]["fit_attacked"]) for f in found)
        for arm in ARMS
    )
    several = len(found) > 1
    lines = [
        f"`python examples/reproduction/detect.py run --seeds {seeds}`, which calls `csg-ext train` with its "
        f"defaults, in bf16 ({first['config']['model']}, {first['config']['epochs']} epochs, "
        f"lambda_2 = {first['config']['lambda_2']:g}) "
        f"and `csg-ext detect RUN {' '.join(first['options'])}`; {first['machine']}; torch "
        f"{first['versions']['torch']}; {max(f['date'] for f in found)}. Accuracy on the test part, seed by seed: "
        f"{accuracy}. Of {first['arms']['std']['test_images']} test images the networks get right: {counts}. Attacked "
        f"train images that fit the forest and the regression: {fitted}.",
        "",
        "Cells are means over the seeds; brackets go from the lowest lower to the highest upper end of the seeds' 95 % "
        "bootstrap intervals."
        if several
        else "One training seed; brackets are 95 % bootstrap intervals over images.",
    ]
    for key, text in (
        ("auroc", "AUROC"),
        ("tpr", "TPR at the threshold that 5 % of benign train images exceed"),
        ("evaded", "Evaded: the share of the benign images that an attack both changes and gets past the threshold"),
    ):
        lines += ["", f"**{text}**", *heading(["attack", "arm", "changed", *DETECTORS])]
        lines += arm_rows(found, key, attacks if key != "evaded" else [attacks[0], *adaptive])
        if key == "tpr":
            for arm in ARMS:
                cells = [cell([f["arms"][arm]["fpr"][d] for f in found]) for d in DETECTORS]
                lines.append(f"| none: false positives | {arm.upper()} | | " + " | ".join(cells) + " |")
    bold = "the interval of every seed" if several else "the interval"
    lines += ["", f"**AUROC, CSG - STD**; bold where {bold} excludes 0", *heading(["attack", *DETECTORS])]
    lines += difference_rows(found, attacks)
    return "\n".join([*lines, *verdicts(found, plain, adaptive)])


def verdicts(found: list[dict[str, Any]], plain: list[str], adaptive: list[str]) -> list[str]:
    """The claim and the comparisons, each answered by the numbers."""
    every = "in every seed" if len(found) > 1 else "by its interval"
    lines = [*heading([f"question, {len(plain)} attacks that do not know the detectors", "answer"])]
    for d in DETECTORS:
        signs = [direction([f["difference"][a]["auroc"][d] for f in found]) for a in plain]
        lines.append(
            f"| Does {d} find more on CSG than on STD (AUROC, {every})? | more: {signs.count(1)}, less: "
            f"{signs.count(-1)}, not distinguishable: {signs.count(0)} |"
        )
    for own, arm in (("score", "csg"), ("gate regression", "csg"), ("forest", "csg"), ("forest", "std")):
        ahead = [
            a
            for a in plain
            if mean(found, arm, a, "auroc", own) > max(mean(found, "std", a, "auroc", b) for b in BASELINES)
        ]
        lines.append(
            f"| Is {own} on {arm.upper()} above both baselines on STD (mean AUROC)? | for {len(ahead)} of {len(plain)}"
            f"{': ' + '; '.join(ahead) if ahead else ''} |"
        )
    for arm in ARMS:
        won = [max(DETECTORS, key=lambda d, a=a, arm=arm: mean(found, arm, a, "auroc", d)) for a in plain]
        lines.append(
            f"| Which detector is best on {arm.upper()} (mean AUROC)? | "
            + ", ".join(f"{d}: {won.count(d)}" for d in DETECTORS if d in won)
            + " |"
        )
    lines += heading(["question, adaptive attacks", "STD", "CSG"])
    for attack in adaptive:
        values = [mean(found, arm, attack, "evaded", "score") for arm in ARMS]
        lines.append(f"| Share that evades the score, {attack} | {values[0]:.0%} | {values[1]:.0%} |")
    return lines


def report() -> None:
    """Writes the tables between the marks in docs/adversarial.md."""
    found = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("seed-*.json"))]
    if not found:
        raise SystemExit(f"detect: expected results of `run` in {RESULTS}, got none")
    if any(f["options"] != found[0]["options"] or list(f["difference"]) != list(found[0]["difference"]) for f in found):
        raise SystemExit(f"detect: expected results of one set of options in {RESULTS}, got several")
    write_between(PAGE, BEGIN, tables(found))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="S")
    parser.add_argument("--images", default="500", metavar="N", help="this and the next three as in csg-ext detect")
    parser.add_argument("--epsilons", nargs="+", default=["4", "8", "16"], metavar="E")
    parser.add_argument("--steps", default="6", metavar="N")
    parser.add_argument("--weights", nargs="*", default=["10", "100", "1000"], metavar="W")
    parser.add_argument("--scratch", type=Path, default=ROOT / "runs" / "reproduction" / "detect", metavar="DIR")
    arguments = parser.parse_args()
    if arguments.command == "run":
        settings = {f"--{name}": getattr(arguments, name) for name in ("images", "epsilons", "steps", "weights")}
        settings = {name: [value] if isinstance(value, str) else value for name, value in settings.items()}
        run(arguments.seeds, settings, arguments.scratch.resolve())
    else:
        report()


if __name__ == "__main__":
    main()
