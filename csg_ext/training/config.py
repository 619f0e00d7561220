"""Every setting of a training run, with its checks and its JSON form."""

from __future__ import annotations

import dataclasses
import math
import numbers
from dataclasses import dataclass
from typing import Any

from csg_ext.nn.backbones import NAMES, is_backbone_name
from csg_ext.ops.gate_step import METHODS
from csg_ext.training.objective import Objective
from csg_ext.training.schedule import Schedule

PRECISIONS = ("auto", "bf16", "fp32")
GATE_INITS = ("half", "one-hot")
_MOST_EPOCHS = 10**6
_LARGEST = 3.4e38  # what float32 holds
_NON_NEGATIVE = ("lr", "momentum", "weight_decay", "gate_lr", "csg_lr", "mixup", "cutmix")

_KINDS: dict[str, tuple[type, str]] = {
    "str": (str, "a text"),
    "bool": (bool, "true or false"),
    "int": (numbers.Integral, "an integer"),
    "float": (numbers.Real, "a number"),
}


def _check_kind(name: str, value: Any, kind: str) -> None:
    """Raises ValueError for a value that is not of the annotated type `kind`: JSON can hold any."""
    kind, _, optional = kind.partition(" | ")
    if value is None and optional:
        return
    if kind.startswith("tuple["):
        if not isinstance(value, list | tuple):
            raise ValueError(f"{name} must be a list of integers, got {value!r:.100}")
        for item in value:
            _check_kind(f"every item of {name}", item, "int")
        return
    wanted, words = _KINDS[kind]
    fits = isinstance(value, wanted) and (kind == "bool" or not isinstance(value, bool))
    if not fits or (isinstance(value, int) and abs(value) >= 2**63):
        raise ValueError(f"{name} must be {words}, got {value!r:.100}")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one run; both arms share them. Raises ValueError for a value that is out of range.

    - model: the backbone, one of csg_ext.nn.build_backbone's names; weights: a file with its first weights (None:
      random ones). seed: of the weights, the batches and the augmentation. epochs: passes over the train images.
    - Schedule (see Schedule): schedule, period (None: 3 for "epochs", else 60), csg_share, csg_at, warmup, gate_warmup,
      final_std, lambda_1_ramp, lambda_2_ramp.
    - Loss CE(STD) + lambda_1 CE(CSG) + lambda_2 psi(ReLU(||G||_1 - budget)): lambda_1, lambda_2, budget (None: K),
      penalty (psi) and label_smoothing.
    - Optimisers: lr, momentum and weight_decay of the weights' SGD, whose rate rises over the first lr_warmup of the
      run and falls with lr_decay; csg_lr, its rate on CSG steps (None: lr), with
      csg_lr_warmup and csg_lr_decay (None: as the other steps); gate_lr of the gate's projected SGD, which
      falls with lr_decay. All follow the run's own clock, whatever path a step takes. clip_norm and gate_clip_norm:
      largest norms of the weights' and of the gate's gradient (None: any). projection: how the gate is kept in V_G,
      "scale" or "euclidean" (see csg_ext.project_gate). gate_init: "half", 0.5 everywhere, or "one-hot", filter k for
      class k modulo C; with gate_lr = 0 the filters are dealt out to the classes beforehand, and nothing is learnt.
    - Data: batch_size, shift (pixels), flip, low_scale and low_share: the first low_share of the epochs see images
      scaled by low_scale (to a multiple of 4 pixels), which costs less. mixup and cutmix: their alphas, 0 for none (see
      Mix).
    - precision: "bf16" (autocast), "fp32" or "auto": bf16 where that is the faster one.
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
    lambda_2: float = 0.1
    budget: float | None = None
    penalty: str = "l1"
    schedule: str = "joint"
    period: int | None = None
    csg_share: float = 1 / 3
    warmup: float = 0.0
    final_std: float = 0.1
    shift: int = 2
    flip: bool = True
    low_scale: float = 0.7
    low_share: float = 2 / 3
    precision: str = "auto"
    csg_at: tuple[int, ...] | None = None
    gate_warmup: float = 0.0
    lambda_1_ramp: float = 0.0
    lambda_2_ramp: float = 0.0
    lr_decay: str = "cosine"
    csg_lr: float | None = None
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    clip_norm: float | None = None
    gate_clip_norm: float | None = None
    projection: str = "scale"
    weights: str | None = None
    gate_init: str = "half"
    csg_lr_warmup: float | None = None
    csg_lr_decay: str | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_kind(field.name, getattr(self, field.name), str(field.type))
        if self.period is None:  # as_dict names the one that was used
            object.__setattr__(self, "period", 3 if self.schedule == "epochs" else 60)
        if self.csg_at is not None:
            object.__setattr__(self, "csg_at", tuple(self.csg_at))  # JSON gives a list
        if not is_backbone_name(self.model):
            raise ValueError(f"model must be one of {NAMES}, got {self.model!r}")
        for name, choices in (("precision", PRECISIONS), ("projection", METHODS), ("gate_init", GATE_INITS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name, low in (("epochs", 1), ("batch_size", 2), ("shift", 0), ("seed", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if self.epochs > _MOST_EPOCHS:
            raise ValueError(f"epochs must be at most {_MOST_EPOCHS}, got {self.epochs}")
        for name in _NON_NEGATIVE:
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a non-negative number, got {value}")
        for name in ("clip_norm", "gate_clip_norm"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        for name in ("low_scale", "low_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        Schedule.of(self, 1), self.objective()  # their checks
        for name in (*_NON_NEGATIVE, "lambda_1", "lambda_2"):
            if (getattr(self, name) or 0) > _LARGEST:
                raise ValueError(f"{name} must be at most {_LARGEST}, got {getattr(self, name)}")

    def objective(self) -> Objective:
        """The loss that the settings describe."""
        return Objective(self.lambda_1, self.lambda_2, self.budget, self.penalty, self.label_smoothing)

    def sizes(self, native: int) -> list[int]:
        """The image side of every epoch."""
        low = round(self.low_share * self.epochs)
        size = min(native, max(4, 4 * round(self.low_scale * native / 4)))
        return [size] * low + [native] * (self.epochs - low)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, the same before and after JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
