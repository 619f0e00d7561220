"""The page of a report: the template filled, its scripts allowed by their hashes, its data safe inside HTML."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from importlib import resources
from typing import Any

import numpy as np

from csg_ext import __version__, metrics, plots
from csg_ext.report.collect import Run, contents, data_uri
from csg_ext.training.compare import rows

_SIMILAR = 512  # filters up to which the similarity of every two is drawn: beyond, no pixel shows one pair


def render(runs: list[Run]) -> str:
    """The whole page as HTML."""
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
                "pictures": _pictures(run),
                "omitted": "" if _few_filters(run) else f"Similarity of kernels is drawn for up to {_SIMILAR} filters.",
            }
            for run in runs
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


def _few_filters(run: Run) -> bool:
    return len(run.arms[0].mi) <= _SIMILAR


def _pictures(run: Run) -> list[dict[str, str]]:
    classes = run.data.classes
    std, csg = run.arms
    drawn: list[tuple[str, Any]] = []
    for arm in run.arms:
        if arm.gate is not None:
            text = f"The gate of {arm.name}: classes down, filters across, sorted by class"
            drawn.append((text, plots.plot_gate(arm.gate, classes)))
    drawn.append(
        (
            "Mutual information between filters and classes, STD on the left and CSG on the right",
            plots.plot_mutual_information(std.mi, csg.mi, classes, run.summary["std"]["mis_bound"]),
        )
    )
    histories = {arm.name.lower(): arm.history for arm in run.arms}
    drawn.append(
        ("Training by epoch: loss, accuracy and density of the gate", plots.plot_training(histories, len(classes)))
    )
    for arm in run.arms:
        text = f"Confusion matrix of {arm.name}: true classes down, predicted classes across"
        drawn.append((text, plots.plot_confusion(arm.confusion, classes)))
    similarities = []
    compared = run.arms if _few_filters(run) else []
    for arm in compared:
        kernels = metrics.last_convolution(arm.model, arm.mi.shape[0]).weight
        similarities.append(metrics.filter_similarity(kernels.detach().numpy()))
    top = max((float((s - np.eye(len(s))).max()) for s in similarities), default=1.0)
    for arm, similarity in zip(compared, similarities, strict=True):
        owner = arm.mi.argmax(1) if arm.gate is None else arm.gate.argmax(0)
        by = "mutual information" if arm.gate is None else "the gate"
        text = f"Similarity of the kernels of the filters of {arm.name}, sorted by class (by {by})"
        drawn.append((text, plots.plot_filter_similarity(similarity, owner, classes, top)))
    return [{"alt": text, "source": data_uri(_png(figure))} for text, (figure, _) in drawn]


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()
