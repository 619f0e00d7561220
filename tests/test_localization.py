"""Tests of the localization: every score against a loop over upsampled maps in fp64, hostile input, the command."""

from __future__ import annotations

import json
import runpy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from csg_ext import cli, localize
from csg_ext.analysis import localization as loc
from csg_ext.analysis import scenes
from csg_ext.data import load_images
from csg_ext.nn import GatedModel

SIZES = [((4, 4), (24, 24)), ((3, 5), (10, 17)), ((1, 3), (6, 4)), ((5, 1), (5, 9)), ((4, 6), (4, 6)), ((7, 7), (5, 6))]


def _masks(n, height, width):
    """Boxes with ragged edges: none empty."""
    masks = torch.rand(n, height, width) < 0.3
    masks[:, height // 4 : height // 2 + 1, width // 4 : width // 2 + 1] = True
    return masks


def _naive_upsample(maps, size):
    return F.interpolate(maps[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]


def _iou(region, mask):
    return int((region & mask).sum()) / int((region | mask).sum())


# ---- scores against loops


@pytest.mark.parametrize("small, large", SIZES)
def test_interpolation_is_that_of_torch(small, large):
    maps = torch.randn(3, 2, *small, dtype=torch.float64)
    expected = F.interpolate(maps, size=large, mode="bilinear", align_corners=False)
    torch.testing.assert_close(loc.upsample(maps, large), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("small, large", SIZES)
@pytest.mark.parametrize("chunk", [1, 200, 2**19])
def test_regions_are_those_of_a_loop(small, large, chunk):
    n, k = 5, 7
    maps = torch.randn(n, k, *small, dtype=torch.float64)
    thresholds, masks = torch.randn(n, k, dtype=torch.float64) * 0.5, _masks(n, *large)
    heard = []
    found = loc.regions(maps, thresholds, masks, chunk=chunk, progress=lambda done, total: heard.append((done, total)))
    for i in range(n):
        for j in range(k):
            region = _naive_upsample(maps[i, j], large) > thresholds[i, j]
            assert found.area[i, j] == region.sum()
            assert found.inside[i, j] == (region & masks[i]).sum()
            assert found.iou()[i, j] == pytest.approx(_iou(region, masks[i]), abs=1e-12)
    assert heard[-1] == (n * k, n * k) and [d for d, _ in heard] == sorted(d for d, _ in heard)


@pytest.mark.parametrize("small, large", SIZES)
def test_regions_of_whole_numbers_exclude_pixels_at_the_threshold(small, large):
    # Small integers meet the threshold at the cells' centres, and their differences are exact powers of two there.
    maps = torch.randint(0, 3, (6, 4, *small)).double() * 2
    masks = _masks(6, *large)
    up = loc.upsample(maps - 2, large)
    sure = up.abs() > 1e-9  # elsewhere a pixel equals the threshold within rounding
    sure |= up == 0
    found = loc.regions(maps, torch.tensor(2.0), masks)
    region = (up > 0) & sure
    unsure = (~sure).sum((2, 3))
    assert ((found.area - region.sum((2, 3))).abs() <= unsure).all()
    exact = unsure == 0
    assert exact.any()
    assert torch.equal(found.area[exact], region.sum((2, 3))[exact])
    assert torch.equal(found.inside[exact], (region & masks[:, None]).sum((2, 3))[exact])


def test_regions_at_the_threshold_without_upsampling():
    maps = torch.randint(0, 3, (4, 3, 6, 8)).float()
    masks = _masks(4, 6, 8)
    found = loc.regions(maps, torch.tensor(1.0), masks)
    assert torch.equal(found.area, (maps > 1).sum((2, 3)))
    assert torch.equal(found.inside, ((maps > 1) & masks[:, None]).sum((2, 3)))


def test_regions_in_fp32_differ_by_few_pixels():
    maps, masks = torch.randn(20, 30, 4, 4).relu(), _masks(20, 64, 64)
    thresholds = loc.activation_thresholds(maps)
    single = loc.regions(maps, thresholds, masks)
    double = loc.regions(maps.double(), thresholds, masks)
    assert (single.area - double.area).abs().max() <= 3  # of 4096
    assert (single.iou() - double.iou()).abs().max() < 2e-3


@pytest.mark.parametrize("small, large", SIZES)
@pytest.mark.parametrize("chunk", [1, 2**19])
def test_peaks_are_the_maxima_of_upsampled_maps(small, large, chunk):
    n, k = 4, 6
    maps, masks = torch.randn(n, k, *small, dtype=torch.float64), _masks(n, *large)
    found = loc.peaks(maps, large, chunk=chunk)
    hits = found.hits(masks)
    for i in range(n):
        for j in range(k):
            up = _naive_upsample(maps[i, j], large)
            row, column = found.row[i, j], found.column[i, j]
            assert found.value[i, j] == pytest.approx(float(up.max()), abs=1e-12)
            assert up[row, column] == pytest.approx(float(up.max()), abs=1e-12)
            assert hits[i, j] == masks[i, row, column]


def test_peak_of_an_outer_cell_is_beside_its_centre():
    maps = torch.zeros(1, 1, 4, 4)
    maps[0, 0, 0, 3] = 1
    found = loc.peaks(maps, (32, 32))  # cells of 8 pixels: centres between pixels 3 and 4, and 27 and 28
    assert (int(found.row), int(found.column)) == (3, 28)


@pytest.mark.parametrize("small, large", SIZES)
@pytest.mark.parametrize("chunk", [1, 2**19])
def test_energy_is_that_of_a_loop(small, large, chunk):
    n, k = 4, 5
    maps, masks = torch.randn(n, k, *small, dtype=torch.float64), _masks(n, *large)
    found = loc.energy(maps, masks, chunk=chunk)
    for i in range(n):
        for j in range(k):
            up = _naive_upsample(maps[i, j].clamp(min=0), large)
            expected = float((up * masks[i]).sum() / up.sum()) if up.sum() > 0 else 0.0
            assert found[i, j] == pytest.approx(expected, abs=1e-12)


def test_energy_of_a_uniform_map_is_the_share_of_the_mask():
    masks = _masks(6, 20, 30)
    found = loc.energy(torch.full((6, 2, 4, 4), 0.7), masks)
    torch.testing.assert_close(found, masks.float().mean((1, 2))[:, None].expand(6, 2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("small, large", SIZES)
@pytest.mark.parametrize("chunk", [1, 2**19])
def test_boxes_are_those_of_a_loop(small, large, chunk):
    n, k = 3, 5
    maps, thresholds = torch.randn(n, k, *small, dtype=torch.float64), torch.rand(k, dtype=torch.float64)
    found = loc.boxes_from_maps(maps, thresholds, large, chunk=chunk)
    for i in range(n):
        for j in range(k):
            rows, columns = np.nonzero((_naive_upsample(maps[i, j], large) > thresholds[j]).numpy())
            box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] if len(rows) else [0, 0, 0, 0]
            assert found[i, j].tolist() == box


def test_box_iou_is_that_of_painted_boxes():
    corner = torch.randint(0, 8, (50, 2, 2))
    boxes = torch.cat([corner, corner + torch.randint(0, 6, (50, 2, 2))], 2)
    painted = torch.zeros(50, 2, 16, 16, dtype=torch.bool)
    for i in range(50):
        for j in range(2):
            x0, y0, x1, y1 = boxes[i, j].tolist()
            painted[i, j, y0:y1, x0:x1] = True
    one, other = painted[:, 0], painted[:, 1]
    expected = (one & other).sum((1, 2)) / (one | other).sum((1, 2)).clamp(min=1)
    torch.testing.assert_close(loc.box_iou(boxes[:, 0], boxes[:, 1]), expected.double(), rtol=0, atol=1e-6)
    full = (one.sum((1, 2)) > 0).nonzero()[:, 0]
    assert torch.equal(loc.boxes_from_masks(one)[full], boxes[full, 0])


def test_average_precision_is_the_share_above_each_threshold():
    iou = torch.rand(40, 3, dtype=torch.float64)
    found = loc.average_precision(iou, [0.0, 0.3, 0.9, 1.0])
    for t, row in zip([0.0, 0.3, 0.9, 1.0], found, strict=True):
        assert row.tolist() == pytest.approx([sum(v > t for v in iou[:, k].tolist()) / 40 for k in range(3)])
    assert (found[1:] <= found[:-1]).all()
    with pytest.raises(ValueError, match="average_precision: iou must hold at least one sample, got none"):
        loc.average_precision(torch.zeros(0), [0.5])


def test_filter_scores_are_those_of_a_loop():
    n, k, classes = 30, 6, 4
    maps = torch.randn(n, k, 3, 4, dtype=torch.float64)
    masks, labels = _masks(n, 12, 11), torch.randint(0, classes - 1, (n,))  # the last class has no image
    thresholds = loc.activation_thresholds(maps)
    found = loc.score_filters(maps, thresholds, masks, labels, classes, success=0.25)
    assert found.images.tolist() == torch.bincount(labels, minlength=classes).tolist()
    for c in range(classes):
        for j in range(k):
            rows = [i for i in range(n) if labels[i] == c]
            ious, energies = [], []
            for i in rows:
                up = _naive_upsample(maps[i, j], (12, 11))
                region = up > thresholds[j]
                ious.append(_iou(region, masks[i]))
                positive = _naive_upsample(maps[i, j].clamp(min=0), (12, 11))
                energies.append(float((positive * masks[i]).sum() / positive.sum()))
            expected = [np.mean(ious), np.mean(np.array(ious) > 0.25), np.mean(energies)] if rows else [0.0, 0.0, 0.0]
            assert [found.iou[c, j], found.success[c, j], found.energy[c, j]] == pytest.approx(expected, abs=1e-9)
    own = found.classes()
    for j in range(k):
        best = max(range(classes), key=lambda c: float(found.success[c, j]))
        assert own[j] == (best if found.success[best, j] > 0 else -1)
        assert found.own(own)["iou"][j] == (found.iou[own[j], j] if own[j] >= 0 else 0)


# ---- maps


def test_cam_weighs_the_maps_of_each_sample():
    maps, weight, classes = torch.randn(5, 6, 3, 4), torch.randn(7, 6), torch.randint(0, 7, (5,))
    expected = torch.stack([sum(weight[c, k] * maps[i, k] for k in range(6)) for i, c in enumerate(classes)])
    torch.testing.assert_close(loc.cam(maps, weight, classes), expected)


def test_cam_averages_to_the_logit():
    model = GatedModel(torch.nn.Conv2d(3, 6, 3), 4, 6)
    x, classes = torch.randn(5, 3, 8, 8), torch.randint(0, 4, (5,))
    with torch.no_grad():
        found = loc.cam(model.forward_features(x), model.classifier.weight, classes).mean((1, 2))
        logit = (model(x) - model.classifier.bias)[torch.arange(5), classes]
    torch.testing.assert_close(found, logit)


def test_cam_is_grad_cam_of_a_globally_pooled_network(monkeypatch):
    import model_zoo  # makes torchvision, which the library imports, importable

    monkeypatch.syspath_prepend(model_zoo.ZOO)
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model = GatedModel(torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3, stride=2), torch.nn.ReLU()), 4, 6).eval()
    x, classes = torch.randn(5, 3, 16, 20), torch.randint(0, 4, (5,))
    with GradCAM(model=model, target_layers=[model.backbone]) as method:
        expected = method(input_tensor=x, targets=[ClassifierOutputTarget(int(c)) for c in classes])
    with torch.no_grad():
        found = loc.cam(model.forward_features(x), model.classifier.weight, classes).clamp(min=0)
    up = loc.upsample(found, (16, 20))
    low, high = up.amin((1, 2), keepdim=True), up.amax((1, 2), keepdim=True)
    torch.testing.assert_close((up - low) / (high - low), torch.from_numpy(expected), rtol=1e-4, atol=1e-4)
    assert (high > low).all()


def test_gate_map_holds_the_filters_of_the_class_alone():
    maps = torch.rand(4, 5, 3, 3)
    gate = torch.tensor([[1.0, 0.2, 0.0, 1.0, 0.4], [0.1, 1.0, 1.0, 0.3, 1.0], [0.0, 0.0, 0.1, 0.0, 0.2]])
    found = loc.gate_map(maps, gate, torch.tensor([0, 1, 2, 1]))
    torch.testing.assert_close(found[0], maps[0, 0] + maps[0, 3])
    torch.testing.assert_close(found[1], maps[1, 1] + maps[1, 2] + maps[1, 4])
    assert (found[2] == 0).all()  # a class without a filter
    torch.testing.assert_close(found[3], maps[3, 1] + maps[3, 2] + maps[3, 4])
    with pytest.raises(ValueError, match="gate_map: gate must be trained, got one that is 0.5 everywhere"):
        loc.gate_map(maps, torch.full((3, 5), 0.5), torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize("top", [0.05, 0.3, 0.75])
def test_activation_thresholds_leave_the_top_share(top):
    maps = torch.randn(11, 6, 3, 5, dtype=torch.float64)
    found = loc.activation_thresholds(maps, top)
    values = maps.transpose(0, 1).reshape(6, -1)
    kept = int(top * values.shape[1] + 1e-9)
    assert torch.equal((values > found[:, None]).sum(1), torch.full((6,), kept))
    sparse = (torch.rand(11, 6, 3, 5) < 0.1).float()
    assert (sparse > loc.activation_thresholds(sparse, top)[:, None, None]).float().mean() <= top


def test_gradient_map_is_that_of_differences():
    model = GatedModel(torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3, padding=1), torch.nn.Softplus()), 3, 4).double()
    images, weight = torch.randn(2, 2, 6, 7, dtype=torch.float64), torch.rand(2, 4, dtype=torch.float64)
    norm = torch.zeros(2, 6, 7, dtype=torch.float64)
    with torch.no_grad():
        for position in np.ndindex(2, 6, 7):
            step = torch.zeros(2, 6, 7, dtype=torch.float64)
            step[position] = 1e-5
            up, down = ((model.pooled_features(images + sign * step) * weight).sum(1) for sign in (1, -1))
            norm[:, position[1], position[2]] += ((up - down) / 2e-5) ** 2
    norm = norm.sqrt()
    scaled = norm / norm.square().mean((1, 2), keepdim=True).sqrt()
    found = loc.gradient_map(model, images, weight, sigma=0.8)
    torch.testing.assert_close(found, loc.gaussian_blur(scaled, 0.8), rtol=1e-6, atol=1e-7)
    assert model.classifier.weight.grad is None and not images.requires_grad
    still = loc.gradient_map(model, images, torch.zeros(2, 4, dtype=torch.float64), sigma=0.8)
    assert (still == 0).all()


def test_blur_is_that_of_scipy():
    from scipy.ndimage import gaussian_filter

    maps = torch.rand(3, 12, 9, dtype=torch.float64)
    expected = [gaussian_filter(m, 1.5, mode="nearest", radius=4) for m in maps.numpy()]
    torch.testing.assert_close(loc.gaussian_blur(maps, 1.5), torch.as_tensor(np.array(expected)), rtol=0, atol=1e-12)


# ---- two objects in view


def test_query_energy_is_half_on_average_for_maps_blind_to_the_query():
    masks = torch.zeros(20, 2, 16, 16, dtype=torch.bool)
    masks[:, 0, 2:9, 1:6], masks[:, 1, 5:15, 8:11] = True, True
    blind = torch.rand(20, 1, 4, 4, dtype=torch.float64).expand(20, 2, 4, 4)
    found = loc.query_energy(blind, masks)
    torch.testing.assert_close(found.sum(1), torch.ones(20, dtype=torch.float64))
    assert (found[:, 0] - 0.5).abs().max() > 0.01
    assert torch.equal(loc.query_energy(torch.zeros(20, 2, 4, 4), masks), torch.full((20, 2), 0.5))


def test_query_energy_of_maps_on_their_object_is_one():
    masks = torch.zeros(1, 2, 16, 16, dtype=torch.bool)
    masks[0, 0, :4, :4], masks[0, 1, 12:, 12:] = True, True
    maps = torch.zeros(1, 2, 16, 16)
    maps[0, 0, 1, 1], maps[0, 1, 13, 14] = 1, 3
    assert loc.query_energy(maps, masks).tolist() == [[1, 1]]
    assert loc.query_energy(maps.flip(1), masks).tolist() == [[0, 0]]


# ---- dead filters, odd input


def test_constant_maps_give_no_nan_and_are_shown_as_dead():
    n, k = 12, 5
    maps = torch.rand(n, k, 4, 4)
    maps[:, 1] = 0
    maps[:, 3] = 0.7
    masks, labels = _masks(n, 16, 16), torch.arange(n) % 3
    assert loc.dead_filters(maps).tolist() == [False, True, False, True, False]
    found = loc.score_filters(maps, loc.activation_thresholds(maps), masks, labels, 3)
    for scores in found:
        assert torch.isfinite(scores).all()
    assert found.classes()[[1, 3]].tolist() == [-1, -1]
    assert (found.iou[:, [1, 3]] == 0).all() and (found.pointing[:, [1, 3]] == 0).all()
    assert (found.energy[:, 1] == 0).all()


def test_odd_input_is_refused():
    maps, masks, limit = torch.rand(3, 2, 4, 4), _masks(3, 8, 8), torch.tensor(0.5)
    with pytest.raises(TypeError, match=r"regions: masks must be a bool tensor, got torch\.uint8"):
        loc.regions(maps, limit, masks.byte())
    with pytest.raises(ValueError, match=r"regions: masks must be \(3, H, W\), one per image, got \(2, 8, 8\)"):
        loc.regions(maps, limit, masks[:2])
    with pytest.raises(ValueError, match=r"energy: masks must be \(3, H, W\), one per image, got \(3, 1, 8, 8\)"):
        loc.energy(maps, masks[:, None])
    with pytest.raises(ValueError, match=r"peaks: maps must be \(N, K, h, w\) and not empty, got \(3, 4, 4\)"):
        loc.peaks(maps[:, 0], (8, 8))
    for kind in (torch.int64, torch.bfloat16):  # in bfloat16 a pixel's position would not be exact
        with pytest.raises(TypeError, match=f"energy: maps must be a float32 or float64 tensor, got {kind}"):
            loc.energy(maps.to(kind), masks)
    bad = maps.clone()
    bad[1, 1, 2, 2] = float("nan")
    with pytest.raises(ValueError, match="regions: maps must be finite, got NaN or infinite values"):
        loc.regions(bad, limit, masks)
    with pytest.raises(ValueError, match=r"cam: classes must lie in \[0, 4\), got 0 to 4"):
        loc.cam(maps, torch.rand(4, 2), torch.tensor([0, 4, 1]))
    with pytest.raises(ValueError, match=r"cam: weight must be \(C, 2\) like the maps, got \(4, 3\)"):
        loc.cam(maps, torch.rand(4, 3), torch.tensor([0, 1, 1]))
    with pytest.raises(ValueError, match=r"activation_thresholds: top must lie in \(0, 1\), got 1"):
        loc.activation_thresholds(maps, 1)


# ---- scenes


def _shirts(count):
    """Grey items: a frame whose hole is filled, a cut-off one and a bar, by turns."""
    items = np.zeros((count, 28, 28), np.uint8)
    items[0::3, 4:24, 6:22], items[0::3, 10:18, 10:18] = 200, 0
    items[1::3] = 90
    items[2::3, 2:26, 11:17] = 120
    return items


def test_item_masks_are_filled_and_cut_off_items_refused():
    items = _shirts(6)
    items[0, 0, 0] = 8  # no brighter than what counts as background
    masks, usable = scenes.item_masks(items)
    frame = np.zeros((28, 28), bool)
    frame[4:24, 6:22] = True
    assert (masks[0] == frame).all() and (masks[3] == frame).all()
    assert usable.tolist() == [True, False, True, True, False, True]


@pytest.mark.parametrize("objects", [1, 2])
def test_scenes_are_seeded_and_their_masks_exact(objects):
    items, labels = _shirts(30), np.arange(30) % 3 // 2  # class 0: frames and unusable ones; class 1: bars
    photos = [np.random.default_rng(1).integers(0, 256, (3, 60, 70), np.uint8), np.full((3, 40, 41), 7, np.uint8)]
    found = scenes.make_scenes(items, labels, photos, 20, objects, seed=3)
    again = scenes.make_scenes(items, labels, photos, 8, objects, seed=3)
    for one, two in zip(found, again, strict=True):
        assert (one[:8] == two).all()
    assert (found.images != scenes.make_scenes(items, labels, photos, 20, objects, seed=4).images).any()
    assert found.labels[:, 0].tolist() == [0, 1] * 10
    area = found.masks.sum((2, 3))
    assert area.min() > 0
    if objects == 2:
        assert (found.labels[:, 0] != found.labels[:, 1]).all()
        assert not (found.masks[:, 0] & found.masks[:, 1]).any()
    # Over a background of one colour, that colour is outside the masks and the tinted item inside.
    plain = scenes.make_scenes(items, labels, [np.full((3, 50, 50), 7, np.uint8)], 20, objects, seed=3)
    outside = ~plain.masks.any(1)
    assert (np.moveaxis(plain.images, 1, -1)[outside] == 7).all()
    inside = np.moveaxis(plain.images, 1, -1)[~outside].max(1)
    assert (inside > 7).mean() > 0.8


def test_photographs_and_items_of_both_parts_are_disjoint():
    assert not set(scenes.PHOTOS["train"]) & set(scenes.PHOTOS["test"])
    for part in ("train", "test"):
        for photo in scenes.photographs(part):
            assert photo.dtype == np.uint8 and photo.ndim == 3 and len(photo) == 3 and min(photo.shape[1:]) >= 160


def test_the_benchmark_file_is_a_training_set_with_masks(tmp_path, capsys):
    file = tmp_path / "scenes.npz"
    assert scenes.main([str(file), "--seed", "5", "--train", "20", "--test", "10", "--pairs", "4"]) == 0
    assert "20 train, 10 test and 4 pair scenes" in capsys.readouterr().out
    data = load_images(file)
    assert data.test_images.shape == (10, 3, 40, 40) and data.classes == load_images().classes
    with np.load(file) as arrays:
        assert arrays["test_masks"].shape == (10, 40, 40) and arrays["train_masks"].dtype == bool
        assert arrays["pair_masks"].shape == (4, 2, 40, 40) and arrays["pair_labels"].shape == (4, 2)


# ---- a network whose filters are known


def _squares(labels):
    """16 x 16 images with a 4 x 4 square of the class's colour (red, green, blue) for each label (N, objects)."""
    images = np.zeros((len(labels), 3, 16, 16), np.uint8)
    masks = torch.zeros(*labels.shape, 16, 16, dtype=torch.bool)
    for i, classes in enumerate(labels.tolist()):
        for q, c in enumerate(classes):
            square = (slice(2 + i % 9, 6 + i % 9), slice(1 + 8 * q, 5 + 8 * q))
            images[i, c][square] = 255
            masks[i, q][square] = True
    return images, masks


@pytest.fixture
def planted():
    """Filters red, green, blue and dead; the gate gives blue to green's class: the class of blue has none."""
    model = GatedModel(torch.nn.Conv2d(3, 4, 1, bias=False), 3, 4)
    with torch.no_grad():
        model.backbone.weight.copy_(torch.eye(4, 3)[:, :, None, None])
        model.classifier.weight.fill_(1)
        model.classifier.bias.zero_()
        model.gate.copy_(torch.tensor([[1.0, 0, 0.1, 1], [0, 1, 1, 0.5], [0.2, 0, 0.3, 0]]))
    labels = torch.arange(30)[:, None] % 3
    images, masks = _squares(labels)
    part = localize.Part(images, labels[:, 0], masks[:, 0])
    pairs = torch.tensor([[0, 1], [1, 0]] * 5)
    found, both = _squares(pairs)
    return model, localize.Scenes(part, part, localize.Part(found, pairs, both), 0)


def test_filters_and_gate_of_a_planted_network_find_their_class(planted):
    model, data = planted
    found = localize.localize(model, data, ([0.0] * 3, [1.0] * 3), localize.Settings())
    json.dumps(found, allow_nan=False)
    assert found["filters"]["class"] == [0, 1, 2, -1] and found["filters"]["dead"] == [3]
    assert found["filters"]["gate_class"] == [0, 1, 1, 0]
    assert found["filters"]["without_class"] == 1 and found["classes_without_filter"] == [2]
    assert found["filters"]["gate_class_agreement"] == pytest.approx(2 / 3)
    assert found["filters"]["mean"] == {"iou": 1, "success": 1, "pointing": 1, "energy": pytest.approx(1)}
    # Of the filters that belong to each class by the gate, blue and the dead one never see it.
    assert found["filters"]["mean_on_gate_class"]["iou"] == 0.5
    gate = found["methods"]["gate"]["per_class"]
    for score in ("iou", "box_iou", "pointing", "energy"):
        assert gate[score] == pytest.approx([1, 1, 0])
    assert found["methods"]["cam"]["iou"] == 1  # every filter weighs the same, and there is one object
    assert found["query"]["gate"]["energy"] == pytest.approx(1) and found["query"]["gate"]["picked"] == 1
    assert found["query"]["cam"]["energy"] == 0.5 and found["query"]["cam"]["picked"] == 0.5
    assert found["images_wrong"] == 20  # all logits are equal: the first class


def test_images_that_the_network_gets_wrong_can_be_left_out(planted):
    model, data = planted
    found = localize.localize(model, data, ([0.0] * 3, [1.0] * 3), localize.Settings(only_correct=True))
    assert found["images"] == 10 and found["images_wrong"] == 20
    assert found["methods"]["gate"]["iou"] == 1
    assert found["methods"]["gate"]["per_class"]["iou"] == [1, None, None]
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([0.0, 0, 1]))
        model.classifier.weight[2] = 0
    wrong = localize.Part(data.scored.images, torch.ones(30, dtype=torch.int64), data.scored.masks)
    with pytest.raises(ValueError, match="only_correct leaves no image: the network gets every one wrong"):
        localize.localize(
            model,
            localize.Scenes(wrong, wrong, None, 0),
            ([0.0] * 3, [255.0] * 3),
            localize.Settings(only_correct=True),
        )


def test_without_a_gate_gradients_take_the_filters_that_find_the_class(planted):
    model, data = planted
    with torch.no_grad():
        model.gate.fill_(0.5)
    found = localize.localize(model, data, ([0.0] * 3, [1.0] * 3), localize.Settings())
    reason = "the checkpoint has no trained gate: its entries are all 0.5"
    assert found["methods"]["gate"] == found["query"]["gate"] == {"unavailable": reason}
    assert "gate_class" not in found["filters"] and found["classes_without_filter"] == []


@pytest.mark.parametrize("name", ["above", "top", "success"])
@pytest.mark.parametrize("value", [0, 1, float("nan")])
def test_shares_outside_of_their_range_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name} must lie in \(0, 1\), got {value}"):
        localize.Settings(**{name: value})
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        localize.Settings(chunk=0)


# ---- the command


@pytest.fixture
def masks(digits, tmp_path):
    """Masks of the digits (what is brighter than half) and pairs of two of them side by side, as an .npz."""
    data = load_images(digits)
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 137, (2, 12))
    pairs = np.concatenate([data.test_images[first][..., ::2], data.test_images[second][..., ::2]], 3)
    pair_masks = np.stack([pairs[:, 0] > 100] * 2, 1)
    pair_masks[:, 0, :, 4:], pair_masks[:, 1, :, :4] = False, False
    arrays = {
        "test_masks": data.test_images[:, 0] > 120,
        "train_masks": data.train_images[:, 0] > 120,
        "pair_images": pairs,
        "pair_labels": np.stack([data.test_labels[first], data.test_labels[second]], 1),
        "pair_masks": pair_masks,
    }
    arrays["test_masks"][[3, 8]] = False
    file = tmp_path / "masks.npz"
    np.savez(file, **arrays)
    return file, arrays


def _localize(capsys, *arguments):
    status = cli.main(["localize", *map(str, arguments), "--device", "cpu"])
    return status, *capsys.readouterr()


def test_command_scores_both_arms(run, digits, masks, tmp_path, capsys):
    file, arrays = masks
    status, out, err = _localize(capsys, run[0], "--data", digits, "--masks", file, "--output", tmp_path / "out")
    assert status == 0, err
    report = json.loads((tmp_path / "out" / "localization.json").read_text())
    std, csg = report["checkpoints"]
    assert (std["name"], csg["name"]) == ("std", "csg")
    assert report["data"]["empty_masks"] == 2 and std["images"] == csg["images"] == 135
    assert "2 with an empty mask are left out" in out
    assert "std: no map of the gate, as the checkpoint has no trained gate: its entries are all 0.5" in out
    assert "unavailable" in std["methods"]["gate"] and "unavailable" in std["query"]["gate"]
    kept = np.setdiff1d(np.arange(137), [3, 8])
    assert csg["mask_area"] == pytest.approx(arrays["test_masks"][kept].mean())
    assert csg["filters"]["count"] == 64 == len(csg["filters"]["per_filter"]["iou"])
    for arm, methods in ((std, ("cam", "gradient")), (csg, ("cam", "gradient", "gate"))):
        for method in methods:
            found = arm["methods"][method]
            assert found["best_iou"] == max(found["sweep"]["iou"])
            assert 0 <= found["energy"] <= 1 and 0 < arm["query"][method]["energy"] < 1
            assert list(found["average_precision"].values()) == sorted(found["average_precision"].values())[::-1]
        assert len(arm["query"]["cam"]["per_class"]["energy"]) == 3


def test_command_scores_what_the_functions_score(run, digits, masks, tmp_path, capsys):
    from csg_ext.data.batches import normalise
    from csg_ext.runs import checkpoint_files, read_checkpoint, restore

    file, arrays = masks
    assert _localize(capsys, run[0], "--data", digits, "--masks", file, "--output", tmp_path)[0] == 0
    csg = json.loads((tmp_path / "localization.json").read_text())["checkpoints"][1]
    data = load_images(digits)
    model = restore(read_checkpoint(checkpoint_files(run[0])[1]), data).eval()
    kept = torch.from_numpy(np.setdiff1d(np.arange(137), [3, 8]))
    x, labels = normalise(data.test_images[kept], *data.statistics()), torch.from_numpy(data.test_labels)[kept]
    with torch.no_grad():
        maps = model.forward_features(x)
        found = loc.gate_map(maps, model.gate, labels)
    masks = torch.from_numpy(arrays["test_masks"])[kept]
    up = F.interpolate(found[:, None], size=(8, 8), mode="bilinear", align_corners=False)[:, 0].double()
    region = up > 0.2 * up.amax((1, 2), keepdim=True)
    iou = ((region & masks).sum((1, 2)).double() / (region | masks).sum((1, 2))).mean()
    share = ((up * masks).sum((1, 2)) / up.sum((1, 2)).clamp(min=1e-9)).mean()
    assert csg["methods"]["gate"]["iou"] == pytest.approx(float(iou), abs=2e-3)
    assert csg["methods"]["gate"]["energy"] == pytest.approx(float(share), abs=1e-4)
    threshold = loc.activation_thresholds(maps)
    assert csg["filters"]["threshold"] == pytest.approx(threshold.tolist(), abs=1e-5)


def test_pairs_must_be_whole_and_fit(digits, masks):
    data, arrays = load_images(digits), masks[1]
    for change, message in (
        ({"pair_labels": None}, "scenes of two objects need .* got no pair_labels"),
        ({"pair_labels": arrays["pair_labels"] + 1}, r"pair_labels must be \(12, 2\) with classes in \[0, 3\)"),
        ({"pair_images": arrays["pair_images"][:, :, :4]}, r"pair_images must be uint8 \(M, 1, 8, 8\)"),
        ({"pair_masks": arrays["pair_masks"][:, :1]}, r"pair_masks must be \(12, 2, 8, 8\)"),
        ({"pair_masks": arrays["pair_masks"] & False}, "expected scenes of two objects with masks that are not empty"),
    ):
        odd = {key: value for key, value in (arrays | change).items() if value is not None}
        with pytest.raises(ValueError, match=f"masks: {message}"):
            localize.masked_scenes(data, odd)
    arrays["pair_masks"][2, 1] = False
    assert len(localize.masked_scenes(data, arrays).pairs.labels) == 11


def test_command_without_train_masks_chooses_on_images_that_it_does_not_score(run, digits, masks, tmp_path, capsys):
    np.save(tmp_path / "masks.npy", masks[1]["test_masks"].astype(np.uint8) * 255)
    arguments = ("--data", digits, "--masks", tmp_path / "masks.npy", "--output", tmp_path)
    status, out, err = _localize(capsys, run[0] / "csg", *arguments)
    assert status == 0, err
    report = json.loads((tmp_path / "localization.json").read_text())
    assert report["checkpoints"][0]["images"] == 67 and report["data"]["images_that_choose"] == 68
    assert "query" not in report["checkpoints"][0]


def test_command_can_leave_out_what_the_network_gets_wrong(run, digits, masks, tmp_path, capsys):
    arguments = (run[0], "--data", digits, "--masks", masks[0], "--output", tmp_path, "--only-correct")
    assert _localize(capsys, *arguments)[0] == 0
    for arm in json.loads((tmp_path / "localization.json").read_text())["checkpoints"]:
        assert arm["images"] == 135 - arm["images_wrong"]


def test_example_draws_what_the_gate_picks(run, digits, masks, tmp_path, monkeypatch, capsys):
    with np.load(digits) as images:
        np.savez(tmp_path / "scenes.npz", **images, **masks[1])
    picture = tmp_path / "maps.png"
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setattr("sys.argv", ["example", str(run[0] / "csg"), str(tmp_path / "scenes.npz"), str(picture), "2"])
    runpy.run_path("examples/localization.py", run_name="__main__")
    assert "2 scenes; energy on the queried object 0." in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_command_refuses_masks_that_do_not_fit(run, digits, masks, tmp_path, capsys):
    good = masks[1]["test_masks"]
    for array, message in (
        (good[:, :4], r"masks: test_masks must be (137, 8, 8), like the images, got (137, 4, 8)"),
        (good[:9], r"masks: test_masks must be (137, 8, 8), like the images, got (9, 8, 8)"),
        (good.astype(np.float32), "masks: test_masks must be bool, or uint8 with 0 outside the object, got float32"),
        (good.astype(np.uint8) + 1, "masks: test_masks must hold 0 and one other value, got also [1, 2]"),
        (np.zeros_like(good), "masks: expected masks that are not empty in every part, got none"),
    ):
        np.save(tmp_path / "bad.npy", array)
        arguments = (run[0], "--data", digits, "--masks", tmp_path / "bad.npy", "--output", tmp_path / "out")
        status, _, err = _localize(capsys, *arguments)
        assert status == 2 and err == f"csg-ext localize: error: {message}\n"
        assert not (tmp_path / "out").exists()
    (tmp_path / "bad.npz").write_bytes(b"PK no archive")
    status, _, err = _localize(capsys, run[0], "--data", digits, "--masks", tmp_path / "bad.npz")
    assert status == 2 and "masks: expected a readable NumPy file" in err
    alone = tmp_path / "alone" / "csg" / "model.safetensors"
    alone.parent.mkdir(parents=True)
    alone.write_bytes((run[0] / "csg" / "model.safetensors").read_bytes())
    status, _, err = _localize(capsys, alone)
    assert status == 2 and "holds weights alone" in err
    status, _, err = _localize(capsys, run[0], "--data", digits)
    assert status == 2 and f"masks: expected the array test_masks in {digits}" in err
