"""Training with a class-specific gate: alternate or joint, as a LightningModule, as a callback, or in one's own loop.

Schedule and Objective serve all of them; `csg-ext train` compares both arms. What needs lightning is imported when it
is used.
"""

from importlib import import_module
from typing import Any

from csg_ext.training.config import TrainConfig
from csg_ext.training.distributed import average_gradient
from csg_ext.training.freeze import fixed_statistics, freeze
from csg_ext.training.logs import gate_image
from csg_ext.training.mix import Mix
from csg_ext.training.monitor import DensityWarning, DensityWatch, DivergedError, FiniteLoss
from csg_ext.training.objective import Losses, Objective
from csg_ext.training.schedule import Schedule
from csg_ext.training.weights import load_checkpoint, load_weights, save_checkpoint

_LAZY = {
    "AtomicCheckpointIO": "checkpoint",
    "AveragedGatedModel": "gated",
    "ClassSpecificGateCallback": "callback",
    "GatedTraining": "gated",
    "GatedWeightAveraging": "gated",
}

__all__ = [
    "AtomicCheckpointIO",
    "AveragedGatedModel",
    "ClassSpecificGateCallback",
    "DensityWarning",
    "DensityWatch",
    "DivergedError",
    "FiniteLoss",
    "GatedTraining",
    "GatedWeightAveraging",
    "Losses",
    "Mix",
    "Objective",
    "Schedule",
    "TrainConfig",
    "average_gradient",
    "fixed_statistics",
    "freeze",
    "gate_image",
    "load_checkpoint",
    "load_weights",
    "save_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
