"""The reproduction study: STD against CSG over seeds, and what each setting of the method does.

    python examples/reproduction/study.py run [--only NAME ...] [--jobs 2]   trains what is not there yet
    python examples/reproduction/study.py report                             writes docs/results.md

Every run is one arm in a process with one thread; its numbers are kept in results/NAME/ARM-SEED.json, so a study that
is stopped goes on where it was. `demo`, `demo-low`, `long`, `long-low`, `fixed`, `full`, `scenes`, `crowded` and the
six named `shared` are measured on the test part with settings fixed before; every other study varies one setting and
is measured on images held out of the train part: the test part chooses nothing.

`full` reads the whole of Fashion-MNIST from the folder that --fashion-mnist names.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

import tables
from sets import crowded, filters_of_items, scenes, shared
from studies import MAIN_SEEDS, OTHERS, PRECISION, STUDIES, Study, result_path

if TYPE_CHECKING:
    from csg_ext.data import ImageData

ROOT = Path(__file__).resolve().parents[2]
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True)
class Job:
    """One arm of one study with one seed."""

    study: Study
    arm: str
    seed: int

    @property
    def path(self) -> Path:
        """Where its numbers are kept."""
        return result_path(self.study, self.arm, self.seed)

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
        import torch
        from safetensors.numpy import load_file

        from csg_ext.info import processor

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
        result |= {"date": str(date.today()), "torch": str(torch.__version__), "processor": processor()}
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


def report() -> None:
    """Writes docs/results.md from the results that are there."""
    ablations = [study for study in STUDIES if study.hold_out]
    text = (Path(__file__).resolve().parent / "results.md.in").read_text()
    tested = [study for study in [*STUDIES, *OTHERS] if not study.hold_out]
    for study in tested:
        text = text.replace(f"{{{{{study.name}}}}}", "\n".join(tables.main_table(study)))
    text = text.replace("{{summary}}", "\n".join(tables.summary_table(tested)))
    text = text.replace("{{effect}}", "\n".join(tables.effect_table(tested)))
    compared = [study for study in STUDIES if study.name in ("demo", "fixed")]
    text = text.replace("{{specificity}}", "\n".join(tables.specificity_table(compared)))
    text = text.replace("{{items}}", "\n".join(tables.items_table(tested)))
    text = text.replace("{{decay}}", "\n".join(tables.decay_table(ablations)))
    text = text.replace("{{ablations}}", "\n".join(tables.ablation_table(ablations)))
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
