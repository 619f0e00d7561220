"""Tests of the callback in fp16 and bf16: what the scaler skips, who unscales, a plain loop."""

from __future__ import annotations

import copy
import functools
import math

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from tiny_training import OBJECTIVE, Own, assert_same, batches, loader, tiny, trainer

from csg_ext.optim import ProjectedOptimizer
from csg_ext.training import ClassSpecificGateCallback, GatedTraining, Schedule

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:::lightning")]


class Overflows(torch.amp.GradScaler):
    """A scaler that finds an overflow in the second step's gradients."""

    def __init__(self) -> None:
        super().__init__("cpu", init_scale=1024.0)
        self.steps = 0

    def unscale_(self, optimizer):
        self.steps += 1
        if self.steps == 2:
            optimizer.param_groups[0]["params"][0].grad.fill_(math.inf)
        super().unscale_(optimizer)


@pytest.mark.parametrize("gate_in_optimizer", [False, True])
def test_fp16_skips_the_gate_when_the_scaler_skips(gate_in_optimizer):
    """Joint steps under a GradScaler: the skipped one moves nothing, the others equal unscaled fp32 steps."""
    schedule = Schedule(kind="joint", lr_warmup=0.0, final_std=0.0, lr_decay="constant")
    model, data = tiny(dtype=torch.float32), batches(torch.float32, count=3)
    nets = [copy.deepcopy(model) for _ in range(2)]
    gates = []

    class Records(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            gates.append(nets[0].gate.detach().clone())

    scaler = Overflows()
    precision = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    precision.forward_context = torch.enable_grad  # the scaler is tested, not the rounding of fp16
    own = Own(nets[0])
    if not gate_in_optimizer:
        own.configure_optimizers = lambda: torch.optim.SGD(nets[0].weights(), 0.1, momentum=0.9, weight_decay=1e-3)
    callbacks = [ClassSpecificGateCallback(schedule, OBJECTIVE), Records()]
    trainer(1, plugins=[precision], callbacks=callbacks, gradient_clip_val=1.0).fit(own, loader(data))
    assert scaler.get_scale() == 512 and torch.equal(gates[0], gates[1]) and not torch.equal(gates[1], gates[2])
    kept = [data[0], data[2]]
    trainer(1, callbacks=[ClassSpecificGateCallback(schedule, OBJECTIVE)], gradient_clip_val=1.0).fit(
        Own(nets[1]), loader(kept)
    )
    assert_same(nets[0], nets[1])


def test_fp16_unscales_weights_that_only_the_csg_optimizer_has():
    model, data = tiny(dtype=torch.float32), batches(torch.float32, count=2)
    nets = [copy.deepcopy(model) for _ in range(2)]
    for net, plugins in zip(nets, ([], [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]), strict=True):
        for plugin in plugins:
            plugin.forward_context = torch.enable_grad
        own = Own(net)
        own.configure_optimizers = lambda net=net: torch.optim.SGD(net.classifier.parameters(), lr=0.1)
        callback = ClassSpecificGateCallback(
            Schedule(kind="steps", period=2, csg_share=0.5, final_std=0.0),
            csg_optimizer=functools.partial(torch.optim.SGD, lr=0.01),
        )
        trainer(1, plugins=plugins, callbacks=[callback]).fit(own, loader(data))
    assert_same(*nets)
    assert not torch.equal(nets[0].backbone[0].weight, model.backbone[0].weight)


def test_fp16_in_a_plain_loop():
    """Weights and gate in one ProjectedOptimizer: the scaler skips both or none; STD steps leave the gate alone."""
    model, data = tiny(dtype=torch.float32), batches(torch.float32, count=4)
    groups = [{"params": model.weights(), "lr": 0.1}, {"params": [model.gate], "lr": 1.0}]
    optimizer = ProjectedOptimizer(torch.optim.SGD(groups, lr=0.1), [model.gate])
    scaler = Overflows()
    states = [copy.deepcopy(model.state_dict())]
    for (x, y), path in zip(data, ["std", "csg", "csg", "std"], strict=True):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            losses = OBJECTIVE(model, x, y, path)
        scaler.scale(losses.total).backward()
        scaler.step(optimizer)
        scaler.update()
        states.append(copy.deepcopy(model.state_dict()))
    changed = [{k for k in a if not torch.equal(a[k], b[k])} for a, b in zip(states, states[1:], strict=False)]
    assert changed[1] == set() and changed[2] == set(states[0])
    assert changed[0] == changed[3] == set(states[0]) - {"csg.gate"}
    assert states[-1]["csg.gate"].amax(0).eq(1).all()


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_trains(precision):
    model, data = tiny(norm=True, dtype=torch.float32), batches(torch.float32)
    plugin = MixedPrecision(precision, "cpu", *([torch.amp.GradScaler("cpu")] if precision == "16-mixed" else []))
    trainer(plugins=[plugin]).fit(GatedTraining(model, Schedule(lr_warmup=0.0), OBJECTIVE), loader(data))
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in model.parameters())
    assert model.gate.amax(0).eq(1).all() and model.csg.density() < 1


def test_a_fused_optimizer_under_fp16():
    own = Own(tiny(dtype=torch.float32))
    own.configure_optimizers = lambda: torch.optim.Adam(own.parameters(), lr=0.1, fused=True)
    precision = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(
        ValueError, match="the optimizer must not unscale gradients by itself, got Adam with fused=True"
    ):
        trainer(plugins=[precision], callbacks=[ClassSpecificGateCallback()]).fit(own, loader(batches(torch.float32)))
