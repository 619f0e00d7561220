"""What a trained network's filters show: localization from feature maps, and what removing a class's filters does."""

from csg_ext.analysis.removal import Forgotten, accuracy_per_class, forget, removal_table

__all__ = ["Forgotten", "accuracy_per_class", "forget", "removal_table"]
