"""The gate's optimizer step and projection beside torch.optim.SGD followed by the projection (pytest-benchmark)."""

from __future__ import annotations

import gate_step_cases
import measure
import pytest


@pytest.mark.parametrize("peer", gate_step_cases.PEERS)
@pytest.mark.parametrize("size", gate_step_cases.SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def bench_gate_step(benchmark, size, peer):
    gate_step_cases.check(size, peer)
    moved = gate_step_cases.moved(size)
    benchmark.group = f"gate_step {size[0]}x{size[1]}"
    benchmark.extra_info.update(bytes=moved, device=measure.DEVICE, peer=peer)
    step = measure.synchronized(gate_step_cases.step_of(peer, gate_step_cases.start(size)))
    step()  # compiles here and makes the momentum buffer: pytest-benchmark would take it for the time of a call
    benchmark(step)
    if benchmark.stats:  # none with --benchmark-disable
        benchmark.extra_info["gigabytes_per_second"] = round(moved / benchmark.stats.stats.median / 1e9, 2)
