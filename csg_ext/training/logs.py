"""The gate as an image, and a run's numbers for TensorBoard."""

from __future__ import annotations

import torch
from torch import Tensor


def gate_image(gate: Tensor) -> Tensor:
    """A gate (C, K) as a grey image (1, C, K) of uint8, filters sorted by the class of their largest entry."""
    gate = gate.detach().float().cpu()
    order = torch.argsort(gate.argmax(0), stable=True)
    return gate[:, order].clamp(0, 1).mul(255).round().to(torch.uint8)[None]
