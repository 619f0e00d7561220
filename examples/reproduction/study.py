"""The reproduction study: STD against CSG over seeds, and what each setting of the method does.

    python examples/reproduction/study.py run [--only NAME ...] [--jobs 2]   trains what is not there yet
    python examples/reproduction/study.py report                             writes docs/results.md

Every run is one arm in a process with one thread; its numbers are kept in results/NAME/ARM-SEED.json, so a study that
is stopped goes on where it was. `demo`, `demo-low`, `long`, `long-low`, `full`, `scenes`, `crowded` and the
six named `shared` are measured on the test part with settings fixed before; every other study varies one setting and
is measured on images held out of the train part: the test part chooses nothing.

`full` reads the whole of Fashion-MNIST from the folder that --fashion-mnist names.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sets import crowded, filters_of_items, scenes, shared

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from csg_ext.data import ImageData

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results"
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
HOLD_OUT = 2000  # images of the train part that the ablations are measured on
MAIN_SEEDS, ABLATION_SEEDS = range(5), range(2)


@dataclass(frozen=True)
class Study:
    """One setting of the method, trained with several seeds."""

    name: str
    text: str  # what differs from the default, for the table
    settings: dict[str, Any] = field(default_factory=dict)
    arms: tuple[str, ...] = ("csg",)
    seeds: range = ABLATION_SEEDS
    hold_out: int | None = HOLD_OUT
    data: str = "fashion"  # the embedded subset; "full": the whole set; "scenes": items on photographs, in colour;
    # "crowded": 80 classes; "shared-S": ten classes of two items each, every item in S of them
    classes: int = 10  # of the data
    std: str = ""  # the study whose STD arm is compared, where it has none of its own


PRECISION = {"precision": "bf16"}  # what "auto" was on the processors of the study, whatever it is on another one
BASE = {"lambda_2": 0.01}  # the default when these were trained; what they showed moved it to 0.1


def _ablation(name: str, text: str, settings: dict[str, Any] | None = None, arms: tuple[str, ...] = ("csg",)) -> Study:
    return Study(name, text, BASE | (settings or {}), arms, std="" if "std" in arms else "default")


STUDIES = [
    Study("demo", "12 epochs, the default", arms=("std", "csg"), seeds=MAIN_SEEDS, hold_out=None),
    Study("long", "24 epochs", {"epochs": 24}, seeds=MAIN_SEEDS, hold_out=None, std="long-low"),
    Study("full", "12 epochs, all 60,000 images", {}, ("std", "csg"), range(3), hold_out=None, data="full"),
    Study("long-low", "24 epochs, lambda_2 = 0.01", BASE | {"epochs": 24}, ("std", "csg"), MAIN_SEEDS, hold_out=None),
    Study("demo-low", "12 epochs, lambda_2 = 0.01", BASE, ("std", "csg"), MAIN_SEEDS, hold_out=None),
    Study("scenes", "24 epochs, scenes", BASE | {"epochs": 24}, ("std", "csg"), range(3), hold_out=None, data="scenes"),
    Study("crowded", "12 epochs, 80 classes", {}, ("std", "csg"), MAIN_SEEDS, None, data="crowded", classes=80),
    *(
        Study(
            f"shared-{sharing}{suffix}",
            f"{epochs} epochs, two items a class, each in {word}",
            {"epochs": epochs},
            ("std", "csg"),
            range(2),
            hold_out=None,
            data=f"shared-{sharing}",
        )
        for epochs, suffix in ((12, ""), (24, "-long"))
        for sharing, word in ((1, "one"), (2, "two"), (4, "four"))
    ),
    _ablation("default", "base", arms=("std", "csg")),
    _ablation("steps60", "schedule: by steps, period 60, 1/3 CSG", {"schedule": "steps"}),
    _ablation("steps60-half", "schedule: by steps, period 60, 1/2 CSG", {"schedule": "steps", "csg_share": 0.5}),
    _ablation("steps6", "schedule: by steps, period 6, 1/3 CSG", {"schedule": "steps", "period": 6}),
    _ablation("epochs3", "schedule: by epochs (the paper's), period 3, 1/3 CSG", {"schedule": "epochs", "period": 3}),
    _ablation("warmup", "first quarter STD only", {"warmup": 0.25}),
    _ablation("lambda1-low", "lambda_1 = 0.3", {"lambda_1": 0.3}),
    _ablation("lambda1-high", "lambda_1 = 3", {"lambda_1": 3.0}),
    _ablation("lambda2-low", "lambda_2 = 0.001", {"lambda_2": 0.001}),
    _ablation("lambda2-high", "lambda_2 = 0.1", {"lambda_2": 0.1}),
    _ablation("budget2", "budget g = 2 K", {"budget": 128.0}),
    _ablation("budget3", "budget g = 3 K", {"budget": 192.0}),
    _ablation("psi-l2", "psi: L2", {"penalty": "l2"}),
    _ablation("psi-smooth", "psi: smooth L1", {"penalty": "smooth_l1"}),
    _ablation("euclidean", "Euclidean projection", {"projection": "euclidean"}),
    _ablation("gate-lr-low", "gate learning rate 0.5", {"gate_lr": 0.5}),
    _ablation("gate-lr-high", "gate learning rate 8", {"gate_lr": 8.0}),
    _ablation("decay-low", "weight decay 5e-4", {"weight_decay": 5e-4}, arms=("std", "csg")),
    _ablation("decay-high", "weight decay 2e-3", {"weight_decay": 2e-3}, arms=("std", "csg")),
    _ablation("epochs24", "24 epochs", {"epochs": 24}, arms=("std", "csg")),
]


# Trained by the script that is named, not by `run`.
OTHERS = [
    Study(name, text, arms=("std", "csg"), seeds=range(3), hold_out=None)
    for name, text in (
        ("objects-1", "one object in view, objects.py"),
        ("objects-2", "two objects in view, objects.py"),
        ("finetune", "EfficientNet-lite0, 6 epochs, finetune.py"),
        ("finetune-long", "EfficientNet-lite0, 12 epochs, finetune.py"),
    )
]


@dataclass(frozen=True)
class Job:
    """One arm of one study with one seed."""

    study: Study
    arm: str
    seed: int

    @property
    def path(self) -> Path:
        """Where its numbers are kept."""
        return RESULTS / self.study.name / f"{self.arm}-{self.seed}.json"

    def start(self, data: Path, folder: Path) -> subprocess.Popen[str]:
        """The process that trains and measures it."""
        from csg_ext.training.config import TrainConfig

        config = TrainConfig(seed=self.seed, **PRECISION | self.study.settings)
        job = {
            "arm": self.arm,
            "config": config.as_dict(),
            "data": str(data),
            "folder": str(folder),
            "resume": True,
            "device": "cpu",
            "threads": 1,
            "tensorboard": False,
        }
        folder.mkdir(parents=True, exist_ok=True)
        process = subprocess.Popen(
            [sys.executable, "-m", "csg_ext.training.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=(folder / "log.txt").open("w"),
            text=True,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        )
        assert process.stdin is not None
        with process.stdin as pipe:
            json.dump(job, pipe)
        return process

    def keep(self, folder: Path) -> None:
        """Stores the numbers of a finished run, and which images it had right (as hexadecimal digits)."""
        import numpy as np
        from safetensors.numpy import load_file

        result = json.loads((folder / "result.json").read_text())
        weights = load_file(folder / "model.safetensors")
        with np.load(folder / "arrays.npz") as arrays:
            logits = arrays["features"] @ weights["classifier.weight"].T + weights["classifier.bias"]
            right = logits.argmax(axis=1) == arrays["labels"]
            if self.study.data.startswith("shared"):
                result["filters_of_items"] = filters_of_items(
                    arrays["features"], arrays["labels"], arrays["mi"], int(self.study.data[-1])
                )
        result |= {"seed": self.seed, "images": len(right), "right": np.packbits(right).tobytes().hex()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(result, indent=1) + "\n")


def jobs(only: list[str]) -> Iterator[Job]:
    """What is to be trained, seed by seed, so that a study that is stopped early has something for every setting."""
    chosen = [study for study in STUDIES if not only or study.name in only]
    for seed in MAIN_SEEDS:
        for study in chosen:
            if seed in study.seeds:
                yield from (Job(study, arm, seed) for arm in study.arms)


def load_set(name: str, scratch: Path, fashion_mnist: Path) -> ImageData:
    """The images of a study's `data`."""
    from csg_ext.data import load_images

    if name in ("full", "scenes"):
        return load_images(fashion_mnist if name == "full" else scenes(scratch))
    data = load_images()
    if name == "crowded":
        return crowded(data)
    return shared(data, int(name[-1])) if name.startswith("shared") else data


def run(only: list[str], count: int, fashion_mnist: Path) -> None:
    """Trains the jobs that have no result, `count` at a time."""
    unknown = set(only) - {study.name for study in STUDIES}
    if unknown:
        raise SystemExit(f"study: NAME must be one of {', '.join(s.name for s in STUDIES)}, got {sorted(unknown)}")
    sys.path.insert(0, str(ROOT))
    scratch = ROOT / "runs" / "reproduction"
    scratch.mkdir(parents=True, exist_ok=True)
    waiting = [job for job in jobs(only) if not job.path.exists()]
    files = {}
    for name, hold_out in {(job.study.data, job.study.hold_out) for job in waiting}:
        files[name, hold_out] = scratch / f"{name}-{hold_out or 'test'}.npz"
        data = load_set(name, scratch, fashion_mnist)
        (data.hold_out(hold_out) if hold_out else data).save(files[name, hold_out])
    running: list[tuple[Job, subprocess.Popen[str], Path]] = []
    while waiting or running:
        while waiting and len(running) < count:
            job = waiting.pop(0)
            folder = scratch / job.study.name / f"{job.arm}-{job.seed}"
            running.append((job, job.start(files[job.study.data, job.study.hold_out], folder), folder))
        time.sleep(1)
        ended = [entry for entry in running if entry[1].poll() is not None]
        running = [entry for entry in running if entry not in ended]
        for job, process, folder in ended:
            if process.returncode:
                raise SystemExit(f"study: {job.study.name} {job.arm} seed {job.seed} failed, see {folder}/log.txt")
            job.keep(folder)
            print(
                f"{job.study.name}: arm {job.arm}, seed {job.seed} done, {len(waiting) + len(running)} to go",
                flush=True,
            )


def load(study: Study, arm: str) -> dict[int, dict[str, Any]]:
    """The results that are there, by seed."""
    found = {}
    for seed in study.seeds:
        path = Job(study, arm, seed).path
        if path.exists():
            found[seed] = json.loads(path.read_text())
    return found


def both_arms(study: Study) -> list[tuple[int, dict[str, Any], dict[str, Any]]]:
    """(seed, STD, CSG) for the seeds that have both."""
    other = next((s for s in STUDIES if s.name == study.std), study)
    std, csg = load(other, "std"), load(study, "csg")
    return [(seed, std[seed], csg[seed]) for seed in sorted(set(std) & set(csg))]


def interval(values: list[float], level: float = 0.95) -> tuple[float, float]:
    """The confidence interval of the mean of a few values (Student's t)."""
    from scipy.stats import t

    mean, error = statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5
    half = float(t.ppf((1 + level) / 2, len(values) - 1)) * error
    return mean - half, mean + half


def closed(std: dict[str, Any], csg: dict[str, Any]) -> float:
    """The share of the gap between STD's MIS and its ceiling that CSG closes."""
    return (csg["mis"] - std["mis"]) / (std["mis_ceiling"] - std["mis"])


def spread(values: list[float], form: str) -> str:
    """Mean and standard deviation, or the one value."""
    mean = format(statistics.mean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {format(statistics.stdev(values), form.lstrip('+'))}"


def verdict(held: bool) -> str:
    """How a table says it."""
    return "yes" if held else "no"


def paired(std: dict[str, Any], csg: dict[str, Any]) -> NDArray[np.float64]:
    """Image by image, the points that CSG's answer is worth more than STD's: 100, 0 or -100."""
    import numpy as np

    right = [np.unpackbits(np.frombuffer(bytes.fromhex(r["right"]), np.uint8))[: r["images"]] for r in (std, csg)]
    return 100 * (right[1].astype(float) - right[0].astype(float))


def main_table(study: Study) -> list[str]:
    """STD beside CSG, seed by seed; with all of the study's seeds also the intervals of the means and the verdict."""
    runs = both_arms(study)
    lines = [
        "| seed | STD accuracy | CSG accuracy | difference, points | standard error | STD MIS | CSG MIS | "
        "STD ceiling | gap closed | L1-density | gate class = MI class | own filters only |",
        "|---" * 12 + "|",
    ]
    differences = []
    for seed, a, b in runs:
        points = paired(a, b)
        differences.append(float(points.mean()))
        cells = [
            seed,
            f"{a['accuracy']:.2%}",
            f"{b['accuracy']:.2%}",
            f"{points.mean():+.2f}",
            f"{points.std() / len(points) ** 0.5:.2f}",
            *(f"{v:.4f}" for v in (a["mis"], b["mis"], a["mis_ceiling"])),
            f"{closed(a, b):.2f}",
            f"{b['l1_density']:.4f}",
            f"{b['class_agreement']:.1%}",
            f"{b['one_hot_accuracy']:.2%}",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    if not runs:
        return ["Not trained yet."]
    both = [(a, b) for _, a, b in runs]
    columns = [
        spread([a["accuracy"] for a, _ in both], ".2%"),
        spread([b["accuracy"] for _, b in both], ".2%"),
        spread(differences, "+.2f"),
        "",
        spread([a["mis"] for a, _ in both], ".4f"),
        spread([b["mis"] for _, b in both], ".4f"),
        spread([a["mis_ceiling"] for a, _ in both], ".4f"),
        spread([closed(a, b) for a, b in both], ".2f"),
        spread([b["l1_density"] for _, b in both], ".4f"),
        spread([b["class_agreement"] for _, b in both], ".1%"),
        spread([b["one_hot_accuracy"] for _, b in both], ".2%"),
    ]
    lines.append("| mean ± sd | " + " | ".join(columns) + " |")
    if len(runs) < len(study.seeds):
        lines += ["", f"{len(runs)} of {len(study.seeds)} seeds so far, too few for an interval or a verdict."]
    elif len(runs) > 1:
        low, high = interval(differences)
        gaps = [closed(a, b) for a, b in both]
        least, most = interval(gaps)
        lines += [
            "",
            f"Accuracy of CSG less that of STD over {len(runs)} seeds: {statistics.mean(differences):+.2f} points, 95 "
            f"% interval of the mean [{low:+.2f}, {high:+.2f}] (Student's t, seeds as the units). Gap closed: "
            f"{statistics.mean(gaps):.2f}, interval [{least:.2f}, {most:.2f}].",
            "",
            "| the aims, by the means over the seeds | reached |",
            "|---|---|",
            *(f"| {aim} | {verdict(held)} |" for aim, held in aims(study).items()),
        ]
    return lines


def aims(study: Study) -> dict[str, bool]:
    """What the method is held to, by the means over the seeds, of which there must be two at least."""
    both = [(a, b) for _, a, b in both_arms(study)]
    low, high = interval([float(paired(a, b).mean()) for a, b in both])
    return {
        "the interval of the accuracy's difference holds 0": low <= 0 <= high,
        "at least 0.65 of the gap closed": statistics.mean(closed(a, b) for a, b in both) >= 0.65,
        "L1-density at most 1.05 / C": max(b["l1_density"] for _, b in both) <= 1.05 / study.classes,
        "the classes of gate and MI agree for at least 85 % of the filters": statistics.mean(
            b["class_agreement"] for _, b in both
        )
        >= 0.85,
    }


def summary_table(studies: list[Study]) -> list[str]:
    """One row for every set of the test part with all its seeds, two or more: what the gate costs and brings."""
    lines = [
        "| set | seeds | accuracy CSG - STD, points | 95 % interval | gap closed | L1-density times C | "
        "gate class = MI class | of the four aims |",
        "|---" * 8 + "|",
    ]
    for study in studies:
        both = [(a, b) for _, a, b in both_arms(study)]
        if len(both) < max(2, len(study.seeds)):
            continue
        differences = [float(paired(a, b).mean()) for a, b in both]
        low, high = interval(differences)
        cells = [
            study.text,
            str(len(both)),
            spread(differences, "+.2f"),
            f"[{low:+.2f}, {high:+.2f}]",
            spread([closed(a, b) for a, b in both], ".2f"),
            spread([b["l1_density"] * study.classes for _, b in both], ".2f"),
            spread([b["class_agreement"] for _, b in both], ".0%"),
            f"{sum(aims(study).values())}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def ablation_table(studies: list[Study]) -> list[str]:
    """One row for every setting: means over the seeds that are there, against the same seeds' STD arm."""
    lines = [
        "| setting | seeds | STD accuracy | CSG accuracy | CSG MIS | gap closed | L1-density | gate class = MI class |",
        "|---" * 8 + "|",
    ]
    for study in studies:
        runs = both_arms(study)
        if not runs:
            continue
        both = [(a, b) for _, a, b in runs]
        cells = [
            study.text,
            ", ".join(str(seed) for seed, *_ in runs),
            spread([a["accuracy"] for a, _ in both], ".2%"),
            spread([b["accuracy"] for _, b in both], ".2%"),
            spread([b["mis"] for _, b in both], ".4f"),
            spread([closed(a, b) for a, b in both], ".2f"),
            spread([b["l1_density"] for _, b in both], ".3f"),
            spread([b["class_agreement"] for _, b in both], ".0%"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def effect_table(studies: list[Study]) -> list[str]:
    """One row for every set of the test part: how entangled STD's filters are, and what CSG changes."""
    lines = [
        "| set | seeds | STD MIS / ceiling | CSG MIS / ceiling | MIS gained, points of the ceiling | MIS gained | "
        "gap closed |",
        "|---" * 7 + "|",
    ]
    for study in studies:
        both = [(a, b) for _, a, b in both_arms(study)]
        if not both:
            continue
        cells = [
            study.text,
            str(len(both)),
            spread([a["mis"] / a["mis_ceiling"] for a, _ in both], ".3f"),
            spread([b["mis"] / a["mis_ceiling"] for a, b in both], ".3f"),
            spread([100 * (b["mis"] - a["mis"]) / a["mis_ceiling"] for a, b in both], "+.1f"),
            spread([b["mis"] / a["mis"] - 1 for a, b in both], "+.1%"),
            spread([closed(a, b) for a, b in both], ".2f"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def items_table(studies: list[Study]) -> list[str]:
    """How many filters are of an item rather than of a class, in the sets of shared items."""
    lines = ["| set | seeds | STD: filters of an item | CSG: filters of an item |", "|---" * 4 + "|"]
    for study in studies:
        both = [(a, b) for _, a, b in both_arms(study) if "filters_of_items" in a]
        if both:
            shares = (spread([arm["filters_of_items"] for arm in arms], ".0%") for arms in zip(*both, strict=True))
            lines.append("| " + " | ".join([study.text, str(len(both)), *shares]) + " |")
    return lines


def report() -> None:
    """Writes docs/results.md from the results that are there."""
    ablations = [study for study in STUDIES if study.hold_out]
    text = (Path(__file__).resolve().parent / "results.md.in").read_text()
    tested = [study for study in [*STUDIES, *OTHERS] if not study.hold_out]
    for study in tested:
        text = text.replace(f"{{{{{study.name}}}}}", "\n".join(main_table(study)))
    text = text.replace("{{summary}}", "\n".join(summary_table(tested)))
    text = text.replace("{{effect}}", "\n".join(effect_table(tested)))
    text = text.replace("{{items}}", "\n".join(items_table(tested)))
    text = text.replace("{{ablations}}", "\n".join(ablation_table(ablations)))
    (ROOT / "docs" / "results.md").write_text(text)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="studies to run (default: all)")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes at a time (default 2)")
    parser.add_argument(
        "--fashion-mnist",
        type=Path,
        default=FASHION_MNIST,
        metavar="DIR",
        help="the whole set's four IDX files (default: where Debian's package dataset-fashion-mnist has them)",
    )
    arguments = parser.parse_args()
    if arguments.command == "run":
        run(arguments.only, arguments.jobs, arguments.fashion_mnist)
    else:
        report()


if __name__ == "__main__":
    main()
