"""Differentiable operators over the extension's kernels: one module per family."""

from csg_ext.ops.gate_step import gate_step_, project_gate, project_gate_
from csg_ext.ops.gated_pool import gated_pool

__all__ = ["gate_step_", "gated_pool", "project_gate", "project_gate_"]
