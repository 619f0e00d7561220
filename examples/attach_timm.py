"""A class-specific gate in a model of timm: both paths in every step, every measure, then the model without the gate.

pip install timm "csg-ext[train]"
python examples/attach_timm.py [model] [steps] [images]
"""

import sys

import timm
import torch
import torch.nn.functional as F

import csg_ext
from csg_ext.analysis import evaluate_model, evaluation_table
from csg_ext.data import Batches, load_images
from csg_ext.data.batches import normalise

name = sys.argv[1] if len(sys.argv) > 1 else "resnet10t"  # any of timm.list_models()
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 200
count = int(sys.argv[3]) if len(sys.argv) > 3 else 12000

torch.manual_seed(0)
data = load_images()  # the Fashion-MNIST subset inside the package
mean, std = data.statistics()
batches = Batches(data.train_images[:count], data.train_labels[:count], 32, mean=mean, std=std, shift=2, flip=True)
model = timm.create_model(name, num_classes=len(data.classes), in_chans=1)  # pretrained=True loads weights
g = csg_ext.attach(model)
weights_optimizer = torch.optim.SGD(g.weights(), lr=0.02, momentum=0.9, weight_decay=1e-3)
gate_optimizer = csg_ext.optim.ProjectedSGD([g.gate], lr=2.0)


def images(x: torch.Tensor) -> torch.Tensor:
    """Images of 28 x 28 as the network expects them."""
    return F.interpolate(x, size=64, mode="bilinear")


for step in range(steps):
    x, labels = batches[step]
    std_logits, csg_logits = g(images(x), labels, path="both")
    loss_std, loss_csg = F.cross_entropy(std_logits, labels), F.cross_entropy(csg_logits, labels)
    weights_optimizer.zero_grad()
    gate_optimizer.zero_grad()
    (loss_std + loss_csg + 0.1 * g.csg.penalty()).backward()
    weights_optimizer.step()
    gate_optimizer.step()
    if step % 20 == 0 or step == steps - 1:
        print(f"step {step:4d}  STD loss {loss_std.item():.3f}  L1-density of the gate {g.csg.density():.3f}")

test = [
    (images(normalise(data.test_images[i : i + 250], mean, std)), torch.from_numpy(data.test_labels[i : i + 250]))
    for i in range(0, len(data.test_labels), 250)
]
print(evaluation_table({name: evaluate_model(g, test, classes=data.classes)}), end="")
model = csg_ext.detach(g).eval()
with torch.inference_mode():
    right = sum(int((model(x).argmax(1) == labels).sum()) for x, labels in test)
print(f"accuracy of the model without the gate: {right / len(data.test_labels):.2%}")
