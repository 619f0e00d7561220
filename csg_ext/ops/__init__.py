"""Differentiable operators over the extension's kernels: one module per family."""

from csg_ext.ops.gate_step import gate_step_, project_gate, project_gate_
from csg_ext.ops.gated_pool import gated_pool
from csg_ext.ops.mutual_info import class_entropy, class_mutual_info, mutual_info_classif

__all__ = [
    "class_entropy",
    "class_mutual_info",
    "gate_step_",
    "gated_pool",
    "mutual_info_classif",
    "project_gate",
    "project_gate_",
]
