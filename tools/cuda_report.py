"""Prints, as Markdown, what the compiler made of every CUDA kernel: registers, spills, 16-byte accesses. Needs no GPU.

    python tools/cuda_report.py [csg_ext/_cuda.so] > docs/cuda_resources.md

Reads the machine code of a built library (or of several files that nvcc made with -fatbin). Needs cuobjdump and
nvdisasm: of the CUDA toolkit, or from `pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm`. Exits with 1 if a
kernel spills registers, or if one of those that move the large tensors has no 16-byte access.
"""

from __future__ import annotations

import argparse
import collections
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# How these kernels move x or grad_x. Those with a last template argument of 1 are for rows that are not aligned.
WIDE = {
    "pool_tiles": "LDG",
    "pool_rows": "LDG",
    "pool_channels": "LDG",
    "fill_rows": "STG",
    "fill_channels": "STG",
}
Kernels = dict[str, collections.Counter[str]]  # by name: REG, STACK, LOCAL; LDG and STG of 16 bytes; any LDL and STL


def find(tool: str) -> str:
    """The path of a tool of the CUDA toolkit."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    packages = Path(sysconfig.get_path("purelib")) / "nvidia"
    folders = [Path(home) / "bin", *sorted(packages.glob("*/bin"))]
    path = shutil.which(tool) or next((str(f / tool) for f in folders if (f / tool).exists()), None)
    if path is None:
        sys.exit(f"cuda_report: {tool} must be on PATH, in CUDA_HOME/bin or installed by pip, found none")
    return path


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode != 0:
        sys.exit(f"cuda_report: {command[0]} failed: {done.stdout}{done.stderr}")
    return done.stdout


def by_architecture(text: str) -> dict[str, str]:
    """What cuobjdump prints for each architecture, put together."""
    found: dict[str, str] = collections.defaultdict(str)
    for part in re.split(r"^arch = ", text, flags=re.MULTILINE)[1:]:
        architecture, _, rest = part.partition("\n")
        found[architecture] += rest
    return found


def resources(text: str, into: dict[str, collections.Counter[str]]) -> None:
    """Per mangled kernel, what `cuobjdump -res-usage` says."""
    for name, numbers in re.findall(r"^ Function (\S+):\n\s+(.*)$", text, re.MULTILINE):
        for key, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", numbers):
            into[name][key] = int(number)


def accesses(text: str, into: dict[str, collections.Counter[str]]) -> None:
    """Per mangled kernel, from `cuobjdump -sass`: 16-byte loads and stores of global memory, all of local memory."""
    for part in re.split(r"Function : ", text)[1:]:
        name, _, code = part.partition("\n")
        for operation in re.findall(r"\b((?:LDG|STG|LDL|STL)\.?[\w.]*)", code):
            kind = operation[:3]
            if kind in ("LDL", "STL") or operation.endswith(".128") or ".128." in operation:
                into[name.strip()][kind] += 1


def readable(name: str) -> str:
    """csg::(anonymous namespace)::pool_tiles<__half, (csg::Pool)1>(...) -> pool_tiles<half, max>"""
    name = name.replace("unsigned __int128", "word128").replace("unsigned long", "word64")
    name = re.sub(r"\(anonymous namespace\)::|csg::|^void ", "", name)
    name = name.replace("(Pool)0", "avg").replace("(Pool)1", "max")
    return name.split("(")[0].replace("__nv_bfloat16", "bfloat16").replace("__half", "half")


def read(libraries: list[Path]) -> dict[str, Kernels]:
    """The kernels of libraries by architecture, without CUB's."""
    cuobjdump, demangle = find("cuobjdump"), find("cu++filt" if shutil.which("cu++filt") else "c++filt")
    search = os.pathsep.join([str(Path(find("nvdisasm")).parent), os.environ.get("PATH", "")])
    mangled: dict[str, dict[str, collections.Counter[str]]] = collections.defaultdict(
        lambda: collections.defaultdict(collections.Counter)
    )
    for library in libraries:
        for option, take in (("-res-usage", resources), ("-sass", accesses)):
            for architecture, text in by_architecture(run(cuobjdump, option, str(library), PATH=search)).items():
                take(text, mangled[architecture])
    found: dict[str, Kernels] = {}
    for architecture, kernels in mangled.items():
        names = run(demangle, *kernels).splitlines()
        own = {
            readable(name): counts for name, counts in zip(names, kernels.values(), strict=True) if "cub::" not in name
        }
        if own:  # linking adds a file without kernels for nvcc's default architecture
            found[architecture] = own
    return found


def faults(architectures: dict[str, Kernels]) -> list[str]:
    """Kernels that spill, and those of WIDE without their 16-byte accesses."""
    found = []
    for architecture, kernels in architectures.items():
        for name, m in sorted(kernels.items()):
            if m["STACK"] or m["LOCAL"] or m["LDL"] or m["STL"]:
                found.append(
                    f"{name}, {architecture}: {m['STACK']} bytes of stack, {m['LDL'] + m['STL']} accesses to it"
                )
            wide = WIDE.get(name.partition("<")[0])
            if wide and not name.endswith(", 1>") and not m[wide]:
                found.append(f"{name}, {architecture}: no {wide} of 16 bytes")
        missing = WIDE.keys() - {name.partition("<")[0] for name in kernels}
        found += [f"{name}, {architecture}: not in the library" for name in sorted(missing)]
    return found


def report(architectures: dict[str, Kernels], compiler: str) -> str:
    columns = sorted(architectures, key=lambda name: int(re.sub(r"\D", "", name)))
    wrong = faults(architectures)
    lines = [
        "# What the compiler made of the CUDA kernels\n",
        f"Written by `tools/cuda_report.py` from what {compiler} built; no GPU ran.",
        "Each cell: registers per thread / 16-byte global loads / 16-byte global stores in the machine code. A last",
        "template argument of 1 in a `_channels` kernel is the path for rows that are not 16-byte aligned. CUB's own",
        "kernels, behind `radix_sort`, are left out.\n",
        "Kernels that spill registers, and kernels that move x or grad_x without 16-byte accesses: "
        + ("none.\n" if not wrong else "\n\n- " + "\n- ".join(wrong) + "\n"),
        "| kernel | " + " | ".join(columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for name in sorted({name for kernels in architectures.values() for name in kernels}):
        cells = [architectures[column].get(name) for column in columns]
        texts = ["-" if m is None else f"{m['REG']} / {m['LDG']} / {m['STG']}" for m in cells]
        lines.append(f"| `{name}` | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Registers, spills and 16-byte accesses of every CUDA kernel.")
    default = ROOT / "csg_ext" / "_cuda.so"
    parser.add_argument("library", nargs="*", type=Path, default=[default], help="a built _cuda.so")
    libraries = parser.parse_args().library
    for library in libraries:
        if not library.is_file():
            parser.error(f"library must be a built _cuda.so, got {str(library)!r}, which does not exist")
    version = re.search(r"release ([\d.]+)", run(find("nvcc"), "--version"))
    architectures = read(libraries)
    print(report(architectures, f"nvcc {version[1]}" if version else "nvcc"))
    wrong = faults(architectures) if architectures else ["the library holds no machine code"]
    for fault in wrong:
        print(f"cuda_report: {fault}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
