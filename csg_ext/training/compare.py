"""Both arms under the same budget and seed, each in its own process, and the summary that compares them."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from csg_ext._extension import CUDA_ERROR
from csg_ext.data.images import ImageData
from csg_ext.metrics import gap_closed
from csg_ext.training.config import TrainConfig
from csg_ext.training.files import ARMS, LOG, RESULT, SUMMARY, TABLE, is_number, read_json, write_text
from csg_ext.training.worker import FAILED, INTERRUPTED

Display = Callable[[str, dict[str, Any]], None]
_STOPPED = (INTERRUPTED, -signal.SIGINT)  # the second: before the worker could handle Ctrl-C
# Of result.json, in the comparison.
_NUMBERS = ("accuracy", "mis", "mis_ceiling", "mis_bound", "train_seconds")
_CSG_NUMBERS = ("l1_density", "class_agreement", "one_hot_accuracy")
_MAX_THREADS = 4  # per arm: batches of 64 small images keep no more busy


class ArmFailed(RuntimeError):
    """An arm stopped with an error, which the message says."""


def default_threads() -> int:
    """Threads of one arm when both run side by side on this machine's CPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(_MAX_THREADS, cores // 2))


class _Worker:
    """The process of one arm, its messages put into a queue as (arm, message), and (arm, None) at its end."""

    def __init__(
        self,
        arm: str,
        job: dict[str, Any],
        messages: queue.Queue[tuple[str, dict[str, Any] | None]],
        inherited: tuple[int, ...],
    ) -> None:
        self.arm, self.error = arm, ""
        folder = Path(job["folder"])
        folder.mkdir(parents=True, exist_ok=True)
        threads = str(job["threads"])
        environment = os.environ | {
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads of one arm would take the other's core
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        }
        self.log_path = folder / LOG
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "csg_ext.training.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches the parent alone, which passes it on once
                pass_fds=inherited,
            )
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError), self.process.stdin as pipe:
            json.dump(job, pipe)
        threading.Thread(target=self._read, args=(self.process.stdout, messages), daemon=True).start()

    def _read(self, lines: IO[str], messages: queue.Queue[tuple[str, dict[str, Any] | None]]) -> None:
        for line in lines:
            messages.put((self.arm, json.loads(line)))
        messages.put((self.arm, None))

    def interrupt(self) -> None:
        """Asks the process to save its state and stop."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGINT)

    def failure(self) -> str:
        """Why the process failed, in one sentence."""
        if self.error:
            return f"arm {self.arm}: {self.error}"
        lines = self.log_path.read_text(errors="replace").strip().splitlines()
        last = lines[-1] if lines else "it wrote nothing"
        return f"arm {self.arm} ended with status {self.process.returncode}: {last} (see {self.log_path})"


def run_arms(
    config: TrainConfig,
    data: ImageData,
    folder: Path,
    *,
    resume: bool = False,
    device: str = "cpu",
    threads: int | None = None,
    tensorboard: bool = False,
    display: Display = lambda arm, message: None,
    inherited: tuple[int, ...] = (),
) -> dict[str, dict[str, Any]]:
    """Trains the arms that have no result yet: side by side on the CPU, one after the other on a GPU.

    Returns {"std": result, "csg": result} as train_arm does. display gets every message of every arm; the
    arms' processes inherit the file descriptors `inherited` (see run_lock).
    Raises KeyboardInterrupt when it was interrupted and every arm has saved its state, ArmFailed when one failed; the
    other arm then saves its state too.
    """
    todo = [arm for arm in ARMS if not (resume and (folder / arm / RESULT).exists())]
    groups = [todo] if device == "cpu" else [[arm] for arm in todo]
    with tempfile.TemporaryDirectory(prefix="csg_ext_") as scratch:
        data.save(Path(scratch) / "data.npz")
        job = {
            "config": config.as_dict(),
            "data": str(Path(scratch) / "data.npz"),
            "resume": resume,
            "device": device,
            "threads": threads or default_threads(),
            "parent": os.getpid(),
            "tensorboard": tensorboard,
        }
        for group in filter(None, groups):
            jobs = [(arm, job | {"arm": arm, "folder": str(folder / arm)}) for arm in group]
            _run_group(jobs, display, inherited)
    return {arm: read_result(folder / arm / RESULT, arm) for arm in ARMS}


def read_result(file: Path, arm: str) -> dict[str, Any]:
    """What train_arm wrote of a finished arm; OSError, or ValueError with one sentence."""
    result = read_json(file, "the result of an arm")
    wanted = [*_NUMBERS, *(_CSG_NUMBERS if arm == "csg" else ())]
    if not isinstance(result, dict) or result.get("arm") != arm:
        raise ValueError(f"{file}: expected the result of the arm {arm!r}, got other JSON")
    for key in wanted:
        if not is_number(result.get(key)):
            raise ValueError(f"{file}: {key} must be a number, got {result.get(key)!r:.100}")
    return result


def _run_group(jobs: list[tuple[str, dict[str, Any]]], display: Display, inherited: tuple[int, ...]) -> None:
    messages: queue.Queue[tuple[str, dict[str, Any] | None]] = queue.Queue()
    workers: dict[str, _Worker] = {}
    interrupted = False

    def stop_all() -> None:
        for worker in workers.values():
            worker.interrupt()

    try:
        for arm, job in jobs:
            workers[arm] = _Worker(arm, job, messages, inherited)
        running = set(workers)
        while running:
            try:
                arm, message = messages.get()
                if message is None:
                    running.discard(arm)
                    if workers[arm].process.wait() not in (0, *_STOPPED):
                        stop_all()
                elif "error" in message:
                    workers[arm].error = message["error"]
                else:
                    display(arm, message)
            except KeyboardInterrupt:
                if interrupted:  # the second Ctrl-C: do not wait for the state to be saved
                    raise
                interrupted = True
                display("", {"interrupting": True})
                stop_all()
    finally:
        for worker in workers.values():
            if worker.process.poll() is None:
                worker.process.kill()
            worker.process.wait()
    failed = [worker for worker in workers.values() if worker.process.returncode not in (0, *_STOPPED)]
    if failed:
        # The arm that says why comes first: the other one may have failed while it was being stopped.
        raise ArmFailed(max(failed, key=lambda w: (bool(w.error), w.process.returncode == FAILED)).failure())
    if interrupted or any(worker.process.returncode in _STOPPED for worker in workers.values()):
        raise KeyboardInterrupt


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    found = {"python": platform.python_version()}
    for name in ("csg-ext", "torch", "numpy", "lightning"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def summarise(
    results: dict[str, dict[str, Any]], config: TrainConfig, data: ImageData, seconds: float
) -> dict[str, Any]:
    """What summary.json holds: both arms' numbers, the share of the gap closed, the settings, data and versions."""
    std, csg = results["std"], results["csg"]
    return {
        "std": std,
        "csg": csg,
        "gap_closed": None if math.isnan(gap := gap_closed(csg["mis"], std["mis"], std["mis_ceiling"])) else gap,
        "seed": config.seed,
        "config": config.as_dict(),
        "data": {
            "name": data.name,
            "train": len(data.train_labels),
            "test": len(data.test_labels),
            "shape": list(data.train_images.shape[1:]),
            "classes": data.classes,
            "sha256": data.fingerprint(),
            "skipped": data.skipped,
        },
        "seconds": round(seconds, 1),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {platform.system()}",
        "versions": versions(),
    }


def rows(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The comparison as rows (measure, STD, CSG) of text."""
    std, csg = summary["std"], summary["csg"]
    classes, closed = len(summary["data"]["classes"]), summary["gap_closed"]
    dead = [arm.get("dead_filters", 0) for arm in (std, csg)]  # an older run did not count them

    def both(text: str, key: str, csg_key: str, form: str) -> list[tuple[str, str, str]]:
        values = std.get(key), csg.get(csg_key)  # an older run did not measure all
        shown = [f"{value:{form}}" if is_number(value) else "" for value in values]
        return [(text, shown[0], shown[1])] if any(shown) else []

    return [
        ("accuracy (STD path: no label is used)", f"{std['accuracy']:.2%}", f"{csg['accuracy']:.2%}"),
        ("MIS: mutual information filter-class, nats", f"{std['mis']:.4f}", f"{csg['mis']:.4f}"),
        ("  its ceiling: the network's own class scores", f"{std['mis_ceiling']:.4f}", f"{csg['mis_ceiling']:.4f}"),
        ("  share of the gap to STD's ceiling closed", "", "-" if closed is None else f"{closed:.2f}"),
        *both("  a filter's MI over its class's ceiling, mean", "mis_of_ceiling", "mis_of_ceiling", ".2f"),
        *both("class-selectivity index of the filters, mean", "class_selectivity", "class_selectivity", ".2f"),
        (f"L1-density of the gate (floor {1 / classes:.4g})", "", f"{csg['l1_density']:.4f}"),
        *both(
            "filters whose gate class (STD: by weight) is their MI class", "weight_agreement", "class_agreement", ".1%"
        ),
        *both(
            "accuracy, each class scored by its own filters only",
            "weight_own_accuracy",
            "one_hot_accuracy",
            ".2%",
        ),
        *([("dead filters: one activation on all test images", f"{dead[0]}", f"{dead[1]}")] if any(dead) else []),
        ("training, seconds", f"{std['train_seconds']:.0f}", f"{csg['train_seconds']:.0f}"),
    ]


def table(summary: dict[str, Any]) -> str:
    """The comparison as aligned text."""
    compared = rows(summary)
    width = max(len(row[0]) for row in compared)
    lines = [f"{'':{width}}  {'STD':>8}  {'CSG':>8}"]
    lines += [f"{name:{width}}  {a:>8}  {b:>8}" for name, a, b in compared]
    if summary["gap_closed"] is None:
        lines.append("-: STD's MIS is not below its ceiling, so there is no gap to close")
    data = summary["data"]
    lines.append(
        f"{data['name']}: {data['train']} train, {data['test']} test images; {summary['config']['model']}, "
        f"{summary['config']['epochs']} epochs, seed {summary['seed']}"
    )
    return "\n".join(lines) + "\n"


def save_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Writes summary.json and table.txt."""
    write_text(folder / SUMMARY, json.dumps(summary, indent=1) + "\n")
    write_text(folder / TABLE, table(summary))


def pick_device(name: str) -> str:
    """ "cpu", "cuda" or "cuda:i" from a name that may be "auto": a GPU if csg_ext was built for it."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() and CUDA_ERROR is None else "cpu"
    if name == "cpu":
        return name
    if not re.fullmatch(r"cuda(:[0-9]+)?", name):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:INDEX, got {name!r}")
    if not torch.cuda.is_available():
        raise ValueError(f"device {name!r} needs a GPU that this torch can use, got none (torch {torch.__version__})")
    if CUDA_ERROR is not None:  # a GPU of ROCm among others
        raise ValueError(f"device {name!r} needs csg_ext's CUDA kernels, which are not there: {CUDA_ERROR}")
    if int(name.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise ValueError(f"device must be one of the {torch.cuda.device_count()} GPUs, counted from 0, got {name!r}")
    return name
