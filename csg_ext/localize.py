"""The command `csg-ext localize`: where a network's filters see each class, scored against masks, arms side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from csg_ext._text import aligned
from csg_ext.analysis import localization as loc
from csg_ext.analysis.masks import Part, Scenes, masked_scenes, read_arrays
from csg_ext.data.batches import normalise
from csg_ext.nn.gate import GatedModel
from csg_ext.remarks import filter_remarks
from csg_ext.runs import chosen_files, heading, read_checkpoint, restore, source_images, training_statistics
from csg_ext.training.files import write_text

NUMBERS = "localization.json"
SWEEP = tuple(i / 20 for i in range(1, 20))  # shares of a map's maximum
IOUS = tuple(i / 10 for i in range(1, 10))  # of the average precision
_BLUR = 20  # GradMap's sigma is the image's height divided by this
_BATCH = 250
Statistics = tuple[list[float], list[float]]


@dataclass(frozen=True)
class Settings:
    """above: share of its maximum beyond which a map is the object (20 %: Zhou et al., CVPR 2016). top: share of a
    filter's activations that its threshold leaves above. success: IoU beyond which an object is found. only_correct:
    whether images that the network gets wrong are left out. chunk: bounds the memory, see regions."""

    above: float = 0.2
    top: float = 0.3
    success: float = 0.3
    only_correct: bool = False
    chunk: int = loc.CHUNK

    def __post_init__(self) -> None:
        for name in ("above", "top", "success"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in (0, 1), got {getattr(self, name)}")
        if self.chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {self.chunk}")


# ---- one network


class _Network:
    """A model with the normalisation of its images: maps, predictions and gradient maps, batch by batch."""

    def __init__(self, model: GatedModel, statistics: Statistics) -> None:
        self.model, self.statistics = model.eval(), statistics

    def _batches(self, images: NDArray[np.uint8], what: str) -> Any:
        from tqdm import tqdm

        for start in tqdm(range(0, len(images), _BATCH), desc=what, unit="batch", disable=None, leave=False):
            rows = slice(start, start + _BATCH)
            yield rows, normalise(images[rows], *self.statistics, self.model.gate.device)

    @torch.no_grad()
    def maps(self, images: NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
        """(maps (N, K, h, w), predicted classes (N,)) of the STD path."""
        maps, predicted = [], []
        for _, x in self._batches(images, "maps"):
            maps.append(self.model.forward_features(x).contiguous())
            predicted.append(self.model.classifier(maps[-1].mean((2, 3))).argmax(1))
        return torch.cat(maps), torch.cat(predicted)

    def gradient_maps(self, images: NDArray[np.uint8], weight: Tensor, classes: Tensor) -> Tensor:
        """GradMap of each image for its class, (N, H, W); weight (C, K) holds each class's filters."""
        sigma = images.shape[2] / _BLUR
        return torch.cat(
            [
                loc.gradient_map(self.model, x, weight[classes[rows]], sigma)
                for rows, x in self._batches(images, "gradients")
            ]
        )


def localize(
    model: GatedModel,
    scenes: Scenes,
    statistics: Statistics,
    settings: Settings,
    names: Sequence[str] | None = None,
    no_gate: str = "",
) -> dict[str, Any]:
    """Scores a network's maps against the masks; docs/localization.md says what every number is.

    statistics: mean and deviation of the channels that the model was trained with. names: those of the classes for
    the remarks, numbers when not given. no_gate: why there is none, for the report; a constant gate says so itself.
    """
    network, device = _Network(model, statistics), model.gate.device
    weight, gate = model.classifier.weight.detach(), model.gate.detach()
    names = names or [str(c) for c in range(len(weight))]
    trained = bool((gate != gate[0, 0]).any())
    maps, predicted = network.maps(scenes.scored.images)
    dead = loc.dead_filters(maps)  # also on what only_correct leaves out: a filter may see nothing else
    right = predicted.cpu() == scenes.scored.labels
    scored = scenes.scored
    if settings.only_correct:
        if not bool(right.any()):
            raise ValueError("only_correct leaves no image: the network gets every one wrong")
        scored, maps = scored.take(torch.nonzero(right)[:, 0]), maps[right.to(device)]
    masks, labels = scored.masks.to(device), scored.labels.to(device)
    thresholds = loc.activation_thresholds(maps, settings.top)
    owner = torch.where(dead, -1, _filter_classes(network, scenes.choosing, len(weight), settings))
    own = loc.own_filters(gate) if trained else F.one_hot(owner.clamp(min=0), len(weight)).T * (owner >= 0)
    gate_class = gate.argmax(0) if trained else None

    def of_classes(part: Part, maps: Tensor, classes: Tensor) -> dict[str, Tensor]:
        found = {
            "cam": loc.cam(maps, weight, classes),
            "gradient": network.gradient_maps(part.images, own.to(maps.dtype), classes),
        }
        return found | ({"gate": loc.gate_map(maps, gate, classes)} if trained else {})

    methods: dict[str, Any] = {}
    for name, found in of_classes(scored, maps, labels).items():
        methods[name] = score_maps(found, masks, labels, len(weight), 1.0 if name == "gradient" else None, settings)
    by = "the gate" if trained else "ActivMap"
    belongs = torch.where(dead, -1, gate.argmax(0)) if trained else owner
    report: dict[str, Any] = {
        "remarks": filter_remarks(belongs.cpu().numpy(), dead.cpu().numpy(), names, by),
        "images": len(labels),
        "images_wrong": int((~right).sum()),
        "mask_area": float(masks.double().mean()),
        "methods": methods,
        "filters": _filters(maps, thresholds, masks, labels, owner, gate_class, dead, len(weight), settings),
        "classes_without_filter": sorted(set(range(len(weight))) - set(belongs.tolist())),
    }
    if scenes.pairs is not None:
        maps, _ = network.maps(scenes.pairs.images)
        queries = scenes.pairs.labels.to(device).unbind(1)
        queried = [of_classes(scenes.pairs, maps, q) for q in queries]
        report["query"] = {"images": len(scenes.pairs.labels)} | {
            name: query(torch.stack([q[name] for q in queried], 1), scenes.pairs, len(weight)) for name in queried[0]
        }
    if not trained:
        reason = no_gate or f"the checkpoint has no trained gate: its entries are all {float(gate[0, 0]):g}"
        methods["gate"] = {"unavailable": reason}
        if "query" in report:
            report["query"]["gate"] = {"unavailable": reason}
    return report


def _filter_classes(network: _Network, part: Part, classes: int, settings: Settings) -> Tensor:
    """The class that each filter finds most often on these images, (K,); -1 for one that finds none."""
    maps, _ = network.maps(part.images)
    thresholds = loc.activation_thresholds(maps, settings.top)
    masks, labels = part.masks.to(maps.device), part.labels.to(maps.device)
    return _score_filters(maps, thresholds, masks, labels, classes, settings).classes()


def _score_filters(
    maps: Tensor, thresholds: Tensor, masks: Tensor, labels: Tensor, classes: int, settings: Settings
) -> loc.FilterScores:
    from tqdm import tqdm

    with tqdm(total=maps.shape[0] * maps.shape[1], desc="filters", unit="map", disable=None, leave=False) as bar:
        return loc.score_filters(
            maps,
            thresholds,
            masks,
            labels,
            classes,
            success=settings.success,
            chunk=settings.chunk,
            progress=lambda done, total: bar.update(done - bar.n),
        )


def _filters(
    maps: Tensor,
    thresholds: Tensor,
    masks: Tensor,
    labels: Tensor,
    owner: Tensor,
    gate_class: Tensor | None,
    dead: Tensor,
    classes: int,
    settings: Settings,
) -> dict[str, Any]:
    """ActivMap: every filter on the images of its class, and the means over the filters that have one; with a gate,
    also on the images of the gate's class. Filters of a class without an image are counted and have no score."""
    scores = _score_filters(maps, thresholds, masks, labels, classes, settings)
    own, belongs = scores.own(owner), owner >= 0
    blind = belongs & (scores.images[owner.clamp(min=0)] == 0)  # own() gives 0 there, which is no score
    seen = belongs & ~blind
    found: dict[str, Any] = {
        "count": len(owner),
        "dead": torch.nonzero(dead)[:, 0].tolist(),
        "without_class": int((~belongs).sum()),
        "without_images": int(blind.sum()),
        "class": owner.tolist(),
        "threshold": thresholds.tolist(),
        "mean": {name: _mean(values[seen]) for name, values in own.items()},
        "per_class": {"filters": F.one_hot(owner[belongs], classes).sum(0).tolist()}
        | {name: _class_means(values[seen], owner[seen], classes) for name, values in own.items()},
        "per_filter": {
            name: [None if b else v for v, b in zip(values.tolist(), blind.tolist(), strict=True)]
            for name, values in own.items()
        },
    }
    if gate_class is not None:
        found["gate_class"] = gate_class.tolist()
        scored = scores.images[gate_class] > 0
        found["mean_on_gate_class"] = {name: _mean(v[scored]) for name, v in scores.own(gate_class).items()}
        agree = (gate_class == owner)[belongs].double()
        found["gate_class_agreement"] = _mean(agree)
    return found


def _mean(values: Tensor) -> float | None:
    return float(values.mean()) if len(values) else None


def _class_means(values: Tensor, classes: Tensor, count: int) -> list[float | None]:
    """The mean of the values of every class; None for a class without any."""
    one_hot = F.one_hot(classes, count).double()
    sums, counts = values.double() @ one_hot, one_hot.sum(0)
    return [float(s / n) if n else None for s, n in zip(sums, counts, strict=True)]


def score_maps(
    maps: Tensor, masks: Tensor, labels: Tensor, classes: int, limit: float | None, settings: Settings
) -> dict[str, Any]:
    """One map (N, h, w) per image against its mask. limit: the threshold; None: a share of the map's maximum."""
    size, positive = masks.shape[1:], maps.clamp(min=0)[:, None]
    peak = loc.peaks(positive, size, chunk=settings.chunk)
    limits = settings.above * peak.value if limit is None else torch.full_like(peak.value, limit)
    shares = torch.tensor(SWEEP, dtype=maps.dtype, device=maps.device)
    all_limits = torch.cat([limits, peak.value * shares], 1)
    ious = loc.regions(positive.expand(-1, all_limits.shape[1], -1, -1), all_limits, masks, chunk=settings.chunk).iou()
    iou, swept = ious[:, 0], ious[:, 1:].mean(0)
    boxes = loc.boxes_from_maps(positive, limits, size, chunk=settings.chunk)[:, 0]
    scores = {
        "iou": iou,
        "box_iou": loc.box_iou(boxes, loc.boxes_from_masks(masks)),
        "pointing": peak.hits(masks)[:, 0],
        "energy": loc.energy(positive, masks)[:, 0],
    }
    return {name: float(values.double().mean()) for name, values in scores.items()} | {
        "average_precision": dict(zip(map(str, IOUS), loc.average_precision(iou, IOUS).tolist(), strict=True)),
        "sweep": {
            "share_of_maximum": list(SWEEP),
            "iou": swept.tolist(),
            "success": (ious[:, 1:] > settings.success).double().mean(0).tolist(),
        },
        "best_iou": float(swept.max()),
        "best_share": SWEEP[int(swept.argmax())],
        "per_class": {name: _class_means(values, labels, classes) for name, values in scores.items()},
    }


def query(maps: Tensor, pairs: Part, classes: int) -> dict[str, Any]:
    """How much of the energy on both objects lies on the queried one; maps (M, 2, h, w).

    energy: its mean over scenes and queries, with its standard error over the scenes; picked: how often it is more than
    half, one that is exactly half counted as half.
    """
    energy = loc.query_energy(maps, pairs.masks.to(maps.device)).cpu().double()
    picked = (energy > 0.5).double() + 0.5 * (energy == 0.5).double()
    return {
        "energy": float(energy.mean()),
        "standard_error": float(energy.mean(1).std(correction=0)) / len(energy) ** 0.5,
        "picked": float(picked.mean()),
        "per_class": {"energy": _class_means(energy.flatten(), pairs.labels.flatten(), classes)},
    }


# ---- the report

_METHODS = {
    "cam": "CAM: the class's weights times the maps",
    "gradient": "GradMap: input gradient of the class's filters",
    "gate": "gate: the class's filters weighted by its row",
}
SCORES = (
    ("iou", "mean IoU"),
    ("box_iou", "mean IoU of the boxes"),
    ("best_iou", "mean IoU at the best threshold of the sweep"),
    ("pointing", "pointing game"),
    ("energy", "energy inside the mask"),
)


def _show(value: Any, kind: str = ".3f") -> str:
    return "-" if value is None else format(value, kind)


def table(report: dict[str, Any]) -> str:
    """The report as aligned text."""
    arms, success = report["checkpoints"], report["settings"]["success"]
    rows: list[list[str]] = [["", *(heading(a["name"]) for a in arms)]]

    def row(text: str, values: list[Any], kind: str = ".3f") -> None:
        rows.append([text, *(_show(value, kind) for value in values)])

    row("images scored", [a["images"] for a in arms], "d")
    row("  of the test images, the network gets wrong", [a["images_wrong"] for a in arms], "d")
    row("share of the image in the mask: chance of pointing and energy", [a["mask_area"] for a in arms])
    for method, text in _METHODS.items():
        rows.append([text])
        found = [a["methods"][method] for a in arms]
        for key, score in SCORES:
            row(f"  {score}", [f.get(key) for f in found])
        for iou in ("0.3", "0.5"):
            row(f"  AP: share with IoU > {iou}", [f.get("average_precision", {}).get(iou) for f in found])
    rows.append(["ActivMap: each filter alone, on the images of its class"])
    filters = [a["filters"] for a in arms]
    row("  filters", [f["count"] for f in filters], "d")
    row("  dead: one activation everywhere", [len(f["dead"]) for f in filters], "d")
    row("  without a class: finds no object", [f["without_class"] for f in filters], "d")
    if any(f["without_images"] for f in filters):
        row("  without a score: its class has no scored image", [f["without_images"] for f in filters], "d")
    texts = {"success": f"share with IoU > {success:g}"} | dict(SCORES)
    for key in ("iou", "success", "pointing", "energy"):
        row(f"  {texts[key]}", [f["mean"][key] for f in filters])
    row("  its class is its gate's class, share of filters", [f.get("gate_class_agreement") for f in filters])
    rows.append(["each filter alone, on the images of its gate's class (dead ones too)"])
    for key in ("iou", "success", "pointing", "energy"):
        row(f"  {texts[key]}", [f.get("mean_on_gate_class", {}).get(key) for f in filters])
    row("classes without a filter", [len(a["classes_without_filter"]) for a in arms], "d")
    if "query" in arms[0]:
        rows.append(
            [f"two objects in view ({arms[0]['query']['images']} scenes): energy on the queried one, chance 0.5"]
        )
        for method in _METHODS:
            row(f"  {_METHODS[method].split(':')[0]}", [a["query"][method].get("energy") for a in arms])
    notes = {
        f"{a['name']}: no map of the gate, as {a['methods']['gate']['unavailable']}"
        for a in arms
        if "unavailable" in a["methods"]["gate"]
    }
    remarks = [f"{a['name']}: {said}" for a in arms for said in a["remarks"]]
    return "\n".join([*aligned(rows, len(arms) + 1), *sorted(notes), *remarks]) + "\n"


def main(arguments: dict[str, Any]) -> int:
    """Runs `csg-ext localize` with the parsed arguments; returns the exit status."""
    from csg_ext.training.compare import pick_device, versions

    device = pick_device(arguments["device"])
    settings = Settings(**{name: arguments[name] for name in ("above", "top", "success", "only_correct", "chunk")})
    files = chosen_files(arguments["checkpoints"])
    stored = [read_checkpoint(file) for file in files.values()]
    run = stored[0].run
    path: str | None = arguments["data"] or (run["source"]["data"] if run else None)
    if path is None and run is None:
        raise ValueError(
            f"the images must be given as --data PATH: {stored[0].file} has no run.json of its run beside it"
        )
    mask_file = arguments["masks"] or (path if path and path.endswith(".npz") else None)
    if mask_file is None:
        raise ValueError(
            f"the masks must be given as --masks FILE, as {path or 'the set inside the package'} holds none"
        )
    chosen = [f"--{k.replace('_', '-')}" for k in ("hold_out", "imbalance") if run and run["source"][k] is not None]
    if chosen and arguments["data"] is None and arguments["masks"] is None:
        raise ValueError(
            f"the masks must be given as --masks FILE, as those of {path} are not of the images that the run chose by "
            f"{' and '.join(chosen)}, or the images as --data PATH"
        )
    data = source_images(stored, arguments)
    scenes = masked_scenes(data, read_arrays(Path(mask_file)))
    height, width = data.test_images.shape[2:]
    print(
        f"Localizing on {data.name}: {len(scenes.scored.labels)} test images, {height}x{width}, "
        f"{len(data.classes)} classes; {scenes.empty} with an empty mask are left out.",
        flush=True,
    )
    reports = []
    for (name, file), s in zip(files.items(), stored, strict=True):
        print(f"  {name}: {file}", flush=True)
        model = restore(s, data).to(device)
        found = localize(model, scenes, training_statistics(s, data), settings, data.classes, s.why_no_gate())
        reports.append({"name": name, "file": str(file), "model": s.config.model} | found)
    report = {
        "checkpoints": reports,
        "data": {
            "name": data.name,
            "classes": data.classes,
            "shape": list(data.test_images.shape[1:]),
            "sha256": data.fingerprint(),
            "empty_masks": scenes.empty,
            "images_that_choose": len(scenes.choosing.labels),
        },
        "settings": vars(settings) | {"device": device},
        "versions": versions(),
    }
    folder = Path(arguments["output"])
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / NUMBERS, json.dumps(report, indent=1, allow_nan=False) + "\n")
    print("\n" + table(report))
    print(f"Written to {folder}: {NUMBERS}")
    return 0
