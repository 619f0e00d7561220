"""Writes summary.json and summary.md from what tools/gpu_suite.sh left in a folder; exits 1 if a step failed.

python tools/gpu_summary.py WORKDIR OUTDIR
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")


def read_steps(folder: Path) -> list[dict[str, Any]]:
    """Every step that ran: name, exit status, seconds, command."""
    rows = [line.split("\t") for line in (folder / "steps.tsv").read_text().splitlines()]
    return [{"name": r[0], "status": int(r[1]), "seconds": int(r[2]), "command": r[3]} for r in rows]


def read_tests(path: Path) -> dict[str, Any]:
    """Counts of a JUnit file, and the tests that failed with the first line of what they said."""
    suites = list(ElementTree.parse(path).getroot().iter("testsuite"))
    counts = {key: sum(int(s.get(key, 0)) for s in suites) for key in ("tests", "failures", "errors", "skipped")}
    counts["passed"] = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    failed = {}
    for case in (case for suite in suites for case in suite.iter("testcase")):
        for outcome in (*case.iter("failure"), *case.iter("error")):
            failed[case.get("name", "")] = (outcome.get("message") or "").split("\n")[0][:300]
    return {"counts": counts, "failed": failed}


def read_sanitizer(path: Path, status: int) -> dict[str, Any]:
    """The tool's own last line, and whether it stands for success."""
    text = path.read_text(errors="replace") if path.is_file() else ""
    summary = re.findall(r"^=+ *((?:ERROR|RACECHECK) SUMMARY:.*)$", text, re.MULTILINE)
    return {"passed": status == 0 and bool(summary), "summary": summary[-1].strip() if summary else "no summary line"}


def read_text(path: Path) -> str:
    """What a step printed."""
    return path.read_text(errors="replace").strip() if path.is_file() else ""


def first_line(*command: str) -> str:
    """Of what a command prints; empty where there is no such command or it fails."""
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    return (output.splitlines() or [""])[0].strip()


def describe_machine() -> dict[str, Any]:
    """Commit, versions and devices."""
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": os.environ.get("COMMIT") or first_line("git", "-C", str(ROOT), "rev-parse", "HEAD") or "unknown",
        "platform": platform.platform(),
        "device": first_line("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
        or "no GPU",
    }
    try:
        from csg_ext import info

        facts["csg_ext"] = info.collect()
    except Exception as error:  # the build may have failed: that is part of the result
        facts["csg_ext"] = f"{type(error).__name__}: {error}"
    return facts


def table(header: list[str], rows: list[list[Any]]) -> list[str]:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines] + [""]


def markdown(summary: dict[str, Any]) -> str:
    """The summary for people."""
    machine = summary["machine"]
    lines = ["# GPU suite", "", f"{machine['date']}, commit {machine['commit']}, {machine['device']}", ""]
    if isinstance(machine["csg_ext"], dict):
        built, runs = machine["csg_ext"]["built"], machine["csg_ext"]["runs"]
        lines += [
            f"torch {runs['torch']}, CUDA {runs['torch_cuda']}, Python {runs['python']}; CUDA kernels: "
            + (f"nvcc {built['cuda']} for {' '.join(built['cuda_architectures'])}" if built["cuda"] else "none"),
            "",
        ]
    else:
        lines += [f"csg_ext does not import: {machine['csg_ext']}", ""]
    outcome = {0: "passed", 124: "timed out"}
    lines += table(
        ["step", "result", "seconds"],
        [[s["name"], outcome.get(s["status"], f"failed ({s['status']})"), s["seconds"]] for s in summary["steps"]],
    )
    if summary["tests"]:
        first = next(iter(summary["tests"].values()))["counts"]
        lines += table(["part", *first], [[name, *t["counts"].values()] for name, t in summary["tests"].items()])
        failed = [
            [f"{name}::{case}", said] for name, t in summary["tests"].items() for case, said in t["failed"].items()
        ]
        if failed:
            lines += table(["failed test", "what it said"], failed)
    if summary["sanitizers"]:
        lines += table(
            ["sanitizer", "passed", "its summary"],
            [[name, "yes" if r["passed"] else "no", r["summary"]] for name, r in summary["sanitizers"].items()],
        )
    if summary["benchmarks"]:
        lines += ["Benchmarks: [performance.md](performance.md), from the JSON in benchmarks/.", ""]
    if summary["mutual_info"]:
        lines += [summary["mutual_info"], ""]
    return "\n".join(lines)


def main() -> int:
    """Read, write, and say whether all went well."""
    work, folder = Path(sys.argv[1]), Path(sys.argv[2])
    steps = read_steps(work)
    status = {step["name"]: step["status"] for step in steps}
    summary: dict[str, Any] = {
        "machine": describe_machine(),
        "steps": steps,
        "tests": {file.stem: read_tests(file) for file in sorted(work.glob("*.xml"))},
        "sanitizers": {t: read_sanitizer(work / f"{t}.log", status[t]) for t in SANITIZERS if t in status},
        "benchmarks": (folder / "performance.md").is_file(),
        "mutual_info": read_text(work / "mutual_info.log") if status.get("mutual_info") == 0 else "",
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    (folder / "summary.md").write_text(markdown(summary))
    failed = [step["name"] for step in steps if step["status"] != 0]
    failed += [name for name, result in summary["sanitizers"].items() if not result["passed"] and name not in failed]
    print(f"failed: {', '.join(failed)}" if failed else f"all {len(steps)} steps passed", f"({folder / 'summary.md'})")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
