"""Modules: the class-specific gate, a model that holds one, and the CIFAR ResNets."""

from csg_ext.nn.gate import ClassSpecificGate, GatedModel, gate_penalty, l1_density
from csg_ext.nn.resnet import CifarResNet, build_backbone

__all__ = ["CifarResNet", "ClassSpecificGate", "GatedModel", "build_backbone", "gate_penalty", "l1_density"]
