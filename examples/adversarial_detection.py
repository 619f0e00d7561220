"""Attacks test images of a trained arm with PGD and tells which the label-free score flags.

csg-ext train --output runs/mine
python examples/adversarial_detection.py runs/mine/csg [images] [epsilon]
"""

import sys

import numpy as np

from csg_ext.analysis.adversarial import Network
from csg_ext.analysis.attacks import Attack, run_attack
from csg_ext.analysis.detectors import OutsideShare
from csg_ext.runs import checkpoint_files, load_source, read_checkpoint, restore, training_statistics

count = int(sys.argv[2]) if len(sys.argv) > 2 else 100
epsilon = float(sys.argv[3]) if len(sys.argv) > 3 else 8

stored = read_checkpoint(checkpoint_files(sys.argv[1])[0])
if stored.run is None:
    sys.exit("expected an arm of a run that csg-ext train wrote, got a checkpoint without run.json")
data = load_source(stored.run["source"])
train, test = (images[:count].astype(np.float32) / 255 for images in (data.train_images, data.test_images))
labels = data.test_labels[:count]
network = Network(restore(stored, data), training_statistics(stored, data), train, data.train_labels[:count])

detector = OutsideShare(network.rows)
detector.calibrate(network.outputs(train), false_positives=0.05)  # train images set the threshold

clean = network.outputs(test)
attacked = network.outputs(run_attack(network.model, test, labels, Attack("pgd", epsilon)))
right = clean.logits.argmax(1) == labels
changed = right & (attacked.logits.argmax(1) != labels)
print(f"PGD, {epsilon:g}/255: changes {changed.sum()} of {right.sum()} right predictions")
print(f"flagged: {detector.flags(attacked)[changed].sum()} of the changed, {detector.flags(clean)[right].sum()} benign")
