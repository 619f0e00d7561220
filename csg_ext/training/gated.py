"""Gated training as a LightningModule for one's own data: a gated network and ordinary data loaders."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from csg_ext.nn.gate import ClassSpecificGate
from csg_ext.training.callback import ClassSpecificGateCallback, total_steps
from csg_ext.training.objective import Objective
from csg_ext.training.schedule import Schedule

_SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-3)


class GatedTraining(pl.LightningModule):
    """Trains a gated network on batches (x, labels): an ordinary module with ClassSpecificGateCallback attached.

    Precision, accumulation, clipping of the weights, devices and checkpoints are the Trainer's.

    Args:
        model: a gated module, such as GatedModel. Freeze stages before (csg_ext.training.freeze).
        schedule, objective: see there; the objective's label_smoothing serves both paths.
        optimizer: makes the weights' optimizer; its learning rate follows schedule.lr_factor.
        options: gate_optimizer, csg_optimizer, mix and gate_clip_norm of ClassSpecificGateCallback.

    Validation and test log accuracy and loss of the STD path: labels are unknown when the model is used.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule | None = None,
        objective: Objective | None = None,
        *,
        optimizer: Callable[[list[nn.Parameter]], Optimizer] = _SGD,
        **options: Any,
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.objective = objective or Objective()
        self.gate_callback = ClassSpecificGateCallback(schedule, self.objective, model="model", **options)
        self.make_optimizer = optimizer

    def configure_callbacks(self) -> list[pl.Callback]:
        """The callback that chooses the path and trains the gate."""
        return [self.gate_callback]

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The weights' optimizer, its learning rate on the run's own clock."""
        optimizer = self.make_optimizer([p for p in self.model.weights() if p.requires_grad])
        schedule = self.gate_callback.schedule.for_run(total_steps(self.trainer), 1)
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])  # LambdaLR asks for it where it does not begin at 0
        begun = self.trainer.global_step  # not 0 where the same Trainer fits on; a checkpoint brings its own
        scheduler = LambdaLR(optimizer, schedule.lr_factor, last_epoch=begun - 1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def forward(self, x: Tensor) -> Tensor:
        """The STD path's logits, (N, C)."""
        return self.model(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of the path that the callback has chosen."""
        x, labels = batch
        return self.objective.cross_entropy(self.model(x), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Logs val_accuracy and val_loss."""
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Logs test_accuracy and test_loss."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: tuple[Tensor, Tensor], part: str) -> None:
        x, labels = batch
        logits = self.model(x)
        classes = labels.argmax(1) if labels.is_floating_point() else labels
        numbers = {
            f"{part}_accuracy": (logits.argmax(1) == classes).float().mean(),
            f"{part}_loss": nn.functional.cross_entropy(logits, labels),
        }
        self.log_dict(numbers, batch_size=len(labels), sync_dist=True)


def _gates(module: nn.Module) -> list[ClassSpecificGate]:
    return [part for part in module.modules() if isinstance(part, ClassSpecificGate)]


class AveragedGatedModel(AveragedModel):
    """torch.optim.swa_utils.AveragedModel with gates that lie in V_G: an average of feasible gates need not lie in it.

    The gates of `module` are the projections of the averages, which the buffers raw_gate_0, ... keep as they are: an
    average that was projected at every step would hold on to what a gate has left long ago.
    Arguments: as AveragedModel; multi_avg_fn=get_ema_multi_avg_fn(0.999) makes it an exponential moving average.
    """

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        for i, csg in enumerate(_gates(self.module)):
            self.register_buffer(f"raw_gate_{i}", csg.gate.detach().clone())

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Averages, then projects the average gate."""
        raw = [(csg, self.get_buffer(f"raw_gate_{i}")) for i, csg in enumerate(_gates(self.module))]
        for csg, average in raw:
            csg.gate.copy_(average)
        super().update_parameters(model)
        for csg, average in raw:
            average.copy_(csg.gate)
            csg.project_()


class GatedWeightAveraging(EMAWeightAveraging):
    """Lightning's EMAWeightAveraging, a callback, with gates that lie in V_G; see AveragedGatedModel.

    Arguments: as EMAWeightAveraging, such as decay and update_every_n_steps.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Makes the average when fit begins."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":  # a fit before this one has counted its own; a checkpoint's come after setup
            self._latest_update_step, self._latest_update_epoch = 0, -1
        if self._average_model is not None and not isinstance(self._average_model, AveragedGatedModel):
            device = self._device or pl_module.device
            self._average_model = AveragedGatedModel(
                pl_module, device=device, use_buffers=self._use_buffers, **self._kwargs
            )
