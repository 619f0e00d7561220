"""Every setting of a training run, with its checks and its JSON form."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from csg_ext.nn.resnet import DEPTHS

SCHEDULES = ("steps", "epochs", "joint")
PENALTIES = ("l1", "l2", "smooth_l1")
PRECISIONS = ("auto", "bf16", "fp32")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one run; both arms share them.

    Schedule (see Schedule): schedule, period, csg_share, warmup, final_std.
    Loss CE(STD) + lambda_1 CE(CSG) + lambda_2 psi(ReLU(||G||_1 - budget)): lambda_1, lambda_2, budget (None: K) and
    penalty (psi).
    Optimisers: lr, momentum and weight_decay of the weights' SGD, whose rate rises over the first lr_warmup of the run
    and falls to 0 along a cosine; gate_lr of the gate's projected SGD, which falls along a cosine. Both follow the
    run's own clock, whatever path a step takes.
    Data: batch_size, shift (pixels), flip, low_scale and low_share: the first low_share of the epochs see images scaled
    by low_scale (to a multiple of 4 pixels), which costs less.
    precision: "bf16" (autocast), "fp32" or "auto": bf16 where the processor has instructions for it.
    """

    model: str = "resnet20"
    seed: int = 0
    epochs: int = 12
    batch_size: int = 64
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-3
    lr_warmup: float = 0.3
    gate_lr: float = 2.0
    lambda_1: float = 1.0
    lambda_2: float = 0.01
    budget: float | None = None
    penalty: str = "l1"
    schedule: str = "joint"
    period: int = 60
    csg_share: float = 1 / 3
    warmup: float = 0.0
    final_std: float = 0.1
    shift: int = 2
    flip: bool = True
    low_scale: float = 0.7
    low_share: float = 2 / 3
    precision: str = "auto"

    def __post_init__(self) -> None:
        for name, choices in (
            ("model", tuple(DEPTHS)),
            ("schedule", SCHEDULES),
            ("penalty", PENALTIES),
            ("precision", PRECISIONS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name, low in (("epochs", 1), ("batch_size", 2), ("period", 1), ("shift", 0), ("seed", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        for name in ("lr", "momentum", "weight_decay", "gate_lr", "lambda_1", "lambda_2"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} must be a non-negative number, got {getattr(self, name)}")
        for name in ("csg_share", "warmup", "final_std", "lr_warmup", "low_scale", "low_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.budget is not None and not self.budget > 0:
            raise ValueError(f"budget must be positive, got {self.budget}")

    def sizes(self, native: int) -> list[int]:
        """The image side of every epoch."""
        low = round(self.low_share * self.epochs)
        size = min(native, max(4, 4 * round(self.low_scale * native / 4)))
        return [size] * low + [native] * (self.epochs - low)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)
