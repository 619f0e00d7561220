"""Tests of csg_ext.analysis.localization: maps, regions, peaks, boxes and scores, against loops and torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from csg_ext.analysis import localization as loc
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


def test_gradient_map_of_a_model_in_training_is_that_of_each_image_alone():
    norm = torch.nn.BatchNorm2d(4)
    model = GatedModel(torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3), norm, torch.nn.Dropout(), torch.nn.ReLU()), 3, 4)
    norm.eval()  # frozen, as fine-tuning may leave it
    model.backbone[0].requires_grad_(False)
    images, weight = torch.randn(3, 2, 6, 7), torch.rand(3, 4)
    for frozen in (True, False):
        norm.train(not frozen)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        alone = [loc.gradient_map(model, images[i : i + 1], weight[i : i + 1], sigma=1) for i in range(3)]
        torch.testing.assert_close(loc.gradient_map(model, images, weight, sigma=1), torch.cat(alone))
        assert model.training and norm.training is not frozen and model.backbone[2].training
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


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
