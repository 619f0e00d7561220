"""The command `csg-ext train`: both arms on one set of images, their comparison, pictures and report."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Container, Iterator
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

# Settings of the schedules that alternate.
_ALTERNATING = ("period", "csg_share", "csg_at", "csg_lr", "csg_lr_warmup", "csg_lr_decay")
_MOST_THREADS = 1024  # many more, and the system refuses them in words of its own
_SKIPPED = "skipped.txt"
_TEST_IMAGES = "test_images.txt"


def main(arguments: dict[str, Any]) -> int:
    """Runs `csg-ext train` with the parsed arguments; returns the exit status."""
    folder = Path(arguments.pop("output"))
    resume, overwrite = arguments.pop("resume"), arguments.pop("overwrite")
    device, threads, tensorboard = (arguments.pop(name) for name in ("device", "threads", "tensorboard"))
    if resume and overwrite:
        raise ValueError("--resume and --overwrite exclude each other, got both")
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    if threads is not None and threads > _MOST_THREADS:
        raise ValueError(f"threads must be at most {_MOST_THREADS}, got {threads}")
    if "data" in arguments and "://" not in arguments["data"] and not arguments["data"].startswith("pipe:"):
        arguments["data"] = str(Path(arguments["data"]).absolute())
    if "weights" in arguments:
        arguments["weights"] = str(Path(arguments["weights"]).absolute())
    share_given = "test_share" in arguments and not resume
    if resume:
        config, source, fingerprint = _stored_request(folder, arguments)
    else:
        (config, source), fingerprint = _new_request(arguments), None
        _check_free(folder, overwrite, source["data"])

    from tqdm import tqdm

    from csg_ext.data.images import find_images, has_test_part
    from csg_ext.report import draw, read_run, write_report
    from csg_ext.runs import load_source, saying_where_to_give_moved_images, tell_skipped
    from csg_ext.training import compare
    from csg_ext.training.display import Progress

    device = compare.pick_device(device)
    begun = time.monotonic()

    def reading(files: Any) -> Any:
        return tqdm(files, desc="reading images", unit="", disable=None, leave=False)

    moved = saying_where_to_give_moved_images() if resume and "data" not in arguments else contextlib.nullcontext()
    with moved:
        found = find_images(source["data"], strict=source["strict"], progress=reading)
        if share_given and has_test_part(found):
            raise ValueError(
                f"--test-share applies to images without a test part of their own, got {source['test_share']} for "
                f"{found.name}"
            )
        data = load_source(source, reading, found)
    tell_skipped(data.skipped, f"all of them are in {folder / _SKIPPED}")
    if fingerprint not in (None, data.fingerprint()):
        raise ValueError(
            f"--resume expects the images that the run began with, got others from {source['data'] or 'the package'}"
        )
    if not resume:  # before anything is written or trained
        _check_fits(config, data, arguments)
    folder.mkdir(parents=True, exist_ok=True)
    with run_lock(folder) as lock:
        if not resume:
            _check_free(folder, overwrite, source["data"])  # again: another run may have begun meanwhile
            _begin(folder, config, source, data)
        elif arguments.get("data"):
            _note(folder, source=source)
        begun -= _run(folder).get("seconds", 0)  # of the parts before this one
        height, width = data.train_images.shape[2:]
        print(
            f"{'Resuming' if resume else 'Training'} STD and CSG ({config.model}, {config.epochs} epochs, "
            f"seed {config.seed}, {device}) on {data.name}: {len(data.train_labels)} train and "
            f"{len(data.test_labels)} test images, {height}x{width}, {len(data.classes)} classes.",
            flush=True,
        )
        with Progress(compare.ARMS) as display, _noting_seconds(folder, begun) as note_seconds:

            def show(arm: str, message: dict[str, Any]) -> None:
                display(arm, message)
                if message.get("row"):  # where a part that is killed is counted to
                    note_seconds()

            options = {"resume": resume, "device": device, "threads": threads, "tensorboard": tensorboard}
            results = compare.run_arms(config, data, folder, display=show, inherited=(lock,), **options)
        summary = compare.summarise(results, config, data, time.monotonic() - begun)
        compare.save_summary(folder, summary)
        print("\n" + compare.table(summary), flush=True)
        run = read_run(folder, data)
        pictures = draw(run)
        for picture in pictures:
            with atomic_file(folder / f"{picture.name}.png") as file:
                file.write(picture.png)
        report = write_report([run], folder, [pictures])
    names = [SUMMARY, TABLE, *(f"{picture.name}.png" for picture in pictures)]
    print(f"Everything is in {folder}: {', '.join(names)}")
    print(f"The report, to open in a browser: {report}")
    return 0


def _stored_request(folder: Path, request: dict[str, Any]) -> tuple[TrainConfig, dict[str, Any], str]:
    """(settings, source, fingerprint of the images) of the run in `folder`, which `request` must not contradict.

    The path of the images may be another one, as they may have moved; the fingerprint tells whether they are the same.
    """
    from csg_ext.runs import read_run, stored_config

    run_file = folder / RUN
    if not run_file.is_file():
        raise FileNotFoundError(f"--resume expects a run in {folder}, which has no {RUN}")
    stored = read_run(run_file)
    config = stored_config(run_file, stored["config"])
    known = config.as_dict() | stored["source"]  # an older run knew fewer settings
    for name, value in request.items():
        if name != "data" and known[name] != value:
            raise ValueError(
                f"--resume continues with the run's own settings: {name} was {known[name]!r}, got {value!r}"
            )
    return config, stored["source"] | {"data": request.get("data", known["data"])}, stored["sha256"]


def _run(folder: Path) -> dict[str, Any]:
    from csg_ext.runs import read_run

    return read_run(folder / RUN)


def _note(folder: Path, **facts: Any) -> None:
    """Notes in run.json what is known by now: where the images are, how long the run took so far."""
    run = _run(folder)
    if run != run | facts:
        write_text(folder / RUN, json.dumps(run | facts, indent=1) + "\n")


@contextlib.contextmanager
def _noting_seconds(folder: Path, begun: float) -> Iterator[Callable[[], None]]:
    """Gives a function that notes the seconds since `begun`, which is called at the end, too, whatever ends it."""

    def note() -> None:
        with contextlib.suppress(OSError):  # a full disk: the arms say so of what matters
            _note(folder, seconds=round(time.monotonic() - begun, 1))

    try:
        yield note
    finally:
        note()


def _new_request(request: dict[str, Any]) -> tuple[TrainConfig, dict[str, Any]]:
    """(settings, source) of a new run; takes the source's keys out of `request`."""
    from csg_ext.runs import SOURCE, check_source
    from csg_ext.training.config import TrainConfig

    source = SOURCE | {key: request.pop(key) for key in list(request) if key in SOURCE}
    check_source(source)
    config = TrainConfig(**request)
    for name in _ALTERNATING:  # not in TrainConfig: an earlier run may have them
        if name in request and config.schedule == "joint":
            raise ValueError(
                f"{name} must be left out with the joint schedule, which takes both paths in every step, got "
                f"{request[name]}"
            )
    if "csg_at" in request and "csg_share" in request:
        raise ValueError(
            f"csg_share must be left out with csg_at, which says what takes the CSG path, got {request['csg_share']}"
        )
    return config, source


def _begin(folder: Path, config: TrainConfig, source: dict[str, Any], data: ImageData) -> None:
    """Clears the folder and writes what a run is: its settings, its images and what was left out of them."""
    _clear(folder)
    run = {
        "config": config.as_dict(),
        "source": source,
        "sha256": data.fingerprint(),
        "statistics": data.statistics(),
        "images": {"classes": data.classes, "shape": list(data.train_images.shape[1:])},
    }
    write_text(folder / RUN, json.dumps(run, indent=1) + "\n")
    if data.skipped:
        write_text(folder / _SKIPPED, "\n".join(data.skipped) + "\n")
    if data.test_names:  # which image a row of arrays.npz and a mask belongs to
        write_text(folder / _TEST_IMAGES, "\n".join(data.test_names) + "\n")


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


def _check_free(folder: Path, overwrite: bool, data: str | None) -> None:
    if (folder / RUN).exists() and not overwrite:
        raise FileExistsError(f"{folder} already holds a run: give --resume, --overwrite or another --output")
    if data is not None and not (folder / RUN).exists() and _among_images(folder.resolve(), Path(data).resolve()):
        raise ValueError(f"--output must be a folder apart from the images in --data, got {folder}")


def _among_images(folder: Path, root: Path) -> bool:
    """Whether a run in `folder` would change the set in `root`: its arms would be two more classes, or a class would be
    taken for a run and left out."""
    from csg_ext.data.decode import EXTENSIONS
    from csg_ext.data.index import PARTS

    if folder == root or (folder.parent == root and folder.name.lower() in PARTS):
        return True
    inside = [place for place in (folder, *folder.parents) if root in place.parents and place.is_dir()]
    return any(file.suffix.lower() in EXTENSIONS for place in inside for file in place.iterdir())


def _clear(folder: Path) -> None:
    """Removes what an earlier run left where this one will write, and nothing else."""
    from csg_ext.report.pictures import NAMES
    from csg_ext.training.compare import ARMS

    (folder / RUN).unlink(missing_ok=True)  # first: what is half removed is no run to resume
    for arm in ARMS:
        for name in (CHECKPOINT, RESULT, ARRAYS, WEIGHTS, METRICS_CSV, METRICS_JSON):
            (folder / arm / name).unlink(missing_ok=True)
        for events in (folder / arm / TENSORBOARD).glob("events.out.tfevents.*"):
            events.unlink()
    for name in (SUMMARY, TABLE, REPORT, _SKIPPED, _TEST_IMAGES, *(f"{name}.png" for name in NAMES)):
        (folder / name).unlink(missing_ok=True)
