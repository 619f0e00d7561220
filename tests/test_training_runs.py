"""Tests of the callback with compiled networks, data loaders without a length, and again after a run that failed."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_training import OBJECTIVE, Own, assert_same, batches, loader, tiny, trainer
from torch.utils.data import DataLoader, IterableDataset

from csg_ext.training import ClassSpecificGateCallback, DivergedError, GatedTraining, Schedule

# The runs are too short to become sparse, which is warned of.
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

ALTERNATE = Schedule(kind="steps", period=3)


class Stream(IterableDataset):
    """Samples one after the other, nobody knows how many."""

    def __init__(self, data) -> None:
        self.data = data

    def __iter__(self):
        for x, y in self.data:
            yield from zip(x, y, strict=True)


@pytest.mark.parametrize("schedule", [ALTERNATE, Schedule()], ids=["steps", "joint"])
@pytest.mark.parametrize("form", [GatedTraining, Own])
def test_a_compiled_network_takes_the_same_steps(form, schedule):
    data, nets = batches(), [tiny()]
    nets.append(copy.deepcopy(nets[0]))
    start = nets[0].gate.detach().clone()
    for net, compiled in zip(nets, (False, True), strict=True):
        forward = torch.compile(net, backend="aot_eager") if compiled else net
        if form is GatedTraining:
            trainer().fit(GatedTraining(forward, schedule, OBJECTIVE), loader(data))
        else:
            trainer(callbacks=[ClassSpecificGateCallback(schedule, OBJECTIVE)]).fit(Own(forward), loader(data))
    assert not torch.equal(nets[0].gate, start)
    assert_same(nets[1], nets[0])


def test_a_loader_without_a_length_needs_max_steps():
    data, nets = batches(), [tiny()]
    nets.append(copy.deepcopy(nets[0]))
    stream = DataLoader(Stream(data), 8)
    trainer().fit(GatedTraining(nets[0], ALTERNATE, OBJECTIVE), loader(data))
    trainer(max_steps=2 * len(data)).fit(GatedTraining(nets[1], ALTERNATE, OBJECTIVE), stream)
    assert_same(nets[1], nets[0])
    message = "max_steps must be given for a data loader without a length, got max_epochs=2 alone"
    for module, callbacks in ((GatedTraining(tiny()), []), (Own(tiny()), [ClassSpecificGateCallback()])):
        with pytest.raises(ValueError, match=message):
            trainer(callbacks=callbacks).fit(module, stream)
    with pytest.raises(ValueError, match="a schedule by epochs needs a data loader with a length, got one without"):
        trainer(max_steps=12).fit(GatedTraining(tiny(), Schedule(kind="epochs")), stream)


def test_a_run_without_end():
    for module, callbacks in ((GatedTraining(tiny()), []), (Own(tiny()), [ClassSpecificGateCallback()])):
        with pytest.raises(ValueError, match="max_epochs or max_steps must be given, got a run without end"):
            trainer(-1, callbacks=callbacks).fit(module, loader(batches()))


def test_a_callback_serves_another_run_after_one_that_diverged():
    callback, data = ClassSpecificGateCallback(ALTERNATE, OBJECTIVE), batches()
    with pytest.raises(DivergedError, match="at step 1 of 12"):
        trainer(callbacks=[callback]).fit(Own(tiny()), loader([(x * torch.nan, y) for x, y in data]))
    nets = [tiny()]
    nets.append(copy.deepcopy(nets[0]))
    trainer(callbacks=[callback]).fit(Own(nets[0]), loader(data))
    trainer(callbacks=[ClassSpecificGateCallback(ALTERNATE, OBJECTIVE)]).fit(Own(nets[1]), loader(data))
    assert_same(nets[0], nets[1])
