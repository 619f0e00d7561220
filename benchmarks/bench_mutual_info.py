"""Mutual information of every feature with every class beside scikit-learn (pytest-benchmark)."""

from __future__ import annotations

import measure
import mutual_info_cases as mi
import pytest


@pytest.mark.parametrize("peer", ["noise", "exact", "kernel noise", "kernel exact", "approximate"])
@pytest.mark.parametrize("case", mi.SIZES + mi.LARGE, ids=lambda case: case.id)
def bench_class_mutual_info(benchmark, case, peer):
    mi.check(case)
    x, y = case.inputs()
    if peer == "approximate":
        f = mi.approximate(case, x, y)
    else:
        f = (mi.kernel if peer.startswith("kernel") else mi.ours)(case, x, y, peer.split()[-1])
    benchmark.group = f"class_mutual_info {case.id}"
    benchmark.extra_info.update(device=measure.DEVICE, peer=peer)
    benchmark.pedantic(measure.synchronized(f), rounds=5, warmup_rounds=1)
    if benchmark.stats:  # none with --benchmark-disable
        seconds = benchmark.stats.stats.median
        benchmark.extra_info["nanoseconds_per_value"] = round(seconds / (case.n * case.k) * 1e9, 2)


@pytest.mark.parametrize("case", mi.SIZES[:1], ids=lambda case: case.id)
def bench_scikit_learn(benchmark, case):
    x, y = (t.cpu().numpy() for t in case.inputs())
    benchmark.group = f"class_mutual_info {case.id}"
    benchmark.extra_info.update(device="cpu", peer="scikit-learn, 2 jobs")
    benchmark.pedantic(mi.scikit_learn, (x, y, list(range(case.c)), 2), rounds=1)
