"""Mutual information beside scikit-learn, in one run: writes docs/performance_mutual_info.md and its JSON.

    python benchmarks/report_mutual_info.py [--quick] [--output FILE.md] [--json FILE.json]

All candidates of a case take turns, and the median over the turns counts. scikit-learn is measured as a whole at the
smallest size; at the larger ones a few features and classes are timed, one call at a time, and the rest is their
multiple, as the table says. --quick: small sizes, to try the report itself.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if "--quick" in sys.argv:
    os.environ["CSG_BENCH_QUICK"] = "1"  # read by measure

import measure
import mutual_info_cases as mi
import numpy as np
import torch
from page import table
from sklearn.feature_selection import mutual_info_classif

import csg_ext

ROOT = Path(__file__).resolve().parent.parent
TURNS = 3 if measure.QUICK else 7
CLASSES = [2, 3, 10, 100, 500] if measure.QUICK else [2, 3, 4, 5, 10, 100, 1000, 5000]
SAMPLES = [1000, 3000, 10_000] if measure.QUICK else [1000, 5000, 20_000, 80_000, 320_000, 1_280_000]
Candidates = dict[str, Callable[[], object]]


def seconds(f: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def medians(candidates: Candidates) -> dict[str, float]:
    """Seconds per call of every candidate, by turns after a first call; short ones several calls a turn."""
    waiting = {name: measure.synchronized(f) for name, f in candidates.items()}
    calls = {}
    for name, f in waiting.items():
        f()
        calls[name] = max(1, min(50, int(0.05 / seconds(f))))
    times: dict[str, list[float]] = {name: [] for name in waiting}
    for _ in range(TURNS):
        for name, f in waiting.items():
            times[name].append(seconds(lambda f=f, count=calls[name]: [f() for _ in range(count)]) / calls[name])
    return {name: statistics.median(values) for name, values in times.items()}


def matrix(case: mi.Case) -> dict[str, Any]:
    """class_mutual_info, all included and the kernel alone, beside scikit-learn."""
    mi.check(case)
    x, y = case.inputs()
    candidates = {f"{ties}": mi.ours(case, x, y, ties) for ties in ("noise", "exact")}
    candidates |= {f"kernel {ties}": mi.kernel(case, x, y, ties) for ties in ("noise", "exact")}
    candidates["approximate"] = mi.approximate(case, x, y)
    row: dict[str, Any] = {"case": case.id, "seconds": medians(candidates)}
    features, labels = x.cpu().numpy(), y.cpu().numpy()
    if case.n * case.k * case.c <= 1e7:  # some seconds
        row["scikit-learn"] = seconds(lambda: mi.scikit_learn(features, labels, list(range(case.c))))
        mi.scikit_learn(features[:, :4], labels, [0], 2)  # starts the processes
        row["scikit-learn, 2 jobs"] = seconds(lambda: mi.scikit_learn(features, labels, list(range(case.c)), 2))
        row["extrapolated"] = False
    else:
        few = np.ascontiguousarray(features[:, :4])
        calls = [seconds(lambda c=c: mi.scikit_learn(few, labels, [c])) for c in range(5)]
        row["scikit-learn per feature and class"] = statistics.median(calls) / 4
        row["scikit-learn"] = row["scikit-learn per feature and class"] * case.k * case.c
        row["extrapolated"] = True
    return row


def multiclass(case: mi.Case) -> dict[str, Any]:
    """mutual_info_classif beside scikit-learn's function of this name."""
    x, y = (t.cpu().numpy() for t in case.inputs())
    few = np.ascontiguousarray(x[:, :4])
    want = mutual_info_classif(few, y, random_state=0)
    assert np.abs(csg_ext.mutual_info_classif(few, y, random_state=0) - want).max() <= 1e-9
    ours = medians({"ours": lambda: csg_ext.mutual_info_classif(x, y, random_state=0)})["ours"]
    theirs = statistics.median(seconds(lambda: mutual_info_classif(few, y, random_state=0)) for _ in range(3))
    return {"case": case.id, "ours": ours, "scikit-learn per feature": theirs / 4, "scikit-learn": theirs / 4 * case.k}


def by_classes() -> list[dict[str, Any]]:
    """The kernel for more and more classes; all take turns."""
    n, k = (5000, 16) if measure.QUICK else (50_000, 64)
    rows = {}
    for ties in ("exact", "noise"):
        candidates = {}
        for c in CLASSES:
            case = mi.Case(n, k, c)
            candidates[str(c)] = mi.kernel(case, *case.inputs(), ties)
        rows[ties] = medians(candidates)
    return [{"n": n, "k": k, "classes": c} | {ties: rows[ties][str(c)] for ties in rows} for c in CLASSES]


def by_samples() -> list[dict[str, Any]]:
    """The kernel for more and more samples, 50 or more of each class, beside sorts of the same columns alone."""
    rows = []
    for n in SAMPLES:
        case = mi.Case(n, max(8, min(256, 2_000_000 // n)), min(1000, n // 50))
        x, y = case.inputs()
        columns = x.T.contiguous()
        array = columns.cpu().numpy()
        candidates: Candidates = {f"{ties}": mi.kernel(case, x, y, ties) for ties in ("exact", "noise")}
        candidates["approximate"] = mi.approximate(case, x, y)
        candidates["torch.sort"] = lambda columns=columns: torch.sort(columns, dim=1)
        if measure.DEVICE == "cpu":
            candidates["numpy.sort, keys alone"] = lambda array=array: np.sort(array, axis=1)
        times = medians(candidates)
        rows.append({"n": n, "k": case.k, "classes": case.c} | {key: t / (n * case.k) for key, t in times.items()})
    return rows


_MEMORY = """
import sys, torch, csg_ext
n, threads, ties = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(threads)
x, y = torch.randn(n, 8), torch.arange(n) % 100
psi, bits = csg_ext.ops.mutual_info._psi(n, x.device)
noise = csg_ext.ops.mutual_info._noise(0, n, 8, 0, 8) if ties == "noise" else None
torch.ops.csg_ext.class_mutual_info(x[:9], y[:9], 100, 3, None, False, psi[:10].clone(), bits)  # loads all code
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
open("/proc/self/clear_refs", "w").write("5")  # the peak begins here
before = status("VmRSS")
torch.ops.csg_ext.class_mutual_info(x, y, 100, 3, noise, False, psi, bits)
print(status("VmHWM") - before)
"""


def memory() -> list[dict[str, Any]]:
    """Peak memory of the kernel beyond its arguments, in a process of its own, bytes per sample."""
    n = 200_000 if measure.QUICK else 1_000_000
    rows = []
    for ties in ("exact", "noise"):
        for threads in (1, 2):
            done = subprocess.run(
                [sys.executable, "-c", _MEMORY, str(n), str(threads), ties],
                capture_output=True,
                text=True,
                check=True,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            )
            rows.append({"n": n, "ties": ties, "threads": threads, "bytes per sample": int(done.stdout) / n})
    return rows


def duration(value: float) -> str:
    """Seconds for people."""
    for unit, size in (("h", 3600.0), ("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value * 1e6:.3g} us"


HEAD = """\
# Performance of class_mutual_info

Written by `python benchmarks/report_mutual_info.py`; do not edit. Candidates of a row took turns; medians.
Features are fp32, k = 3. noise, exact: `csg_ext.class_mutual_info` with these ties, all included (checks,
noise, chunks); kernel: the operator alone, noise drawn beforehand. approximate:
`metrics.approximate_class_mutual_info`, 64 bins, all included. scikit-learn: a call of
`mutual_info_classif` for every class, one process unless it says more; at sizes that would take hours, the
median of 5 calls with 4 features each, times the number of features and classes. Its values were compared
with ours (1e-9) before the timing.
"""


def matrix_section(found: list[dict[str, Any]]) -> list[str]:
    """class_mutual_info: a row per size."""
    rows = []
    for row in found:
        t, theirs = row["seconds"], row["scikit-learn"]
        jobs = f" ({duration(row['scikit-learn, 2 jobs'])} with 2 jobs)" if "scikit-learn, 2 jobs" in row else ""
        single = row.get("scikit-learn per feature and class")
        rows.append(
            [
                row["case"],
                *(duration(t[key]) for key in ("noise", "kernel noise", "exact", "kernel exact", "approximate")),
                duration(theirs) + jobs + (f" = K C x {duration(single)}" if single else ""),
                f"{theirs / t['noise']:,.0f}x",
                f"{theirs / t['exact']:,.0f}x",
            ]
        )
    ours = ["noise", "kernel", "exact", "kernel", "approximate"]
    head = ["N x K x C", *ours, "scikit-learn", "over noise", "over exact"]
    return ["## Every feature with every class, (N, K, C)", "", *table(head, rows)]


def multiclass_section(found: list[dict[str, Any]]) -> list[str]:
    """mutual_info_classif: a row per size."""
    rows = [
        [
            row["case"],
            duration(row["ours"]),
            f"{duration(row['scikit-learn'])} = K x {duration(row['scikit-learn per feature'])}",
            f"{row['scikit-learn'] / row['ours']:,.0f}x",
        ]
        for row in found
    ]
    head = ["N x K x C", "csg_ext", "scikit-learn = K x per feature", "over csg_ext"]
    return ["## The multi-class value, mutual_info_classif", "", *table(head, rows)]


def classes_section(found: list[dict[str, Any]]) -> list[str]:
    """The kernel for more and more classes, and how little they matter."""

    def spread(ties: str, fewest: int) -> str:
        times = [row[ties] for row in found if row["classes"] >= fewest]
        return f"{max(times) / min(times):.2f} ({ties})"

    rows = [[f"{row['classes']:,}", duration(row["exact"]), duration(row["noise"])] for row in found]
    return [
        f"## More classes: the kernel at N = {found[0]['n']:,}, K = {found[0]['k']}",
        "",
        *table(["C", "exact", "noise"], rows),
        f"Largest over smallest: {spread('exact', 2)}, {spread('noise', 2)}; from three classes on: "
        f"{spread('exact', 3)}, {spread('noise', 3)}.",
        "",
    ]


def samples_section(found: list[dict[str, Any]]) -> list[str]:
    """The kernel for more and more samples, beside the sorts that were measured."""
    timed = ["exact", "noise", "approximate"]
    timed += [key for key in ("numpy.sort, keys alone", "torch.sort") if key in found[0]]
    rows = [
        [f"{row['n']:,}", str(row["k"]), str(row["classes"]), *(f"{row[key] * 1e9:.1f}" for key in timed)]
        for row in found
    ]
    return [
        "## More samples: nanoseconds per value of the features, all threads",
        "",
        "The sorts order the same columns, contiguous, and do nothing else.",
        "",
        *table(["N", "K", "C", *timed], rows),
    ]


def memory_section(found: list[dict[str, Any]]) -> list[str]:
    """Memory by ties and threads; nothing where it was not measured."""
    if not found:
        return []
    rows = [
        [
            row["ties"],
            str(row["threads"]),
            f"{row['bytes per sample']:.1f}",
            f"{row['bytes per sample'] / row['threads']:.1f}",
        ]
        for row in found
    ]
    return [
        f"## Memory: peak beyond the arguments at N = {found[0]['n']:,}, bytes per sample",
        "",
        *table(["ties", "threads", "bytes per sample", "per sample and thread"], rows),
    ]


def text(found: dict[str, Any]) -> str:
    """The report."""
    lines = [HEAD, *[f"- {key}: {value}" for key, value in found["machine"].items()], ""]
    lines += matrix_section(found["matrix"]) + multiclass_section(found["multiclass"])
    lines += classes_section(found["classes"]) + samples_section(found["samples"]) + memory_section(found["memory"])
    return "\n".join(lines)


def main() -> None:
    """Measure and write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "performance_mutual_info.md")
    parser.add_argument(
        "--json", type=Path, default=ROOT / "benchmarks" / "results" / f"mutual_info_{measure.DEVICE}.json"
    )
    arguments = parser.parse_args()
    measure.steady_memory()
    torch.manual_seed(0)
    found: dict[str, Any] = {"machine": measure.machine(), "matrix": []}
    for case in [*mi.SIZES, mi.Case(mi.SIZES[-1].n, mi.SIZES[-1].k, mi.SIZES[-1].c, "relu"), *mi.LARGE]:
        found["matrix"].append(matrix(case))
        print(found["matrix"][-1], flush=True)
    for name, part in (
        ("multiclass", lambda: [multiclass(case) for case in mi.SIZES]),
        ("classes", by_classes),
        ("samples", by_samples),
        ("memory", memory if measure.DEVICE == "cpu" and sys.platform == "linux" else list),
    ):
        found[name] = part()
        print(name, found[name], flush=True)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    arguments.output.write_text(text(found))


if __name__ == "__main__":
    main()
