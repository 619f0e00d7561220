"""Kills `csg-ext train` at random moments and checks that nothing is lost.

    python tests/kill_runs.py [--kills 100] [--seed S]

A run is started in a forked process, killed with SIGKILL, resumed, killed again, until it ends; then the next begins.
Half of the kills come at a random moment of the run, half within milliseconds of the appearance of a file that is being
written. After every kill each file under its final name must be whole; every run must end with the weights, the arrays,
the history and the numbers of a run that nobody disturbed. The arms train inside the process that is killed: one that
starts them as processes of its own is killed in test_faults.py.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import load_file

from csg_ext import cli
from csg_ext.data import ImageData
from csg_ext.training import compare
from csg_ext.training.arm import train_arm
from csg_ext.training.files import ARMS, ARRAYS, CHECKPOINT, LOG, METRICS_JSON, REPORT, RESULT, RUN, SUMMARY, WEIGHTS
from csg_ext.training.weights import load_checkpoint

SETTINGS = ["--epochs", "3", "--batch-size", "16", "--precision", "fp32", "--device", "cpu", "--threads", "1"]


def small_images(path: Path) -> Path:
    """A set of 48 + 24 images of three classes."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (72, 1, 12, 12), np.uint8), np.arange(72) % 3
    ImageData("noise", images[:48], labels[:48], images[48:], labels[48:], ["a", "b", "c"]).save(path)
    return path


def _arms_here(config, data, folder, *, resume, device, display, **_):
    """run_arms without processes."""
    for arm in ARMS:
        if not (resume and (folder / arm / RESULT).exists()):
            train_arm(arm, config, data, folder / arm, resume=resume, device=device)
    return {arm: json.loads((folder / arm / RESULT).read_text()) for arm in ARMS}


def begin(folder: Path, data: Path, log: Path) -> int:
    """The number of a process that begins or resumes the run."""
    resume = (folder / RUN).exists()
    arguments = ["train", "--output", str(folder), *(["--resume"] if resume else ["--data", str(data), *SETTINGS])]
    child = os.fork()
    if child == 0:
        try:
            with log.open("a") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
                torch.set_num_threads(1)
                compare.run_arms = _arms_here
                os._exit(cli.main(arguments))
        except BaseException:
            log.write_text(traceback.format_exc())
        finally:
            os._exit(99)
    return child


def check_files(folder: Path) -> None:
    """Every file under its final name can be read to its end."""
    for path in folder.rglob("*"):
        if path.is_dir() or path.name.startswith(".") or path.name == LOG:
            continue
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".csv":
            width = {line.count(",") for line in path.read_text().splitlines()}
            assert len(width) == 1 and path.read_text().endswith("\n"), path
        elif path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                for key in archive.files:
                    archive[key]
        elif path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".ckpt":
            load_checkpoint(path)
        elif path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
        elif path.suffix == ".html":
            assert path.read_text().rstrip().endswith("</html>"), path
        elif path.suffix == ".txt":
            assert path.read_text().endswith("\n"), path
        else:
            raise AssertionError(f"unexpected file {path}")


def outcome(folder: Path) -> dict[str, object]:
    """All of a finished run that does not depend on how long it took."""
    found: dict[str, object] = {}
    for arm in ARMS:
        found[arm, "weights"] = {k: v.tobytes() for k, v in load_file(folder / arm / WEIGHTS).items()}
        with np.load(folder / arm / ARRAYS) as archive:
            found[arm, "arrays"] = {key: archive[key].tobytes() for key in archive.files}
        rows = json.loads((folder / arm / METRICS_JSON).read_text())
        found[arm, "history"] = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    summary = json.loads((folder / SUMMARY).read_text())
    for arm in ARMS:
        del summary[arm]["train_seconds"]
    found["summary"] = {k: v for k, v in summary.items() if k not in ("seconds", "finished")}
    return found


def stage(folder: Path) -> str:
    """How far a run had come when it was killed."""
    if (folder / REPORT).exists():
        return "after the report"
    if (folder / SUMMARY).exists():
        return "pictures and report"
    for arm in reversed(ARMS):
        if (folder / arm / METRICS_JSON).exists():
            trained = len(json.loads((folder / arm / METRICS_JSON).read_text())) == 3
            return f"{arm} measured" if trained else f"{arm} training"
    return "start" if not (folder / ARMS[0] / CHECKPOINT).exists() else f"{ARMS[0]} training"


def _wait(child: int, until: float | None) -> int | None:
    """The exit status, or None when the time is over first."""
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if until is not None and time.monotonic() >= until:
            return None
        time.sleep(0.0005)


def _wait_for_a_write(child: int, folder: Path, generator: random.Random, length: float) -> int | None:
    """Waits until the process writes a file, a random number of times over, and a moment more."""
    begun, skip = time.monotonic(), generator.randrange(8)
    seen = False
    while time.monotonic() - begun < length:
        status = _wait(child, time.monotonic())
        if status is not None:
            return status
        writing = any(True for _ in folder.rglob(".*.part"))
        if writing and not seen:
            if skip == 0:
                return _wait(child, time.monotonic() + generator.uniform(0, 0.003))
            skip -= 1
        seen = writing
    return None


def kill_runs(kills: int, seed: int, scratch: Path) -> dict[str, int]:
    """Kills that many times; returns how many hit which stage, and how many runs ended as they should."""
    generator = random.Random(seed)
    data, log = small_images(scratch / "data.npz"), scratch / "log.txt"
    whole = scratch / "whole"
    begun = time.monotonic()
    assert _wait(begin(whole, data, log), None) == 0, log.read_text()
    length = time.monotonic() - begun
    expected = outcome(whole)
    counts: collections.Counter[str] = collections.Counter()
    run = 0
    while counts["kills"] < kills:
        folder = scratch / f"run-{run}"
        status = None
        while status is None:
            child = begin(folder, data, log)
            if counts["kills"] >= kills:
                status = _wait(child, None)
            elif generator.random() < 0.5:
                status = _wait(child, time.monotonic() + generator.uniform(0, length))
            else:
                status = _wait_for_a_write(child, folder, generator, length)
            if status is None:
                os.kill(child, signal.SIGKILL)
                ended = _wait(child, None)
                if ended != -signal.SIGKILL:  # it had ended before the signal came
                    status = ended
                    break
                check_files(folder) if folder.exists() else None
                counts["kills"] += 1
                counts[stage(folder)] += 1
        assert status == 0, log.read_text()
        check_files(folder)
        found = outcome(folder)
        other = [key for key in expected if found[key] != expected[key]]
        assert not other, f"{folder} ended otherwise in {other}"
        left = [path for path in folder.rglob(".*.part")]
        assert not left, f"{folder}: left behind {left}"
        counts["runs"] += 1
        run += 1
    return dict(counts)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=None)
    arguments = parser.parse_args()
    seed = random.SystemRandom().randrange(2**32) if arguments.seed is None else arguments.seed
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="csg_ext_kills_") as scratch:
        counts = kill_runs(arguments.kills, seed, Path(scratch))
    print(json.dumps(counts, indent=1))


if __name__ == "__main__":
    sys.exit(main())
