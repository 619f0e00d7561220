"""The alternate training of a gated model as a LightningModule: one arm, STD or CSG."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from csg_ext.data.batches import Batches, derive_seed
from csg_ext.nn.gate import GatedModel
from csg_ext.optim import ProjectedSGD
from csg_ext.training.config import TrainConfig
from csg_ext.training.mix import Mix
from csg_ext.training.monitor import FiniteLoss, density_floor, warn_if_stalled
from csg_ext.training.objective import Losses
from csg_ext.training.schedule import CSG, GATE, STD, Schedule
from csg_ext.training.weights import check_state

_STEP_STREAM = 3  # random stream of everything drawn inside a step, e.g. dropout
ROW = ("epoch", "step", "seconds", "lr", "gate_lr", "loss_std", "loss_csg", "train_accuracy", "l1_density")


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
        if arm == CSG:
            self.schedule.check_takes_csg()
        self.objective = config.objective()
        mixes = config.mixup > 0 or config.cutmix > 0
        self.mix = Mix(model.csg.num_classes, config.mixup, config.cutmix) if mixes else None
        self.finite = FiniteLoss(
            f"the loss of arm {arm}", f"try a learning rate below lr={config.lr} or gate_lr={config.gate_lr}"
        )
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
        return [weights, ProjectedSGD([self.model.gate], lr=c.gate_lr, method=c.projection)]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """One step on the path that the schedule names."""
        x, labels = batch
        c, step = self.config, self.step_count
        path = STD if self.arm == STD else self.schedule.path(step)
        torch.manual_seed(derive_seed(c.seed, _STEP_STREAM, step))
        if self.mix is not None:
            x, labels = self.mix(x, labels)
        weights_optimizer, gate_optimizer = cast(list[LightningOptimizer], self.optimizers())
        if path == CSG:
            lr = (c.lr if c.csg_lr is None else c.csg_lr) * self.schedule.csg_lr_factor(step)
        else:
            lr = c.lr * self.schedule.lr_factor(step)
        self._set_lr(weights_optimizer, lr)
        self._set_lr(gate_optimizer, c.gate_lr * self.schedule.gate_lr_factor(step))
        weights_optimizer.zero_grad()
        gate_optimizer.zero_grad()
        losses = self.objective(self.model, x, labels, path, self.schedule.lambda_factors(step))
        self.finite.observe(losses.total, step, self.schedule.total_steps)
        self._count(losses, labels)
        self.manual_backward(losses.total)
        if path != GATE:
            if c.clip_norm is not None:
                clip_grad_norm_(self.model.weights(), c.clip_norm)
            weights_optimizer.step()
        if path != STD:
            if c.gate_clip_norm is not None:
                clip_grad_norm_(self.model.gate, c.gate_clip_norm)
            gate_optimizer.step()
        self.step_count = step + 1

    def _count(self, losses: Losses, labels: Tensor) -> None:
        """Adds a step's losses and correct answers to the epoch's sums."""
        sums, n = self.sums, len(labels)
        if losses.std is not None and losses.std_logits is not None:
            sums[0] += losses.std.detach() * n
            sums[1] += n
            classes = labels.argmax(1) if labels.is_floating_point() else labels
            sums[2] += (losses.std_logits.detach().argmax(1) == classes).sum()
        if losses.csg is not None:
            sums[3] += losses.csg.detach() * n
            sums[4] += n

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
        if csg_count:
            self._watch_density(density)

    def _watch_density(self, density: float) -> None:
        """Warns once when the gate is still dense and hardly moves."""
        before = self.history[-2]["l1_density"] if len(self.history) > 1 else None
        if self._warned or not isinstance(before, float):
            return
        c, csg = self.config, self.model.csg
        self._warned = warn_if_stalled(
            density,
            before,
            density_floor(csg.num_classes, csg.num_filters, c.budget),
            self.step_count,
            self.schedule.total_steps,
            f"raise gate_lr ({c.gate_lr}) or lambda_2 ({c.lambda_2})",
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
        arm = state.get("arm") if isinstance(state, dict) else None
        if not isinstance(state, dict) or arm != self.arm:
            raise ValueError(f"expected a checkpoint of csg-ext's arm {self.arm!r}, got {arm!r:.100}")
        _check_state(state, self.sums)
        known = TrainConfig().as_dict() | state["config"]  # settings younger than the run had their default
        if known != self.config.as_dict():
            changed = [k for k, v in self.config.as_dict().items() if known[k] != v]
            raise ValueError(f"a run resumes with the settings that it began with, got another {', '.join(changed)}")
        self.step_count, self.seconds, self.history = state["step_count"], state["seconds"], state["history"]
        check_state(self, checkpoint["state_dict"])
        self._warned = state["warned"]
        self.sums.copy_(state["sums"])
        # Lightning counts an epoch too few once it has resumed at an epoch's end: a second resume would train one more.
        epoch = max(0, self.step_count - 1) // len(self.batches)
        progress = {"ready": epoch + 1, "started": epoch + 1, "processed": epoch, "completed": epoch}
        checkpoint["loops"]["fit_loop"]["epoch_progress"] = {"total": dict(progress), "current": dict(progress)}


def _check_state(state: dict[str, Any], sums: Tensor) -> None:
    """Raises ValueError for what on_save_checkpoint does not write."""
    history, stored = state.get("history"), state.get("sums")
    kinds = {"step_count": int, "seconds": float | int, "warned": bool, "config": dict, "history": list}
    wrong = next((key for key, kind in kinds.items() if not isinstance(state.get(key), kind)), None)
    if wrong is None and (not isinstance(stored, Tensor) or stored.shape != sums.shape or stored.is_complex()):
        wrong = "sums"
    if wrong is None and not all(isinstance(row, dict) and row.keys() >= set(ROW) for row in history or []):
        wrong = "history"
    if wrong is not None:
        raise ValueError(f"expected the state of a run, got {wrong} as {state.get(wrong)!r:.100}".replace("\n", " "))
