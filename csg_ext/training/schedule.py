"""Which path a step takes, and the learning rates, as functions of the run's own clock."""

from __future__ import annotations

import math
from dataclasses import dataclass

from csg_ext.training.config import TrainConfig

STD, CSG, JOINT = "std", "csg", "joint"


@dataclass(frozen=True)
class Schedule:
    """The alternate training of one run of `total_steps` steps.

    kind "steps": of every `period` steps the last csg_share take the CSG path. "epochs" (the paper's): the same with
    epochs, the period counted in epochs. "joint": every step sums both losses. The first `warmup` and the last
    `final_std` of the run take the STD path; a run must end on it, or the accuracy of the STD path suffers.
    """

    kind: str
    total_steps: int
    steps_per_epoch: int
    period: int
    csg_share: float
    warmup: float
    final_std: float
    lr_warmup: float

    @classmethod
    def of(cls, config: TrainConfig, steps_per_epoch: int) -> Schedule:
        """The schedule that a configuration describes."""
        return cls(
            config.schedule,
            config.epochs * steps_per_epoch,
            steps_per_epoch,
            config.period,
            config.csg_share,
            config.warmup,
            config.final_std,
            config.lr_warmup,
        )

    def path(self, step: int) -> str:
        """The path of step 0, 1, ... total_steps - 1: "std", "csg" or "joint"."""
        if step < self.warmup * self.total_steps or step >= (1 - self.final_std) * self.total_steps:
            return STD
        if self.kind == "joint":
            return JOINT
        position = (step if self.kind == "steps" else step // self.steps_per_epoch) % self.period
        return CSG if position >= round(self.period * (1 - self.csg_share)) else STD

    def lr_factor(self, step: int) -> float:
        """Factor of the weights' learning rate: 1/25 up to 1 over lr_warmup, then down to 0, both along a cosine."""
        t = step / self.total_steps
        if t < self.lr_warmup:
            return 1 - 0.96 * (1 + math.cos(math.pi * t / self.lr_warmup)) / 2
        return (1 + math.cos(math.pi * (t - self.lr_warmup) / max(1 - self.lr_warmup, 1e-9))) / 2

    def gate_lr_factor(self, step: int) -> float:
        """Factor of the gate's learning rate: from 1 down to 0 along a cosine."""
        return (1 + math.cos(math.pi * step / self.total_steps)) / 2
