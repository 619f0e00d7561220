"""Draws what a trained run's gate picks where two objects are in view: one row a scene, one column a queried class.

python -m csg_ext.analysis.scenes scenes.npz
csg-ext train --data scenes.npz --output runs/scenes
python examples/localization.py runs/scenes/csg scenes.npz gate_maps.png [scenes]
"""

import sys

import matplotlib.pyplot as plt
import numpy as np
import torch

from csg_ext.analysis.localization import gate_map, query_energy, upsample
from csg_ext.data import load_images
from csg_ext.data.batches import normalise
from csg_ext.runs import checkpoint_files, read_checkpoint, restore, training_statistics

arm, scenes, picture = sys.argv[1:4]
count = int(sys.argv[4]) if len(sys.argv) > 4 else 6

data = load_images(scenes)
with np.load(scenes) as arrays:
    images, labels, masks = (arrays[f"pair_{name}"][:count] for name in ("images", "labels", "masks"))
stored = read_checkpoint(checkpoint_files(arm)[0])
model = restore(stored, data).eval()

with torch.no_grad():
    maps = model.forward_features(normalise(images, *training_statistics(stored, data)))  # (N, K, h, w)
    queried = torch.stack([gate_map(maps, model.gate, torch.from_numpy(c)) for c in labels.T], 1)  # (N, 2, h, w)
    energy = query_energy(queried, torch.from_numpy(masks))  # (N, 2), chance 0.5
    shown = upsample(queried, images.shape[2:]).numpy()

figure, axes = plt.subplots(count, 3, figsize=(6, 2 * count), squeeze=False)
for row, image, classes, pair, shares in zip(axes, images, labels, shown, energy, strict=True):
    row[0].imshow(np.moveaxis(image, 0, -1))
    for axis, label, found, share in zip(row[1:], classes, pair, shares, strict=True):
        axis.imshow(np.moveaxis(image, 0, -1).mean(-1), cmap="gray")
        axis.imshow(found, cmap="inferno", alpha=0.6)
        axis.set_title(f"{data.classes[label]}: {share:.2f}", fontsize=8)
for axis in axes.flat:
    axis.axis("off")
figure.tight_layout()
figure.savefig(picture, dpi=100)
print(f"{picture}: {count} scenes; energy on the queried object {energy.mean():.3f} (chance 0.5)")
