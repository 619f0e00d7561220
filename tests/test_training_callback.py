"""Tests of ClassSpecificGateCallback and GatedTraining against plain loops; AMP, checkpoints, logs."""

from __future__ import annotations

import copy
import functools
import importlib.util
import math
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from csg_ext.nn import GatedModel
from csg_ext.optim import ProjectedSGD
from csg_ext.training import (
    ClassSpecificGateCallback,
    GatedTraining,
    Objective,
    Schedule,
)

CLASSES, SIZE, STEPS = 3, 8, 6  # samples per batch, batches per epoch


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        yield
    torch.set_num_threads(threads)


def tiny(norm: bool = False, dtype: torch.dtype = torch.float64) -> GatedModel:
    layers = [nn.Conv2d(1, 8, 3), *([nn.BatchNorm2d(8)] if norm else []), nn.Tanh()]
    return GatedModel(nn.Sequential(*layers), CLASSES, num_filters=8).to(dtype)


def batches(dtype: torch.dtype = torch.float64, count: int = STEPS) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(SIZE, 1, 6, 6, dtype=dtype), torch.randint(0, CLASSES, (SIZE,))) for _ in range(count)]


def loader(data) -> DataLoader:
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    return DataLoader(TensorDataset(x, y), SIZE)


def trainer(epochs: int = 2, **options) -> pl.Trainer:
    defaults = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    return pl.Trainer(max_epochs=epochs, accelerator="cpu", devices=1, **(defaults | options))


def assert_same(model: nn.Module, other: nn.Module, **tolerance) -> None:
    for (name, ours), theirs in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def by_hand(model: GatedModel, data, epochs: int, paths, *, clip=None, gate_clip=None, factors=None, csg_sgd=False):
    """The method in plain autograd: SGD with momentum on the weights, projected SGD on the gate, given the paths."""
    total = epochs * len(data)
    weights = torch.optim.SGD(model.weights(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    other = torch.optim.SGD(model.weights(), lr=0.03, momentum=0.5) if csg_sgd else None
    for step in range(total):
        x, y = data[step % len(data)]
        features = model.backbone(x).mean((2, 3))
        first, second = factors(step) if factors else (1.0, 1.0)
        std = F.cross_entropy(model.classifier(features), y)
        csg = F.cross_entropy(model.classifier(features * model.gate[y]), y)
        loss = 0.7 * first * csg + 0.02 * second * F.relu(model.gate.sum() - 8)
        loss = {"std": std, "joint": std + loss}.get(paths[step], loss)
        model.zero_grad()
        loss.backward()
        optimizer = other if csg_sgd and paths[step] == "csg" else weights
        if clip:
            nn.utils.clip_grad_norm_(model.weights(), clip)
        decay = (1 + math.cos(math.pi * step / total)) / 2
        optimizer.param_groups[0]["lr"] = (0.1 if optimizer is weights else 0.03) * decay
        if paths[step] != "gate":
            optimizer.step()
        if paths[step] != "std":
            gradient = model.gate.grad
            if gate_clip:
                gradient = gradient * min(1.0, gate_clip / (gradient.norm().item() + 1e-6))
            with torch.no_grad():
                moved = model.gate - 2.0 * decay * gradient
                top = moved.max(0).values
                assert (top > 0).all()
                model.gate.copy_((moved / top).clamp(0, 1))


OBJECTIVE = Objective(lambda_1=0.7, lambda_2=0.02)
CASES = {
    "joint": (dict(kind="joint"), ["joint"] * 10 + ["std"] * 2),
    "steps": (dict(kind="steps", period=3), ["std", "std", "csg"] * 3 + ["std"] * 3),
    "epochs": (dict(kind="epochs", period=2, csg_at=(0,)), ["csg"] * 6 + ["std"] * 6),
    "gate first": (
        dict(kind="steps", period=2, csg_share=0.5, warmup=0.1, gate_warmup=0.25),
        ["std"] * 2 + ["gate"] * 3 + ["csg", "std", "csg", "std", "csg", "std", "std"],
    ),
}


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("case", CASES)
def test_gated_training_takes_the_methods_steps(case, clip):
    options, paths = CASES[case]
    schedule = Schedule(**options, final_std=0.17, lr_warmup=0.0, lambda_2_ramp=0.5)
    model, data = tiny(), batches()
    expected = copy.deepcopy(model)
    module = GatedTraining(model, schedule, OBJECTIVE, gate_clip_norm=clip)
    trainer(gradient_clip_val=clip).fit(module, loader(data))
    start = schedule.warmup * 12
    by_hand(
        expected,
        data,
        2,
        paths,
        clip=clip,
        gate_clip=clip,
        factors=lambda step: (1.0, min(1.0, max(0.0, (step + 1 - start) / 6))),
    )
    assert_same(model, expected)
    assert [module.gate_callback.schedule.path(s) for s in range(12)] == paths


def test_an_optimizer_of_its_own_for_csg_steps():
    options, paths = CASES["steps"]
    model, data = tiny(), batches()
    expected = copy.deepcopy(model)
    module = GatedTraining(
        model,
        Schedule(**options, final_std=0.17, lr_warmup=0.0),
        OBJECTIVE,
        csg_optimizer=functools.partial(torch.optim.SGD, lr=0.03, momentum=0.5),
    )
    trainer(gradient_clip_val=0.1).fit(module, loader(data))
    by_hand(expected, data, 2, paths, clip=0.1, csg_sgd=True)
    assert_same(model, expected)


class Own(pl.LightningModule):
    """A user's module that knows nothing of gates; its optimizer takes every parameter."""

    def __init__(self, net: nn.Module, smoothing: float = 0.0) -> None:
        super().__init__()
        self.net, self.smoothing = net, smoothing

    def training_step(self, batch, batch_idx):
        x, y = batch
        return {"loss": F.cross_entropy(self.net(x), y, label_smoothing=self.smoothing), "size": len(y)}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_a_users_module_trains_as_gated_training_does(case):
    schedule = Schedule(**CASES[case][0], lr_warmup=0.0, lr_decay="constant")
    objective = Objective(label_smoothing=0.1)
    model, data = tiny(norm=True), batches()
    net = copy.deepcopy(model)
    trainer().fit(GatedTraining(model, schedule, objective), loader(data))
    own = Own(net, smoothing=0.1)
    trainer(callbacks=[ClassSpecificGateCallback(schedule, objective)]).fit(own, loader(data))
    assert_same(net, model, rtol=0, atol=0)
    assert net.gate.amax(0).eq(1).all()
    assert "training_step" not in own.__dict__ and not net._forward_hooks and not net._forward_pre_hooks


def test_accumulation_steps_once_and_keeps_the_path():
    """Three micro-batches a step equal one batch of their size: a path per optimizer step, one step of the gate."""
    model, data = tiny(), batches(count=9)
    expected, big = copy.deepcopy(model), loader(data).dataset.tensors
    schedule = Schedule(kind="steps", period=2, csg_share=0.5, lr_warmup=0.0)
    trainer(accumulate_grad_batches=3).fit(GatedTraining(model, schedule, OBJECTIVE), loader(data))
    trainer().fit(GatedTraining(expected, schedule, OBJECTIVE), DataLoader(TensorDataset(*big), 3 * SIZE))
    assert_same(model, expected)


def test_plain_example_takes_the_same_steps():
    spec = importlib.util.spec_from_file_location(
        "plain", Path(__file__).parents[1] / "examples" / "train_plain_pytorch.py"
    )
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    model, data = tiny(norm=True, dtype=torch.float32), batches(torch.float32)
    expected = copy.deepcopy(model)
    example.train(expected, data * 2, 2 * STEPS)
    module = GatedTraining(
        model,
        Schedule(kind="steps", period=3, csg_at=(2,), lr_warmup=0.0),
        Objective(),
        optimizer=functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=5e-4),
        gate_optimizer=functools.partial(ProjectedSGD, lr=2.0),
    )
    trainer().fit(module, loader(data))
    assert_same(model, expected)
    assert not model.gate.eq(0.5).any()
