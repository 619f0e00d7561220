"""The gate's optimizer step and projection beside torch.optim.SGD followed by the projection (pytest-benchmark)."""

from __future__ import annotations

import cases
import pytest
import torch

import csg_ext
from csg_ext import reference
from csg_ext.optim import ProjectedSGD

SIZES = [(10, 64), (1000, 2048)] if cases.QUICK else [(10, 64), (100, 512), (1000, 2048), (21841, 4096)]


def step_of(peer: str, gate: torch.Tensor):
    """One momentum step on a gate with a gradient, and its projection."""
    gate.grad = torch.randn_like(gate)
    optimizer = (ProjectedSGD if peer == "csg_ext" else torch.optim.SGD)([gate], lr=1e-3, momentum=0.9)
    if peer == "csg_ext":
        return optimizer.step
    project = torch.compile(reference.project_gate) if peer == "compiled" else reference.project_gate

    def run() -> None:
        optimizer.step()
        with torch.no_grad():
            gate.copy_(project(gate))

    return run


@pytest.mark.parametrize("peer", ["csg_ext", "eager", "compiled"])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def bench_gate_step(benchmark, size, peer):
    torch.manual_seed(0)
    start = csg_ext.project_gate(torch.rand(size, device=cases.DEVICE))
    gates = [start.clone().requires_grad_() for _ in range(2)]
    torch.manual_seed(1)
    step_of(peer, gates[0])()
    torch.manual_seed(1)
    step_of("eager", gates[1])()
    torch.testing.assert_close(gates[0], gates[1], rtol=1e-5, atol=1e-6)
    moved = 5 * start.numel() * 4  # gate and buffer read and written, gradient read
    benchmark.group = f"gate_step {size[0]}x{size[1]}"
    benchmark.extra_info.update(bytes=moved, device=cases.DEVICE, peer=peer)
    benchmark(cases.synchronized(step_of(peer, start.clone().requires_grad_())))
    benchmark.extra_info["gigabytes_per_second"] = round(moved / benchmark.stats.stats.median / 1e9, 2)
