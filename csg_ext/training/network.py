"""The network of a run, built without what only its training needs."""

from __future__ import annotations

import torch

from csg_ext.data.batches import derive_seed
from csg_ext.data.images import ImageData
from csg_ext.nn.gate import GatedModel
from csg_ext.nn.resnet import build_backbone
from csg_ext.training.config import TrainConfig

_INIT_STREAM = 4  # random stream of the initial weights: the same for both arms


def build_model(config: TrainConfig, data: ImageData) -> GatedModel:
    """The model with the initial weights that the seed gives."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, _INIT_STREAM))
        model = GatedModel(build_backbone(config.model, data.channels), len(data.classes))
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing from torch's stubs
