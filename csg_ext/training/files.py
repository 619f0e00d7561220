"""The files of a run: their names, and writes that leave a file complete or as it was."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

# In the folder of an arm.
CHECKPOINT, WEIGHTS, RESULT, ARRAYS = "last.ckpt", "model.safetensors", "result.json", "arrays.npz"
METRICS_CSV, METRICS_JSON, LOG, TENSORBOARD = "metrics.csv", "metrics.json", "log.txt", "tensorboard"
# In the folder of the run.
ARMS = ("std", "csg")
RUN, SUMMARY, TABLE, REPORT = "run.json", "summary.json", "table.txt", "report.html"


def sentence(error: BaseException) -> str:
    """An exception as one sentence: an OSError of the system names its file and its reason."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` when the block ends well; otherwise `path` stays as it was."""
    target = Path(path)
    part = target.with_name(f".{target.name}.part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink()
        if isinstance(error, OSError):
            kept = "the old file is kept" if target.exists() else "nothing is written"
            raise OSError(error.errno, f"{target} cannot be written ({error.strerror or error}); {kept}") from error
        raise


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file atomically."""
    with atomic_file(path) as file:
        file.write(text.encode())
