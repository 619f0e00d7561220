"""The command `csg-ext report`: one self-contained HTML page about one or more runs of csg-ext train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from csg_ext.report.collect import Run, read_run
from csg_ext.report.page import render
from csg_ext.report.pictures import Picture, draw
from csg_ext.training.files import REPORT, write_text

__all__ = ["Picture", "Run", "draw", "main", "read_run", "render", "write_report"]


def write_report(runs: list[Run], folder: str | Path, pictures: list[list[Picture]] | None = None) -> Path:
    """Writes report.html about `runs` (at least one) into `folder`, which is made where it is missing.

    pictures: what draw gives for every run, where it is drawn already."""
    target = Path(folder) / REPORT
    text = render(runs, pictures)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, text)
    return target


def main(arguments: dict[str, Any]) -> int:
    """Runs `csg-ext report` with the parsed arguments; returns the exit status."""
    runs = [read_run(folder) for folder in arguments["runs"]]
    names = [run.name for run in runs]
    for run, folder in zip(runs, arguments["runs"], strict=True):
        if names.count(run.name) > 1:
            run.name = "/".join(Path(folder).resolve().parts[-2:])
    if arguments["output"] is None and len(runs) > 1:
        raise ValueError(f"--output must name the folder of the page of several runs, got {len(runs)} runs and none")
    target = write_report(runs, arguments["output"] or arguments["runs"][0])
    print(f"Written to {target} ({target.stat().st_size / 1e6:.1f} MB): open it in a browser")
    return 0
