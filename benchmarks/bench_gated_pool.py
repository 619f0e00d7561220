"""Throughput of gated_pool beside its peers (pytest-benchmark): forward, and forward with backward."""

from __future__ import annotations

import cases
import pytest

PEERS = cases.peers()


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("case", cases.grid(), ids=lambda case: case.id)
@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
def bench_gated_pool(benchmark, direction, case, peer):
    f = PEERS[peer]
    cases.check(case, f)
    make = cases.forward_of if direction == "forward" else cases.forward_backward_of
    moved = case.bytes * (1 if direction == "forward" else 2)
    benchmark.group = f"{direction} {case.id}"
    benchmark.extra_info.update(bytes=moved, device=cases.DEVICE, peer=peer)
    benchmark(cases.synchronized(make(f, case.inputs())))
    benchmark.extra_info["gigabytes_per_second"] = round(moved / benchmark.stats.stats.median / 1e9, 2)
