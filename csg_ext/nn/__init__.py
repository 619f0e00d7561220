"""Modules: the class-specific gate, a model that holds one, gates in other models, and backbones."""

from csg_ext.nn.attach import AttachedModel, attach, detach
from csg_ext.nn.backbones import TimmBackbone, build_backbone
from csg_ext.nn.gate import ClassSpecificGate, GatedModel, gate_penalty, l1_density
from csg_ext.nn.resnet import CifarResNet

__all__ = [
    "AttachedModel",
    "CifarResNet",
    "ClassSpecificGate",
    "GatedModel",
    "TimmBackbone",
    "attach",
    "build_backbone",
    "detach",
    "gate_penalty",
    "l1_density",
]
