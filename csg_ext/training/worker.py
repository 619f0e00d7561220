"""One arm in a process of its own: reads a job as JSON from stdin, reports progress as JSON lines on stdout.

Started by csg_ext.training.compare, which sets the thread count in the environment: OpenMP reads it only at its start.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import warnings
from typing import Any

INTERRUPTED, FAILED = 130, 2
_PR_SET_PDEATHSIG = 1  # Linux: prctl(2)


def stop_with(parent: int | None) -> None:
    """When the parent dies, however it dies, this process saves its state and stops."""
    if parent is not None:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGINT)
        if os.getppid() != parent:  # it died before it could be watched
            raise KeyboardInterrupt


def main() -> int:
    """Runs the job; returns the exit status: 0, INTERRUPTED or FAILED (after a message {"error": sentence})."""
    messages = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints must not mix with the messages

    def report(message: dict[str, Any]) -> None:
        messages.write(json.dumps(message) + "\n")

    job = json.load(sys.stdin)
    try:
        stop_with(job.get("parent"))
        import torch

        from csg_ext.data import load_images
        from csg_ext.training.arm import train_arm
        from csg_ext.training.checkpoint import TrainingInterrupted
        from csg_ext.training.config import TrainConfig
        from csg_ext.training.files import sentence
        from csg_ext.training.monitor import DensityWarning, DivergedError

        torch.set_num_threads(job["threads"])

        def show(text: Warning | str, category: type[Warning], *_: Any) -> None:
            if issubclass(category, DensityWarning):
                report({"warning": str(text)})
            else:
                sys.stderr.write(f"{category.__name__}: {text}\n")

        warnings.showwarning = show  # type: ignore[assignment]  # called with positions alone
        try:
            train_arm(
                job["arm"],
                TrainConfig(**job["config"]),
                load_images(job["data"]),
                job["folder"],
                resume=job["resume"],
                device=job["device"],
                report=report,
                tensorboard=job["tensorboard"],
            )
        except TrainingInterrupted:
            return INTERRUPTED
        except (OSError, ValueError, DivergedError) as error:
            report({"error": sentence(error)})
            return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        return FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
