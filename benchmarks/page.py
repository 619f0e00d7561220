"""docs/performance.md and its pictures from the measured JSON: nothing here measures, nothing is typed by hand."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

DIRECTIONS = {
    "forward": "Forward",
    "backward": "Backward",
    "both": "Forward with backward",
    "relu": "Forward with backward, a ReLU before it",
}
# Okabe and Ito's colours, and a marker each: readable without colours, too.
STYLES = {
    "csg_ext": ("#000000", "o"),
    "eager": ("#D55E00", "s"),
    "eager compiled": ("#E69F00", "D"),
    "eager autotuned": ("#F0E442", "P"),
    "masked": ("#0072B2", "v"),
    "masked compiled": ("#56B4E9", "^"),
    "masked autotuned": ("#CC79A7", "X"),
    "viewed": ("#999999", "h"),
    "triton": ("#009E73", "*"),
}
HEAD = """\
# Performance

Written by `python benchmarks/report.py`; do not edit. `python benchmarks/report.py --from-json` writes it again from
benchmarks/results/ without measuring.

How it is measured. Two candidates are compared as a pair: in each turn both are timed one after the other, who comes
first changes, and the median over the turns of the ratio of their times counts. On a CPU each call is timed after
untimed calls of its own that fill the caches; on a GPU by events on the device, the L2 cache flushed before each call.
Turns in which other programs took the processors are measured again; where fewer than half of a pair's turns were
undisturbed, its figure bears a * and the summaries leave it out. Every candidate's result and gradients are compared
with fp64 first.
"""
POOL = """\
The limit of forward is one read of x (`sum` over its memory, taken as fp32 whatever its type: a sum of half numbers
would bound the adding, not the memory), of backward one write of the gradients of x and gate (`fill_`), of both the
two in one go{copy}; with a ReLU before the pooling a copy of x, a read and another copy, which is what the ReLU must
move forward and backward beside the pooling's read. Share of the limit: the limit's time over csg_ext's. Above 1 it
says that PyTorch's loop, which stands for the limit, did not reach it, or that the gradient of x, the same at all
positions, is handed back as a broadcast view of (N, K) values (csg_ext where that is faster; viewed): then backward
writes nothing, and what it costs the operator before the pooling to read the view is in the figures with a ReLU. A
peer's cell has its time in multiples of csg_ext's (above 1x csg_ext is faster), then its peak memory: the most that is
allocated at a time beyond the inputs, in multiples of x's bytes. A case is named by layer, type, layout and number of
classes C. rows: contiguous; channels_last: also the memory of tokens (N, L, K). The layers' maps (N, K, *spatial), S
positions each: {layers}.

- eager: `x.mean(spatial) * gate[labels]`
- masked: `(x * gate[labels][..., None, None]).mean(spatial)`, the method as it is written
- compiled: the same under `torch.compile`; autotuned: under its mode max-autotune-no-cudagraphs ({few})
- viewed: `x.sum(spatial) * (gate[labels] / S)`, the shortest form whose gradient of x is a view
{others}- backward: `torch.autograd.grad` through one graph that is kept (`retain_graph`), gradients to x and gate
  (memory: what backward allocates itself, without what the graph holds)
"""
GATE = """\
A momentum step on a gate (C, K) with its projection. The limit is a copy that moves as many bytes as the step
must: gate and momentum buffer read and written, the gradient read. Peers: `torch.optim.SGD` (foreach, or fused), then
`reference.project_gate`, which like csg_ext keeps NaN and makes a column without a positive entry one-hot; compiled:
both under one `torch.compile`. A peer's cell has its time in multiples of csg_ext's, then its peak memory in multiples
of the gate's bytes; csg_ext's is without the maxima, at most 65 rows, that the CPU kernel takes beside torch's
allocator. The first step, which makes the momentum buffer, is not measured.

in place: fused, then `gate.div_(gate.amax(0)).clamp_(0, 1)`, enough for gates without NaN and without such columns.
"""
END_TO_END = """\
Whole training steps: forward, loss, backward, optimizers. The ratio to the STD step of the same network is
the median over turns of one step each; in brackets the 95 % interval of the median (bootstrap). The ms of a row are
those of its own turns, which ran at another time than those of other rows: compare rows by their ratios. The overhead
of csg is what the gate costs; joint has both paths' losses from one pass.

- std beside itself: the error of the measurement; a difference that is no larger shows nothing
- csg, joint: `csg_ext.nn.GatedModel` with gated_pool and `ProjectedSGD`
- masked: the map gated by broadcasting, then pooled; gate by `torch.optim.SGD`, then the projection in PyTorch
- released: the same with a mask of (N, K, H, W) filled in a loop over the samples, as the released method does
"""


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def milliseconds(seconds: float) -> str:
    """Three significant digits at least, without an exponent."""
    return f"{seconds * 1e3:.{max(0, 2 - math.floor(math.log10(seconds * 1e3)))}f}"


def _names(rows: list[dict], direction: str) -> list[str]:
    return [name for name in STYLES if any(name in row["pairs"][direction] for row in rows)]


def _cell(pair: dict | None, peak: float) -> str:
    return "" if pair is None else f"{pair['ratio']:.2f}x, {peak:.2f}{'*' if pair['disturbed'] else ''}"


def pool_table(rows: list[dict], direction: str) -> list[str]:
    """One direction: ours, its share of the limit and memory, then the peers."""
    peers = _names(rows, direction)
    lines = []
    for row in rows:
        pairs, peaks = row["pairs"][direction], row["peak_bytes"][direction]
        limit = pairs["limit"]
        lines.append(
            [
                row["case"],
                f"{row['bytes'] / 1e6:.2f}",
                milliseconds(row["seconds"][direction]),
                f"{limit['ratio']:.2f}{'*' if limit['disturbed'] else ''}",
                f"{peaks['csg_ext'] / row['bytes']:.2f}",
                *[_cell(pairs.get(p), peaks.get(p, 0) / row["bytes"]) for p in peers],
            ]
        )
    return table(["case", "x (MB)", "csg_ext (ms)", "share of the limit", "memory", *peers], lines)


def pool_summary(rows: list[dict]) -> str:
    """How near the limits the large maps come, and every peer that is faster."""
    lines = []
    for direction, title in DIRECTIONS.items():
        large = [row["pairs"][direction]["limit"] for row in rows if row["bytes"] >= 4e6]
        shares = sorted(pair["ratio"] for pair in large if not pair["disturbed"])
        if shares:
            near = sum(share >= 0.85 for share in shares)
            middle = statistics.median(shares)
            lines.append(
                f"- {title}: of {len(shares)} maps of 4 MB and more, {near} at 0.85 of the limit or more; "
                f"median {middle:.2f}, lowest {shares[0]:.2f}."
            )
    pairs = [(row, d, name, pair) for row in rows for d in DIRECTIONS for name, pair in row["pairs"][d].items()]
    compared = sum(name != "limit" and not pair["disturbed"] for *_, name, pair in pairs)
    faster = [
        f"{name} of {row['case']}, {direction} ({pair['ratio']:.2f}x)"
        for row, direction, name, pair in pairs
        if name != "limit" and not pair["disturbed"] and pair["ratio"] < 1
    ]
    disturbed = sum(pair["disturbed"] for *_, pair in pairs)
    named = f": {'; '.join(faster)}" if faster else ""
    lines.append(f"- A peer was faster than csg_ext in {len(faster)} of {compared} comparisons{named}.")
    lines.append(f"- Comparisons left out because other programs disturbed them (*): {disturbed}.")
    return "\n".join(lines)


def _shares(row: dict, direction: str) -> dict[str, float]:
    """Every candidate's share of the limit."""
    pairs = row["pairs"][direction]
    peers = {name: pairs["limit"]["ratio"] / pair["ratio"] for name, pair in pairs.items() if name != "limit"}
    return {"csg_ext": pairs["limit"]["ratio"]} | peers


def picture(rows: list[dict], path: Path) -> None:
    """The share of the limit of every candidate, a row per case under its layer, a panel per direction."""
    heights: dict[str, float] = {}
    ticks, headings, at = [], [], 0.0
    for row in rows:
        heading = f"{row['layer']} ({', '.join(map(str, row['shape']))})"
        if heading not in headings:
            headings.append(heading)
            at += 0.4
            ticks.append((at, heading))
            at += 1
        ticks.append((at, row["kind"]))
        heights[row["case"]] = at
        at += 1
    figure, panels = plt.subplots(
        1, len(DIRECTIONS), figsize=(17, 1.6 + 0.19 * at), sharex=True, sharey=True, layout="constrained"
    )
    for panel, (direction, title) in zip(panels, DIRECTIONS.items(), strict=True):
        for name, (colour, marker) in reversed(STYLES.items()):
            shares = [(_shares(row, direction).get(name), heights[row["case"]]) for row in rows]
            shares = [point for point in shares if point[0] is not None]
            if shares:
                size = 80 if marker == "*" else 34
                style = {"c": colour, "marker": marker, "s": size, "edgecolors": "black", "linewidths": 0.4}
                panel.scatter(*zip(*shares, strict=True), label=name, zorder=3, **style)
        panel.axvline(1, color="black", linewidth=1)
        panel.set(xscale="log", title=title, xlabel="share of the limit (more is better)")
        panel.grid(axis="x", color="#dddddd", linewidth=0.6)
        panel.hlines(heights.values(), 0, 1, color="#eeeeee", linewidth=0.6, transform=panel.get_yaxis_transform())
        panel.tick_params(axis="both", which="both", length=0)
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.xaxis.set_minor_formatter(NullFormatter())
    panels[0].set_yticks(*zip(*ticks, strict=True), fontsize=8)
    for label in panels[0].get_yticklabels():
        label.set_fontweight("bold" if label.get_text() in headings else "normal")
    panels[0].set_ylim(at - 0.3, -0.5)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside upper center", ncols=len(labels), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def machine_lines(about: dict[str, str]) -> list[str]:
    """What was measured on what."""
    return [", ".join(f"{key} {value}" if key != "device" else value for key, value in about.items()) + ".", ""]


def pool_method(part: dict, device: str) -> str:
    """What the columns of gated_pool are."""
    rows = part["rows"]
    few = sorted({row["layer"] for row in rows if "eager autotuned" in row["pairs"]["forward"]})
    return POOL.format(
        copy="" if device == "cpu" else " (a copy of x)",
        layers="; ".join(dict.fromkeys(f"{row['layer']} ({', '.join(map(str, row['shape']))})" for row in rows)),
        few="few cases, since compiling takes seconds each: " + ", ".join(few),
        others="" if device == "cpu" else "- triton: benchmarks/triton_peer.py\n",
    )


def pool_section(part: dict, method: list[str], image: str) -> list[str]:
    """gated_pool: how, summary, picture, a table per direction."""
    rows = part["rows"]
    lines = ["### gated_pool", "", *machine_lines(part["machine"]), *method, "In short:", "", pool_summary(rows), ""]
    lines += [f"![share of the limit per case]({image})", ""]
    for direction, title in DIRECTIONS.items():
        lines += [f"#### {title}", "", *pool_table(rows, direction)]
    return lines


def gate_section(part: dict, method: list[str]) -> list[str]:
    """gate_step: a row per size."""
    rows = part["rows"]
    peers = [name for name in rows[0]["pairs"] if name != "limit"]
    lines = []
    for row in rows:
        size = 4 * math.prod(row["size"])
        lines.append(
            [
                f"{row['size'][0]} x {row['size'][1]}",
                f"{row['moved'] / 1e6:.2f}",
                milliseconds(row["seconds"]),
                f"{row['pairs']['limit']['ratio']:.2f}{'*' if row['pairs']['limit']['disturbed'] else ''}",
                f"{row['peak_bytes']['csg_ext'] / size:.2f}",
                *[_cell(row["pairs"][peer], row["peak_bytes"][peer] / size) for peer in peers],
            ]
        )
    head = ["C x K", "bytes moved (MB)", "csg_ext (ms)", "share of the limit", "memory", *peers]
    return ["### gate_step", "", *machine_lines(part["machine"]), *method, *table(head, lines)]


def _overhead(row: dict) -> str:
    """What the gate and the released form add to a step, beside the error."""
    shares = {}
    for form, pair in row["forms"].items():
        more, low, high = (100 * (ratio - 1) for ratio in (pair["ratio"], *pair["interval"]))
        shares[form] = f"{more:+.1f} % ({low:+.1f} to {high:+.1f})"
    return (
        f"- {row['network']}, over std's step: csg {shares['csg']}, released {shares['released']}; "
        f"std beside itself {shares['std']}."
    )


def end_to_end_section(part: dict, method: list[str]) -> list[str]:
    """Training steps: a row per network and form."""
    lines = []
    for row in part["rows"]:
        for form, pair in row["forms"].items():
            low, high = pair["interval"]
            lines.append(
                [
                    f"{row['network']}, batch {' x '.join(map(str, row['batch']))}, C {row['classes']}",
                    form + (" beside itself" if form == "std" else ""),
                    milliseconds(pair["seconds"]),
                    f"{pair['ratio']:.3f} ({low:.3f} to {high:.3f}){'*' if pair['disturbed'] else ''}",
                    str(pair["turns"]),
                    f"{pair['peak_bytes'] / 1e6:.1f}",
                ]
            )
    head = ["network", "step", "ms", "over std", "turns", "peak memory (MB)"]
    summary = [_overhead(row) for row in part["rows"]]
    return ["### End to end", "", *machine_lines(part["machine"]), *method, *summary, "", *table(head, lines)]


def write(results: dict[str, dict], output: Path) -> None:
    """The page and its pictures (in images/ beside it) from the results of every device: cpu_*, then cuda_*."""
    lines = [HEAD]
    if not any(name.startswith("cuda") for name in results):
        lines += ["The CUDA kernels and the Triton peer (benchmarks/triton_peer.py): not measured on a GPU.", ""]
    told: set[str] = set()

    def method(text: str) -> list[str]:
        """What a table's columns are, once a page."""
        lines = ["What the columns are stands above.", ""] if text in told else [text]
        told.add(text)
        return lines

    for name, parts in results.items():
        device = name.partition("_")[0]
        lines += [f"## {next(iter(parts.values()))['machine']['device']}", ""]
        if "gated_pool" in parts:
            part = parts["gated_pool"]
            image = Path("images", f"performance_{name}.png")
            picture(part["rows"], output.parent / image)
            lines += pool_section(part, method(pool_method(part, device)), image.as_posix())
        if "gate_step" in parts:
            lines += gate_section(parts["gate_step"], method(GATE))
        if "end_to_end" in parts:
            lines += end_to_end_section(parts["end_to_end"], method(END_TO_END))
    output.write_text("\n".join(lines).rstrip() + "\n")
