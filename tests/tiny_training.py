"""A tiny gated network, batches and a trainer: what the tests of training with Lightning share."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from csg_ext.nn import GatedModel
from csg_ext.training import Objective

CLASSES, SIZE, STEPS = 3, 8, 6  # samples per batch, batches per epoch
OBJECTIVE = Objective(lambda_1=0.7, lambda_2=0.02)


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
