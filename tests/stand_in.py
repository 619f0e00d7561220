"""The CUDA kernels compiled by a C++ compiler against tests/cuda_on_cpu: how tests build, load and call them."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import subprocess
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "tests" / "cuda_on_cpu"
KERNELS = sorted((ROOT / "csrc").glob("*/*.cu"))
STAND_IN = HERE / "cuda_on_cpu.cpp"
HEADERS = sorted([*(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cuh"), *HERE.glob("*.h")])
# Few blocks, so that the kernels' grid-stride loops run.
FLAGS = (
    "-std=c++20 -O1 -g -Wall -Wextra -Werror -Wno-unknown-pragmas -fno-strict-aliasing -fPIC "
    "-fsanitize=undefined -fno-sanitize-recover=all -DCSG_MAX_BLOCKS=7"
).split()

TYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}

Pointer, Int64, Double, Bool, Enum = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_bool, ctypes.c_int8


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX") or "g++")


def build_folder() -> Path:
    digest = hashlib.sha256(" ".join([*compiler(), *FLAGS]).encode())
    for path in [*KERNELS, *HEADERS, *sorted(HERE.glob("*.cpp"))]:
        digest.update(path.read_bytes())
    folder = ROOT / "build" / "cuda_on_cpu" / digest.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def compile_one(source: Path, target: Path) -> None:
    if not target.exists():
        part = target.with_suffix(f".{os.getpid()}")
        subprocess.run([*compiler(), *FLAGS, f"-I{HERE}", "-x", "c++", "-c", str(source), "-o", str(part)], check=True)
        part.replace(target)


def build(target: str, sources: list[Path], *options: str) -> Path:
    """build/cuda_on_cpu/<hash of everything that goes in>/target; objects are shared between targets."""
    folder = build_folder()
    path = folder / target
    if not path.exists():
        objects = [folder / f"{source.name}.o" for source in sources]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(compile_one, sources, objects))
        linked = folder / f"{target}.{os.getpid()}"
        subprocess.run(
            [*compiler(), *options, "-fsanitize=undefined", "-o", str(linked), *map(str, objects)], check=True
        )
        linked.replace(path)
    return path


class StandIn:
    """The loaded library. Every buffer that a kernel sees ends (or begins) at a page that it may not touch."""

    def __init__(self) -> None:
        path = build("csg_cuda_on_cpu.so", [*KERNELS, STAND_IN, HERE / "library.cpp"], "-shared")
        self.library = ctypes.CDLL(str(path))
        self.library.cuda_on_cpu_error.restype = ctypes.c_char_p
        self.library.cuda_on_cpu_map.restype = Pointer
        self.library.cuda_on_cpu_map.argtypes = [ctypes.c_size_t]
        self.library.cuda_on_cpu_unmap.argtypes = [Pointer, ctypes.c_size_t]
        self.library.cuda_on_cpu_set_seed.argtypes = [ctypes.c_uint64]
        self.library.cuda_on_cpu_launches.restype = Int64
        self.at_end = True

    def seed(self, seed: int) -> None:
        self.library.cuda_on_cpu_set_seed(seed)

    def launches(self) -> int:
        return self.library.cuda_on_cpu_launches()

    def check_size(self, index: int, struct: type[ctypes.Structure]) -> None:
        """The mirror of the struct with this index in library.cpp is as large as the struct."""
        assert (Int64 * (index + 1)).in_dll(self.library, "csg_sizes")[index] == ctypes.sizeof(struct)

    def call(self, name: str, parameters: ctypes.Structure, *more: object) -> None:
        status = getattr(self.library, name)(ctypes.byref(parameters), *more)
        assert status == 0, self.library.cuda_on_cpu_error().decode()

    def buffer(self, elements: int, dtype: torch.dtype) -> Tensor:
        """A 1-d tensor of NaN (-1 for integers) that ends at a forbidden page, or begins after one."""
        size = elements * dtype.itemsize
        if size == 0:
            return torch.empty(0, dtype=dtype)
        page = self.library.cuda_on_cpu_map(size)
        assert page
        pages = -(-size // os.sysconf("SC_PAGESIZE")) * os.sysconf("SC_PAGESIZE")
        start = page + pages - size if self.at_end else page
        memory = (ctypes.c_char * size).from_address(start)
        weakref.finalize(memory, self.library.cuda_on_cpu_unmap, page, size)
        tensor = torch.frombuffer(memory, dtype=dtype)
        return tensor.fill_(float("nan") if dtype.is_floating_point else -1)

    def sparse(self, elements: int, dtype: torch.dtype) -> Tensor:
        """A buffer of zeros, of which only the pages that are touched take memory."""
        size = elements * dtype.itemsize
        page = self.library.cuda_on_cpu_map(size)
        assert page
        memory = (ctypes.c_char * size).from_address(page)
        weakref.finalize(memory, self.library.cuda_on_cpu_unmap, page, size)
        return torch.frombuffer(memory, dtype=dtype)

    def guarded(self, t: Tensor | None) -> Tensor | None:
        """A copy with the same strides."""
        if t is None:
            return None
        span = 1 + sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
        flat = self.buffer(span, t.dtype)
        out = flat.as_strided(t.shape, t.stride())
        if 0 in t.stride():  # expanded: write each element once
            index = [slice(0, 1) if step == 0 else slice(None) for step in t.stride()]
            out[tuple(index)] = t[tuple(index)]
        else:
            out.copy_(t)
        return out

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return self.buffer(int(np.prod(shape)), dtype).view(*shape)

    @staticmethod
    def pointer(t: Tensor | None) -> int | None:
        return None if t is None or t.numel() == 0 else t.data_ptr()
