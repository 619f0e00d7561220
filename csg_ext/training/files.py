"""The files of a run: their names, and writes that leave a file complete or as it was."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from csg_ext._text import reason

# In the folder of an arm.
CHECKPOINT, WEIGHTS, RESULT, ARRAYS = "last.ckpt", "model.safetensors", "result.json", "arrays.npz"
METRICS_CSV, METRICS_JSON, LOG, TENSORBOARD = "metrics.csv", "metrics.json", "log.txt", "tensorboard"
# In the folder of the run.
ARMS = ("std", "csg")
RUN, SUMMARY, TABLE, REPORT = "run.json", "summary.json", "table.txt", "report.html"
LOCK = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


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
    """Writes a text file atomically, UTF-8 but for the names of files that are not."""
    with atomic_file(path) as file:
        file.write(text.encode(errors="surrogateescape"))


def read_json(path: str | Path, expected: str) -> Any:
    """What a JSON file holds; OSError, or ValueError "FILE: expected EXPECTED as JSON, got: ..." when it is damaged."""
    try:
        return json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected {expected} as JSON, got: {reason(error)}") from None


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a number that fits float64, NaN and the infinite ones included."""
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1000)


@contextlib.contextmanager
def run_lock(folder: Path, patience: float = 60) -> Iterator[int]:
    """Keeps other runs out of a folder; yields a file descriptor for child processes to inherit.

    The system gives the lock back when the last process that has the descriptor is gone, however it ended. A run that
    was killed may leave an arm that is still saving its state: that is waited for, `patience` seconds at most.
    Raises OSError when another run uses the folder. On a file system without locks it warns and goes on.
    """
    path = folder / LOCK
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        begun = time.monotonic()
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                owner = os.pread(file, 32, 0).decode(errors="replace").strip()
                alive = owner.isdigit() and Path("/proc", owner).exists()
                if alive or time.monotonic() - begun > patience:
                    raise OSError(
                        errno.EBUSY, f"used by another run (process {owner or 'unknown'})", str(folder)
                    ) from None
                time.sleep(0.1)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                warnings.warn(f"{folder} cannot be locked: make sure that one run alone uses it", stacklevel=3)
                break
        os.ftruncate(file, 0)
        os.pwrite(file, str(os.getpid()).encode(), 0)
        yield file
    finally:
        os.close(file)
