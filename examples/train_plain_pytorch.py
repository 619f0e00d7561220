"""Alternate training of a class-specific gate in plain PyTorch: no trainer, the whole method in one loop.

python examples/train_plain_pytorch.py [steps] [images]

csg_ext.training.GatedTraining with Schedule(kind="steps", period=3, csg_at=(2,), lr_warmup=0) does the same steps.
"""

import math
import sys

import torch
import torch.nn.functional as F

from csg_ext.data import Batches, load_images
from csg_ext.nn import GatedModel, build_backbone
from csg_ext.optim import ProjectedSGD


def train(model, batches, steps, lr=0.05, gate_lr=2.0, lambda_1=1.0, lambda_2=0.1):
    """Trains a gated model; every third step takes the CSG path, the last tenth of the run the STD path alone."""
    weights_optimizer = torch.optim.SGD(model.weights(), lr=lr, momentum=0.9, weight_decay=5e-4)
    gate_optimizer = ProjectedSGD([model.gate], lr=gate_lr)  # projects the gate onto V_G after its update
    for step in range(steps):
        x, labels = batches[step]
        decay = (1 + math.cos(math.pi * step / steps)) / 2  # both rates on the run's own clock
        weights_optimizer.param_groups[0]["lr"], gate_optimizer.param_groups[0]["lr"] = lr * decay, gate_lr * decay
        csg_step = step % 3 == 2 and step < 0.9 * steps
        weights_optimizer.zero_grad()
        gate_optimizer.zero_grad()
        if csg_step:
            loss = lambda_1 * F.cross_entropy(model(x, labels), labels) + lambda_2 * model.csg.penalty()
        else:
            loss = F.cross_entropy(model(x), labels)
        loss.backward()
        weights_optimizer.step()
        if csg_step:
            gate_optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:4d}  loss {loss.item():.3f}  L1-density of the gate {model.csg.density():.3f}")


if __name__ == "__main__":
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 12000
    torch.manual_seed(0)
    data = load_images()  # the Fashion-MNIST subset inside the package
    mean, std = data.statistics()
    batches = Batches(data.train_images[:count], data.train_labels[:count], 64, mean=mean, std=std, shift=2, flip=True)
    train(GatedModel(build_backbone("resnet20", data.channels), num_classes=len(data.classes)), batches, steps)
