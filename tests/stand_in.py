"""The CUDA kernels compiled by a C++ compiler against tests/cuda_on_cpu: how tests build, load and call them."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import itertools
import os
import re
import shlex
import subprocess
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from cuda_report import readable
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "tests" / "cuda_on_cpu"
KERNELS = sorted((ROOT / "csrc").glob("*/*.cu"))
STAND_IN = HERE / "cuda_on_cpu.cpp"
HEADERS = sorted([*(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cuh"), *HERE.glob("*.h")])
# Few blocks, so that the kernels' grid-stride loops run.
FLAGS = "-std=c++20 -Wall -Wextra -Werror -Wno-unknown-pragmas -fno-strict-aliasing -fPIC -DCSG_MAX_BLOCKS=7".split()
CHECKED = "-O1 -g -fsanitize=undefined -fno-sanitize-recover=all".split()
# Accesses are counted as the optimiser leaves them: each value loaded once and kept in registers, as nvcc does, but
# none made wider than the source says. The calls in front of them are those of traffic.cpp.
# Blocks that fill a GPU are 8 instead of 512: small problems are cut up as problems 64 times larger are on a GPU.
COUNTED = (
    "-O2 -fno-tree-vectorize -fsanitize=thread --param=tsan-instrument-func-entry-exit=0 -DCSG_FILL_BLOCKS=8".split()
)

TYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}

Pointer, Int64, Double, Bool, Enum = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_bool, ctypes.c_int8


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX") or "g++")


def kernel_names() -> list[str]:
    """Of every __global__ function in the sources."""
    sources = "".join(path.read_text() for path in [*KERNELS, *HEADERS])
    names = re.findall(r"__global__ void(?: __launch_bounds__\([^{;]*?\))?\s+(\w+)\((?:const )?\w", sources)
    assert len(names) == sources.count("__global__ void"), names
    return names


def build_folder() -> Path:
    digest = hashlib.sha256(" ".join([*compiler(), *FLAGS, *CHECKED, *COUNTED]).encode())
    for path in [*KERNELS, *HEADERS, *sorted(HERE.glob("*.cpp"))]:
        digest.update(path.read_bytes())
    folder = ROOT / "build" / "cuda_on_cpu" / digest.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def compile_one(source: Path, target: Path, flags: list[str]) -> None:
    if not target.exists():
        part = target.with_suffix(f".{os.getpid()}")
        command = [*compiler(), *FLAGS, *flags, f"-I{HERE}", "-x", "c++", "-c", str(source), "-o", str(part)]
        subprocess.run(command, check=True)
        part.replace(target)


def build(target: str, sources: list[Path], *options: str, counted: bool = False) -> Path:
    """build/cuda_on_cpu/<hash of everything that goes in>/target; objects are shared between targets.

    counted: accesses of the kernels are counted instead of checked; traffic.cpp has to be among the sources.
    """
    folder = build_folder()
    path = folder / target
    if not path.exists():
        flags = [COUNTED if counted and source in KERNELS else CHECKED for source in sources]
        ends = [".counted.o" if of is COUNTED else ".o" for of in flags]
        objects = [folder / f"{source.name}{end}" for source, end in zip(sources, ends, strict=True)]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(compile_one, sources, objects, flags))
        linked = folder / f"{target}.{os.getpid()}"
        command = [*compiler(), *options, "-fsanitize=undefined", "-o", str(linked), *map(str, objects)]
        subprocess.run(command, check=True)
        linked.replace(path)
    return path


class Counts(ctypes.Structure):
    """What loads, or stores, of a kernel did to a buffer: bytes moved, those moved 16 at a time, 32-byte sectors that
    the accesses of warps touched, each access counted anew; and how many different bytes and sectors those are."""

    _fields_ = [(name, Int64) for name in ("bytes", "wide_bytes", "sectors", "touched_bytes", "touched_sectors")]


class TrafficRow(ctypes.Structure):
    _fields_ = [("kernel", Pointer), ("buffer", Int64), ("store", Int64), ("counts", Counts)]


class StandIn:
    """The loaded library. Every buffer that a kernel sees ends (or begins) at a page that it may not touch."""

    counted = False  # in the library of Traffic

    def __init__(self) -> None:
        sources = [*KERNELS, STAND_IN, HERE / "library.cpp"]
        if self.counted:
            self.path = build("csg_traffic.so", [*sources, HERE / "traffic.cpp"], "-shared", counted=True)
        else:
            self.path = build("csg_cuda_on_cpu.so", sources, "-shared")
        self.library = ctypes.CDLL(str(self.path))
        self.library.cuda_on_cpu_error.restype = ctypes.c_char_p
        self.library.cuda_on_cpu_map.restype = Pointer
        self.library.cuda_on_cpu_map.argtypes = [ctypes.c_size_t]
        self.library.cuda_on_cpu_unmap.argtypes = [Pointer, ctypes.c_size_t]
        self.library.cuda_on_cpu_set_seed.argtypes = [ctypes.c_uint64]
        self.library.cuda_on_cpu_set_ends_only.argtypes = [Bool]
        self.library.cuda_on_cpu_fail_call.argtypes = [Int64]
        self.library.cuda_on_cpu_launches.restype = Int64
        self.library.cuda_on_cpu_launched.restype = Pointer
        self.library.cuda_on_cpu_launched.argtypes = [ctypes.c_size_t]
        self.at_end = True

    def seed(self, seed: int) -> None:
        self.library.cuda_on_cpu_set_seed(seed)

    @contextlib.contextmanager
    def ends_only(self) -> Iterator[None]:
        """Launches run their first and their last blocks alone, with one tile each."""
        self.library.cuda_on_cpu_set_ends_only(True)
        try:
            yield
        finally:
            self.library.cuda_on_cpu_set_ends_only(False)

    def launches(self) -> int:
        return self.library.cuda_on_cpu_launches()

    @functools.cached_property
    def kernels(self) -> dict[int, str]:
        """Every instantiation of a kernel that the library contains: its name by its address."""
        names = kernel_names()
        listing = subprocess.run(
            ["nm", "--demangle", str(self.path)], capture_output=True, text=True, check=True
        ).stdout
        symbol = rf"^(\w+) [tTwW] ((?:void )?csg::\(anonymous namespace\)::(?:{'|'.join(names)})(?:<.*>)?\(.*\))$"
        exported = re.search(r"^(\w+) T cuda_on_cpu_launches$", listing, re.MULTILINE)
        assert exported
        origin = ctypes.cast(self.library.cuda_on_cpu_launches, Pointer).value - int(exported[1], 16)
        return {
            origin + int(address, 16): readable(name)
            for address, name in re.findall(symbol, listing, re.MULTILINE)
            if "{lambda" not in name
        }

    def launched(self) -> set[str]:
        """The kernels that have been launched since this was last asked."""
        addresses = [*itertools.takewhile(bool, map(self.library.cuda_on_cpu_launched, itertools.count()))]
        self.library.cuda_on_cpu_clear_launched()
        return {self.kernels[address] for address in addresses}

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


@dataclass(frozen=True)
class Moved:
    """What one call of a launcher did: its launches, and counts by kernel, buffer and "load" or "store"."""

    launches: int
    counts: dict[tuple[str, str, str], Counts]

    def of(self, buffer: str, way: str) -> Counts:
        """Of one buffer: what all kernels moved, and the most that one of them touched."""
        total = Counts()
        for (_, name, its_way), counts in self.counts.items():
            if (name, its_way) != (buffer, way):
                continue
            for field in ("bytes", "wide_bytes", "sectors"):
                setattr(total, field, getattr(total, field) + getattr(counts, field))
            for field in ("touched_bytes", "touched_sectors"):
                setattr(total, field, max(getattr(total, field), getattr(counts, field)))
        return total

    def all(self) -> dict[tuple[str, str], Counts]:
        """By buffer and "load" or "store"."""
        return {key: self.of(*key) for key in dict.fromkeys(key[1:] for key in self.counts)}


class Traffic(StandIn):
    """The library that counts what kernels load and store, per call of a launcher."""

    counted = True

    def __init__(self) -> None:
        super().__init__()
        self.library.traffic_row.restype = Bool
        self.at_end = False  # buffers begin at pages, as an allocator's begin at sectors
        self.sizes: dict[int, int] = {}
        self.moved: list[Moved] = []  # by every call of a launcher

    def buffer(self, elements: int, dtype: torch.dtype) -> Tensor:
        tensor = super().buffer(elements, dtype)
        self.sizes[tensor.data_ptr()] = elements * dtype.itemsize
        return tensor

    def call(self, name: str, parameters: ctypes.Structure, *more: object) -> None:
        self.library.traffic_clear()
        buffers = pointers(parameters)
        if name == "csg_mutual_info":
            buffers["work"] = more[0].value
        for address in buffers.values():
            self.library.traffic_watch(Pointer(address), ctypes.c_size_t(self.sizes[address]))
        before = self.launches()
        super().call(name, parameters, *more)
        counts = {}
        names, row = list(buffers), TrafficRow()
        for i in itertools.count():
            if not self.library.traffic_row(ctypes.c_size_t(i), ctypes.byref(row)):
                break
            key = (self.kernels[row.kernel], names[row.buffer], "store" if row.store else "load")
            counts[key] = Counts.from_buffer_copy(row.counts)
        self.moved.append(Moved(self.launches() - before, counts))


def pointers(parameters: ctypes.Structure) -> dict[str, int]:
    """Buffers by the names of the fields that point at them."""
    found = {}
    for name, kind in parameters._fields_:
        value = getattr(parameters, name)
        if isinstance(value, ctypes.Structure):
            found |= pointers(value)
        elif kind is Pointer and value is not None:
            found[name] = value
    return found
