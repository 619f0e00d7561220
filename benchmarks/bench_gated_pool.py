"""Throughput of gated_pool beside its peers (pytest-benchmark): forward, backward, and both."""

from __future__ import annotations

import gated_pool_cases
import measure
import pytest

PEERS = gated_pool_cases.peers()
GRID = [(case, peer) for case in gated_pool_cases.grid() for peer in PEERS if gated_pool_cases.measured(case, peer)]


@pytest.mark.parametrize(("case", "peer"), GRID, ids=[f"{case.id}-{peer}" for case, peer in GRID])
@pytest.mark.parametrize("direction", gated_pool_cases.DIRECTIONS)
def bench_gated_pool(benchmark, direction, case, peer):
    gated_pool_cases.check(case, PEERS[peer])
    run = getattr(gated_pool_cases, direction)(PEERS[peer], case.inputs())
    moved = case.bytes * {"both": 2, "relu": 5}.get(direction, 1)
    benchmark.group = f"{direction} {case.id}"
    benchmark.extra_info.update(bytes=moved, device=measure.DEVICE, peer=peer)
    run = measure.synchronized(run)
    run()  # compiles here what the check did not: pytest-benchmark would take it for the time of a call
    benchmark(run)
    if benchmark.stats:  # none with --benchmark-disable
        benchmark.extra_info["gigabytes_per_second"] = round(moved / benchmark.stats.stats.median / 1e9, 2)
