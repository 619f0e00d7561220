"""Alternate training of a class-specific gate in plain PyTorch: no trainer, the whole method in one loop.

python examples/train_plain_pytorch.py [steps] [images]
"""

import sys

import torch
import torch.nn.functional as F

from csg_ext.data import Batches, load_images
from csg_ext.nn import GatedModel, build_backbone
from csg_ext.optim import ProjectedSGD

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 500
count = int(sys.argv[2]) if len(sys.argv) > 2 else 12000

torch.manual_seed(0)
data = load_images()  # the Fashion-MNIST subset inside the package
mean, std = data.statistics()
batches = Batches(data.train_images[:count], data.train_labels[:count], 64, mean=mean, std=std, shift=2, flip=True)
model = GatedModel(build_backbone("resnet20", data.channels), num_classes=len(data.classes))
weights_optimizer = torch.optim.SGD(model.weights(), lr=0.05, momentum=0.9, weight_decay=5e-4)
gate_optimizer = ProjectedSGD([model.gate], lr=2.0)  # projects the gate onto V_G after its update

for step in range(steps):
    x, labels = batches[step]
    csg_step = step % 3 == 2  # the CSG path every third step
    weights_optimizer.zero_grad()
    gate_optimizer.zero_grad()
    if csg_step:
        loss = F.cross_entropy(model(x, labels), labels) + 0.01 * model.csg.penalty()
    else:
        loss = F.cross_entropy(model(x), labels)
    loss.backward()
    weights_optimizer.step()
    if csg_step:
        gate_optimizer.step()
    if step % 50 == 0 or step == steps - 1:
        print(f"step {step:4d}  loss {loss.item():.3f}  L1-density of the gate {model.csg.density():.3f}")
