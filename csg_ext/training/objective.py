"""The loss of one step on either path: one function that every form of training shares."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from csg_ext.nn.gate import gate_penalty
from csg_ext.training.freeze import fixed_statistics
from csg_ext.training.schedule import CSG, GATE, JOINT, STD

PENALTIES = ("l1", "l2", "smooth_l1")


class Losses(NamedTuple):
    """What a step gives. All but std_logits are scalars.

    total is to be differentiated. std and csg are the cross-entropies of the paths and penalty is d(||G||_1, budget),
    without their lambdas; None where the step does not take the path. std_logits: (N, C).
    """

    total: Tensor
    std: Tensor | None
    csg: Tensor | None
    penalty: Tensor | None
    std_logits: Tensor | None


@dataclass(frozen=True)
class Objective:
    """CE(STD) + lambda_1 CE(CSG) + lambda_2 psi(ReLU(||G||_1 - budget)), or the part of it that a path takes.

    budget: in units of ||G||_1; None means K, the smallest that a feasible gate can have. penalty (psi): "l1", "l2" or
    "smooth_l1". label_smoothing in [0, 1], on both paths, as in torch.nn.functional.cross_entropy.
    Raises ValueError for a lambda that is negative or not finite, and for a budget, penalty or smoothing out of range.
    Source: Liang et al., ECCV 2020, section 3.3.
    """

    lambda_1: float = 1.0
    lambda_2: float = 0.1
    budget: float | None = None
    penalty: str = "l1"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        for name in ("lambda_1", "lambda_2"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} must be a non-negative number, got {getattr(self, name)}")
        if self.budget is not None and not self.budget > 0:
            raise ValueError(f"budget must be positive, got {self.budget}")
        if self.penalty not in PENALTIES:
            raise ValueError(f"penalty must be one of {', '.join(PENALTIES)}, got {self.penalty!r}")
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"label_smoothing must lie in [0, 1], got {self.label_smoothing}")

    def __call__(
        self, model: nn.Module, x: Tensor, labels: Tensor, path: str, factors: tuple[float, float] = (1.0, 1.0)
    ) -> Losses:
        """The losses of a batch on `path`: "std", "csg", "joint" (both), or "gate": the CSG path with fixed
        BatchNorm statistics, after which the gate alone is to step.

        model: a gated module, or one in DistributedDataParallel, compiled or not. labels: int64 (N,), or float rows
        (N, C) as mixup and cutmix make them. factors: of lambda_1 and lambda_2, see Schedule.lambda_factors.
        """
        std_logits = csg_logits = None
        with explain_small_batches(len(labels)):
            if path == STD:
                std_logits = model(x)
            elif path == CSG:
                csg_logits = model(x, labels)
            elif path == GATE:
                with fixed_statistics(model):
                    csg_logits = model(x, labels)
            elif path == JOINT:
                std_logits, csg_logits = model(x, labels, path="both")
            else:
                raise ValueError(f"path must be one of {STD}, {CSG}, {GATE}, {JOINT}, got {path!r}")
        std = None if std_logits is None else self.cross_entropy(std_logits, labels)
        csg = None if csg_logits is None else self.cross_entropy(csg_logits, labels)
        inner: Any = getattr(model, "_orig_mod", model)  # what torch.compile has wrapped
        wrapped = isinstance(inner, DistributedDataParallel)
        gate = (inner.module if wrapped else inner).gate
        touch = wrapped and not inner.find_unused_parameters
        total, penalty = self.total(std, csg, gate, factors, touch_gate=touch)
        return Losses(total, std, csg, penalty, std_logits)

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean cross-entropy of logits (N, C), a scalar."""
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)

    def total(
        self,
        std: Tensor | None,
        csg: Tensor | None,
        gate: Tensor,
        factors: tuple[float, float] = (1.0, 1.0),
        touch_gate: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(the sum to differentiate, the penalty or None) from the cross-entropies of the paths that a step takes.

        touch_gate gives the gate a gradient of zeros where the step has no use for it: DistributedDataParallel waits
        for every parameter's gradient (unless it has find_unused_parameters=True).
        """
        total = torch.zeros((), device=gate.device)
        if std is not None:
            total = total + std
        if csg is None:
            return (total + 0.0 * gate.sum() if touch_gate else total), None
        penalty = gate_penalty(gate, self.budget, self.penalty)
        return total + self.lambda_1 * factors[0] * csg + self.lambda_2 * factors[1] * penalty, penalty


@contextlib.contextmanager
def explain_small_batches(size: int) -> Iterator[None]:
    """Says what to do when BatchNorm gets one value per channel, from which it can learn no statistics."""
    try:
        yield
    except ValueError as error:
        if "Expected more than 1 value per channel" not in str(error):
            raise
        raise ValueError(
            f"a batch must give BatchNorm more than one value per channel, got a batch of {size}: use larger batches "
            "(drop_last=True leaves out a last one of a single sample) or freeze the statistics"
        ) from None
