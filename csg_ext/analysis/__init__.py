"""What a trained network's filters show: every measure of one, localization from feature maps, and what removing a
class's filters does."""

from csg_ext.analysis.evaluation import Evaluation, evaluate_model, evaluation_differences, evaluation_table
from csg_ext.analysis.removal import Forgotten, accuracy_per_class, forget, removal_table

__all__ = [
    "Evaluation",
    "Forgotten",
    "accuracy_per_class",
    "evaluate_model",
    "evaluation_differences",
    "evaluation_table",
    "forget",
    "removal_table",
]
