"""The network of a run, built without what only its training needs."""

from __future__ import annotations

import torch

from csg_ext.data.batches import derive_seed, scaled_width
from csg_ext.data.images import ImageData
from csg_ext.nn.backbones import build_backbone, check_maps
from csg_ext.nn.gate import GatedModel
from csg_ext.training.config import TrainConfig
from csg_ext.training.weights import load_backbone

_INIT_STREAM = 4  # random stream of the initial weights: the same for both arms


def build_model(config: TrainConfig, data: ImageData) -> GatedModel:
    """The model with the random weights that the seed gives."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, _INIT_STREAM))
        model = GatedModel(build_backbone(config.model, data.channels), len(data.classes))
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing from torch's stubs


def initial_model(config: TrainConfig, data: ImageData) -> GatedModel:
    """The model as a run begins: build_model's, its backbone with the weights in the file config.weights."""
    model = build_model(config, data)
    if config.gate_init == "one-hot":
        classes, filters = model.gate.shape
        with torch.no_grad():
            model.gate.copy_(torch.arange(classes)[:, None] == torch.arange(filters) % classes)
    if config.weights is not None:
        load_backbone(model.backbone, config.weights, config.model)
    return model


def check_network(config: TrainConfig, data: ImageData) -> None:
    """Raises ValueError with one sentence, before a run begins, for a network that it cannot train and measure."""
    model, (channels, height, width) = initial_model(config, data), data.train_images.shape[1:]
    sizes = [(size, scaled_width(height, width, size)) for size in sorted(set(config.sizes(height)))]
    check_maps(model.backbone, config.model, [(channels, *size) for size in sizes])
