"""What the benchmarks of gated_pool measure: layer shapes, the operator, its peers and limits. Results are checked."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from measure import DEVICE, QUICK
from torch import Tensor

import csg_ext

DIRECTIONS = ("forward", "backward", "both", "relu")
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
Pool = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One feature map and one gate."""

    name: str
    shape: tuple[int, ...]  # (N, K, *spatial)
    dtype: torch.dtype
    layout: str  # "rows" (contiguous) or "channels_last" (also the memory of tokens (N, L, K))
    classes: int = 100

    @property
    def kind(self) -> str:
        """Everything but the layer, readable."""
        return f"{str(self.dtype).removeprefix('torch.')} {self.layout} C{self.classes}"

    @property
    def id(self) -> str:
        """A readable name."""
        return f"{self.name} {self.kind}".replace(" ", "-")

    @property
    def bytes(self) -> int:
        """Bytes of x: what forward must read and backward must write."""
        return math.prod(self.shape) * self.dtype.itemsize

    def inputs(self) -> Inputs:
        """x, gate, labels and a gradient of the result; fresh random values."""
        n, k = self.shape[:2]
        x = torch.randn(self.shape, device=DEVICE).to(self.dtype)
        if self.layout == "channels_last":
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        gate = torch.rand(self.classes, k, device=DEVICE).to(self.dtype)
        labels = torch.randint(0, self.classes, (n,), device=DEVICE)
        return x.requires_grad_(), gate.requires_grad_(), labels, torch.randn(n, k, device=DEVICE).to(self.dtype)


LAYERS = {
    "tiny": (8, 64, 4, 4),
    "resnet20": (256, 64, 8, 8),
    "resnet18": (256, 512, 7, 7),
    "resnet50": (64, 2048, 7, 7),
    "resnet50_256": (256, 2048, 7, 7),
    "resnet50_1024": (1024, 2048, 7, 7),
    "efficientnet_lite0": (64, 1280, 7, 7),
    "map28": (64, 256, 28, 28),
    "map112": (8, 64, 112, 112),
    "vit_b_tokens": (64, 768, 196),
    "volume": (8, 128, 8, 16, 16),
}
ALL_TYPES = ("resnet18", "map28", "vit_b_tokens")  # fp16 too: elsewhere it behaves as bf16
BATCHES = ("resnet50_256", "resnet50_1024")  # of the same layer: rows only on a CPU; on a GPU, which they fill, first
MORE_CLASSES = {"resnet18": (10, 1000), "resnet50": (1000,)}


def grid() -> list[Case]:
    """All cases; with CSG_BENCH_QUICK=1 a few of two layers."""
    if QUICK:
        tiny = Case("tiny", LAYERS["tiny"], torch.float32, "rows")
        kinds = (torch.float32, "rows"), (torch.float32, "channels_last"), (torch.bfloat16, "rows")
        return [tiny, *(Case("resnet50", LAYERS["resnet50"], *kind) for kind in kinds)]
    cases = []
    for name in sorted(LAYERS, key=lambda name: DEVICE == "cuda" and name not in BATCHES):
        shape = LAYERS[name]
        if DEVICE == "cpu" and name == "resnet50_1024":
            continue  # 411 MB in fp32, and peers hold several times that
        types = [torch.float32, torch.bfloat16] + [torch.float16] * (name in ALL_TYPES)
        layouts = ["channels_last"] if name == "vit_b_tokens" else ["rows", "channels_last"]
        for dtype in types:
            for layout in layouts[:1] if name in BATCHES and DEVICE == "cpu" else layouts:
                cases.append(Case(name, shape, dtype, layout))
        cases += [Case(name, shape, torch.float32, "rows", classes) for classes in MORE_CLASSES.get(name, ())]
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


def viewed(x: Tensor, gate: Tensor, labels: Tensor) -> Tensor:
    """Pool by a sum: autograd's gradient of x is a broadcast view of (N, K) values, which is never written."""
    return x.sum(tuple(range(2, x.dim()))) * (gate.index_select(0, labels) / math.prod(x.shape[2:]))


def peers() -> dict[str, Pool]:
    """Implementations by name, ours first; the Triton kernel where there is a GPU."""
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 4096
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # else a peer would silently run uncompiled
    # Backward is timed alone on a graph that is kept, which buffers given away by it would forbid.
    torch._functorch.config.donated_buffer = False
    found: dict[str, Pool] = {"csg_ext": ours}
    for name, f in (("eager", eager), ("masked", masked)):
        found[name] = f
        found[f"{name} compiled"] = torch.compile(f, dynamic=False)
        found[f"{name} autotuned"] = torch.compile(f, dynamic=False, mode="max-autotune-no-cudagraphs")
    found["viewed"] = viewed
    if DEVICE == "cuda":
        import triton_peer

        found["triton"] = triton_peer.gated_pool
    return found


def measured(case: Case, peer: str) -> bool:
    """Whether a peer takes part: compiling takes seconds per case, so the autotuned ones have a few cases only."""
    few = case.name in ("tiny", "resnet50", "map28") and case.layout == "rows" and case.classes == 100
    return few or not peer.endswith("autotuned")


def check(case: Case, f: Pool) -> None:
    """The result and its gradients agree with fp64 before anything is timed, by the norm of the error.

    The tolerance: 8 roundings of x's type, and what an fp32 sum over space may collect, term after term.
    """
    length = math.prod(case.shape[2:])
    tolerance = 8 * torch.finfo(case.dtype).eps + math.sqrt(length) * torch.finfo(torch.float32).eps
    x, gate, labels, grad = case.inputs()
    x64, gate64 = (t.detach().double().requires_grad_() for t in (x, gate))
    out, want = f(x, gate, labels), csg_ext.reference.gated_pool(x64, gate64, labels)
    got = (out, *torch.autograd.grad(out, (x, gate), grad))
    wanted = (want, *torch.autograd.grad(want, (x64, gate64), grad.double()))
    for name, one, other in zip(("result", "gradient of x", "gradient of gate"), got, wanted, strict=True):
        error = ((one.double() - other).norm() / other.norm()).item()
        if not error <= tolerance:
            raise AssertionError(f"{case.id}: the {name} differs from fp64's by {error:.2g} of its norm")


def forward(f: Pool, inputs: Inputs) -> Callable[[], object]:
    """A call of the forward pass without gradients. Peers share one x: where it lies in memory matters."""
    x, gate, labels, _ = inputs

    def run() -> object:
        with torch.no_grad():
            return f(x, gate, labels)

    return run


def backward(f: Pool, inputs: Inputs) -> Callable[[], object]:
    """A call of the backward pass alone, gradients to x and gate, through one graph that is kept."""
    x, gate, labels, grad = inputs
    out = f(x, gate, labels)
    return lambda: torch.autograd.grad(out, (x, gate), grad, retain_graph=True)


def both(f: Pool, inputs: Inputs) -> Callable[[], object]:
    """A call of forward and backward, gradients to x and gate."""
    x, gate, labels, grad = inputs
    return lambda: torch.autograd.grad(f(x, gate, labels), (x, gate), grad)


def relu(f: Pool, inputs: Inputs) -> Callable[[], object]:
    """A call of forward and backward with a ReLU before the pooling, as networks have it: it reads the gradient."""
    x, gate, labels, grad = inputs
    return lambda: torch.autograd.grad(f(torch.relu(x), gate, labels), (x, gate), grad)


def limit(direction: str, inputs: Inputs) -> Callable[[], object]:
    """What must be read and written: forward reads x, a written gradient of x is as large; with a ReLU both.

    A gradient that is handed back as a view writes nothing: its share of the limit of backward may be above 1. A ReLU
    reads and writes x's bytes in forward and in backward, where its gradient needs its result; the pooling reads them.
    x is read as fp32 whatever its type: adding half numbers would bound the sum, not the memory.
    """
    x, gate = (t.detach() for t in inputs[:2])
    memory = torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage()).view(torch.float32)

    def write() -> object:
        return torch.empty_like(x).fill_(1), torch.empty_like(gate).fill_(1)

    if direction == "forward":
        return lambda: memory.sum()
    if direction == "backward":
        return write
    if direction == "relu":
        return lambda: (torch.empty_like(x).copy_(x), memory.sum(), torch.empty_like(x).copy_(x))
    if DEVICE == "cpu":
        return lambda: (memory.sum(), write())
    return lambda: (torch.empty_like(x).copy_(x), torch.empty_like(gate).fill_(1))
