"""What a run must notice: a loss that is no number, a gate that does not become sparse."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from csg_ext.nn.gate import ClassSpecificGate

_LOOKS = 20  # at the density, during a run
_CHECK_EVERY = 20  # steps between looks at the losses of a GPU: reading one waits for it


class DivergedError(RuntimeError):
    """The loss, or a parameter, is not a finite number any more."""


class DensityWarning(UserWarning):
    """The gate does not become sparse."""


class FiniteLoss:
    """Stops a run whose loss is NaN or infinite, and says at which step: at once on a CPU, soon on a GPU.

    name, advice: of what the error speaks, and what it recommends. Call observe() before the backward pass of every
    step, check_parameters() before every checkpoint.

    Example:
        >>> finite = FiniteLoss("the loss", "try a lower learning rate")
        >>> finite.observe(torch.tensor(0.5), step=0, total_steps=10)
        >>> finite.observe(torch.tensor(float("nan")), step=1, total_steps=10)
        Traceback (most recent call last):
        csg_ext.training.monitor.DivergedError: the loss is not finite at step 2 of 10: try a lower learning rate
    """

    def __init__(self, name: str, advice: str) -> None:
        self.name, self.advice = name, advice
        self.reset()

    def reset(self) -> None:
        """Forgets what an earlier run has shown."""
        self._first: Tensor | None = None  # the first bad step, counted from 1; 0 while there is none
        self._total = 0

    def observe(self, loss: Tensor, step: int, total_steps: int) -> None:
        """Looks at the loss of step 0, 1, ...; raises DivergedError with one sentence."""
        loss = loss.detach()
        if self._first is None:
            self._first = torch.zeros((), dtype=torch.int64, device=loss.device)
        self._first = torch.where((self._first == 0) & ~torch.isfinite(loss), step + 1, self._first)
        self._total = total_steps
        if loss.device.type == "cpu" or (step + 1) % _CHECK_EVERY == 0:
            self.check()

    def check(self) -> None:
        """Raises DivergedError when a loss was NaN or infinite; to be called before a checkpoint is written."""
        first = 0 if self._first is None else int(self._first)
        if first:
            raise DivergedError(f"{self.name} is not finite at step {first} of {self._total}: {self.advice}")

    def check_parameters(self, model: nn.Module, step: int, total_steps: int) -> None:
        """check(), and raises DivergedError for a parameter that `step` steps have left NaN or infinite.

        The loss of the next step would show it, but a checkpoint, or the end of the run, comes before that.
        """
        self.check()
        local = {n: p.to_local() if isinstance(p, DTensor) else p for n, p in model.named_parameters()}
        device = next(iter(local.values())).device
        finite = torch.stack([torch.isfinite(p.detach()).all().to(device) for p in local.values()])
        bad = [name for name, good in zip(local, finite.tolist(), strict=True) if not good]
        if bad:
            more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
            raise DivergedError(
                f"{self.name} is finite, but the parameter {bad[0]}{more} is NaN or infinite after step {step} of "
                f"{total_steps}: {self.advice}"
            )


def density_floor(num_classes: int, num_filters: int, budget: float | None) -> float:
    """The L1-density that the penalty leaves in peace: budget / (K C), and at least 1/C, the least in V_G."""
    return max(1.0, (budget or 0) / num_filters) / num_classes


def warn_if_stalled(density: float, before: float, floor: float, step: int, total_steps: int, advice: str) -> bool:
    """Warns, and returns True, when a quarter of the run is over and the gate is still dense and hardly moves.

    density, before: the L1-density now and at the look before it, with steps of the gate in between.
    """
    dense = min(2 * floor, (1 + floor) / 2)  # twice the floor of two classes is more than any density
    if step < total_steps / 4 or density <= dense or density <= 0.95 * before:
        return False
    warnings.warn(
        f"the gate's L1-density stalls at {density:.2f} after {step} of {total_steps} steps (its floor is "
        f"{floor:.2f}): {advice}",
        DensityWarning,
        stacklevel=3,
    )
    return True


class DensityWatch:
    """Warns once (DensityWarning) when a quarter of a run is over and its gate is still dense and hardly moves.

    csg: the gate's module; budget: of the penalty, as Objective has it. The density is looked at 20 times a run, for
    which a GPU is waited for.

    Example:
        >>> csg = ClassSpecificGate(num_classes=10, num_filters=8)
        >>> watch = DensityWatch(csg)
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     for step in range(100):  # in which the gate never moves
        ...         watch.observe(step + 1, total_steps=100)
        >>> print(str(caught[0].message).partition(":")[0])
        the gate's L1-density stalls at 0.50 after 25 of 100 steps (its floor is 0.10)
    """

    def __init__(self, csg: ClassSpecificGate, budget: float | None = None) -> None:
        self.csg, self.floor = csg, density_floor(csg.num_classes, csg.num_filters, budget)
        self.density: float | None = None  # at the last look
        self.moved = self.warned = False

    def observe(self, step: int, total_steps: int, moved: bool = True) -> None:
        """To be called when `step` steps of total_steps are done; moved: whether the gate took part in the last one."""
        self.moved |= moved
        if not self.moved or self.warned or step % max(1, total_steps // _LOOKS):
            return
        density, self.moved = self.csg.density(), False
        if self.density is not None:
            advice = "raise the gate's learning rate or lambda_2"
            self.warned = warn_if_stalled(density, self.density, self.floor, step, total_steps, advice)
        self.density = density

    def state_dict(self) -> dict[str, Any]:
        """What it has seen, for a checkpoint."""
        return {"density": self.density, "moved": self.moved, "warned": self.warned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what state_dict() gave."""
        self.density, self.moved, self.warned = (state[k] for k in ("density", "moved", "warned"))
