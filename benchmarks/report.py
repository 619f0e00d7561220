"""Ratios to the limit and to the peers, measured in one interleaved run: writes docs/performance.md and its JSON.

    python benchmarks/report.py [--output docs/performance.md] [--json benchmarks/results/NAME.json]

Protocol. Two candidates are compared as a pair: the operator with a limit, or with a peer. x.sum() reads x once; the
same followed by torch.empty_like(x).fill_(1) writes as much once. In every turn both of a pair are measured one after
the other, who comes first changes from turn to turn, and the median over the turns of the ratio counts: what disturbs
a shared machine for longer than a turn disturbs both. Each is called until its caches are its own (WARM calls, not
timed) and then timed over several calls: a peer that writes a map of x's size leaves nothing of x in the cache, and x
of the cache's size comes back only over several calls. Both sides thus find what their own last call left, as in a loop
that does nothing else: the limits are at their best, too. Times in milliseconds are medians over all turns.

Where other programs take the processors, both of a pair wait in whole time slices and every ratio tends to 1. A turn in
which this process waited for a processor for more than WAITED of its time is therefore measured again, whatever it gave
(Linux tells; elsewhere every turn counts). Rows with a pair that got fewer than half of its turns so are marked with *
and left out of the summary.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import cases
import torch

from csg_ext import _extension

ROOT = Path(__file__).resolve().parent.parent
TURNS = 7 if cases.QUICK else 15
WARM = 8  # untimed calls before the timed ones; fewer where they would take longer than SECONDS
WAITED = 0.02  # share of a turn that its threads may have waited for a processor
ATTEMPTS = 4 * TURNS
SECONDS = 0.004  # that the timed calls of one candidate take in one turn, or two calls


def timed(f: Callable[[], object]) -> float:
    """Seconds per call of f, after calls that fill the caches as its own last call leaves them."""
    start = time.perf_counter()
    f()
    seconds = time.perf_counter() - start
    for _ in range(min(WARM, max(1, int(SECONDS / seconds))) - 1):
        start = time.perf_counter()
        f()
        seconds = time.perf_counter() - start
    calls = max(2, min(200, int(SECONDS / seconds)))
    start = time.perf_counter()
    for _ in range(calls):
        f()
    return (time.perf_counter() - start) / calls


def waited() -> float:
    """Seconds that the threads of this process were ready to run but had no processor."""
    total = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(path.read_text().split()[1])
        except (OSError, IndexError):
            pass  # the thread has ended, or the kernel does not count
    return total * 1e-9


def compared(ours: Callable[[], object], other: Callable[[], object]) -> list[tuple[float, float, bool]]:
    """Seconds per call of both, turn by turn, and whether the turn was undisturbed; who comes first changes."""
    turns: list[tuple[float, float, bool]] = []
    for attempt in range(ATTEMPTS):
        start, waited_before = time.perf_counter(), waited()
        if attempt % 2:
            other_time, ours_time = timed(other), timed(ours)
        else:
            ours_time, other_time = timed(ours), timed(other)
        fine = waited() - waited_before <= WAITED * (time.perf_counter() - start)
        turns.append((ours_time, other_time, fine))
        if sum(turn[2] for turn in turns) == TURNS:
            break
    return turns


def measure(case: cases.Case, peers: dict[str, Callable]) -> dict:
    """All figures of one case: seconds of every candidate, and its time over ours (medians of ratios)."""
    for f in peers.values():
        cases.check(case, f)
    inputs = case.inputs()
    x = inputs[0].detach()
    make = {"forward": cases.forward_of, "both": cases.forward_backward_of}
    limits: dict[str, Callable[[], object]] = {
        "forward": lambda: x.sum(),
        "both": lambda: (x.sum(), torch.empty_like(x).fill_(1)),
    }
    seconds, ratios, disturbed = {}, {}, False
    for direction in make:
        ours = cases.synchronized(make[direction](peers["csg_ext"], inputs))
        others = {"limit": limits[direction]}
        others |= {name: make[direction](f, inputs) for name, f in peers.items() if name != "csg_ext"}
        all_ours = []
        for name, f in others.items():
            turns = compared(ours, cases.synchronized(f))
            quiet = [turn for turn in turns if turn[2]]
            disturbed |= 2 * len(quiet) < TURNS
            turns = quiet or turns
            all_ours += [turn[0] for turn in turns]
            seconds[f"{name} {direction}"] = statistics.median(turn[1] for turn in turns)
            ratios[f"{name} {direction}"] = statistics.median(turn[1] / turn[0] for turn in turns)
        seconds[f"csg_ext {direction}"] = statistics.median(all_ours)
    gc.collect()
    return {
        "case": case.id,
        "shape": list(case.shape),
        "bytes": case.bytes,
        "disturbed": disturbed,
        "seconds": seconds,
        "ratios": ratios,
    }


def table(rows: list[dict]) -> list[str]:
    """The Markdown table: ours, its share of the limit, the peers' times relative to ours."""
    peers = ["eager", "compiled", "masked"]
    lines = [
        "| case | x (MB) | forward (ms) | share of `sum`'s bandwidth | both (ms) | over `sum` and `fill` | "
        + " | ".join(f"{p} forward" for p in peers)
        + " | "
        + " | ".join(f"{p} both" for p in peers)
        + " |",
        "|---|---|---|---|---|---|" + "---|" * (2 * len(peers)),
    ]
    for row in rows:
        t, ratio = row["seconds"], row["ratios"]
        cells = [
            row["case"] + (" *" if row["disturbed"] else ""),
            f"{row['bytes'] / 1e6:.2f}",
            f"{t['csg_ext forward'] * 1e3:.4f}",
            f"{ratio['limit forward']:.2f}",
            f"{t['csg_ext both'] * 1e3:.4f}",
            f"{1 / ratio['limit both']:.2f}",
            *[f"{ratio[f'{p} forward']:.2f}x" for p in peers],
            *[f"{ratio[f'{p} both']:.2f}x" for p in peers],
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def summary(rows: list[dict]) -> str:
    """How many rows come near the limits, where x is large enough for that, and which peers are faster."""
    marked = sum(row["disturbed"] for row in rows)
    rows = [row for row in rows if not row["disturbed"]]
    large = [row["ratios"] for row in rows if row["bytes"] >= 4e6]
    near = sum(ratio["limit forward"] >= 0.85 for ratio in large)
    both = sum(ratio["limit both"] >= 1 / 1.5 for ratio in large)
    faster = [
        f"{name} of {row['case']} ({ratio:.2f}x)"
        for row in rows
        for name, ratio in row["ratios"].items()
        if not name.startswith("limit") and ratio < 1
    ]
    return (
        f"Of {len(large)} maps of 4 MB and more, forward reads {near} at 0.85 or more of `sum`'s bandwidth, and "
        f"forward with backward takes at most 1.5 times `sum` and `fill` for {both}. Faster than the operator in "
        f"{len(rows)} maps: {', '.join(faster) or 'no peer'}. Rows left out because other programs disturbed them (*): "
        f"{marked}."
    )


def machine() -> dict[str, str]:
    """What was measured on what."""
    name = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    level = ["baseline", "AVX2", "AVX-512"][torch.ops.csg_ext._cpu_level(-1)]
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if cases.DEVICE == "cuda" else f"{name}, {level} kernels",
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "csg_ext": _extension.BUILD["version"],
        "commit": commit or "unknown",
    }


def main() -> None:
    """Measure the grid and write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "performance.md")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / f"{cases.DEVICE}.json")
    arguments = parser.parse_args()
    cases.steady_memory()
    torch.manual_seed(0)
    peers = cases.peers()
    rows = []
    for case in cases.grid():
        rows.append(measure(case, peers))
        print(table(rows[-1:])[-1], flush=True)
    about = machine()
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")
    gpu = [] if cases.DEVICE == "cuda" else ["", "CUDA kernels: not measured on a GPU."]
    arguments.output.write_text(
        "\n".join(
            [
                "# Performance of gated_pool",
                "",
                "Written by `python benchmarks/report.py`; do not edit. The operator is compared in pairs, with a",
                "limit (`x.sum()` reads x once; the same followed by `torch.empty_like(x).fill_(1)` writes as much",
                "once) or with a peer: in each turn both are timed one after the other, each after untimed calls of",
                "its own that fill the caches, who comes first changes, and the median over the turns of the ratio",
                "counts. A peer's column says how many times the operator's time it takes: above 1x the operator is",
                "faster. eager: `x.mean(spatial) * gate[labels]`; compiled: the same under `torch.compile`; masked:",
                "`(x * gate[labels][..., None, None]).mean(spatial)` (the method as written). both: forward and",
                "backward, gradients to x and gate. Turns in which other programs took the processors are measured",
                "again.",
                "",
                *[f"- {key}: {value}" for key, value in about.items()],
                *gpu,
                "",
                summary(rows),
                "",
                *table(rows),
                "",
            ]
        )
    )


if __name__ == "__main__":
    main()
