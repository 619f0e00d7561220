"""gate_step_, project_gate_ (being replaced by the kernels' version: same signature)."""

from __future__ import annotations

import torch
from torch import Tensor

from csg_ext import reference


def project_gate(gate: Tensor, method: str = "scale") -> Tensor:
    """See project_gate_."""
    return reference.project_gate(gate, method)


@torch.no_grad()
def project_gate_(gate: Tensor, method: str = "scale") -> Tensor:
    """Project in place."""
    return gate.copy_(reference.project_gate(gate, method))


@torch.no_grad()
def gate_step_(
    gate: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None = None,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    first_step: bool = False,
    method: str = "scale",
) -> Tensor:
    """SGD step and projection, in place."""
    new, buf = reference.gate_step(
        gate, grad, momentum_buffer, lr=lr, momentum=momentum, dampening=dampening, nesterov=nesterov,
        weight_decay=weight_decay, first_step=first_step, method=method,
    )
    if momentum_buffer is not None and buf is not None:
        momentum_buffer.copy_(buf)
    return gate.copy_(new)
