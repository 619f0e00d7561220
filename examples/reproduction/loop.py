"""The training loop of the scripts beside csg-ext train: plain PyTorch with the package's schedule and steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from csg_ext.data import Batches
from csg_ext.nn.gate import TwoPaths
from csg_ext.optim import ProjectedSGD
from csg_ext.training import Schedule

Loss = Callable[[Tensor, Tensor, str], Tensor]  # of a batch's images and labels on a path


def train(
    model: TwoPaths, batches: Batches, arm: str, epochs: int, weights: torch.optim.Optimizer, gate_lr: float, loss: Loss
) -> None:
    """Trains all weights for `epochs`, and with arm "csg" the gate; both learning rates fall on the run's own clock."""
    lr = weights.param_groups[0]["lr"]
    gate = ProjectedSGD([model.gate], lr=gate_lr)
    run = Schedule().for_run(total_steps=epochs * len(batches), steps_per_epoch=len(batches))
    model.train()
    for step in range(run.total_steps):
        path = run.path(step) if arm == "csg" else "std"
        weights.param_groups[0]["lr"] = lr * run.lr_factor(step)
        gate.param_groups[0]["lr"] = gate_lr * run.gate_lr_factor(step)
        weights.zero_grad()
        gate.zero_grad()
        loss(*batches[step], path).backward()
        weights.step()
        if path != "std":
            gate.step()
