"""The page of a report: the template filled, its scripts allowed by their hashes, its data safe inside HTML."""

from __future__ import annotations

import base64
import hashlib
import json
from importlib import resources
from typing import Any

from csg_ext import __version__
from csg_ext.report.collect import Run, contents, data_uri, remarks
from csg_ext.report.pictures import Picture, draw
from csg_ext.training.compare import rows


def render(runs: list[Run], pictures: list[list[Picture]] | None = None) -> str:
    """The whole page as HTML; pictures: those of every run, where they are drawn already."""
    import jinja2
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    if not runs:
        raise ValueError("report: runs must hold at least one run, got none")
    files = resources.files(__package__)
    template, style, script = (
        files.joinpath(name).read_text(encoding="utf-8") for name in ("template.html", "style.css", "page.js")
    )
    scripts = [get_plotlyjs(), script]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(template).render(
        title=f"csg-ext report: {', '.join(run.name for run in runs)}",
        version=__version__,
        style=Markup(style),
        scripts=[Markup(s) for s in scripts],
        hashes=[Markup(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'") for s in scripts],
        content=Markup(embedded_json({"runs": [contents(run, 1 / len(runs)) for run in runs]})),
        rows=_table(runs),
        runs=[
            {
                "name": run.name,
                "facts": _facts(run),
                "settings": _settings(run),
                "remarks": [f"{arm.name}: {said}" for arm in run.arms for said in remarks(arm, run.data.classes)],
                "pictures": [{"alt": p.text, "source": data_uri(p.png)} for p in drawn],
            }
            for run, drawn in zip(runs, pictures or [draw(run) for run in runs], strict=True)
        ],
    )


def embedded_json(value: Any) -> str:
    """JSON that no text in it can end early inside <script>; NaN is an error."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _table(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """The rows of csg-ext train's table, the cells STD and CSG of every run; a run without a row has empty cells."""
    tables = [{label: cells for label, *cells in rows(run.summary)} for run in runs]
    labels = dict.fromkeys(label for table in tables for label in table)
    return [(label, [cell for table in tables for cell in table.get(label, ["", ""])]) for label in labels]


def _facts(run: Run) -> list[tuple[str, str]]:
    summary, config, arm = run.summary, run.summary["config"], run.arms[0]
    data, versions = summary["data"], summary["versions"]
    channels, height, width = data["shape"]
    return [
        ("network", f"{config['model']}, K = {arm.mi.shape[0]} filters in its last layer"),
        ("images", f"{data['name']}: {data['train']} to train, {data['test']} to test"),
        ("size", f"{height} × {width}, {'grey' if channels == 1 else 'colour'}"),
        ("classes", str(len(data["classes"]))),
        ("training", f"{config['epochs']} epochs, schedule {config['schedule']}, seed {summary['seed']}"),
        ("device", f"{summary['csg']['device']}, {summary['csg']['precision']}"),
        ("took", f"{summary['seconds']:.0f} s"),
        ("finished", str(summary["finished"])),
        ("machine", str(summary["machine"])),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]


def _settings(run: Run) -> list[tuple[str, str]]:
    return [(key, "-" if value is None else str(value)) for key, value in run.summary["config"].items()]
