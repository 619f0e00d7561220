"""csg_ext: class-specific gates for interpretable convolutional networks."""

from csg_ext import metrics, nn, optim, reference
from csg_ext._extension import BUILD as _BUILD
from csg_ext.metrics import best_class, mutual_information_score
from csg_ext.nn import ClassSpecificGate, GatedModel, attach, detach, gate_penalty, l1_density
from csg_ext.ops import (
    class_entropy,
    class_mutual_info,
    gate_step_,
    gated_pool,
    mutual_info_classif,
    project_gate,
    project_gate_,
)

__version__ = _BUILD["version"]

__all__ = [
    "ClassSpecificGate",
    "GatedModel",
    "attach",
    "best_class",
    "class_entropy",
    "class_mutual_info",
    "detach",
    "gate_penalty",
    "gate_step_",
    "gated_pool",
    "l1_density",
    "metrics",
    "mutual_info_classif",
    "mutual_information_score",
    "nn",
    "optim",
    "project_gate",
    "project_gate_",
    "reference",
]
