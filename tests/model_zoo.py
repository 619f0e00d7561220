"""torchvision, timm and foolbox's images for the tests, from .venv/zoo where they are not installed.

The package index has torchvision for CUDA builds of torch only. Beside another build its import fails for want of two
operators, and with it every import of lightning and torchmetrics in that environment. So `make test` puts it, and what
imports it, into a folder that only the tests look into (requirements/zoo.txt). Models and transforms call neither
operator.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch

ZOO = Path(__file__).parents[1] / ".venv" / "zoo"

if importlib.util.find_spec("torchvision") is None:
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

import timm

__all__ = ["imagenet_images", "timm", "torchvision"]


def imagenet_images() -> list[tuple[Path, int]]:
    """The 20 ImageNet images inside the foolbox package and their class indices; foolbox itself is not imported."""
    spec = importlib.util.find_spec("foolbox")
    assert spec is not None and spec.origin is not None, "the tests need the images of the package foolbox"
    paths = sorted((Path(spec.origin).parent / "data").glob("imagenet_*.jpg"))
    assert len(paths) == 20
    return [(path, int(path.stem.rsplit("_", 1)[1])) for path in paths]
