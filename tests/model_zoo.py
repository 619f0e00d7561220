"""torchvision, timm and foolbox's images for the tests, from .venv/zoo where they are not installed.

The package index has torchvision for CUDA builds of torch only. Beside another build its import fails for want of two
operators, and with it every import of lightning and torchmetrics in that environment. So `make test` puts it, and what
imports it, into a folder that only the tests look into (requirements/zoo.txt). Models and transforms call neither
operator.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

ZOO = Path(__file__).parents[1] / ".venv" / "zoo"

if not all(importlib.util.find_spec(name) for name in ("torchvision", "timm", "foolbox")):
    if not ZOO.is_dir():
        raise ImportError(f"the tests need torchvision, timm and foolbox in {ZOO}: `make test` installs them")
    sys.path.append(str(ZOO))

try:
    import torchvision
except RuntimeError as error:
    if "torchvision::nms" not in str(error):
        raise
    _OPERATORS = torch.library.Library("torchvision", "DEF")  # keeps what it defines as long as it lives
    _OPERATORS.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _OPERATORS.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

import timm  # noqa: E402  (imports torchvision)
import torchvision.models as tv  # noqa: E402
import transformers as hf  # noqa: E402
from timm.models.deit import VisionTransformerDistilled  # noqa: E402
from timm.models.swin_transformer import SwinTransformer  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402
from torch import nn  # noqa: E402
from torchvision.models.convnext import CNBlockConfig  # noqa: E402

_FOOLBOX = importlib.util.find_spec("foolbox")
if str(ZOO) in sys.path:
    sys.path.remove(str(ZOO))  # not for the processes that tests spawn: lightning would find torchvision there

__all__ = ["MODELS", "Known", "imagenet_images", "timm", "torchvision"]

CLASSES = 7
_VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
_HF_VIT: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": CLASSES,
}


class Known(NamedTuple):
    """A model, and what is known of it without any tracing."""

    build: Callable[[], nn.Module]
    size: int  # of its images
    layer: str  # a module at which the last feature map before global pooling can be gated ...
    side: str  # ... at its input or output
    channel_dim: int  # of that map
    filters: int
    chosen: str  # the layer that attach is expected to name


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=CLASSES, **options)


MODELS = {
    "torchvision-resnet18": Known(
        lambda: tv.resnet18(num_classes=CLASSES), 64, "layer4", "output", 1, 512, "output of layer4"
    ),
    "torchvision-resnet50": Known(
        lambda: tv.resnet50(num_classes=CLASSES), 64, "layer4", "output", 1, 2048, "output of layer4"
    ),
    "torchvision-densenet": Known(  # functional pooling after an in-place ReLU
        lambda: tv.DenseNet(8, (2, 2), 8, num_classes=CLASSES), 32, "features", "output", 1, 28, "output of features"
    ),
    "torchvision-shufflenet": Known(  # x.mean([2, 3])
        lambda: tv.shufflenet_v2_x0_5(num_classes=CLASSES), 64, "conv5", "output", 1, 1024, "output of conv5"
    ),
    "torchvision-mobilenet_v3": Known(  # two linear layers
        lambda: tv.mobilenet_v3_small(num_classes=CLASSES), 64, "features", "output", 1, 576, "output of features"
    ),
    "torchvision-convnext": Known(  # LayerNorm after pooling
        lambda: tv.ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], num_classes=CLASSES),
        32, "features", "output", 1, 16, "output of features",
    ),
    "torchvision-vit": Known(  # a classifier that starts at zero
        lambda: tv.VisionTransformer(32, 8, 2, 2, 24, 32, num_classes=CLASSES),
        32, "encoder", "output", -1, 24, "output of encoder",
    ),
    "timm-convnext": Known(_timm("convnext_atto"), 64, "stages", "output", 1, 320, "output of stages"),
    "timm-efficientnet": Known(_timm("efficientnet_lite0"), 64, "bn2", "output", 1, 1280, "output of bn2"),
    "timm-resnet-se-maxpool": Known(  # maximum pooling; pooling inside the blocks too
        _timm("resnet10t", block_args={"attn_layer": "se"}, global_pool="max"),
        64, "layer4", "output", 1, 512, "output of layer4",
    ),
    "timm-vit": Known(
        lambda: VisionTransformer(**_VIT, num_classes=CLASSES), 32, "norm", "output", -1, 24, "output of norm"
    ),
    "timm-vit-avgpool": Known(
        lambda: VisionTransformer(**_VIT, num_classes=CLASSES, global_pool="avg"),
        32, "norm", "output", -1, 24, "output of blocks",
    ),
    "timm-vit-attention-pool": Known(
        lambda: VisionTransformer(**_VIT, num_classes=CLASSES, global_pool="map"),
        32, "norm", "output", -1, 24, "output of norm",
    ),
    "timm-deit-distilled": Known(  # two tokens, two classifiers
        lambda: VisionTransformerDistilled(**_VIT, num_classes=CLASSES), 32, "norm", "output", -1, 24, "output of norm"
    ),
    "timm-swin": Known(  # (N, H, W, K)
        lambda: SwinTransformer(32, 4, 3, CLASSES, embed_dim=16, depths=(2, 2), num_heads=(2, 2), window_size=4),
        32, "norm", "output", -1, 32, "output of norm",
    ),
    "transformers-resnet": Known(
        lambda: hf.ResNetForImageClassification(
            hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_labels=CLASSES)
        ),
        64, "resnet.pooler", "input", 1, 32, "output of resnet.encoder.stages.3",
    ),
    "transformers-vit": Known(
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**_HF_VIT)),
        32, "vit.layernorm", "output", -1, 24, "output of vit.layernorm",
    ),
    "transformers-beit": Known(
        lambda: hf.BeitForImageClassification(hf.BeitConfig(**_HF_VIT)),
        32, "beit.layernorm", "output", -1, 24, "output of beit.layernorm",
    ),
}  # fmt: skip


def imagenet_images() -> list[tuple[Path, int]]:
    """The 20 ImageNet images inside the foolbox package and their class indices; foolbox itself is not imported."""
    assert _FOOLBOX is not None and _FOOLBOX.origin is not None, "the tests need the images of the package foolbox"
    paths = sorted((Path(_FOOLBOX.origin).parent / "data").glob("imagenet_*.jpg"))
    assert len(paths) == 20
    return [(path, int(path.stem.rsplit("_", 1)[1])) for path in paths]
