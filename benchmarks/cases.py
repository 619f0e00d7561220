"""What the benchmarks measure: layer shapes, layouts, the operator and its peers. Every result is checked first."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import csg_ext

QUICK = os.environ.get("CSG_BENCH_QUICK") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def steady_memory() -> None:
    """Keep freed memory in the process, as a caching allocator does.

    glibc returns large blocks to the system at once; every later use then pays for page faults, which cost several
    times the writing itself and hide what the operators do.
    """
    try:
        libc = ctypes.CDLL(None)
        for option, value in ((-3, 2**30), (-1, 2**31 - 1)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            libc.mallopt(option, value)
    except (OSError, AttributeError):
        pass  # not glibc: nothing to do


@dataclass(frozen=True)
class Case:
    """One feature map and one gate."""

    name: str
    shape: tuple[int, ...]  # (N, K, *spatial)
    dtype: torch.dtype
    layout: str  # "rows" (contiguous) or "channels_last" (also the memory of tokens (N, L, K))
    classes: int = 100

    @property
    def id(self) -> str:
        """A readable name."""
        return f"{self.name}-{str(self.dtype).removeprefix('torch.')}-{self.layout}"

    @property
    def bytes(self) -> int:
        """Bytes of x: what forward must read and backward must write."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x, gate, labels and a gradient of the result; fresh random values."""
        n, k = self.shape[:2]
        x = torch.randn(self.shape, device=DEVICE).to(self.dtype)
        if self.layout == "channels_last":
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        gate = torch.rand(self.classes, k, device=DEVICE).to(self.dtype)
        labels = torch.randint(0, self.classes, (n,), device=DEVICE)
        return x, gate, labels, torch.randn(n, k, device=DEVICE).to(self.dtype)


LAYERS = {
    "tiny": (8, 64, 4, 4),
    "resnet20": (256, 64, 8, 8),
    "resnet18": (256, 512, 7, 7),
    "resnet50": (64, 2048, 7, 7),
    "efficientnet": (64, 1280, 7, 7),
    "map28": (64, 256, 28, 28),
    "map112": (8, 64, 112, 112),
    "vit_tokens": (64, 768, 196),
    "volume": (8, 128, 8, 16, 16),
}


def grid() -> list[Case]:
    """All cases; with CSG_BENCH_QUICK=1 the ones that tell most."""
    names = ["tiny", "resnet20", "resnet50"] if QUICK else list(LAYERS)
    dtypes = [torch.float32, torch.bfloat16] if QUICK else [torch.float32, torch.bfloat16, torch.float16]
    cases = []
    for name in names:
        for dtype in dtypes:
            for layout in ("rows", "channels_last"):
                if name == "vit_tokens" and layout == "rows":
                    continue
                cases.append(Case(name, LAYERS[name], dtype, layout))
    return cases


def ours(x: Tensor, gate: Tensor, labels: Tensor) -> Tensor:
    """The fused operator."""
    return csg_ext.gated_pool(x, gate, labels)


def eager(x: Tensor, gate: Tensor, labels: Tensor) -> Tensor:
    """The same in two PyTorch operators: pool, then gate."""
    return x.mean(tuple(range(2, x.dim()))) * gate[labels]


def masked(x: Tensor, gate: Tensor, labels: Tensor) -> Tensor:
    """The method as it is written: gate the map, then pool."""
    row = gate[labels].reshape(*x.shape[:2], *[1] * (x.dim() - 2))
    return (x * row).mean(tuple(range(2, x.dim())))


def peers() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Implementations by name, ours first."""
    torch._dynamo.config.cache_size_limit = 512
    return {"csg_ext": ours, "eager": eager, "compiled": torch.compile(eager, dynamic=False), "masked": masked}


def check(case: Case, f: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """The result and its gradients agree with fp64 before anything is timed."""
    x, gate, labels, grad = case.inputs()
    a, g = x.requires_grad_(), gate.requires_grad_()
    a64, g64 = x.detach().double().requires_grad_(), gate.detach().double().requires_grad_()
    out, want = f(a, g, labels), csg_ext.reference.gated_pool(a64, g64, labels)
    tolerance = 40 * torch.finfo(case.dtype).eps
    torch.testing.assert_close(out.double(), want, rtol=tolerance, atol=tolerance)
    got = torch.autograd.grad(out, (a, g), grad)
    wanted = torch.autograd.grad(want, (a64, g64), grad.double())
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance)


Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def forward_of(f: Callable[..., Tensor], inputs: Inputs) -> Callable[[], object]:
    """A call of the forward pass without gradients. Peers share one x: where it lies in memory matters."""
    x, gate, labels, _ = inputs

    def run() -> object:
        with torch.no_grad():
            return f(x, gate, labels)

    return run


def forward_backward_of(f: Callable[..., Tensor], inputs: Inputs) -> Callable[[], object]:
    """A call of forward and backward, gradients to x and gate."""
    x, gate, labels, grad = inputs
    x.requires_grad_()
    gate.requires_grad_()

    def run() -> object:
        return torch.autograd.grad(f(x, gate, labels), (x, gate), grad)

    return run


def synchronized(f: Callable[[], object]) -> Callable[[], object]:
    """f, waiting for the GPU where there is one."""
    if DEVICE == "cpu":
        return f

    def run() -> object:
        result = f()
        torch.cuda.synchronize()
        return result

    return run
