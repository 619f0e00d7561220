"""csg_ext: class-specific gates for interpretable convolutional networks."""

from csg_ext.ops import gate_step_, gated_pool, project_gate, project_gate_

__all__ = ["gate_step_", "gated_pool", "project_gate", "project_gate_"]
