"""Arguments of an operator without their values, for its shapes and checks."""

from __future__ import annotations

from typing import Any

import torch


def on_meta(value: Any) -> Any:
    """A tensor on the meta device with its own strides, which `to` keeps only where there are no gaps."""
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
