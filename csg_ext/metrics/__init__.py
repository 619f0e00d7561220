"""Measures of class specificity: density, mutual information between filters and classes, agreement, accuracy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from csg_ext.metrics.agreement import (
    class_agreement,
    dead_filters,
    own_filter_accuracy,
    own_filter_predictions,
)
from csg_ext.metrics.approximate import approximate_class_mutual_info
from csg_ext.metrics.bootstrap import Interval, paired_bootstrap, split_half_interval
from csg_ext.metrics.cluster import (
    cluster_accuracy,
    cluster_predictions,
    complement_accuracy,
    predicted_class_accuracy,
)
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
from csg_ext.metrics.selectivity import class_selectivity, exclusivity, quiet_filters, specificity
from csg_ext.metrics.similarity import (
    BlockScore,
    block_score,
    filter_similarity,
    kernel_similarity,
    last_convolution,
)
from csg_ext.nn.gate import l1_density

if TYPE_CHECKING:
    from csg_ext.metrics.metric import MutualInformationScore as MutualInformationScore

__all__ = [
    "BlockScore",
    "Interval",
    "approximate_class_mutual_info",
    "best_class",
    "block_score",
    "class_agreement",
    "class_entropy",
    "class_mutual_info",
    "class_selectivity",
    "cluster_accuracy",
    "cluster_predictions",
    "complement_accuracy",
    "dead_filters",
    "entropy_bound",
    "exclusivity",
    "filter_similarity",
    "gap_closed",
    "kernel_similarity",
    "l1_density",
    "last_convolution",
    "mis_ceiling",
    "mutual_info_classif",
    "mutual_information_score",
    "own_filter_accuracy",
    "own_filter_predictions",
    "paired_bootstrap",
    "predicted_class_accuracy",
    "quiet_filters",
    "specificity",
    "split_half_interval",
]


def __getattr__(name: str) -> Any:
    """Imports what needs torchmetrics only when it is asked for."""
    if name == "MutualInformationScore":
        from csg_ext.metrics.metric import MutualInformationScore

        return MutualInformationScore
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
