"""csg_ext: class-specific gates for interpretable convolutional networks."""

from csg_ext import metrics, nn, optim, reference
from csg_ext._extension import BUILD as _BUILD
from csg_ext.nn import ClassSpecificGate, GatedModel, gate_penalty, l1_density
from csg_ext.ops import gate_step_, gated_pool, project_gate, project_gate_

__version__ = _BUILD["version"]

__all__ = [
    "ClassSpecificGate",
    "GatedModel",
    "gate_penalty",
    "gate_step_",
    "gated_pool",
    "l1_density",
    "metrics",
    "nn",
    "optim",
    "project_gate",
    "project_gate_",
    "reference",
]
