"""The gate's optimizer step with its projection: sizes, peers, the limit. Results are checked."""

from __future__ import annotations

from collections.abc import Callable

import torch
from measure import DEVICE, QUICK
from torch import Tensor

import csg_ext
from csg_ext import reference
from csg_ext.optim import ProjectedSGD

SIZES = [(10, 64), (100, 512)] if QUICK else [(10, 64), (100, 512), (1000, 2048), (21841, 4096)]
PEERS = ("csg_ext", "foreach", "fused", "compiled", "in place")
OPTIONS = {"lr": 1e-3, "momentum": 0.9}


def step_of(peer: str, gate: Tensor) -> Callable[[], object]:
    """A momentum step on a gate with a gradient, and its projection, by ours or by torch.optim.SGD and PyTorch.

    "in place" knows nothing of NaN and of columns without a positive entry, of which the benchmarks' gates have none.
    """
    if peer == "csg_ext":
        return ProjectedSGD([gate], **OPTIONS).step
    implementation = {"fused": True} if peer in ("fused", "in place") else {"foreach": True}
    optimizer = torch.optim.SGD([gate], **OPTIONS, **implementation)

    def run() -> None:
        optimizer.step()
        with torch.no_grad():
            if peer == "in place":
                gate.div_(gate.amax(0)).clamp_(0, 1)
            else:
                gate.copy_(reference.project_gate(gate))

    if peer != "compiled":
        return run
    torch._dynamo.reset()  # every optimizer is a graph of its own: after eight, compiling stops
    return torch.compile(run, dynamic=False)


def start(size: tuple[int, int]) -> Tensor:
    """A feasible gate (C, K) with a gradient."""
    gate = csg_ext.project_gate(torch.rand(size, device=DEVICE)).requires_grad_()
    gate.grad = torch.randn(size, device=DEVICE)
    return gate


def check(size: tuple[int, int], peer: str) -> None:
    """Two steps lead where the definition leads in fp64, before anything is timed: 64 columns, each its own."""
    gate = start(size)
    grad = gate.grad[:, :64].double()
    want, buffer = gate.detach()[:, :64].double(), torch.zeros_like(grad)
    step = step_of(peer, gate)
    for i in range(2):
        step()
        want, buffer = reference.gate_step(want, grad, buffer, **OPTIONS, first_step=i == 0)
    torch.testing.assert_close(gate.detach()[:, :64].double(), want, rtol=1e-5, atol=1e-6)


def moved(size: tuple[int, int]) -> int:
    """Bytes that a step must move: gate and momentum buffer read and written, the gradient read."""
    return 5 * size[0] * size[1] * 4


def limit(size: tuple[int, int]) -> Callable[[], object]:
    """A copy that moves as many bytes."""
    source = torch.ones(moved(size) // 8, device=DEVICE)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)
