"""The calls whose traffic is counted: tests check it, tools/cuda_traffic.py writes it down."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from stand_in import Moved
from stand_in_kernels import CountedKernels

DTYPES = {torch.float32: "fp32", torch.float64: "fp64", torch.float16: "fp16", torch.bfloat16: "bf16"}
SIZES = {  # N, K, S
    "7 x 7": (16, 64, 49),
    "8 x 8": (16, 64, 64),
    "28 x 28": (4, 32, 784),
    "112 x 112": (1, 8, 12544),
    "197 tokens": (6, 48, 197),
}
CLASSES = 10


@dataclass(frozen=True)
class Pool:
    """A forward and a backward call of gated_pool."""

    size: str = "7 x 7"
    layout: str = "rows"  # or "channels last"
    x_type: torch.dtype = torch.float32
    gate_type: torch.dtype | None = None  # None: that of x
    pool: str = "avg"
    project: bool = False
    soft: bool = False  # labels: the kernels get a gate with one row per sample

    def __str__(self) -> str:
        gate = [] if self.gate_type in (None, self.x_type) else [f"{DTYPES[self.gate_type]} gate"]
        options = [name for name in ("project", "soft") if getattr(self, name)]
        return ", ".join([self.size, self.layout, DTYPES[self.x_type], *gate, self.pool, *options])

    def run(self, kernels: CountedKernels) -> tuple[Moved, Moved]:
        """What forward and backward move (the columns' maxima for `project` apart)."""
        n, k, s = SIZES[self.size]
        x = torch.randn(n, s, k).transpose(1, 2) if self.layout == "channels last" else torch.randn(n, k, s)
        return run_pool(kernels, x.to(self.x_type), self.gate_type, self.pool, self.project, self.soft)


def run_pool(
    kernels: CountedKernels,
    x: torch.Tensor,
    gate_type: torch.dtype | None = None,
    pool: str = "avg",
    project: bool = False,
    soft: bool = False,
) -> tuple[Moved, Moved]:
    """What forward and backward move for x (N, K, S), both gradients wanted."""
    n, k, _ = x.shape
    gate = torch.rand(n if soft else CLASSES, k).to(gate_type or x.dtype)
    labels = None if soft else torch.arange(n) % CLASSES
    out, pooled, index = kernels.forward(x, gate, labels, pool, project)
    forward = kernels.moved[-1]
    kernels.backward(x, gate, labels, torch.randn_like(out), torch.randn_like(out), pooled, index, project)
    return forward, kernels.moved[-1]


def pools() -> Iterator[Pool]:
    for size in SIZES:
        for layout in ("rows", "channels last"):
            for dtype in DTYPES:
                for pool in ("avg", "max"):
                    yield Pool(size, layout, dtype, pool=pool)
    for layout in ("rows", "channels last"):
        yield Pool("7 x 7", layout, torch.bfloat16, torch.float32)
        yield Pool("7 x 7", layout, torch.float16, torch.float32)
        yield Pool("7 x 7", layout, project=True)
        yield Pool("7 x 7", layout, soft=True)


@dataclass(frozen=True)
class Step:
    """A gate step with momentum, and the columns' maxima that `project` needs."""

    classes: int
    channels: int = 64
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"{self.classes} x {self.channels}, {DTYPES[self.dtype]}"

    def run(self, kernels: CountedKernels) -> tuple[Moved, Moved]:
        gate, grad, buffer = (torch.rand(self.classes, self.channels).to(self.dtype) for _ in range(3))
        kernels.step(gate, grad, buffer, lr=0.1, momentum=0.9)
        step = kernels.moved[-1]
        kernels.column_max(gate)
        return step, kernels.moved[-1]


def steps() -> Iterator[Step]:
    for classes in (10, 100, 1000):
        for dtype in DTYPES:
            yield Step(classes, dtype=dtype)
    yield Step(1100)


@dataclass(frozen=True)
class Information:
    """A call of mutual_info: float32 features with ties="exact", or any with ties="noise"."""

    noise: bool = False
    samples: int = 600
    features: int = 32
    classes: int = 10

    def __str__(self) -> str:
        return f"{self.samples} x {self.features}, {self.classes} classes, ties={'noise' if self.noise else 'exact'}"

    def run(self, kernels: CountedKernels) -> Moved:
        x = torch.randn(self.samples, self.features)
        labels = torch.randint(self.classes, (self.samples,))
        noise = torch.randn(self.features, self.samples, dtype=torch.float64).t() if self.noise else None
        kernels.mutual_info(x, labels, self.classes, 3, noise)
        return kernels.moved[-1]
