"""What was built, for which torch, CUDA and processors, and what of it runs here: `python -m csg_ext.info [--json]`."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from csg_ext import _bind, _extension

_CPU_KERNELS = ("baseline", "AVX2", "AVX-512")  # by the level that _cpu_level returns


def processor() -> str:
    """The processor's name where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown processor"


def cpu_kernels() -> str:
    """The instruction set whose CPU kernels run: baseline, AVX2 or AVX-512."""
    return _CPU_KERNELS[torch.ops.csg_ext._cpu_level(-1)]


def collect() -> dict[str, Any]:
    """Facts on this installation, as plain types that json can write.

    Keys: "csg_ext" (version, folder), "built" (what it was built with and for), "runs" (Python, torch, CPU, CUDA),
    "cuda_error" (None, or why there are no CUDA kernels) and "devices" (one entry per GPU, with the kernels it uses).
    """
    built: dict[str, Any] = dict(_extension.BUILD)
    version = built.pop("version")
    architectures = built["cuda_architectures"].split()
    built["cuda_architectures"] = architectures
    devices = []
    if _extension.CUDA_ERROR is None and torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            capability = torch.cuda.get_device_capability(index)
            devices.append(
                {
                    "index": index,
                    "name": torch.cuda.get_device_name(index),
                    "capability": f"{capability[0]}.{capability[1]}",
                    "kernels": _extension.kernels_for(capability, architectures),
                }
            )
    return {
        "csg_ext": {"version": version, "folder": str(Path(_extension.__file__).parent)},
        "built": built,
        "runs": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "torch_cuda": torch.version.cuda,
            "platform": platform.platform(),
            "cpu_kernels": cpu_kernels(),
            "cpu_features": [name for name, present in _bind.cpu_features().items() if present],
            "cpu_threads": torch.get_num_threads(),
        },
        "cuda_error": _extension.CUDA_ERROR,
        "devices": devices,
    }


def report() -> str:
    """The facts of collect() as text for people."""
    facts = collect()
    built, runs = facts["built"], facts["runs"]
    if built["cuda"]:
        built_cuda = f"nvcc {built['cuda']} for {' '.join(built['cuda_architectures'])}"
    else:
        built_cuda = f"left out: {built['cuda_left_out']}"
    rows = [
        ("csg_ext", f"{facts['csg_ext']['version']} in {facts['csg_ext']['folder']}"),
        (
            "built with",
            f"torch {built['torch']} (runs with torch >= {built['torch_minimum']}), Python {built['python']}",
        ),
        ("", f"{built['compiler']}; {built['flags']}"),
        ("CUDA kernels", built_cuda),
        ("runs with", f"torch {runs['torch']}, CUDA {runs['torch_cuda'] or 'none'}, Python {runs['python']}"),
        ("", runs["platform"]),
        ("CPU", f"{runs['cpu_kernels']} kernels, {runs['cpu_threads']} threads; {' '.join(runs['cpu_features'])}"),
    ]
    if facts["cuda_error"] is not None:
        rows.append(("CUDA", f"not used: {facts['cuda_error']}"))
    elif not facts["devices"]:
        rows.append(("CUDA", "not used: torch finds no GPU."))
    for device in facts["devices"]:
        uses = (
            f"{device['kernels']} kernels" if device["kernels"] else "no kernels built for it: set TORCH_CUDA_ARCH_LIST"
        )
        rows.append((f"cuda:{device['index']}", f"{device['name']}, compute capability {device['capability']}: {uses}"))
    return "\n".join(f"{name:<13} {text}" for name, text in rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report, or with --json the facts."""
    parser = argparse.ArgumentParser(prog="csg-ext info", description="What was built and what runs here.")
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")
    options = parser.parse_args(argv)
    print(json.dumps(collect(), indent=2) if options.json else report())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
