"""The standard streams of a command whose results are files, which outlive the reader of what it prints."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast


class Unread:
    """A standard stream that falls silent once nobody reads it any more, as after `| head -1`: results are files."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.remark = ""  # is printed then

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As of the stream; what is lost counts as written."""
        with self._silenced():
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """As of the stream."""
        with self._silenced():
            self._stream.flush()

    @contextlib.contextmanager
    def _silenced(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # takes what is still buffered, too
            os.close(nowhere)
            if self.remark:
                print(self.remark, file=sys.stderr)


@contextlib.contextmanager
def unread() -> Iterator[list[Unread]]:
    """Makes the standard streams, where they are open, fall silent instead of failing when their reader is gone."""
    out, err = (None if stream is None else Unread(stream) for stream in (sys.stdout, sys.stderr))
    with contextlib.redirect_stdout(cast(TextIO, out)), contextlib.redirect_stderr(cast(TextIO, err)):
        try:
            yield [] if out is None else [out]
        finally:
            for stream in (out, err):
                if stream is not None:
                    stream.flush()  # not at exit, where a reader who is gone would be an error
