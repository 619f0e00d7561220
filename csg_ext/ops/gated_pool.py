"""gated_pool (being replaced by the kernels' version: same signature)."""

from __future__ import annotations

from csg_ext.reference import gated_pool

__all__ = ["gated_pool"]
