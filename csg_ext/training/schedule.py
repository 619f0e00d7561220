"""Which path a step takes, the learning rates and the lambdas, as functions of the run's own clock."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from csg_ext.training.config import TrainConfig

STD, CSG, JOINT, GATE = "std", "csg", "joint", "gate"
SCHEDULES = ("steps", "epochs", "joint")
LR_DECAYS = ("cosine", "multistep", "constant")
_MILESTONES, _GAMMA = (0.4, 0.6, 0.8), 0.1
_SHARES = ("csg_share", "warmup", "gate_warmup", "final_std", "lr_warmup", "lambda_1_ramp", "lambda_2_ramp")
_OF_CSG_STEPS = ("csg_lr_warmup", "csg_lr_decay")


@dataclass(frozen=True)
class Schedule:
    """The alternate training of one run of `total_steps` optimizer steps, `steps_per_epoch` of them an epoch.

    kind "steps": of every `period` steps the last csg_share take the CSG path, or those whose position in the period is
    in csg_at. "epochs" (the paper's): the same with epochs, the period counted in epochs. "joint": every step sums both
    losses. The first `warmup` and the last `final_std` of the run take the STD path; a run must end on it, or the
    accuracy of the STD path suffers. The gate_warmup of the run that follows `warmup` trains the gate alone.

    lr_decay: "cosine" (to 0), "multistep" (a tenth of it from 40, 60 and 80 % of the run on) or "constant".
    lr_warmup: the share of the run over which the weights' learning rate rises.
    csg_lr_warmup, csg_lr_decay: the same of the weights' rate on CSG steps, where that is another one; None: as for the
    other steps.
    lambda_1_ramp, lambda_2_ramp: the share of the run, counted from the end of `warmup`, over which a lambda rises
    linearly.

    total_steps and steps_per_epoch are set by `for_run`; a Trainer sets them by itself. Raises ValueError for a kind,
    decay, period, share or position that is out of range.

    Example:
        >>> schedule = Schedule(kind="steps", period=3, csg_share=1 / 3, final_std=0.2)
        >>> run = schedule.for_run(total_steps=10, steps_per_epoch=5)
        >>> [run.path(step) for step in range(10)]
        ['std', 'std', 'csg', 'std', 'std', 'csg', 'std', 'std', 'std', 'std']
    """

    kind: str = "joint"
    total_steps: int = 0
    steps_per_epoch: int = 0
    period: int = 60
    csg_share: float = 1 / 3
    warmup: float = 0.0
    final_std: float = 0.1
    lr_warmup: float = 0.3
    csg_at: tuple[int, ...] | None = None
    gate_warmup: float = 0.0
    lambda_1_ramp: float = 0.0
    lambda_2_ramp: float = 0.0
    lr_decay: str = "cosine"
    csg_lr_warmup: float | None = None
    csg_lr_decay: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.kind!r}")
        given = [name for name in _OF_CSG_STEPS if getattr(self, name) is not None]
        if given and self.kind == "joint":
            raise ValueError(
                f"{given[0]} must be left out with the joint schedule, which takes both paths in every step, got "
                f"{getattr(self, given[0])}"
            )
        for name in ("lr_decay", *given):
            if name.endswith("decay") and getattr(self, name) not in LR_DECAYS:
                raise ValueError(f"{name} must be one of {', '.join(LR_DECAYS)}, got {getattr(self, name)!r}")
        if self.period < 1:
            raise ValueError(f"period must be at least 1, got {self.period}")
        for name in (*_SHARES, *given):
            if not name.endswith("decay") and not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.csg_at is not None and not all(0 <= i < self.period for i in self.csg_at):
            raise ValueError(f"csg_at must lie in [0, {self.period}), the period, got {list(self.csg_at)}")

    @classmethod
    def of(cls, config: TrainConfig, steps_per_epoch: int) -> Schedule:
        """The schedule that a configuration describes."""
        same = (field.name for field in dataclasses.fields(cls) if field.name in config.as_dict())
        return cls(
            kind=config.schedule,
            total_steps=config.epochs * steps_per_epoch,
            steps_per_epoch=steps_per_epoch,
            **{name: getattr(config, name) for name in same},
        )

    def for_run(self, total_steps: int, steps_per_epoch: int) -> Schedule:
        """The same schedule for a run of that length."""
        return dataclasses.replace(self, total_steps=total_steps, steps_per_epoch=steps_per_epoch)

    def path(self, step: int) -> str:
        """The path of step 0, 1, ... total_steps - 1: "std", "csg", "joint", or "gate": the CSG path, weights fixed."""
        if self.total_steps < 1 or self.steps_per_epoch < 1:
            raise ValueError(
                "total_steps and steps_per_epoch must be at least 1 (see Schedule.for_run), "
                f"got {self.total_steps} and {self.steps_per_epoch}"
            )
        if step < self.warmup * self.total_steps or step >= (1 - self.final_std) * self.total_steps:
            return STD
        if step < self.warmup * self.total_steps + self.gate_warmup * self.total_steps:
            return GATE
        if self.kind == "joint":
            return JOINT
        position = (step if self.kind == "steps" else step // self.steps_per_epoch) % self.period
        if self.csg_at is not None:
            return CSG if position in self.csg_at else STD
        return CSG if position >= round(self.period * (1 - self.csg_share)) else STD

    def check_takes_csg(self) -> None:
        """Raises ValueError if all steps of the run take the STD path: its gate would never be trained."""
        first = int(self.warmup * self.total_steps)
        length = self.period * (self.steps_per_epoch if self.kind == "epochs" else 1)  # then the paths repeat
        if all(self.path(step) == STD for step in range(first, min(self.total_steps, first + length + 1))):
            at = f", csg_at {list(self.csg_at)}" if self.csg_at is not None else f", csg_share {self.csg_share:.4g}"
            raise ValueError(
                f"the schedule never takes the CSG path in {self.total_steps} steps, {self.steps_per_epoch} an epoch, "
                f"got kind {self.kind!r}, period {self.period}{at}, warmup {self.warmup:.4g} and "
                f"final_std {self.final_std:.4g}"
            )

    def lr_factor(self, step: int) -> float:
        """Factor of the weights' learning rate: 1/25 up to 1 along a cosine over lr_warmup, then down with lr_decay."""
        return _factor(step / self.total_steps, self.lr_warmup, self.lr_decay)

    def csg_lr_factor(self, step: int) -> float:
        """The same factor on CSG steps, of csg_lr_warmup and csg_lr_decay."""
        warmup = self.lr_warmup if self.csg_lr_warmup is None else self.csg_lr_warmup
        return _factor(step / self.total_steps, warmup, self.csg_lr_decay or self.lr_decay)

    def gate_lr_factor(self, step: int) -> float:
        """Factor of the gate's learning rate: from 1 down with lr_decay."""
        if self.lr_decay != "cosine":
            return _factor(step / self.total_steps, 0.0, self.lr_decay)
        return (1 + math.cos(math.pi * step / self.total_steps)) / 2

    def lambda_factors(self, step: int) -> tuple[float, float]:
        """Factors of lambda_1 and lambda_2."""
        begun = step + 1 - self.warmup * self.total_steps
        first, second = (
            min(1.0, max(0.0, begun / (ramp * self.total_steps))) if ramp else 1.0
            for ramp in (self.lambda_1_ramp, self.lambda_2_ramp)
        )
        return first, second


def _factor(t: float, warmup: float, decay: str) -> float:
    """The factor of a learning rate when the share t of the run is over."""
    if t < warmup:
        return 1 - 0.96 * (1 + math.cos(math.pi * t / warmup)) / 2
    if decay == "cosine":
        return (1 + math.cos(math.pi * (t - warmup) / max(1 - warmup, 1e-9))) / 2
    return 1.0 if decay == "constant" else _GAMMA ** sum(t >= milestone for milestone in _MILESTONES)
