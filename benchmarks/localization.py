"""Seconds of scoring every filter's map on every image, beside a loop over the filters, and CAM beside Grad-CAM.

    python benchmarks/localization.py [--images N] [--filters K] [--slice K] [--threads T]
    python benchmarks/localization.py --run RUN --data SCENES.npz

The first form scores random maps (4 x 4, at 128 x 128: IoU, AP, pointing game, energy, per class) of K filters, with a
bar, and the same on a slice of the filters beside a loop that upsamples and thresholds one filter's maps at a time;
the slice's ratio is the median over three turns. The second scores Grad-CAM of the library pytorch-grad-cam on a
run's checkpoints with the same thresholds and masks as csg-ext localize. It needs what `make test` installs.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from csg_ext import localize
from csg_ext.analysis import localization as loc

SIZE, CLASSES, SUCCESS = (128, 128), 20, 0.3


def loop_over_filters(maps, thresholds, masks):
    """IoU, peaks' hits and energy, each (N, K), as one writes them first: one filter after the other."""
    scores = [], [], []
    sample = torch.arange(len(maps))
    for k in range(maps.shape[1]):
        up = F.interpolate(maps[:, k : k + 1], size=SIZE, mode="bilinear", align_corners=False)[:, 0]
        region = up > thresholds[k]
        scores[0].append((region & masks).sum((1, 2)) / (region | masks).sum((1, 2)).clamp(min=1))
        scores[1].append(masks.flatten(1)[sample, up.flatten(1).argmax(1)])
        positive = up.clamp(min=0)
        scores[2].append((positive * masks).sum((1, 2)) / positive.sum((1, 2)).clamp(min=1e-12))
    return [torch.stack(s, 1) for s in scores]


def speed(images: int, filters: int, part: int) -> None:
    """Prints the seconds for all filters and the ratio on a slice."""
    from tqdm import tqdm

    torch.manual_seed(0)
    maps = torch.randn(images, filters, 4, 4).relu_()
    labels = torch.arange(images) % CLASSES
    masks = torch.zeros(images, *SIZE, dtype=torch.bool)
    for mask, (y, x, height, width) in zip(masks, torch.randint(8, 64, (images, 4)).tolist(), strict=True):
        mask[y : y + height, x : x + width] = True
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.perf_counter()
    with tqdm(total=images * filters, unit="map", unit_scale=True) as bar:
        thresholds = loc.activation_thresholds(maps)
        loc.score_filters(
            maps, thresholds, masks, labels, CLASSES, success=SUCCESS, progress=lambda n, _: bar.update(n - bar.n)
        )
    seconds = time.perf_counter() - begun
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(
        f"{filters} filters, {images} images, {SIZE[0]} x {SIZE[1]}, {torch.get_num_threads()} threads: "
        f"{seconds:.1f} s; peak memory {grown:.0f} MiB above that of the maps ({maps.nbytes / 2**20:.0f} MiB)"
    )
    few, ratios = maps[:, :part].contiguous(), []
    limits = loc.activation_thresholds(few)
    for _ in range(3):
        begun = time.perf_counter()
        loop = loop_over_filters(few, limits, masks)
        middle = time.perf_counter()
        iou = loc.regions(few, limits, masks).iou()
        loc.peaks(few, SIZE).hits(masks)
        share = loc.energy(few, masks)
        ratios.append((middle - begun) / (time.perf_counter() - middle))
    assert (loop[0] - iou).abs().max() < 1e-3 and (loop[2] - share).abs().max() < 1e-3
    print(f"{part} filters: a loop over the filters takes {statistics.median(ratios):.1f} times as long")


def grad_cam(run: Path, data_file: Path) -> None:
    """Prints the scores of pytorch-grad-cam's GradCAM on both arms of a run, true classes as targets."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import model_zoo  # makes torchvision, which the library imports, importable

    sys.path.append(str(model_zoo.ZOO))
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    from csg_ext.data.batches import normalise
    from csg_ext.runs import checkpoint_files, load_source, read_checkpoint, restore, training_statistics

    for file in checkpoint_files(run):
        stored = read_checkpoint(file)
        data = load_source(stored.run["source"] | {"data": str(data_file), "imbalance": None, "hold_out": None})
        model = restore(stored, data).eval()
        part = localize.masked_scenes(data, localize.read_arrays(data_file)).scored
        found = []
        with GradCAM(model=model, target_layers=[model.backbone]) as method:
            for start in range(0, len(part.labels), 250):
                rows = slice(start, start + 250)
                x = normalise(part.images[rows], *training_statistics(stored, data))
                targets = [ClassifierOutputTarget(int(c)) for c in part.labels[rows]]
                found.append(torch.from_numpy(method(input_tensor=x, targets=targets)))
        settings = localize.Settings()
        scores = localize.score_maps(torch.cat(found), part.masks, part.labels, len(data.classes), None, settings)
        numbers = "  ".join(f"{name} {scores[name]:.3f}" for name, _ in localize.SCORES)
        print(f"{file.parent.name}: Grad-CAM of pytorch-grad-cam: {numbers}")


def main() -> None:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1700)
    parser.add_argument("--filters", type=int, default=2048)
    parser.add_argument("--slice", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--data", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.run:
        if args.data is None:
            parser.error("--run needs --data SCENES.npz")
        grad_cam(args.run, args.data)
    else:
        speed(args.images, args.filters, args.slice)


if __name__ == "__main__":
    main()
