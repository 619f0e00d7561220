"""Training steps of ResNet-20 in every form (pytest-benchmark)."""

from __future__ import annotations

import end_to_end
import measure
import pytest


@pytest.fixture(scope="module")
def network():
    found = end_to_end.networks()[0]
    end_to_end.check(found)
    return found


@pytest.mark.parametrize("form", end_to_end.FORMS)
def bench_resnet20_step(benchmark, network, form):
    benchmark.group = "training step of resnet20"
    benchmark.extra_info.update(device=measure.DEVICE, form=form)
    step = measure.synchronized(end_to_end.step_of(form, network.model(), network.data()))
    benchmark.pedantic(step, rounds=5, warmup_rounds=2)
