"""The command `csg-ext train`: both arms on one set of images, their comparison, pictures and report."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Container
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csg_ext.training.files import (
    ARRAYS,
    CHECKPOINT,
    METRICS_CSV,
    METRICS_JSON,
    REPORT,
    RESULT,
    RUN,
    SUMMARY,
    TABLE,
    TENSORBOARD,
    WEIGHTS,
    atomic_file,
    run_lock,
    write_text,
)

if TYPE_CHECKING:
    from csg_ext.data.images import ImageData
    from csg_ext.training.config import TrainConfig

_MOST_THREADS = 1024  # many more, and the system refuses them in words of its own


def main(arguments: dict[str, Any]) -> int:
    """Runs `csg-ext train` with the parsed arguments; returns the exit status."""
    with contextlib.ExitStack() as held:
        return _train(arguments, held)


def _train(arguments: dict[str, Any], held: contextlib.ExitStack) -> int:
    folder = Path(arguments.pop("output"))
    resume, overwrite = arguments.pop("resume"), arguments.pop("overwrite")
    device, threads, tensorboard = (arguments.pop(name) for name in ("device", "threads", "tensorboard"))
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    if threads is not None and threads > _MOST_THREADS:
        raise ValueError(f"threads must be at most {_MOST_THREADS}, got {threads}")
    if "data" in arguments and "://" not in arguments["data"] and not arguments["data"].startswith("pipe:"):
        arguments["data"] = str(Path(arguments["data"]).absolute())
    if "weights" in arguments:
        arguments["weights"] = str(Path(arguments["weights"]).absolute())

    from csg_ext.runs import SOURCE, check_source, load_source, read_run, stored_config
    from csg_ext.training.config import TrainConfig

    source = dict(SOURCE)
    run_file = folder / RUN
    if resume:
        if not run_file.is_file():
            raise FileNotFoundError(f"--resume expects a run in {folder}, which has no {RUN}")
        stored = read_run(run_file)
        config = stored_config(run_file, stored["config"])
        stored["config"] = config.as_dict()  # an older run knew fewer settings
        stored = _same_request(stored, arguments)
        source, fingerprint = stored["source"], stored["sha256"]
    else:
        source |= {key: arguments.pop(key) for key in list(arguments) if key in source}
        check_source(source)
        config, fingerprint = TrainConfig(**arguments), None
        if config.csg_lr is not None and config.schedule == "joint":  # not in TrainConfig: an earlier run may have both
            raise ValueError(
                f"csg_lr must be left out with the joint schedule, whose steps all take lr, got {config.csg_lr}"
            )
        _check_free(folder, overwrite)

    from tqdm import tqdm

    from csg_ext.report import draw, write_report
    from csg_ext.report import read_run as read_finished
    from csg_ext.training import compare
    from csg_ext.training.display import Progress

    device = compare.pick_device(device)
    begun = time.monotonic()
    data = load_source(source, lambda files: tqdm(files, desc="reading images", unit="", disable=None, leave=False))
    if data.skipped:
        print(f"{len(data.skipped)} images, shards or folders are left out:", file=sys.stderr)
        for line in data.skipped[:10]:
            print(f"  {line}", file=sys.stderr)
        if len(data.skipped) > 10:
            print(f"  ... all of them are in {folder / 'skipped.txt'}", file=sys.stderr)
    if fingerprint not in (None, data.fingerprint()):
        raise ValueError(
            f"--resume expects the images that the run began with, got others from {source['data'] or 'the package'}"
        )

    if not resume:  # before anything is written or trained
        _check_fits(config, data, arguments)
    folder.mkdir(parents=True, exist_ok=True)
    lock = held.enter_context(run_lock(folder))
    if not resume:
        _check_free(folder, overwrite)  # again: another run may have begun meanwhile
        _clear(folder)
        write_text(
            run_file,
            json.dumps(
                {
                    "config": config.as_dict(),
                    "source": source,
                    "sha256": data.fingerprint(),
                    "statistics": data.statistics(),
                    "images": {"classes": data.classes, "shape": list(data.train_images.shape[1:])},
                },
                indent=1,
            )
            + "\n",
        )
        if data.skipped:
            write_text(folder / "skipped.txt", "\n".join(data.skipped) + "\n")
    height, width = data.train_images.shape[2:]
    print(
        f"{'Resuming' if resume else 'Training'} STD and CSG ({config.model}, {config.epochs} epochs, "
        f"seed {config.seed}, {device}) on {data.name}: {len(data.train_labels)} train and "
        f"{len(data.test_labels)} test images, {height}x{width}, {len(data.classes)} classes.",
        flush=True,
    )
    with Progress(compare.ARMS) as display:
        options = {"resume": resume, "device": device, "threads": threads, "tensorboard": tensorboard}
        results = compare.run_arms(config, data, folder, display=display, inherited=(lock,), **options)
    summary = compare.summarise(results, config, data, time.monotonic() - begun)
    compare.save_summary(folder, summary)
    print("\n" + compare.table(summary), flush=True)
    run = read_finished(folder, data)
    pictures = draw(run)
    for picture in pictures:
        with atomic_file(folder / f"{picture.name}.png") as file:
            file.write(picture.png)
    report = write_report([run], folder, [pictures])
    print(f"Everything is in {folder}: {', '.join([SUMMARY, TABLE, *(f'{picture.name}.png' for picture in pictures)])}")
    print(f"The report, to open in a browser: {report}")
    return 0


def _check_fits(config: TrainConfig, data: ImageData, given: Container[str]) -> None:
    """Raises ValueError for settings that do not fit the train images; a default that is too large is not `given`."""
    from csg_ext.training.network import check_network
    from csg_ext.training.schedule import Schedule

    images, side = len(data.train_labels), max(data.train_images.shape[2:])
    if "batch_size" in given and config.batch_size > images:
        raise ValueError(f"batch_size must be at most {images}, the number of train images, got {config.batch_size}")
    if "shift" in given and config.shift > side:
        raise ValueError(f"shift must be at most {side}, the side of the train images, got {config.shift}")
    Schedule.of(config, images // min(config.batch_size, images)).check_takes_csg()
    check_network(config, data)


def _same_request(stored: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    """The stored request, after a check that the options given now do not ask for anything else."""
    known = stored["config"] | stored["source"]
    for name, value in request.items():
        if known[name] != value:
            raise ValueError(
                f"--resume continues with the run's own settings: {name} was {known[name]!r}, got {value!r}"
            )
    return stored


def _check_free(folder: Path, overwrite: bool) -> None:
    if (folder / RUN).exists() and not overwrite:
        raise FileExistsError(f"{folder} already holds a run: give --resume, --overwrite or another --output")


def _clear(folder: Path) -> None:
    """Removes what an earlier run left where this one will write, and nothing else."""
    from csg_ext.report.pictures import NAMES
    from csg_ext.training.compare import ARMS

    (folder / RUN).unlink(missing_ok=True)  # first: what is half removed is no run to resume
    for arm in ARMS:
        for name in (
            CHECKPOINT,
            RESULT,
            ARRAYS,
            WEIGHTS,
            METRICS_CSV,
            METRICS_JSON,
        ):
            (folder / arm / name).unlink(missing_ok=True)
        for events in (folder / arm / TENSORBOARD).glob("events.out.tfevents.*"):
            events.unlink()
    for name in (SUMMARY, TABLE, REPORT, "skipped.txt", *(f"{name}.png" for name in NAMES)):
        (folder / name).unlink(missing_ok=True)
