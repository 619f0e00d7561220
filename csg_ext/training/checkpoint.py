"""Lightning's checkpoints written atomically and read safely, and Ctrl-C without loss."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO

from csg_ext.training.weights import load_checkpoint, save_checkpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written atomically and read with weights_only=True: no code runs on loading."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes the checkpoint; raises OSError with one sentence and keeps the old file when that fails."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)  # callers leave that to it
        save_checkpoint(checkpoint, path)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Reads a checkpoint; raises ValueError with one sentence when it is damaged."""
        return load_checkpoint(path, map_location)


class Interruption:
    """Turns Ctrl-C (and SIGTERM) into a flag, so that a step is never cut in two; a second Ctrl-C acts at once."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


class TrainingInterrupted(Exception):
    """Training stopped on request; the state is in the checkpoint."""
