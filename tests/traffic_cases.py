"""The calls whose traffic is counted: tests check them, tools/cuda_traffic.py writes them down."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from stand_in import Moved
from stand_in_kernels import CountedKernels
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# N, K, S
SIZES = {
    "7x7": (16, 64, 49),
    "8x8": (16, 64, 64),
    "28x28": (4, 32, 784),
    "112x112": (2, 8, 12544),
    "197 tokens": (6, 48, 197),
}
CLASSES = 10


@dataclass(frozen=True)
class Pool:
    """A forward and a backward call of gated_pool."""

    size: str
    layout: str = "rows"  # or "channels last"
    x_type: torch.dtype = torch.float32
    gate_type: torch.dtype = torch.float32
    pool: str = "avg"
    project: bool = False
    soft: bool = False  # labels: the kernels get a gate with one row per sample

    def name(self) -> str:
        short = {torch.float32: "fp32", torch.float64: "fp64", torch.float16: "fp16", torch.bfloat16: "bf16"}
        types = short[self.x_type] + ("" if self.gate_type == self.x_type else f", {short[self.gate_type]} gate")
        options = [name for name in ("project", "soft") if getattr(self, name)]
        return ", ".join([self.size, self.layout, types, self.pool, *options])

    def run(self, kernels: CountedKernels) -> tuple[Moved, Moved]:
        """What forward and backward move (column_max of `project` apart)."""
        n, k, s = SIZES[self.size]
        x = torch.randn(n, s, k).transpose(1, 2) if self.layout == "channels last" else torch.randn(n, k, s)
        x = x.to(self.x_type)
        gate = torch.rand(n if self.soft else CLASSES, k).to(self.gate_type)
        labels = None if self.soft else torch.arange(n) % CLASSES
        out, pooled, index = kernels.forward(x, gate, labels, self.pool, self.project)
        forward = kernels.moved[-1]
        kernels.backward(x, gate, labels, torch.randn_like(out), torch.randn_like(out), pooled, index, self.project)
        return forward, kernels.moved[-1]


def pools() -> Iterator[Pool]:
    for size in SIZES:
        for layout in ("rows", "channels last"):
            for dtype in DTYPES:
                for pool in ("avg", "max"):
                    yield Pool(size, layout, dtype, dtype, pool)
    for layout in ("rows", "channels last"):
        yield Pool("7x7", layout, torch.bfloat16, torch.float32)
        yield Pool("7x7", layout, torch.float16, torch.float32)
        yield Pool("7x7", layout, project=True)
        yield Pool("7x7", layout, soft=True)


@dataclass(frozen=True)
class Step:
    """A gate step with momentum, and the columns' maxima that `project` needs."""

    classes: int
    channels: int
    dtype: torch.dtype = torch.float32

    def run(self, kernels: CountedKernels) -> tuple[Moved, Moved]:
        gate, grad, buffer = (torch.rand(self.classes, self.channels).to(self.dtype) for _ in range(3))
        kernels.step(gate, grad, buffer, lr=0.1, momentum=0.9)
        step = kernels.moved[-1]
        kernels.column_max(gate)
        return step, kernels.moved[-1]


def steps() -> Iterator[Step]:
    for classes in (10, 100, 1000):
        for dtype in DTYPES:
            yield Step(classes, 64, dtype)
    yield Step(1100, 64)
    yield Step(2100, 64, torch.bfloat16)
