"""The gate as an image, and a run's numbers for TensorBoard."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from csg_ext.nn.gate import gate_penalty
from csg_ext.training.objective import Objective

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def gate_image(gate: Tensor) -> Tensor:
    """A gate (C, K) as a grey image (1, C, K) of uint8, filters sorted by the class of their largest entry."""
    gate = gate.detach().float().cpu()
    order = torch.argsort(gate.argmax(0), stable=True)
    return gate[:, order].clamp(0, 1).mul(255).round().to(torch.uint8)[None]


def write_epoch(writer: SummaryWriter, row: dict[str, Any], gate: Tensor | None, objective: Objective) -> None:
    """An epoch's row of the history, and where there is a gate (C, K) its penalty and its image."""
    step = row["step"]
    for name, value in row.items():
        if name not in ("epoch", "step") and value is not None:
            writer.add_scalar(name, value, step)
    if gate is not None:
        writer.add_scalar("gate_penalty", float(gate_penalty(gate, objective.budget, objective.penalty)), step)
        writer.add_image("gate", gate_image(gate), step)
    writer.flush()
