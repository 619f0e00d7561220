"""Ratios to the limit and to the peers, measured in one interleaved run: writes docs/performance.md and its JSON.

    python benchmarks/report.py [--output docs/performance.md] [--json benchmarks/results/NAME.json]

The limits are measured beside the operators: x.sum() reads x once, and torch.empty_like(x).fill_(1) after it writes as
much once (in one go, as forward and backward do: what is written drives what was read out of the cache). On a shared
machine absolute times drift, so all candidates of a case take turns, several calls each, and the median over
the turns counts.
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
TURNS = 9 if cases.QUICK else 15


def medians(candidates: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds per call of every candidate, by turns; the first calls of a turn only warm the caches."""
    calls = {}
    for name, f in candidates.items():
        f()
        start = time.perf_counter()
        f()
        calls[name] = max(2, min(200, int(0.004 / max(1e-7, time.perf_counter() - start))))
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(TURNS):
        for name, f in candidates.items():
            f()
            start = time.perf_counter()
            for _ in range(calls[name]):
                f()
            times[name].append((time.perf_counter() - start) / calls[name])
    return {name: statistics.median(values) for name, values in times.items()}


def measure(case: cases.Case, peers: dict[str, Callable]) -> dict:
    """All figures of one case, seconds."""
    for f in peers.values():
        cases.check(case, f)
    inputs = case.inputs()
    x = inputs[0].detach()
    candidates: dict[str, Callable[[], object]] = {
        "sum": lambda: x.sum(),
        "sum and fill": lambda: (x.sum(), torch.empty_like(x).fill_(1)),
    }
    for name, f in peers.items():
        candidates[f"{name} forward"] = cases.forward_of(f, inputs)
        candidates[f"{name} both"] = cases.forward_backward_of(f, inputs)
    times = medians({name: cases.synchronized(f) for name, f in candidates.items()})
    gc.collect()
    return {"case": case.id, "shape": list(case.shape), "bytes": case.bytes, "seconds": times}


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
        t = row["seconds"]
        forward, both = t["csg_ext forward"], t["csg_ext both"]
        cells = [
            row["case"],
            f"{row['bytes'] / 1e6:.2f}",
            f"{forward * 1e3:.4f}",
            f"{t['sum'] / forward:.2f}",
            f"{both * 1e3:.4f}",
            f"{both / t['sum and fill']:.2f}",
            *[f"{t[f'{p} forward'] / forward:.2f}x" for p in peers],
            *[f"{t[f'{p} both'] / both:.2f}x" for p in peers],
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


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
                "Written by `python benchmarks/report.py`; do not edit. Each row is one interleaved run: the operator,",
                "the limits (`x.sum()` reads x once; the same followed by `torch.empty_like(x).fill_(1)`, which writes",
                "as much once) and the peers take turns, and medians count. A peer's column says how many times the",
                "operator's time it takes: above 1x the operator is faster. eager: `x.mean(spatial) * gate[labels]`;",
                "compiled: the same under `torch.compile`; masked: `(x * gate[labels][..., None, None]).mean(spatial)`",
                "(the method as written). both: forward and backward, gradients to x and gate.",
                "",
                *[f"- {key}: {value}" for key, value in about.items()],
                *gpu,
                "",
                *table(rows),
                "",
            ]
        )
    )


if __name__ == "__main__":
    main()
