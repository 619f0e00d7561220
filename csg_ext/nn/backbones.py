"""Backbones by name: the CIFAR ResNets, and timm's convolutional networks as "timm/NAME"."""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from csg_ext._text import reason
from csg_ext.nn.resnet import DEPTHS, CifarResNet

# An architecture and perhaps a tag: timm takes other texts for addresses and folders that it would load from.
_TIMM = re.compile(r"timm/([A-Za-z0-9_]+(\.[A-Za-z0-9_]+)?)")
NAMES = f"{', '.join(DEPTHS)} or timm/NAME"


def is_backbone_name(name: str) -> bool:
    """Whether `build_backbone` can be asked for it; timm itself is not looked at."""
    return name in DEPTHS or _TIMM.fullmatch(name) is not None


class TimmBackbone(nn.Module):
    """A network of timm without its global pooling and classifier: images to the feature map (N, num_filters, H, W)."""

    def __init__(self, net: Any, in_channels: int) -> None:
        super().__init__()
        self.net = net
        self.in_channels = in_channels
        self.num_filters = int(getattr(net, "head_hidden_size", None) or net.num_features)

    def forward(self, x: Tensor) -> Tensor:
        """The last feature map."""
        features: Tensor = self.net(x)
        return features

    def own_weights(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """A state dict of the whole network, as timm names it, as one of this module.

        The classifier is left out; for grey images the first convolution's colours are summed, so that an image gets
        the answer that it would get in three equal channels.
        """
        facts = self.net.pretrained_cfg
        last, first = (_names(facts.get(key)) for key in ("classifier", "first_conv"))
        kept = {k: v for k, v in state.items() if not str(k).startswith(tuple(f"{name}." for name in last))}
        for name in (f"{name}.weight" for name in first):
            weight = kept.get(name)
            if self.in_channels == 1 and isinstance(weight, Tensor) and weight.dim() > 1 and weight.shape[1] == 3:
                kept[name] = weight.sum(1, keepdim=True)
        return {f"net.{k}": v for k, v in kept.items()}


def _names(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())


def build_backbone(name: str, in_channels: int = 3) -> CifarResNet | TimmBackbone:
    """The backbone called `name` with random weights: images (N, in_channels, H, W) to a map (N, num_filters, H', W').

    name: resnet20, resnet32, resnet44 or resnet56 (the CIFAR ResNets), or timm/NAME with a convolutional network of
    the package timm, such as timm/resnet18. Raises ValueError for another name, or where timm cannot be imported.
    """
    if name in DEPTHS:
        return CifarResNet(DEPTHS[name], in_channels)
    found = _TIMM.fullmatch(name)
    if not found:
        raise ValueError(f"build_backbone: name must be one of {NAMES}, got {name!r}")
    try:
        timm: Any = importlib.import_module("timm")
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise ValueError(f"build_backbone: {name} needs timm, whose import fails with: {reason(error)}") from error
        raise ValueError(
            f"build_backbone: {name} needs the package timm, which is not installed: pip install timm"
        ) from None
    except Exception as error:  # a torchvision that does not go with this torch raises almost anything
        raise ValueError(f"build_backbone: {name} needs timm, whose import fails with: {reason(error)}") from error
    model = found[1]
    if not timm.is_model(model):
        near = difflib.get_close_matches(model, timm.list_models(), 3)
        raise ValueError(
            f"build_backbone: timm has no model {model!r}" + (f", but {' and '.join(near)}" if near else "")
        )
    try:
        net = timm.create_model(model, pretrained=False, num_classes=0, global_pool="", in_chans=in_channels)
    except Exception as error:
        raise ValueError(
            f"build_backbone: {name} cannot be built without pooling and classifier: {reason(error)}"
        ) from error
    return TimmBackbone(net, in_channels)


@torch.inference_mode()
def check_maps(backbone: nn.Module, name: str, sizes: list[tuple[int, int, int]]) -> None:
    """Raises ValueError unless images (channels, H, W) of all sizes give maps (num_filters, H', W')."""
    training = backbone.training
    backbone.eval()
    for size in sizes:
        try:
            shape = tuple(backbone(torch.zeros(1, *size)).shape)
        except Exception as error:  # what a network of its own size says of another one
            raise ValueError(
                f"model must take images of {size[1]} x {size[2]} pixels, got {name}, which fails with: {reason(error)}"
            ) from error
        if len(shape) != 4 or shape[1] != backbone.num_filters:
            raise ValueError(
                f"model must be a convolutional network with a last map (N, {backbone.num_filters}, H, W), got {name}, "
                f"which gives {shape}: train it in a loop of your own with csg_ext.attach"
            )
    backbone.train(training)
