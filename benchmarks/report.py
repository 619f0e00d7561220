"""Measures the operators beside limits and peers, and writes docs/performance.md with its pictures.

    python benchmarks/report.py [gated_pool] [gate_step] [end_to_end]     (default: all three)
    python benchmarks/report.py --from-json                               writes the page again without measuring

Each part goes to benchmarks/results/ as soon as a row is measured, into a file of the device's name (cpu_*.json or
cuda_*.json), and replaces that part only; the page has what the folder holds, a section for each device. How it is
measured: benchmarks/measure.py. CSG_BENCH_QUICK=1: a few sizes, to try the report.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports every start otherwise; read when torch loads

import end_to_end
import gate_step_cases
import gated_pool_cases
import measure
import page
import torch

RESULTS = measure.ROOT / "benchmarks" / "results"


def rounded(value: Any) -> Any:
    """Floats to five digits, in lists and dictionaries, too: more is noise."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, list | tuple) else value


def pool_row(case: gated_pool_cases.Case, peers: dict[str, gated_pool_cases.Pool]) -> dict:
    """gated_pool on one map: every direction beside its limit and the peers."""
    peers = {name: f for name, f in peers.items() if gated_pool_cases.measured(case, name)}
    for f in peers.values():
        gated_pool_cases.check(case, f)
    inputs = case.inputs()
    row: dict[str, Any] = {
        "case": case.id,
        "layer": case.name,
        "kind": case.kind,
        "shape": list(case.shape),
        "bytes": case.bytes,
        "seconds": {},
        "pairs": {},
        "peak_bytes": {},
    }
    for direction in gated_pool_cases.DIRECTIONS:
        runs = {name: getattr(gated_pool_cases, direction)(f, inputs) for name, f in peers.items()}
        ours = runs["csg_ext"]
        pairs = {"limit": measure.compared(ours, gated_pool_cases.limit(direction, inputs), few=None)}
        pairs |= {name: measure.compared(ours, run) for name, run in runs.items() if name != "csg_ext"}
        row["seconds"][direction] = statistics.median(pair["ours"] for pair in pairs.values())
        row["pairs"][direction] = pairs
        row["peak_bytes"][direction] = {name: measure.peak_bytes(run) for name, run in runs.items()}
    return row


def pool_rows() -> Iterator[dict]:
    """gated_pool on the grid."""
    peers = gated_pool_cases.peers()
    for case in gated_pool_cases.grid():
        yield pool_row(case, peers)


def gate_rows() -> Iterator[dict]:
    """gate_step at every size beside a copy and torch.optim.SGD; one peer's tensors at a time."""
    for size in gate_step_cases.SIZES:
        for peer in gate_step_cases.PEERS:
            gate_step_cases.check(size, peer)
        ours = gate_step_cases.step_of("csg_ext", gate_step_cases.start(size))
        ours()
        pairs = {"limit": measure.compared(ours, gate_step_cases.limit(size), few=None)}
        peaks = {"csg_ext": measure.peak_bytes(ours)}
        for peer in gate_step_cases.PEERS[1:]:
            step = gate_step_cases.step_of(peer, gate_step_cases.start(size))
            step()
            pairs[peer] = measure.compared(ours, step)
            peaks[peer] = measure.peak_bytes(step)
        yield {
            "size": list(size),
            "moved": gate_step_cases.moved(size),
            "seconds": statistics.median(pair["ours"] for pair in pairs.values()),
            "pairs": pairs,
            "peak_bytes": peaks,
        }


def step_rows() -> Iterator[dict]:
    """Training steps of every network."""
    for network in end_to_end.networks():
        yield end_to_end.run(network)


PARTS = {"gated_pool": pool_rows, "gate_step": gate_rows, "end_to_end": step_rows}


def load(folder: Path) -> dict[str, dict]:
    """The results of every device that the folder has, processors first."""
    paths = [*sorted(folder.glob("cpu_*.json")), *sorted(folder.glob("cuda_*.json"))]
    return {path.stem: json.loads(path.read_text()) for path in paths}


def save(parts: dict[str, dict], path: Path) -> None:
    """JSON with a line per row."""
    texts = []
    for name, part in parts.items():
        rows = ",\n".join(json.dumps(row) for row in part["rows"])
        texts.append(f'"{name}": {{"machine": {json.dumps(part["machine"])}, "rows": [\n{rows}\n]}}')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(texts) + "\n}\n")


def main(arguments: list[str] | None = None) -> None:
    """Measure, save, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of {', '.join(PARTS)}; default: all")
    parser.add_argument("--from-json", action="store_true", help="measure nothing")
    parser.add_argument("--output", type=Path, default=measure.ROOT / "docs" / "performance.md")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the measured JSON")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.parts) - set(PARTS))
    if unknown or (options.from_json and options.parts):
        parser.error(f"parts must be any of {', '.join(PARTS)}, and none with --from-json, got {options.parts}")
    results = load(options.results)
    if not options.from_json:
        measure.steady_memory()
        torch.manual_seed(0)
        path = options.results / f"{measure.results_name()}.json"
        parts = results.setdefault(path.stem, {})
        for name in options.parts or PARTS:
            parts[name] = {"machine": measure.machine(), "rows": []}
            for row in PARTS[name]():
                parts[name]["rows"].append(rounded(row))
                save(parts, path)
                print(f"{name}: {row.get('case') or row.get('network') or row.get('size')}", flush=True)
                gc.collect()
    if not results:
        sys.exit(f"report.py: {options.results} has no cpu_*.json or cuda_*.json")
    page.write(load(options.results), options.output)


if __name__ == "__main__":
    main()
