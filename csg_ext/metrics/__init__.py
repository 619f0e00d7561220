"""Measures of class specificity: density, mutual information between filters and classes, agreement, accuracy."""

from csg_ext.metrics.agreement import class_agreement, own_filter_accuracy
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

__all__ = [
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
