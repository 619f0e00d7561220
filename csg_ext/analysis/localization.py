"""Where a class is in an image, read from feature maps without a detector: the maps, and how they are scored.

Maps are low-resolution tensors (N, K, h, w) or (N, h, w), float32 or float64; masks are boolean (N, H, W) and cover the
same field of view. Arguments of another kind are a TypeError, of another shape or range a ValueError. A map is compared
with a mask at the mask's size, upsampled bilinearly (align_corners=False). No map is upsampled pixel by pixel, though,
where there is one for every filter and image:

- an energy is linear in the map, so the mask is brought down to the map's size once, by the transposed upsampling;
- between the centres of its cells an upsampled map is bilinear, so its maximum is at one of the pixels next to them;
- along a row of pixels it is linear from centre to centre, so a thresholded row is a few intervals, whose ends are
  solved for; their overlap with the mask is a difference of the mask's cumulative sums.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = 2**18  # values at once: about ten temporaries of 1 to 2 MiB, which stay in a processor's caches
Progress = Callable[[int, int], None]


# ---- maps


def cam(maps: Tensor, weight: Tensor, classes: Tensor) -> Tensor:
    """The class activation map: sum_k weight[classes[n], k] maps[n, k], (N, h, w).

    maps (N, K, h, w); weight (C, K), that of a linear classifier on globally averaged maps; classes int64 (N,).
    Source: Zhou et al., CVPR 2016, equation 2.
    """
    return _class_map("cam", "weight", maps, weight, classes)


def _class_map(name: str, argument: str, maps: Tensor, weight: Tensor, classes: Tensor) -> Tensor:
    _check_maps(name, maps)
    if weight.dim() != 2 or weight.shape[1] != maps.shape[1]:
        raise ValueError(f"{name}: {argument} must be (C, {maps.shape[1]}) like the maps, got {tuple(weight.shape)}")
    _check_classes(name, classes, len(maps), weight.shape[0])
    return torch.einsum("nk,nkhw->nhw", weight[classes].to(maps.dtype), maps)


def gate_map(maps: Tensor, gate: Tensor, classes: Tensor) -> Tensor:
    """The gate's own map: the maps of the class's filters weighted by the gate's row, (N, h, w).

    A filter belongs to the class of its largest gate entry (the first of equal ones). The map of a class without a
    filter is zero. maps (N, K, h, w), gate (C, K), classes int64 (N,). Raises ValueError for a gate that is constant,
    as before training: it says nothing about any class.
    """
    return _class_map("gate_map", "gate", maps, own_filters(gate), classes)


def own_filters(gate: Tensor) -> Tensor:
    """The gate (C, K) with its largest entry of every column alone, the others zero."""
    if gate.dim() != 2:
        raise ValueError(f"gate_map: gate must be (C, K), got {tuple(gate.shape)}")
    if bool((gate == gate[0, 0]).all()):
        raise ValueError(f"gate_map: gate must be trained, got one that is {float(gate[0, 0]):g} everywhere")
    owner = gate.argmax(0)
    return gate * (owner == torch.arange(len(gate), device=gate.device)[:, None])


def activation_thresholds(maps: Tensor, top: float = 0.3) -> Tensor:
    """For every filter the value that at most the share `top` of its activations over all images exceeds, (K,).

    maps (N, K, h, w). Source: Liang et al., ECCV 2020 (ActivMap, top 30 %), after Bau et al., CVPR 2017.
    """
    _check_maps("activation_thresholds", maps)
    if not 0 < top < 1:
        raise ValueError(f"activation_thresholds: top must lie in (0, 1), got {top}")
    k, count = maps.shape[1], maps.numel() // maps.shape[1]
    rank = max(1, min(count, count - int(top * count + 1e-9)))
    step = max(1, 2**22 // count)  # a copy of 16 MiB at a time
    parts = [maps[:, i : i + step].transpose(0, 1).flatten(1).kthvalue(rank, dim=1).values for i in range(0, k, step)]
    return torch.cat(parts)


def dead_filters(maps: Tensor) -> Tensor:
    """Which filters have one and the same activation everywhere, bool (K,). maps (N, K, h, w)."""
    _check_maps("dead_filters", maps)
    return maps.amax((0, 2, 3)) == maps.amin((0, 2, 3))


def gradient_map(model: nn.Module, images: Tensor, weight: Tensor, sigma: float) -> Tensor:
    """Gradient of a weighted sum of pooled filters with respect to the pixels, blurred, (N, H, W).

    Its L2 norm over the channels is divided by its root mean square over the image (zero gradients stay zero) and
    blurred with a Gaussian; what exceeds 1 counts as the object. model: has forward_features, as GatedModel, and is
    taken in evaluation mode, as a batch's own statistics would mix its images; images (N, channels, H, W); weight
    (N, K): each sample's weights of the filters, such as the gate's row of its class; sigma in pixels.
    Source: Liang et al., ECCV 2020 (GradMap).
    """
    if not sigma > 0:
        raise ValueError(f"gradient_map: sigma must be positive, got {sigma}")
    x = images.detach().requires_grad_()
    with _evaluating(model), torch.enable_grad():
        maps = model.forward_features(x)  # type: ignore[operator]  # torch types attributes of modules as tensors
        if maps.dim() != 4 or maps.shape[:2] != weight.shape:
            raise ValueError(
                f"gradient_map: weight must be (N, K) of maps (N, K, h, w), got {tuple(weight.shape)} and "
                f"{tuple(maps.shape)}"
            )
        (gradient,) = torch.autograd.grad((maps.mean((2, 3)) * weight).sum(), x)
    norm = gradient.square().sum(1).sqrt()
    rms = norm.square().mean((1, 2), keepdim=True).sqrt()
    return gaussian_blur(norm / torch.where(rms > 0, rms, 1), sigma)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, each of its modules as it was afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def gaussian_blur(maps: Tensor, sigma: float) -> Tensor:
    """maps (N, H, W) convolved with a Gaussian of `sigma` pixels, cut off at 3 sigma; edges are repeated."""
    radius = max(1, round(3 * sigma))
    offset = torch.arange(-radius, radius + 1, dtype=maps.dtype, device=maps.device)
    kernel = torch.exp(-0.5 * (offset / sigma) ** 2)
    kernel = kernel / kernel.sum()
    x = F.pad(maps[:, None], (radius,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(x, kernel[None, None, None]), kernel[None, None, :, None])[:, 0]


# ---- upsampling


def _source(size_in: int, size_out: int) -> Tensor:
    """Where the output pixels lie on the axis of the input's cells, clamped to the outer centres, fp64 (size_out,)."""
    pixel = torch.arange(size_out, dtype=torch.float64)
    return ((pixel + 0.5) * size_in / size_out - 0.5).clamp(0, size_in - 1)


def interpolation(size_in: int, size_out: int) -> Tensor:
    """The matrix of bilinear upsampling along one axis, fp64 (size_out, size_in); align_corners=False."""
    source = _source(size_in, size_out)
    low = source.floor().clamp(max=max(size_in - 2, 0)).long()
    share = source - low
    matrix = torch.zeros(size_out, size_in, dtype=torch.float64)
    rows = torch.arange(size_out)
    matrix[rows, low] = 1 - share
    if size_in > 1:
        matrix[rows, low + 1] = share
    return matrix


def upsample(maps: Tensor, size: Sequence[int]) -> Tensor:
    """maps (..., h, w) at `size` (H, W), bilinear; for a few maps: scores of many need none of it."""
    rows, columns = (interpolation(a, b).to(maps) for a, b in zip(maps.shape[-2:], size, strict=True))
    return rows @ maps @ columns.T


def _next_to_centres(size_in: int, size_out: int) -> Tensor:
    """The pixels at which an upsampled axis can have its maximum: the outermost ones between two centres.

    Before the first and beyond the last centre the axis is constant: the pixel at the centre speaks for it.
    """
    pixel = torch.arange(size_out, dtype=torch.float64)
    cell = ((pixel + 0.5) * size_in / size_out - 0.5).floor()
    first = torch.ones(size_out, dtype=torch.bool)
    first[1:] = cell[1:] != cell[:-1]
    last = first.roll(-1)
    last[-1] = True
    return torch.nonzero((first & (cell >= 0)) | (last & (cell < size_in - 1)))[:, 0]


# ---- scores of every map against a mask


def _chunks(n: int, k: int, values: int, chunk: int) -> Iterator[tuple[slice, slice]]:
    """Slices of images and filters whose maps hold at most `chunk` values, one map at least."""
    filters = max(1, min(k, chunk // values))
    images = max(1, min(n, chunk // (values * filters)))
    for i in range(0, n, images):
        for j in range(0, k, filters):
            yield slice(i, min(i + images, n)), slice(j, min(j + filters, k))


class Regions(NamedTuple):
    """Pixels of thresholded maps, int64 (N, K): all, and those inside the mask; with the mask's own, (N,)."""

    area: Tensor
    inside: Tensor
    mask_area: Tensor

    def iou(self) -> Tensor:
        """Intersection over union with the mask, fp64 (N, K); 0 where both are empty."""
        union = self.area + self.mask_area[:, None] - self.inside
        return self.inside.double() / union.clamp(min=1)


def regions(
    maps: Tensor, thresholds: Tensor, masks: Tensor, *, chunk: int = CHUNK, progress: Progress | None = None
) -> Regions:
    """Counts the pixels in which upsampled maps exceed their thresholds, and those of them in the mask.

    maps (N, K, h, w); thresholds broadcastable to (N, K); masks bool (N, H, W). Exact up to pixels whose value
    equals the threshold within rounding. chunk bounds the memory beside the results: about 60 bytes times
    max(chunk, H w). progress hears (maps done, maps in all).
    """
    _check_maps("regions", maps)
    _check_masks("regions", masks, len(maps))
    n, k, h, w = maps.shape
    height, width = masks.shape[1:]
    limits = thresholds.to(maps.dtype).expand(n, k)
    rows = interpolation(h, height).to(maps)
    area = torch.empty(n, k, dtype=torch.int64, device=maps.device)
    inside = torch.empty_like(area)
    done = 0
    for i, j in _chunks(n, k, height * w, chunk):
        if j.start == 0:
            table = F.pad(masks[i].cumsum(2, dtype=torch.int32), (1, 0))  # (n, H, W + 1): mask pixels before x
        # The threshold is taken off first: a constant map that equals it stays exactly zero.
        low = (maps[i, j] - limits[i, j, None, None]).permute(2, 3, 0, 1).flatten(1)
        values = (rows @ low).view(height, w, *area[i, j].shape)
        area[i, j], inside[i, j] = _count(values, table)
        done += area[i, j].numel()
        if progress is not None:
            progress(done, n * k)
    return Regions(area, inside, masks.sum((1, 2)))


def _count(values: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """(pixels > 0, those in the mask), each (n, k), of values (H, w, n, k) at the cells' centres along every row.

    A row that falls through zero at x ends an interval there, one that rises begins one: the pixels before x count once
    positively, once negatively. An interval that reaches the edge ends at W.
    """
    height, w, n, _ = values.shape
    width = table.shape[2] - 1
    positive = values > 0
    change = positive[:, :-1].to(torch.int8) - positive[:, 1:].to(torch.int8)  # 1: falls, -1: rises
    left, right = values[:, :-1], values[:, 1:]
    scale = width / w
    centre = (torch.arange(w - 1, dtype=values.dtype, device=values.device) + 0.5) * scale - 0.5
    x = (left / (left - right)).mul_(scale).add_(centre[:, None, None])
    x = torch.where(change > 0, x.ceil(), x.floor_().add_(1))  # a pixel of value zero is outside either way
    x = x.nan_to_num_().clamp_(0, width).long()  # 0 / 0 where nothing changes
    row = torch.arange(height, device=values.device)[:, None] + height * torch.arange(n, device=values.device)
    before = table.reshape(-1)[x + (row * (width + 1))[:, None, :, None]]
    last, whole = positive[:, -1], table[:, :, -1].T[:, :, None]
    area = (x * change).sum((0, 1)) + last.sum(0) * width
    inside = (before * change).sum((0, 1)) + (whole * last).sum(0)
    return area, inside


class Peaks(NamedTuple):
    """The largest value of upsampled maps and its pixel, each (N, K); constant: maps that have no peak."""

    value: Tensor
    row: Tensor
    column: Tensor
    constant: Tensor

    def hits(self, masks: Tensor) -> Tensor:
        """The pointing game, bool (N, K): whether the peak lies in the mask, bool (N, H, W). A constant map misses.

        Source: Zhang et al., ECCV 2016.
        """
        _check_masks("hits", masks, len(self.value))
        sample = torch.arange(len(masks), device=masks.device)[:, None]
        return masks[sample, self.row, self.column] & ~self.constant


def peaks(maps: Tensor, size: Sequence[int], *, chunk: int = CHUNK) -> Peaks:
    """The maximum of every map, maps (N, K, h, w), upsampled to `size` (H, W); of equal values the first row, column.

    Where the map is constant beyond its outer centres, the pixel next to the centre speaks for the rest. chunk: as in
    regions.
    """
    _check_maps("peaks", maps)
    n, k, h, w = maps.shape
    pixels = [_next_to_centres(a, b) for a, b in zip((h, w), size, strict=True)]
    rows, columns = (interpolation(a, b)[p].to(maps) for a, b, p in zip((h, w), size, pixels, strict=True))
    value = torch.empty(n, k, dtype=maps.dtype, device=maps.device)
    position = torch.empty(n, k, dtype=torch.int64, device=maps.device)
    for i, j in _chunks(n, k, len(rows) * len(columns), chunk):
        value[i, j], position[i, j] = (rows @ maps[i, j] @ columns.T).flatten(2).max(2)
    row, column = (p.to(maps.device) for p in pixels)
    constant = maps.amax((2, 3)) == maps.amin((2, 3))
    return Peaks(value, row[position // len(column)], column[position % len(column)], constant)


def energy(maps: Tensor, masks: Tensor, *, chunk: int = CHUNK) -> Tensor:
    """Share of a map's sum over the pixels that lies in the mask, (N, K); a map without any has 0.

    maps (N, K, h, w), of which the positive part counts; masks bool (N, H, W). A uniform map gets the mask's share of
    the image. chunk: as in regions. Source: Wang et al., Score-CAM, CVPR workshops 2020 (energy-based pointing game).
    """
    _check_maps("energy", maps)
    _check_masks("energy", masks, len(maps))
    rows, columns = (interpolation(a, b).to(maps) for a, b in zip(maps.shape[2:], masks.shape[1:], strict=True))
    inside = rows.T @ masks.to(maps.dtype) @ columns  # the mask at the maps' size, (N, h, w)
    whole = torch.outer(rows.sum(0), columns.sum(0)).expand_as(inside)
    weights = torch.stack([inside, whole], 3).flatten(1, 2)
    shares = torch.empty(maps.shape[:2], dtype=maps.dtype, device=maps.device)
    for i, j in _chunks(len(maps), maps.shape[1], maps[0, 0].numel(), chunk):
        sums = maps[i, j].clamp(min=0).flatten(2) @ weights[i]
        shares[i, j] = sums[..., 0] / torch.where(sums[..., 1] > 0, sums[..., 1], 1)
    return shares


def query_energy(maps: Tensor, masks: Tensor) -> Tensor:
    """With several objects in view: the queried object's share of the energy that lies on any of them, (N, Q).

    maps (N, Q, h, w): the map for each of Q queries; masks bool (N, Q, H, W): object q is what query q asks for. A map
    with no energy on any object has 1 / Q. Two maps that do not depend on the query have 0.5 on average.
    """
    if masks.dim() != 4 or masks.shape[:2] != maps.shape[:2]:
        raise ValueError(
            f"query_energy: masks must be (N, Q, H, W) with maps (N, Q, h, w), got {tuple(masks.shape)} and "
            f"{tuple(maps.shape)}"
        )
    queries = masks.shape[1]
    on = torch.stack([energy(maps, masks[:, q]) for q in range(queries)], 2)  # (N, query, object)
    total = on.sum(2)
    return torch.where(total > 0, on.diagonal(dim1=1, dim2=2) / torch.where(total > 0, total, 1), 1 / queries)


def average_precision(iou: Tensor, thresholds: Sequence[float]) -> Tensor:
    """Share of the samples whose IoU exceeds each of T thresholds, fp64 (T, ...) from iou (N, ...).

    What localization papers call AP at t; the thresholds' sweep shows how far the choice of t decides.
    """
    if len(iou) == 0:
        raise ValueError("average_precision: iou must hold at least one sample, got none")
    return torch.stack([(iou > t).double().mean(0) for t in thresholds])


# ---- boxes


def boxes_from_maps(maps: Tensor, thresholds: Tensor, size: Sequence[int], *, chunk: int = CHUNK) -> Tensor:
    """The smallest box that holds all pixels above the threshold, int64 (N, K, 4): x0, y0, x1, y1, the ends exclusive.

    maps (N, K, h, w); thresholds broadcastable to (N, K); size (H, W). A map that exceeds its threshold nowhere has the
    empty box 0, 0, 0, 0. chunk: as in regions.
    """
    _check_maps("boxes_from_maps", maps)
    n, k = maps.shape[:2]
    limits = thresholds.to(maps.dtype).expand(n, k)
    boxes = torch.empty(n, k, 4, dtype=torch.int64, device=maps.device)
    for i, j in _chunks(n, k, size[0] * size[1], chunk):
        boxes[i, j] = boxes_from_masks(upsample(maps[i, j] - limits[i, j, None, None], size) > 0)
    return boxes


def boxes_from_masks(masks: Tensor) -> Tensor:
    """The box round each of the masks, bool (..., H, W): int64 (..., 4), x0, y0, x1, y1, the ends exclusive; zeros for
    an empty one."""
    found = []
    for axis in (-2, -1):  # along x, then along y
        seen = masks.any(axis)
        length = seen.shape[-1]
        index = torch.arange(length, device=masks.device)
        first = torch.where(seen, index, length).amin(-1)
        end = torch.where(seen, index + 1, 0).amax(-1)
        found.append((torch.minimum(first, end), end))
    (x0, x1), (y0, y1) = found
    return torch.stack([x0, y0, x1, y1], -1)


def box_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of boxes and others, (..., 4) each, broadcast against each other, fp64 (...); 0 where
    both are empty."""
    low, high = torch.maximum(boxes[..., :2], others[..., :2]), torch.minimum(boxes[..., 2:], others[..., 2:])
    overlap = (high - low).clamp(min=0).prod(-1)
    union = sum((b[..., 2:] - b[..., :2]).prod(-1) for b in (boxes, others)) - overlap
    return overlap.double() / torch.as_tensor(union).clamp(min=1)


# ---- summaries


class FilterScores(NamedTuple):
    """Means over the images of each class, fp64 (C, K), and the number of these images, (C,); NaN never occurs.

    success: share of the images with IoU above the limit. Rows of classes without an image are zero.
    """

    iou: Tensor
    success: Tensor
    pointing: Tensor
    energy: Tensor
    images: Tensor

    def classes(self) -> Tensor:
        """For every filter the class on whose images it succeeds most, int64 (K,); -1 for one that never does."""
        best = self.success.max(0)
        return torch.where(best.values > 0, best.indices, -1)

    def own(self, classes: Tensor) -> dict[str, Tensor]:
        """Every score of each filter on the images of its class, (K,); of a filter without a class, 0."""
        index = classes.clamp(min=0)[None]
        return {
            name: torch.where(classes >= 0, getattr(self, name).gather(0, index)[0], 0.0)
            for name in ("iou", "success", "pointing", "energy")
        }


def score_filters(
    maps: Tensor,
    thresholds: Tensor,
    masks: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    success: float = 0.3,
    chunk: int = CHUNK,
    progress: Progress | None = None,
) -> FilterScores:
    """Scores every filter's own map (ActivMap) on the images of every class.

    maps (N, K, h, w); thresholds (K,), as from activation_thresholds; masks bool (N, H, W), none empty; labels int64
    (N,) in [0, num_classes); success: the IoU above which an image counts as found; chunk, progress: as in regions.
    """
    _check_masks("score_filters", masks, len(maps))
    _check_classes("score_filters", labels, len(maps), num_classes)
    iou = regions(maps, thresholds, masks, chunk=chunk, progress=progress).iou()
    one_hot = F.one_hot(labels, num_classes).double().T
    counts = one_hot.sum(1)
    hits = peaks(maps, masks.shape[1:], chunk=chunk).hits(masks)
    iou_means, success_means, pointing, energies = (
        one_hot @ s.double() / counts.clamp(min=1)[:, None]
        for s in (iou, iou > success, hits, energy(maps, masks, chunk=chunk))
    )
    return FilterScores(iou_means, success_means, pointing, energies, counts.long())


# ---- checks


def _check_maps(name: str, maps: Any) -> None:
    if not isinstance(maps, Tensor) or maps.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name}: maps must be a float32 or float64 tensor, got {getattr(maps, 'dtype', type(maps))}")
    if maps.dim() != 4 or maps.numel() == 0:
        raise ValueError(f"{name}: maps must be (N, K, h, w) and not empty, got {tuple(maps.shape)}")
    if not bool(torch.isfinite(maps.sum())) and not bool(torch.isfinite(maps).all()):
        raise ValueError(f"{name}: maps must be finite, got NaN or infinite values")


def _check_masks(name: str, masks: Any, count: int) -> None:
    if not isinstance(masks, Tensor) or masks.dtype != torch.bool:
        raise TypeError(f"{name}: masks must be a bool tensor, got {getattr(masks, 'dtype', type(masks))}")
    if masks.dim() != 3 or len(masks) != count or masks.numel() == 0:
        raise ValueError(f"{name}: masks must be ({count}, H, W), one per image, got {tuple(masks.shape)}")


def _check_classes(name: str, classes: Any, count: int, num_classes: int) -> None:
    if not isinstance(classes, Tensor) or classes.dtype != torch.int64:
        raise TypeError(f"{name}: classes must be an int64 tensor, got {getattr(classes, 'dtype', type(classes))}")
    if classes.shape != (count,):
        raise ValueError(f"{name}: classes must be ({count},), one per image, got {tuple(classes.shape)}")
    if count and not 0 <= int(classes.min()) <= int(classes.max()) < num_classes:
        raise ValueError(
            f"{name}: classes must lie in [0, {num_classes}), got {int(classes.min())} to {int(classes.max())}"
        )
