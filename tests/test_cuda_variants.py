"""Every instantiation of a CUDA kernel, each called for by name, run by tests/cuda_on_cpu against a reference."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
import torch
from stand_in import ROOT
from stand_in_kernels import Kernels
from test_cuda_on_cpu import check_backward, check_forward, close
from test_mutual_info_cuda_on_cpu import check as check_information

from csg_ext import reference

TYPES = {"float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16}
NEIGHBORS = {8: 3, 16: 7, 32: 15, 0: 18}  # neighbours, by what the last argument of among_all is
Run = Callable[[Kernels], None]


def pooled(
    dtype: torch.dtype, layout: str, shape: tuple[int, int, int], pool: str = "avg", project: bool = False
) -> Run:
    """Forward and backward of features (N, K, S)."""

    def run(kernels: Kernels) -> None:
        n, k, s = shape
        x = torch.randn(n, s, k).transpose(1, 2) if layout == "channels last" else torch.randn(shape)
        x = torch.randn(n, 2 * k, s)[:, ::2] if layout == "every second channel" else x
        gate, labels = torch.rand(3, k).to(dtype), torch.randint(3, (n,))
        check_forward(kernels, x.to(dtype), gate, labels, pool, project)
        check_backward(kernels, x.to(dtype), gate, labels, pool, project)

    return run


def stepped(classes: int, dtype: torch.dtype) -> Run:
    def run(kernels: Kernels) -> None:
        gate, grad, buffer = (torch.randn(classes, 19).to(dtype) for _ in range(3))
        got, got_buffer = kernels.step(gate, grad, buffer, lr=0.1, momentum=0.9)
        wide = (gate.double(), grad.double(), buffer.double())
        expected, expected_buffer = reference.gate_step(*wide, lr=0.1, momentum=0.9)
        close(got, expected)
        close(got_buffer, expected_buffer)

    return run


def informed(
    dtype: torch.dtype = torch.float32,
    neighbors: int = 3,
    noise: bool = False,
    labels: str = "five",
    samples: int = 150,
) -> Run:
    """mutual_info of features with a run of equal values."""

    def run(kernels: Kernels) -> None:
        features = torch.randn(samples, 3)
        features[: samples // 4] = 0
        of_sample = torch.arange(samples) % 5
        if labels == "dominant":  # the others are too few for their neighbours on both sides
            of_sample = (torch.arange(samples) < 5).long()
        if labels == "one alone":
            of_sample[0] = 5
        drawn = torch.randn(features.shape, dtype=torch.float64) if noise else None
        classes, multiclass = int(of_sample.max()) + 1, labels == "one alone"  # which leaves such a class out
        check_information(kernels, features.to(dtype), of_sample, classes, neighbors, drawn, multiclass)

    return run


def of_pool() -> Iterator[tuple[str, Run]]:
    short, long, aligned, odd = (3, 21, 49), (2, 3, 1100), (3, 32, 50), (3, 21, 50)
    for name, dtype in TYPES.items():
        width = 16 // dtype.itemsize
        for pool in ("avg", "max"):
            yield f"pool_tiles<{name}, {pool}>", pooled(dtype, "rows", short, pool)
            yield f"pool_rows<{name}, {pool}>", pooled(dtype, "rows", long, pool)
            yield f"pool_channels<{name}, {pool}, {width}>", pooled(dtype, "channels last", aligned, pool)
            yield f"pool_channels<{name}, {pool}, 1>", pooled(dtype, "channels last", odd, pool)
            yield f"fill_rows<{name}, {pool}>", pooled(dtype, "rows", short, pool)
            yield f"fill_channels<{name}, {pool}, {width}>", pooled(dtype, "channels last", aligned, pool)
            yield f"fill_channels<{name}, {pool}, 1>", pooled(dtype, "channels last", odd, pool)
        yield f"shared_values<{name}>", pooled(dtype, "rows", short)
        yield f"gate_gradient<{name}>", pooled(dtype, "rows", short)
        yield f"max_columns<{name}>", pooled(dtype, "rows", short, project=True)


def of_step() -> Iterator[tuple[str, Run]]:
    for name, dtype in TYPES.items():
        most = {2: 8, 4: 4, 8: 2}[dtype.itemsize]  # batches of eight classes that a thread keeps
        yield f"step_columns<{name}, 1>", stepped(100, dtype)
        yield f"step_columns<{name}, {most}>", stepped(1024, dtype)
        yield f"step_columns<{name}, 0>", stepped(1025, dtype)


def of_information() -> Iterator[tuple[str, Run]]:
    for value, closed in (("float", "true"), ("double", "true"), ("double", "false")):
        noise = closed == "false"
        dtype = torch.float32 if noise else TYPES[value]
        for tile, neighbors in NEIGHBORS.items():
            yield f"among_all<{value}, {closed}, {tile}>", informed(dtype, neighbors, noise)
        yield f"among_own_class<{value}, {closed}>", informed(dtype, noise=noise)
        yield f"one_sample<{value}, {closed}>", informed(dtype, noise=noise)
        yield f"beside_dominant<{value}, {closed}>", informed(dtype, noise=noise, labels="dominant")
    for closed in ("true", "false"):
        yield f"finish<{closed}>", informed(noise=closed == "false")
        yield f"few_samples<{closed}>", informed(noise=closed == "false", samples=12)
    for name, dtype in TYPES.items():
        if name != "double":
            yield f"transpose<{name}, StoreWord>", informed(dtype)
        yield f"transpose<{name}, StoreColumn>", informed(dtype, noise=True)
    for name in ("transpose<double, AddNoise>", "scale_columns", "pack_columns", "unpack<word128, double>"):
        yield name, informed(noise=True)
    for name in ("unpack<word64, float>", "count_classes", "summarise"):
        yield name, informed()
    yield "find_rows", informed(labels="one alone")


VARIANTS = [*of_pool(), *of_step(), *of_information()]


@pytest.mark.parametrize(("name", "run"), VARIANTS, ids=[name for name, _ in VARIANTS])
def test_variant(kernels: Kernels, name: str, run: Run) -> None:
    """The call launches the kernel that it is meant to, and the result is right."""
    kernels.launched()
    run(kernels)
    assert name in kernels.launched()


def test_no_variant_is_left_out(kernels: Kernels) -> None:
    assert sorted(kernels.kernels.values()) == sorted({name for name, _ in VARIANTS})


def test_the_report_lists_every_variant(kernels: Kernels) -> None:
    """docs/cuda_resources.md, which nvcc's machine code was read for, has the same kernels."""
    listed = re.findall(r"^\| `(.*)` \|", (ROOT / "docs" / "cuda_resources.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(kernels.kernels.values())


# What kernels decide at run time: threads to a row, rows to a tile, whether tiles cross samples, columns to a block.
WAYS = {
    "pool_rows, a lane to a row": ("every second channel", (3, 5, 4)),
    "pool_rows, two lanes to a row": ("every second channel", (3, 5, 8)),
    "pool_rows, four lanes to a row": ("every second channel", (3, 5, 15)),
    "pool_rows, eight lanes to a row": ("every second channel", (3, 5, 32)),
    "pool_rows, sixteen lanes to a row": ("every second channel", (3, 5, 49)),
    "pool_rows, a warp to a row": ("every second channel", (3, 5, 300)),
    "pool_rows, a warp to a long row": ("rows", (2, 256, 520)),
    "pool_rows, the block to a long row of few": ("rows", (1, 2, 520)),
    "pool_rows, the block to a very long row": ("rows", (1, 2, 4200)),
    "pool_channels, one position": ("rows", (40, 30, 1)),
    "pool_tiles, rows that meet in banks": ("rows", (9, 40, 64)),
    "pool_tiles, more rows than threads": ("rows", (60, 60, 3)),
    "fill_rows, rows longer than a tile": ("rows", (1, 2, 5000)),
    "fill_rows, several rows to a vector": ("rows", (50, 30, 2)),
    "pool_channels, four columns": ("channels last", (2, 5, 300)),
    "pool_channels, sixteen columns": ("channels last", (40, 60, 300)),
    "pool_channels, fewer positions than lanes": ("channels last", (3, 600, 3)),
    "pool_channels, several tiles of channels": ("channels last", (2, 1030, 9)),
}


@pytest.mark.parametrize("way", WAYS)
def test_way(kernels: Kernels, way: str) -> None:
    kernel, (layout, shape) = way.partition(",")[0], WAYS[way]
    kernels.launched()
    for pool, project in (("avg", True), ("max", False)):
        pooled(torch.float32, layout, shape, pool, project)(kernels)
    assert kernel in {name.partition("<")[0] for name in kernels.launched()}
