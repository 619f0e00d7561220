"""A run of csg-ext train of a few seconds, and csg-ext report of it."""

from __future__ import annotations

import contextlib
import io

SHORT = [
    "--no-flip",
    "--low-share",
    "0",
    "--precision",
    "fp32",
    "--epochs",
    "6",
    "--threads",
    "1",
    "--device",
    "cpu",
]


def report_command(*arguments) -> tuple[int, str, str]:
    """Calls csg-ext report; (exit status, output, errors)."""
    from csg_ext import cli

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main(["report", *map(str, arguments)])
    return status, out.getvalue(), err.getvalue()
