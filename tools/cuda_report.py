"""Prints, as Markdown, what the compiler made of every CUDA kernel: registers, spills, 16-byte accesses. Needs no GPU.

    python tools/cuda_report.py [--arch 80 90 ...] > docs/cuda_resources.md

Needs nvcc, and cuobjdump with nvdisasm: of the CUDA toolkit, or from `pip install nvidia-cuda-cuobjdump
nvidia-cuda-nvdisasm`. Exits with 1 if a kernel spills registers.
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
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ["80", "86", "89", "90", "100", "120"]


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
    return done.stdout + done.stderr


def resources(log: str) -> dict[str, dict[str, int]]:
    """Per mangled kernel, what `ptxas -v` says."""
    found: dict[str, dict[str, int]] = {}
    for part in log.split("Function properties for ")[1:]:
        numbers = {
            "stack": r"(\d+) bytes stack frame",
            "spill": r"(\d+) bytes spill stores",
            "registers": r"Used (\d+) registers",
        }
        matches = {key: re.search(pattern, part) for key, pattern in numbers.items()}
        if matches["registers"]:
            found[part.split(None, 1)[0]] = {key: int(match[1]) for key, match in matches.items() if match}
    return found


def accesses(sass: str) -> dict[str, collections.Counter[str]]:
    """Per mangled kernel, the 16-byte loads and stores of global memory, and all of local memory."""
    found: dict[str, collections.Counter[str]] = {}
    for part in re.split(r"Function : ", sass)[1:]:
        counter = found[part.split(None, 1)[0]] = collections.Counter()
        for operation in re.findall(r"\b((?:LDG|STG|LDL|STL)\.?[\w.]*)", part):
            kind = operation[:3]
            if kind in ("LDL", "STL") or operation.endswith(".128") or ".128." in operation:
                counter[kind] += 1
    return found


def readable(name: str) -> str:
    """csg::(anonymous namespace)::pool_tiles<__half, (csg::Pool)1>(...) -> pool_tiles<half, max>"""
    name = name.replace("unsigned __int128", "word128").replace("unsigned long", "word64")
    name = re.sub(r"\(anonymous namespace\)::|csg::|^void ", "", name)
    name = name.replace("(Pool)0", "avg").replace("(Pool)1", "max")
    return name.split("(")[0].replace("__nv_bfloat16", "bfloat16").replace("__half", "half")


def main() -> int:
    parser = argparse.ArgumentParser(description="Registers, spills and 16-byte accesses of every CUDA kernel.")
    parser.add_argument("--arch", nargs="+", default=ARCHITECTURES, help="compute capabilities, such as 80 90")
    architectures = parser.parse_args().arch
    nvcc, cuobjdump, demangle = (
        find("nvcc"),
        find("cuobjdump"),
        find("cu++filt" if shutil.which("cu++filt") else "c++filt"),
    )
    search = os.pathsep.join([str(Path(find("nvdisasm")).parent), os.environ.get("PATH", "")])
    rows: dict[str, dict[str, str]] = collections.defaultdict(dict)
    spills: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted((ROOT / "csrc").glob("*/*.cu")):
            for architecture in architectures:
                cubin = Path(folder) / f"{source.stem}.{architecture}.cubin"
                flags = ["-std=c++20", "-O3", f"-arch=sm_{architecture}", "-Werror", "all-warnings", "-Xptxas", "-v"]
                used = resources(run(nvcc, *flags, "-cubin", "-o", str(cubin), str(source)))
                moved = accesses(run(cuobjdump, "-sass", str(cubin), PATH=search))
                names = run(demangle, *used).splitlines()
                for name, mangled in zip(map(readable, names), used, strict=True):
                    if "cub::" in name:  # NVIDIA's radix sort
                        continue
                    r, m = used[mangled], moved[mangled]
                    rows[name][architecture] = f"{r['registers']} / {m['LDG']} / {m['STG']}"
                    if r["stack"] or r["spill"] or m["LDL"] or m["STL"]:
                        spills.append(f"{name}, sm_{architecture}: {r['stack']} bytes of stack, {r['spill']} spilled")
    version = re.search(r"release ([\d.]+)", run(nvcc, "--version"))
    print("# What the compiler made of the CUDA kernels\n")
    print(
        f"Written by `tools/cuda_report.py` with nvcc {version[1] if version else 'of an unknown version'}; no GPU ran."
    )
    print("Each cell: registers per thread / 16-byte global loads / 16-byte global stores in the machine code. A last")
    print("template argument of 1 in a `_channels` kernel is the path for rows that are not 16-byte aligned. CUB's own")
    print("kernels, behind `radix_sort`, are left out.\n")
    print(
        "Kernels with a stack frame or spilled registers: " + ("none." if not spills else "\n- " + "\n- ".join(spills))
    )
    print("\n| kernel | " + " | ".join(f"sm_{a}" for a in architectures) + " |")
    print("|---|" + "---|" * len(architectures))
    for name in sorted(rows):
        print(f"| `{name}` | " + " | ".join(rows[name].get(a, "-") for a in architectures) + " |")
    return 1 if spills else 0


if __name__ == "__main__":
    sys.exit(main())
