"""A small model to attach a gate to, and the CSG path of any model by its definition."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from model_zoo import Known
from torch import Tensor, nn

import csg_ext
from csg_ext.nn import AttachedModel


def logits(output) -> Tensor:
    return getattr(output, "logits", output)


def hook_count(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return sum(len(getattr(m, kind)) for m in model.modules() for kind in kinds)


def gated_by_hand(model: nn.Module, known: Known, rows: Tensor, x: Tensor) -> Tensor:
    """The CSG path by its definition: the feature map is multiplied by every sample's row, (N, K), all else stays."""

    def multiply(features: Tensor) -> Tensor:
        shape = [len(rows)] + [1] * (features.dim() - 1)
        shape[known.channel_dim] = -1
        return features * rows.view(shape)

    module = model.get_submodule(known.layer)
    if known.side == "input":
        handle = module.register_forward_pre_hook(lambda m, args: (multiply(args[0]),))
    else:
        handle = module.register_forward_hook(lambda m, args, output: multiply(output))
    try:
        return logits(model(x))
    finally:
        handle.remove()


class Small(nn.Module):
    """Convolution, BatchNorm, in-place ReLU, a residual block with an in-place sum, pooling, linear."""

    def __init__(self, head: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3)
        self.bn = nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.inner = nn.Conv2d(6, 6, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = head or nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.relu(self.bn(self.conv(x)))
        out = self.inner(shortcut)
        out += shortcut
        return self.head(self.pool(F.relu(out, inplace=True)).flatten(1))


EXAMPLE = torch.linspace(-1, 1, 2 * 2 * 6 * 6).sin().view(2, 2, 6, 6)


def attach_small(*args, model=None, **options) -> AttachedModel:
    g = csg_ext.attach(model or Small(), *args, example=EXAMPLE, **options)
    nn.init.uniform_(g.gate)
    return g


def batch(n: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 2, 6, 6), torch.randint(0, 4, (n,))
