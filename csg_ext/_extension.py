"""Loads the compiled libraries: operator schemas and CPU kernels always, CUDA kernels where torch has CUDA.

`CUDA_ERROR` is None when the CUDA kernels are loaded, else one sentence that says why they are not. No device is
touched here, so importing stays cheap; `kernels_for` tells whether a device can run what was built.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable
from pathlib import Path

import torch

_FOLDER = Path(__file__).parent
_REBUILD = "install csg-ext again from its source folder"

try:
    from csg_ext import _bind
except ImportError as error:
    _others = sorted(path.name.split(".")[1] for path in _FOLDER.glob("_bind.*.so"))
    if _others:
        raise ImportError(
            f"csg_ext was built for {', '.join(_others)} and does not load in Python {platform.python_version()} "
            f"({error}): {_REBUILD}."
        ) from None
    raise ImportError(f"csg_ext has no compiled libraries in {_FOLDER}: {_REBUILD}.") from None

BUILD: dict[str, str] = _bind.build_info()


def _numbers(version: str) -> tuple[int, int]:
    """The first two numbers of a version."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _load(name: str) -> str | None:
    """Load one library; returns the loader's own reason when that fails."""
    try:
        torch.ops.load_library(_FOLDER / name)
    except OSError as error:
        return str(error.__cause__ or error)
    return None


def _load_cpu() -> None:
    if _numbers(torch.__version__) < _numbers(BUILD["torch_minimum"]):
        raise ImportError(f"csg_ext needs torch >= {BUILD['torch_minimum']}, got torch {torch.__version__}.")
    failure = _load("_C.so")
    if failure is not None:
        raise ImportError(
            f"csg_ext was built with torch {BUILD['torch']} and does not load in torch {torch.__version__} "
            f"({failure}): {_REBUILD}."
        )


def _load_cuda() -> str | None:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA."
    if not BUILD["cuda"]:
        return f"csg_ext was built without CUDA kernels ({BUILD['cuda_left_out']}): {_REBUILD}."
    if _numbers(BUILD["cuda"])[0] != _numbers(torch.version.cuda)[0]:
        return f"csg_ext was built with CUDA {BUILD['cuda']} but torch uses CUDA {torch.version.cuda}: {_REBUILD}."
    failure = _load("_cuda.so")
    return None if failure is None else f"the CUDA kernels of csg_ext do not load ({failure}): {_REBUILD}."


def kernels_for(capability: tuple[int, int], architectures: Iterable[str]) -> str | None:
    """Which of the built `architectures` (such as "9.0", "9.0a", "12.0+PTX") a device of `capability` runs.

    Returns "sm_90" for machine code, "compute_120" for PTX that the driver compiles at first use, or None. Machine
    code runs on its own major version from its minor version on ("a": on exactly its own version; "f": as without,
    the family); PTX runs on every later version. Source: CUDA C++ Programming Guide, Application Compatibility.
    """
    machine_code: list[tuple[tuple[int, int], str]] = []
    ptx: list[tuple[tuple[int, int], str]] = []
    for entry in architectures:
        name = entry.removesuffix("+PTX")
        version = _numbers(name.rstrip("af"))
        label = name.replace(".", "")
        exact = version == capability
        if exact or (version[0] == capability[0] and version < capability and not name.endswith("a")):
            machine_code.append((version, f"sm_{label}"))
        if entry.endswith("+PTX") and (exact or (version < capability and name[-1].isdigit())):
            ptx.append((version, f"compute_{label}"))
    runs = max(machine_code, default=None) or max(ptx, default=None)
    return None if runs is None else runs[1]


_load_cpu()
CUDA_ERROR: str | None = _load_cuda()
