"""Tests the built wheel under several Pythons and torches: writes docs/compatibility.md.

    python tools/compatibility.py [--wheels DIR] PYTHON:TORCH ...      e.g. python3.10:2.10.0 python3.13:2.14.1

For each pair: a fresh environment, that torch, the wheel for that Python that tools/build_wheels.py put into DIR, or
without --wheels one built there (CPU kernels), then tests of operators, training, data and measures run from outside
the source tree, so that the installed package is what is tested. Results are kept in
benchmarks/results/compatibility.json, one per pair, with and without --wheels; the page lists all that is there. A pair
that cannot be installed is listed with the reason. Folders are removed again: a CUDA build of torch takes several GB.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "benchmarks" / "results" / "compatibility.json"
PAGE = ROOT / "docs" / "compatibility.md"
TESTS = (
    "test_gated_pool.py",
    "test_gated_pool_transforms.py",
    "test_gate_step.py",
    "test_nn.py",
    "test_mutual_info.py",
    "test_mutual_info_arguments.py",
    "test_mutual_info_classif.py",
    "test_info.py",
    "test_data_loader.py",
    "test_data_select.py",
    "test_training_callback.py",
    "test_training_checkpoints.py",
    "test_training_parts.py",
    "test_training_precision.py",
    "test_training_settings.py",
    "test_mis_metric.py",
    "test_evaluate_model.py",
    "test_evaluation_measures.py",
)
HELPERS = (
    "conftest.py",
    "browser_page.py",
    "example_scripts.py",
    "gated_pool_inputs.py",
    "meta_tensors.py",
    "mutual_info_inputs.py",
    "short_run.py",
    "tiny_training.py",
    "tolerances.py",
)
TOOLS = ("pytest", "hypothesis", "expecttest", "scikit-learn", "numpy", "setuptools>=77")


class Failed(Exception):
    """A step of one pair failed; the message says which and why."""


def run(step: str, *command: str | Path, cwd: Path, **environment: str) -> str:
    """The output of a command, or Failed with its last line."""
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, env=os.environ | environment
    )
    output = done.stdout + done.stderr
    if done.returncode:
        lines = [line for line in output.splitlines() if line.strip()]
        told = [line for line in lines if "(constraint)" in line]  # of pip, which ends with "for help visit"
        told = told or [line for line in lines if line.startswith(("E   ", "ERROR ", "FAILED "))][:1]  # of pytest
        told = told or [line for line in lines if re.search(r"error|failed", line, re.IGNORECASE)]
        raise Failed(f"{step}: {(told or lines or ['no output'])[-1].strip()[:300]}")
    return output


def build(pip: tuple[str | Path, ...], folder: Path) -> Path:
    """A wheel of this checkout, built with the torch of the environment that `pip` belongs to."""
    source = folder / "source"
    ignored = (".git", ".venv", "build", "runs", "*.so", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*ignored))
    options = ("--no-build-isolation", "--no-deps", "--wheel-dir", folder / "dist")
    run("build", *pip, "wheel", *options, source, cwd=folder, CSG_EXT_CUDA="0")
    shutil.rmtree(source)
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel


def given(wheels: Path, version: str) -> Path:
    """The wheel for one Python, such as 3.12.1, among those that were built before."""
    tag = "cp" + "".join(version.split(".")[:2])
    found = sorted(wheels.glob(f"csg_ext-*-{tag}-{tag}-*.whl"))
    if len(found) != 1:
        raise Failed(f"--wheels: one wheel for {tag} was expected in {wheels.name}, got {len(found)}")
    return found[0]


def measure(python: str, torch: str, wheels: Path | None) -> dict[str, str]:
    """What the tests say under one Python and one torch."""
    folder = Path(tempfile.mkdtemp(prefix="csg_ext_compatibility_"))
    result = {"date": datetime.date.today().isoformat()}
    try:
        run("venv", python, "-m", "venv", folder / "venv", cwd=folder)
        own = folder / "venv" / "bin" / "python"
        pip = (own, "-m", "pip", "--disable-pip-version-check", "--no-input", "--no-cache-dir")
        result["python"] = run(
            "python", own, "-c", "import platform as p; print(p.python_version())", cwd=folder
        ).strip()
        run("install torch", *pip, "install", f"torch=={torch}", *TOOLS, cwd=folder)
        result["torch"] = run("torch", own, "-c", "import torch; print(torch.__version__)", cwd=folder).strip()
        wheel = build(pip, folder) if wheels is None else given(wheels, result["python"])
        run("install wheel", *pip, "install", f"{wheel}[train]", f"torch=={torch}", cwd=folder)
        shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("results"))
        tests = folder / "tests"
        tests.mkdir()
        for name in (*TESTS, *HELPERS):
            shutil.copy(ROOT / "tests" / name, tests)
        output = run("tests", own, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests, cwd=folder)
        result["tests"] = output.strip().splitlines()[-1].strip("= ")
        result["wheel"] = wheel.name
    except Failed as failure:
        result["failure"] = str(failure)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return result


def page(results: dict[str, dict[str, str]]) -> str:
    """docs/compatibility.md."""
    lines = [
        "# Compatibility",
        "",
        "Written by `python tools/compatibility.py [--wheels DIR] PYTHON:TORCH ...`; do not edit. Each line: a fresh",
        "environment with that Python and torch, a wheel with its extra [train] installed, and tests of operators,",
        "training, data and measures run on what is installed from outside the source tree",
        f"({', '.join(TESTS)});",
        "until 29 November 2026 without the extra, the operators' tests alone.",
        "A wheel tagged manylinux is one of `make wheels`, compiled against one torch and run under another; a wheel",
        "tagged linux was built in that environment (CPU kernels).",
        "The CUDA kernels are compiled in CI against the torch there; nothing on this page ran on a GPU.",
        "",
        "| Python | torch | wheel | result | date |",
        "|---|---|---|---|---|",
    ]
    for pair, result in sorted(results.items()):
        python, torch, *_ = pair.split(":")
        outcome = result.get("tests") or f"failed: {result['failure']}"
        lines.append(
            f"| {result.get('python', python)} | {result.get('torch', torch)} | {result.get('wheel', '')} | {outcome} "
            f"| {result['date']} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures the pairs on the command line and rewrites the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="+", metavar="PYTHON:TORCH")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="test the wheels that lie there")
    arguments = parser.parse_args()
    pairs = arguments.pairs
    if any(pair.count(":") != 1 for pair in pairs):
        parser.error(f"a pair must be PYTHON:TORCH, got {' '.join(pairs)}")
    results = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    for pair in pairs:
        python, torch = pair.split(":")
        name = f"{Path(python).name}:{torch}" + (":wheels" if arguments.wheels else "")
        results[name] = measure(python, torch, arguments.wheels)
        print(name, results[name], flush=True)
        KEPT.parent.mkdir(parents=True, exist_ok=True)
        KEPT.write_text(json.dumps(results, indent=1) + "\n")
        PAGE.write_text(page(results))


if __name__ == "__main__":
    main()
