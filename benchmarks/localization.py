"""Seconds of scoring every filter's map on every image, beside a loop over the filters.

    python benchmarks/localization.py [--images N] [--filters K] [--slice K] [--threads T] [--write]

Scores random maps (4 x 4, at 128 x 128: IoU, AP, pointing game, energy, per class) of K filters, with a bar, and the
same on a slice of them beside a loop that upsamples and thresholds one filter's maps at a time; the slice's ratio is
the median over three turns. --write puts the result into docs/localization.md.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from csg_ext.analysis import localization as loc
from csg_ext.info import processor

SIZE, CLASSES, SUCCESS = (128, 128), 20, 0.3
PAGE = Path(__file__).parents[1] / "docs" / "localization.md"


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


def speed(images: int, filters: int, part: int) -> list[str]:
    """What was measured, as sentences: the seconds for all filters, and the ratio on a slice."""
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
    lines = [
        f"{filters} filters, {images} images, {SIZE[0]} x {SIZE[1]}, {torch.get_num_threads()} threads: "
        f"{seconds:.1f} s; peak memory {grown:.0f} MiB above that of the maps ({maps.nbytes / 2**20:.0f} MiB)"
    ]
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
    ratio = statistics.median(ratios)
    return [*lines, f"{part} of the filters: a loop over the filters takes {ratio:.1f} times as long"]


def write(lines: list[str]) -> None:
    """Puts the measurement between the marks in docs/localization.md."""
    begin, end = "<!-- begin: benchmarks/localization.py --write -->", "<!-- end -->"
    text = PAGE.read_text()
    if begin not in text or end not in text.split(begin)[1]:
        raise SystemExit(f"{PAGE} must hold the lines {begin} and {end}")
    head, rest = text.split(begin, 1)
    date = time.strftime("%Y-%m-%d", time.gmtime())
    measured = "\n".join(f"- {line}" for line in [*lines, f"{processor()}, torch {torch.__version__}, {date}"])
    PAGE.write_text(f"{head}{begin}\n\n{measured}\n\n{end}{rest.split(end, 1)[1]}")


def main() -> None:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1700)
    parser.add_argument("--filters", type=int, default=2048)
    parser.add_argument("--slice", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="write the result into docs/localization.md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lines = speed(args.images, args.filters, args.slice)
    print("\n".join(lines))
    if args.write:
        write(lines)


if __name__ == "__main__":
    main()
