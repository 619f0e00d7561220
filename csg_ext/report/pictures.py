"""The pictures of a finished run: drawn once, as files for `csg-ext train` and inside the page of `csg-ext report`."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from csg_ext import metrics, plots
from csg_ext.data.batches import normalise
from csg_ext.report.collect import Arm, Run, visible

# Files of csg-ext train, without .png. What a network lacks (a trained gate) has no picture.
NAMES = (
    "gate",
    "mutual_information",
    "class_agreement",
    "filters_per_class",
    "filter_similarity_std",
    "filter_similarity_csg",
    "training",
    "top_images",
    "image_filters",
    "confusion_std",
    "confusion_csg",
)
_TOP = 8  # images of the one filter that is shown
_DPI = 110


@dataclass(frozen=True)
class Picture:
    """A PNG, its name (one of NAMES) and the text that says what it shows."""

    name: str
    text: str
    png: bytes


def draw(run: Run) -> list[Picture]:
    """Every picture that the run has the data for, in the order of NAMES."""
    return [Picture(name, text, _png(figure)) for name, text, (figure, _) in _drawn(run)]


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=_DPI)
    return file.getvalue()


def _drawn(run: Run) -> Iterator[tuple[str, str, Any]]:
    classes, (std, csg) = run.data.classes, run.arms
    bound = run.summary["std"]["mis_bound"]
    if csg.gate is not None:
        yield (
            "gate",
            "The gate: classes down, filters across, sorted by class",
            plots.plot_gate(csg.gate, classes, dead=csg.dead),
        )
    yield (
        "mutual_information",
        "Mutual information between filters and classes, STD on the left and CSG on the right, on one scale",
        plots.plot_mutual_information(std.mi, csg.mi, classes, bound, filter_classes=(std.mi_classes, csg.mi_classes)),
    )
    if csg.gate is not None and len(classes) > 2:
        yield (
            "class_agreement",
            "Where the gate and the mutual information name the same class, filter by filter",
            plots.plot_class_agreement(csg.gate, csg.mi, classes, dead=csg.dead),
        )
    owners = {f"{arm.name}, by {arm.classes_by}": arm.filter_classes for arm in run.arms}
    yield "filters_per_class", "Filters per class", plots.plot_filters_per_class(owners, classes)
    similarities = [metrics.kernel_similarity(arm.model, len(arm.mi)) for arm in run.arms]
    top = max((float(np.max(s - np.eye(len(s)))) for s in similarities if s is not None), default=0.0)
    for arm, similarity in zip(run.arms, similarities, strict=True):
        if similarity is None:
            continue
        yield (
            f"filter_similarity_{arm.name.lower()}",
            f"Similarity of the kernels of the filters of {arm.name}, sorted by class (by {arm.classes_by})",
            plots.plot_filter_similarity(similarity, arm.filter_classes, classes, top),
        )
    yield (
        "training",
        "Training by epoch: loss, accuracy and density of the gate, the epochs shaded by the paths that CSG took",
        plots.plot_training({arm.name.lower(): arm.history for arm in run.arms}, len(classes)),
    )
    yield _top_images(run, csg)
    yield _image_filters(run, csg)
    for arm in run.arms:
        yield (
            f"confusion_{arm.name.lower()}",
            f"Confusion matrix of {arm.name}: true classes down, predicted classes across",
            plots.plot_confusion(arm.confusion, classes),
        )


def _top_images(run: Run, arm: Arm) -> tuple[str, str, Any]:
    """The live filter with most mutual information; only its strongest images are computed again."""
    k = int(np.where(arm.dead, -1, arm.mi.max(axis=1)).argmax())
    best = np.argsort(-arm.features[:, k], kind="stable")[:_TOP]
    images = run.data.test_images[best]
    with torch.inference_mode():
        maps = arm.model.forward_features(normalise(images, *arm.statistics, torch.device("cpu")))
    owner = int(arm.filter_classes[k])
    drawn = plots.plot_top_images(
        visible(images),
        maps,
        k,
        labels=run.data.test_labels[best],
        classes=run.data.classes,
        filter_class=owner,
        count=_TOP,
        chosen_from=len(arm.features),
    )
    name = "none" if owner < 0 else run.data.classes[owner]
    return "top_images", f"The test images that filter {k} of {arm.name} (class {name}) answers to most", drawn


def _image_filters(run: Run, arm: Arm) -> tuple[str, str, Any]:
    """The first test image that the network gets right: its filters relative to their own scales."""
    labels, classifier = run.data.test_labels, arm.model.classifier
    predicted = (arm.features @ classifier.weight.detach().numpy().T + classifier.bias.detach().numpy()).argmax(1)
    i = int((predicted == labels).argmax())
    drawn = plots.plot_image_filters(
        visible(run.data.test_images[i : i + 1])[0],
        relative(arm.features)[i],
        arm.filter_classes,
        run.data.classes,
        label=int(labels[i]),
        predicted=int(predicted[i]),
    )
    text = f"The filters of {arm.name} that spoke for test image {i}, and the classes that they speak for"
    return "image_filters", text, drawn


def relative(features: NDArray[np.float32]) -> NDArray[np.float64]:
    """Features (N, K) divided by every filter's 99th percentile, or by its largest where that is not positive: a filter
    of one class in 100 is silent on 99 % of the images. 0 for filters without a positive feature."""
    scale = np.quantile(features, 0.99, axis=0).astype(np.float64)
    scale = np.where(scale > 0, scale, features.max(axis=0))
    return np.divide(features, scale, out=np.zeros(features.shape), where=scale > 0)
