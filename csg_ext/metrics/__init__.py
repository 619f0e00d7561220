"""Measures of class specificity: density, mutual information between filters and classes, agreement, accuracy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from csg_ext.metrics.agreement import class_agreement, own_filter_accuracy
from csg_ext.metrics.approximate import approximate_class_mutual_info
from csg_ext.metrics.mutual_information import (
    best_class,
    class_entropy,
    class_mutual_info,
    entropy_bound,
    gap_closed,
    mis_ceiling,
    mutual_info_classif,
    mutual_information_score,
)
from csg_ext.nn.gate import l1_density

if TYPE_CHECKING:
    from csg_ext.metrics.metric import MutualInformationScore as MutualInformationScore

__all__ = [
    "approximate_class_mutual_info",
    "best_class",
    "class_agreement",
    "class_entropy",
    "class_mutual_info",
    "entropy_bound",
    "gap_closed",
    "l1_density",
    "mis_ceiling",
    "mutual_info_classif",
    "mutual_information_score",
    "own_filter_accuracy",
]


def __getattr__(name: str) -> Any:
    """Imports what needs torchmetrics only when it is asked for."""
    if name == "MutualInformationScore":
        from csg_ext.metrics.metric import MutualInformationScore

        return MutualInformationScore
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
