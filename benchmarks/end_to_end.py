"""What the gate costs in training: steps of one network on the STD path, with CSG, and as the method was released.

A step is forward, loss, backward and the optimizers' steps, momentum included. `run(...)` compares every form with
the STD step in turns of one step each, who comes first changing; csg, whose difference is small, in the most turns.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import measure
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from csg_ext import reference
from csg_ext.nn import GatedModel, build_backbone
from csg_ext.optim import ProjectedSGD

LAMBDA_1, LAMBDA_2 = 1.0, 0.01
FORMS = ("std", "csg", "joint", "masked", "released")
Batch = tuple[Tensor, Tensor]


def _convolution(channels_in: int, channels: int, size: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(channels_in, channels, size, stride, size // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels))


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride) and 1x1 convolutions to 4 width channels, and a shortcut."""

    def __init__(self, channels_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.reduce = _convolution(channels_in, width, 1)
        self.middle = _convolution(width, width, 3, stride)
        self.expand = _convolution(width, 4 * width, 1)
        same = stride == 1 and channels_in == 4 * width
        self.shortcut = nn.Identity() if same else _convolution(channels_in, 4 * width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels_in, H, W) to (N, 4 width, H / stride, W / stride)."""
        return F.relu(self.shortcut(x) + self.expand(F.relu(self.middle(F.relu(self.reduce(x))))))


def resnet50() -> nn.Sequential:
    """ResNet-50 up to its last feature map, (N, 2048, H / 32, W / 32).

    Source: He et al., CVPR 2016, table 1; the stride in the 3x3 convolutions, as in torchvision, which has no build on
    the package index for a CPU torch.
    """
    layers: list[nn.Module] = [_convolution(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            layers.append(Bottleneck(channels, width, stride if block == 0 else 1))
            channels = 4 * width
    return nn.Sequential(*layers)


@dataclass(frozen=True)
class Network:
    """A network, its classes and its batch (N, 3, size, size); turns: steps of each form to compare."""

    name: str
    build: Callable[[], nn.Module]
    filters: int
    classes: int
    batch: int
    size: int
    turns: int

    def model(self) -> GatedModel:
        """Fresh weights, on the device."""
        return GatedModel(self.build(), self.classes, self.filters).to(measure.DEVICE).train()

    def data(self) -> Batch:
        """A batch of noise with random labels."""
        images = torch.randn(self.batch, 3, self.size, self.size, device=measure.DEVICE)
        return images, torch.randint(0, self.classes, (self.batch,), device=measure.DEVICE)


def networks() -> list[Network]:
    """ResNet-20 on small images and ResNet-50 at its usual size, by batches for the device; quick: ResNet-20 alone."""
    gpu = measure.DEVICE == "cuda"
    small = Network("resnet20", lambda: build_backbone("resnet20"), 64, 10, 256 if gpu else 64, 32, 41)
    return [small] if measure.QUICK else [small, Network("resnet50", resnet50, 2048, 1000, 64 if gpu else 4, 224, 15)]


def _loop_mask(model: GatedModel, features: Tensor, labels: Tensor) -> Tensor:
    """The released form's gating: a mask of the map's size, filled sample by sample."""
    mask = torch.zeros_like(features)
    for i in range(len(labels)):
        mask[i] = model.gate[labels[i]][:, None, None]
    return model.classifier((features * mask).mean((2, 3)))


def loss_of(form: str, model: GatedModel, batch: Batch) -> Tensor:
    """The form's loss: CE of the STD path, or of the gated one with the penalty, or of both."""
    images, labels = batch
    if form == "std":
        return F.cross_entropy(model(images), labels)
    std = torch.zeros((), device=images.device)
    if form == "joint":
        std_logits, logits = model(images, labels, path="both")
        std = F.cross_entropy(std_logits, labels)
    elif form == "csg":
        logits = model(images, labels)
    elif form == "masked":
        features = model.forward_features(images)
        logits = model.classifier((features * model.gate[labels][:, :, None, None]).mean((2, 3)))
    else:
        logits = _loop_mask(model, model.forward_features(images), labels)
    return std + LAMBDA_1 * F.cross_entropy(logits, labels) + LAMBDA_2 * model.csg.penalty()


def step_of(form: str, model: GatedModel, batch: Batch) -> Callable[[], None]:
    """One training step. The gate is updated by ProjectedSGD, in the eager forms by torch.optim.SGD and PyTorch."""
    weights = torch.optim.SGD(model.weights(), lr=1e-3, momentum=0.9, weight_decay=1e-3)
    plain = form in ("masked", "released")
    gate = (torch.optim.SGD if plain else ProjectedSGD)([model.gate], lr=0.1, momentum=0.9)

    def run() -> None:
        loss_of(form, model, batch).backward()
        weights.step()
        if form != "std":
            gate.step()
        if plain:
            with torch.no_grad():
                model.gate.copy_(reference.project_gate(model.gate))
        weights.zero_grad()  # at the end: a step's memory has its gradients
        gate.zero_grad()

    return run


def check(network: Network) -> None:
    """The gated forms have one loss and one gradient of the gate and the classifier, before anything is timed."""
    start, batch = network.model(), network.data()
    found = {}
    for form in ("csg", "masked", "released"):
        model = copy.deepcopy(start)
        loss = loss_of(form, model, batch)
        found[form] = (loss.detach(), *torch.autograd.grad(loss, (model.gate, model.classifier.weight)))
    for form in ("masked", "released"):
        for one, other in zip(found[form], found["csg"], strict=True):
            error = ((one - other).norm() / other.norm()).item()
            if not error <= 1e-4:
                raise AssertionError(f"{network.name}: the form {form} differs from csg by {error:.2g} of the norm")


def run(network: Network) -> dict:
    """Seconds of a step of every form, and its ratio to the STD step with the interval of the median."""
    check(network)
    start, batch = network.model(), network.data()
    steps = {form: step_of(form, copy.deepcopy(start), batch) for form in FORMS}
    for step in steps.values():
        step()
        step()
    forms = {}
    for form, step in steps.items():  # std beside itself, too: what the measuring makes of no difference at all
        turns = network.turns if form in ("std", "csg") else network.turns // 2
        pair = measure.compared(steps["std"], step, measure.timed_once, turns, few=None)
        forms[form] = pair | {"peak_bytes": measure.peak_bytes(step)}
    return {
        "network": network.name,
        "batch": [network.batch, 3, network.size, network.size],
        "classes": network.classes,
        "forms": forms,
    }
