"""Alternate training of a class-specific gate: settings, schedule, LightningModule, one arm, both arms."""

from csg_ext.training.config import TrainConfig
from csg_ext.training.schedule import Schedule

__all__ = ["Schedule", "TrainConfig"]
