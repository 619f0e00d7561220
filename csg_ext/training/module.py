"""The alternate training of a gated model as a LightningModule: one arm, STD or CSG."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any, cast

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor

from csg_ext.data.batches import Batches, derive_seed
from csg_ext.nn.gate import GatedModel
from csg_ext.optim import ProjectedSGD
from csg_ext.training.config import TrainConfig
from csg_ext.training.schedule import CSG, STD, Schedule

_STEP_STREAM = 3  # random stream of everything drawn inside a step, e.g. dropout
_CHECK_EVERY = 20  # steps between checks of the loss: reading it waits for the device
ROW = ("epoch", "step", "seconds", "lr", "gate_lr", "loss_std", "loss_csg", "train_accuracy", "l1_density")


class DivergedError(RuntimeError):
    """The loss is not a finite number any more."""


class DensityWarning(UserWarning):
    """The gate does not become sparse."""


class _FromStep:
    """One epoch's batches from the step where the run stands; a batch depends on its step alone: nothing to save."""

    def __init__(self, module: AlternateTraining) -> None:
        self.module = module

    def __len__(self) -> int:
        return len(self.module.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(self.module.step_count % len(self), len(self)):
            yield self.module.batches[self.module.step_count]

    def state_dict(self) -> dict[str, Any]:
        """Tells Lightning that the loader resumes in mid-epoch."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load: the module's step says it all."""


class AlternateTraining(pl.LightningModule):
    """Trains a GatedModel: CE(STD) on STD steps; lambda_1 CE(CSG) + lambda_2 d(||G||_1, budget) on CSG steps.

    arm "csg" follows the configuration's schedule; arm "std", the baseline, takes the STD path on every step. All else
    is the same: initial weights, batches, learning rates, number of steps, trained layers. `history` holds one row per
    epoch with the keys of ROW; losses and accuracy are means over the samples of the steps that they belong to.
    Source: Liang et al., ECCV 2020, algorithm 1.
    """

    sums: Tensor

    def __init__(self, model: GatedModel, batches: Batches, config: TrainConfig, arm: str = CSG) -> None:
        super().__init__()
        if arm not in (STD, CSG):
            raise ValueError(f"AlternateTraining: arm must be 'std' or 'csg', got {arm!r}")
        self.model, self.batches, self.config, self.arm = model, batches, config, arm
        self.schedule = Schedule.of(config, len(batches))
        self.automatic_optimization = False
        self.step_count = 0  # steps done: the run's clock
        self.seconds = 0.0
        self.history: list[dict[str, float | int | None]] = []
        # sums over the epoch so far: STD loss, its samples, correct ones, CSG loss, its samples
        self.register_buffer("sums", torch.zeros(5, dtype=torch.float64), persistent=False)
        self._warned = False

    def train_dataloader(self) -> _FromStep:
        """The loader that Lightning iterates over."""
        return _FromStep(self)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """SGD for the weights, projected SGD for the gate."""
        c = self.config
        weights = torch.optim.SGD(self.model.weights(), lr=c.lr, momentum=c.momentum, weight_decay=c.weight_decay)
        return [weights, ProjectedSGD([self.model.gate], lr=c.gate_lr)]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """One step on the path that the schedule names."""
        x, labels = batch
        c, step = self.config, self.step_count
        path = STD if self.arm == STD else self.schedule.path(step)
        torch.manual_seed(derive_seed(c.seed, _STEP_STREAM, step))
        weights_optimizer, gate_optimizer = cast(list[LightningOptimizer], self.optimizers())
        self._set_lr(weights_optimizer, c.lr * self.schedule.lr_factor(step))
        self._set_lr(gate_optimizer, c.gate_lr * self.schedule.gate_lr_factor(step))
        weights_optimizer.zero_grad()
        gate_optimizer.zero_grad()

        std_logits = csg_logits = None
        if path == STD:
            std_logits = self.model(x)
        elif path == CSG:
            csg_logits = self.model(x, labels)
        else:
            std_logits, csg_logits = self.model(x, labels, path="both")
        loss, sums, n = torch.zeros((), device=x.device), self.sums, len(labels)
        if std_logits is not None:
            std_loss = F.cross_entropy(std_logits, labels)
            loss = loss + std_loss
            sums[0] += std_loss.detach() * n
            sums[1] += n
            sums[2] += (std_logits.detach().argmax(1) == labels).sum()
        if csg_logits is not None:
            csg_loss = F.cross_entropy(csg_logits, labels)
            loss = loss + c.lambda_1 * csg_loss + c.lambda_2 * self.model.csg.penalty(c.budget, c.penalty)
            sums[3] += csg_loss.detach() * n
            sums[4] += n
        self.manual_backward(loss)
        weights_optimizer.step()
        if path != STD:
            gate_optimizer.step()
        self.step_count = step + 1
        if self.step_count % _CHECK_EVERY == 0 or self.step_count % len(self.batches) == 0:
            self.check_finite()

    def check_finite(self) -> None:
        """Raises DivergedError, with one sentence, when a loss of this epoch was NaN or infinite."""
        if not bool(torch.isfinite(self.sums).all()):
            raise DivergedError(
                f"the loss of arm {self.arm} is not finite by step {self.step_count} of {self.schedule.total_steps}: "
                f"try a learning rate below lr={self.config.lr} or gate_lr={self.config.gate_lr}"
            )

    @staticmethod
    def _set_lr(optimizer: Any, lr: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = lr

    def end_epoch(self) -> None:
        """Appends the epoch's row to the history and watches the density."""
        std_loss, std_count, correct, csg_loss, csg_count = self.sums.tolist()
        self.sums.zero_()
        step = self.step_count - 1
        density = self.model.csg.density()
        self.history.append(
            {
                "epoch": self.step_count // len(self.batches),
                "step": self.step_count,
                "seconds": round(self.seconds, 2),
                "lr": self.config.lr * self.schedule.lr_factor(step),
                "gate_lr": self.config.gate_lr * self.schedule.gate_lr_factor(step),
                "loss_std": std_loss / std_count if std_count else None,
                "loss_csg": csg_loss / csg_count if csg_count else None,
                "train_accuracy": correct / std_count if std_count else None,
                "l1_density": density if self.arm == CSG else None,
            }
        )
        self._watch_density(density)

    def _watch_density(self, density: float) -> None:
        """Warns once when half of the run is over and the gate is still dense and hardly moves."""
        if self.arm == STD or self._warned or self.step_count < self.schedule.total_steps / 2 or len(self.history) < 2:
            return
        floor = max(1.0, (self.config.budget or 0) / self.model.csg.num_filters) / self.model.csg.num_classes
        before = self.history[-2]["l1_density"]
        if density > 2 * floor and isinstance(before, float) and density > 0.95 * before:
            self._warned = True
            warnings.warn(
                f"the gate's L1-density stalls at {density:.2f} after {self.step_count} of {self.schedule.total_steps} "
                f"steps (its floor is {floor:.2f}): raise gate_lr ({self.config.gate_lr}) or lambda_2 "
                f"({self.config.lambda_2})",
                DensityWarning,
                stacklevel=2,
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the run's clock, sums and history."""
        checkpoint["csg_ext"] = {
            "step_count": self.step_count,
            "seconds": self.seconds,
            "sums": self.sums.cpu(),
            "history": self.history,
            "warned": self._warned,
            "arm": self.arm,
            "config": self.config.as_dict(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the run's clock, sums and history."""
        state = checkpoint.get("csg_ext")
        if state is None or state["arm"] != self.arm:
            raise ValueError(f"expected a checkpoint of csg-ext's arm {self.arm!r}, got {state and state['arm']!r}")
        if state["config"] != self.config.as_dict():
            changed = [k for k, v in self.config.as_dict().items() if state["config"].get(k, math.nan) != v]
            raise ValueError(f"a run resumes with the settings that it began with, got another {', '.join(changed)}")
        self.step_count, self.seconds, self.history = state["step_count"], state["seconds"], state["history"]
        self._warned = state["warned"]
        self.sums.copy_(state["sums"])
