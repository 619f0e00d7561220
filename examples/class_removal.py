"""Forgets each class in turn, in both arms of a run, and prints the accuracy on it and on the other classes.

csg-ext train --output runs/demo
python examples/class_removal.py runs/demo [class ...]

A run's folder, an arm's folder or a checkpoint. Filters belong to the classes of their mutual information, measured on
the train images, and in the CSG arm also to those of the gate's columns. Accuracy is that of the STD path on the test
images.
"""

import sys

import torch

from csg_ext.analysis import forget, removal_table
from csg_ext.data.batches import normalise
from csg_ext.metrics import best_class, class_mutual_info
from csg_ext.runs import SOURCE, checkpoint_files, load_source, read_checkpoint, restore, training_statistics

BATCH = 250


@torch.no_grad()
def pooled_features(model, images, statistics):
    """Pooled features (N, K) of uint8 images, batch by batch."""
    parts = [images[i : i + BATCH] for i in range(0, len(images), BATCH)]
    return torch.cat([model.pooled_features(normalise(part, *statistics)) for part in parts])


def owners_by_rule(model, data, statistics):
    """The classes of the filters by mutual information and, where there is a trained gate, by the gate."""
    features = pooled_features(model, data.train_images, statistics)
    mi = class_mutual_info(features.numpy(), data.train_labels, num_classes=len(data.classes))
    rules = {"mutual information": best_class(mi)}
    if bool((model.gate != model.gate[0, 0]).any()):
        rules["the gate"] = "gate"
    return rules


@torch.no_grad()
def show(model, data, statistics, classes, owners):
    """One line per class to forget. The backbone does not change: its features are computed once."""
    features = pooled_features(model, data.test_images, statistics)
    before = model.classifier(features)
    print(f"{'':16}{'':>8}{'this class':^18}{'the others':^18}")
    print(f"{'forgotten':16}{'filters':>8}{'before':>9}{'after':>9}{'before':>9}{'after':>9}")
    for c in classes:
        with forget(model, c, owners) as forgotten:
            after = model.classifier(features)
        means = removal_table(data.test_labels, before, after, [c])["means"]
        shares = [means[group][when] for group in ("removed", "kept") for when in ("before", "after")]
        cells = "".join(f"{share:9.1%}" for share in shares)
        print(f"{data.classes[c]:16}{len(forgotten.filters):8}{cells}")


def main(run, wanted):
    for file in checkpoint_files(run):
        stored = read_checkpoint(file)
        data = load_source(stored.run["source"] if stored.run else SOURCE)
        unknown = [name for name in wanted if name not in data.classes]
        if unknown:
            raise SystemExit(f"class must be one of {', '.join(data.classes)}, got {unknown[0]!r}")
        classes = [data.classes.index(name) for name in wanted] or range(len(data.classes))
        model, statistics = restore(stored, data).eval(), training_statistics(stored, data)
        for rule, owners in owners_by_rule(model, data, statistics).items():
            print(f"\n{file}: filters by {rule}")
            show(model, data, statistics, classes, owners)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
