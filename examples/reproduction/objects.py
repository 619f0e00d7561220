"""Does the effect grow where STD entangles more? Scenes of one and of two objects that are the same otherwise.

    python examples/reproduction/objects.py OBJECTS ARM SEED

OBJECTS is 1 or 2, ARM std or csg. Multi-label classification of the scenes of csg_ext.analysis.scenes (it needs
scikit-image): which classes are in view, with the binary cross-entropy of every class. The gate's row of a scene with
two objects is the sum of the rows of their classes. Trains ResNet-20 on 8,000 scenes, measures on 2,000 with other
items and other photographs and writes results/objects-OBJECTS/ARM-SEED.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from loop import train
from numpy.typing import NDArray
from torch import Tensor

from csg_ext import metrics
from csg_ext.analysis.scenes import PAIR_SIZES, SIDE, Scenes, make_scenes, photographs
from csg_ext.data import Batches, load_images
from csg_ext.data.batches import normalise
from csg_ext.nn import GatedModel, build_backbone
from csg_ext.training.config import TrainConfig

TRAIN, TEST = 8000, 2000
CONFIG = TrainConfig(epochs=24)  # the defaults otherwise


def scenes(objects: int, part: str, count: int) -> Scenes:
    """Scenes of the items and photographs of a part; an item has the same sizes in scenes of one and of two."""
    items = load_images()
    images, labels = (getattr(items, f"{part}_{kind}") for kind in ("images", "labels"))
    return make_scenes(images[:, 0], labels, photographs(part), count, objects, int(part == "test"), PAIR_SIZES)


def present(labels: Tensor, classes: int) -> Tensor:
    """Which classes are in view, float (N, C), from labels int64 (N, objects)."""
    return torch.zeros(len(labels), classes).scatter_(1, labels, 1.0)


def fit(arm: str, seed: int, data: Scenes, classes: int, config: TrainConfig) -> GatedModel:
    """ResNet-20 after config.epochs; arm "std" trains without the gate."""
    torch.manual_seed(seed)
    mean, std = statistics(data)
    batches = Batches(
        data.images,
        data.labels,
        config.batch_size,
        seed=seed,
        mean=mean,
        std=std,
        shift=config.shift,
        flip=config.flip,
        sizes=config.sizes(SIDE),
    )
    model = GatedModel(build_backbone(config.model, 3), classes).to(memory_format=torch.channels_last)
    weights = torch.optim.SGD(model.weights(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    objective = config.objective()

    def loss(x: Tensor, labels: Tensor, path: str) -> Tensor:
        target = present(labels, classes)
        with torch.autocast("cpu", torch.bfloat16):
            std, csg = (model(x), None) if path == "std" else model(x, target, path="both")
        return objective.total(
            cross_entropy(std, target), None if csg is None else cross_entropy(csg, target), model.gate
        )[0]

    train(model, batches, arm, config.epochs, weights, config.gate_lr, loss)
    return model


def statistics(data: Scenes) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of every channel, in units of [0, 1]."""
    x = data.images.transpose(1, 0, 2, 3).reshape(3, -1) / 255
    return x.mean(1).tolist(), x.std(1).tolist()


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """The binary cross-entropies of the classes, summed, as a mean over scenes."""
    return F.binary_cross_entropy_with_logits(logits.float(), target, reduction="sum") / len(target)


def class_information(values: NDArray[np.float32], target: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The mutual information (K, C) of values (N, K) with the presence of every class, target (N, C)."""
    return np.stack([metrics.class_mutual_info(values, seen.astype(np.int64))[:, 1] for seen in target.T], 1)


def all_found(scores: NDArray[np.float32], target: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether the largest scores (N, C), as many as there are objects, are those of the classes in view."""
    objects = int(target[0].sum())
    best = np.argsort(-scores, axis=1, kind="stable")[:, :objects]
    found: NDArray[np.bool_] = np.take_along_axis(target, best, 1).all(1)
    return found


@torch.inference_mode()
def measure(model: GatedModel, arm: str, train_scenes: Scenes, test: Scenes) -> dict[str, Any]:
    """Accuracy of the STD path (all objects named), mutual information and gate on the test scenes."""
    model.eval()
    features = torch.cat(
        [
            model.pooled_features(normalise(test.images[i : i + 200], *statistics(train_scenes)))
            for i in range(0, len(test.images), 200)
        ]
    )
    weight, bias = model.classifier.weight.numpy(), model.classifier.bias.numpy()
    logits, features = model.classifier(features).numpy(), features.numpy()
    target = present(torch.from_numpy(test.labels), len(bias)).numpy() > 0
    mi, right = class_information(features, target), all_found(logits, target)
    result = {
        "accuracy": float(right.mean()),
        "mis": metrics.mutual_information_score(mi),
        "mis_ceiling": float(np.mean(class_information(logits, target).diagonal())),
        "images": len(right),
        "right": np.packbits(right).tobytes().hex(),
    }
    if arm == "csg":
        gate = model.gate.numpy()
        owned = np.arange(len(gate))[:, None] == gate.argmax(0)
        result["l1_density"] = model.csg.density()
        result["class_agreement"] = metrics.class_agreement(gate, mi)
        result["one_hot_accuracy"] = float(all_found(features @ (weight * owned).T + bias, target).mean())
    return result


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("objects", type=int, choices=(1, 2))
    parser.add_argument("arm", choices=("std", "csg"))
    parser.add_argument("seed", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    objects, arm, seed = arguments.objects, arguments.arm, arguments.seed
    train_scenes, test = scenes(objects, "train", TRAIN), scenes(objects, "test", TEST)
    start = time.perf_counter()
    model = fit(arm, seed, train_scenes, 10, CONFIG)
    seconds = time.perf_counter() - start
    result = {"arm": arm, "seed": seed, **measure(model, arm, train_scenes, test), "train_seconds": round(seconds, 1)}
    print({k: v for k, v in result.items() if k != "right"})
    path = Path(__file__).resolve().parent / "results" / f"objects-{objects}" / f"{arm}-{seed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
