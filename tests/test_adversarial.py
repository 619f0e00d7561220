"""Tests of attacks, detectors and `csg-ext detect`: against scikit-learn, the toolbox and references written out."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file, save_file
from sklearn.covariance import ledoit_wolf
from sklearn.ensemble import RandomForestClassifier
from sklearn.feature_selection import mutual_info_classif
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from csg_ext import cli
from csg_ext import nn as csg_nn
from csg_ext.analysis import adversarial as adv
from csg_ext.analysis import attacks
from csg_ext.analysis import detectors as det
from csg_ext.data.images import ImageData
from csg_ext.training.files import WEIGHTS

CLASSES, FILTERS = 4, 8
STATISTICS = ([0.4], [0.3])


def _rng():
    return np.random.default_rng(int(torch.randint(2**31, ())))


class _Backbone(nn.Module):
    num_filters = FILTERS

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, FILTERS, 3, 2, 1)

    def forward(self, x):
        return F.relu(self.conv(x))


def _model(gate=True):
    model = csg_nn.GatedModel(_Backbone(), CLASSES)
    if gate:
        with torch.no_grad():
            model.gate.copy_(torch.eye(CLASSES).repeat_interleave(FILTERS // CLASSES, 1) * 0.9 + 0.1)
    return model


def _data(n=120, seed=0):
    """Images whose class is the quarter that is bright, with noise."""
    rng = np.random.default_rng(seed)

    def part(n):
        labels = rng.integers(0, CLASSES, n)
        images = rng.integers(0, 90, (n, 1, 8, 8), np.uint8)
        for image, label in zip(images, labels, strict=True):
            top, left = divmod(int(label), 2)
            image[0, 4 * top : 4 * top + 4, 4 * left : 4 * left + 4] += 60
        return images, labels.astype(np.int64)

    return ImageData("quarters", *part(n), *part(n // 2), [f"quarter {c}" for c in range(CLASSES)])


class _Quarters(nn.Module):
    """Two filters for each quarter: its pixels, brighter than a level, and nothing of the others."""

    num_filters = FILTERS

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        mask = torch.zeros(CLASSES, 8, 8)
        for c in range(CLASSES):
            top, left = divmod(c, 2)
            mask[c, 4 * top : 4 * top + 4, 4 * left : 4 * left + 4] = 1
        self.register_buffer("mask", mask.repeat_interleave(2, 0))

    def forward(self, x):
        return F.relu(self.scale * x * self.mask + 0.2 * self.mask)


def _quarters():
    """A network that gets _data right by its filters' classes."""
    model = csg_nn.GatedModel(_Quarters(), CLASSES)
    with torch.no_grad():
        model.gate.copy_(torch.eye(CLASSES).repeat_interleave(2, 1))
        model.classifier.weight.copy_(20 * model.gate)
        model.classifier.bias.zero_()
    return model


def _outputs(rng, n, shift=0.0):
    features = rng.random((n, FILTERS)).astype(np.float32)
    features[:, 0] += shift
    return det.Outputs(features, rng.standard_normal((n, CLASSES)).astype(np.float32))


def _images(rng, n=12):
    return rng.random((n, 1, 8, 8)).astype(np.float32), rng.integers(0, CLASSES, n)


# ---- attacks ---------------------------------------------------------------------------------------------------------


def test_pixel_model_normalises_and_leaves_the_model_alone():
    model = _model().train()
    pixel = attacks.PixelModel(model, [0.4], [0.3])
    x = torch.rand(3, 1, 8, 8)
    expected = model((x - 0.4) / 0.3)
    torch.testing.assert_close(pixel(x), expected)
    features, logits = pixel.features_and_logits(x)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(features, model.pooled_features((x - 0.4) / 0.3))
    images, labels = _images(_rng())
    attacks.run_attack(pixel, images, labels, attacks.Attack("pgd", 8))
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("targeted", [False, True])
def test_fgsm_is_one_step_along_the_sign_of_the_gradient(targeted):
    rng, model = _rng(), _model()
    images, labels = _images(rng)
    found = attacks.run_attack(
        attacks.PixelModel(model, *STATISTICS), images, labels, attacks.Attack("fgsm", 6, targeted)
    )
    x = torch.from_numpy(images).double().requires_grad_()
    loss = F.cross_entropy(model.double()((x - 0.4) / 0.3), torch.from_numpy(labels), reduction="sum")
    (gradient,) = torch.autograd.grad(loss, x)
    clear = gradient.abs() > 1e-7  # elsewhere fp32 may see the other sign
    assert clear.double().mean() > 0.9
    step = (-1 if targeted else 1) * 6 / 255 * gradient.sign()
    expected = (x.detach() + step).clamp(0, 1)
    torch.testing.assert_close(torch.from_numpy(found).double()[clear], expected[clear], rtol=0, atol=1e-6)


@pytest.mark.parametrize("targeted", [False, True])
def test_pgd_stays_in_the_ball_is_reproducible_and_stronger_than_chance(targeted):
    images, labels = _images(_rng(), 20)
    model = attacks.PixelModel(_model(), *STATISTICS)
    aims = attacks.draw_targets(labels, CLASSES, 3) if targeted else labels
    attack = attacks.Attack("pgd", 10, targeted)
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    found = attacks.run_attack(model, images, aims, attack, seed=5)
    assert (np.random.get_state()[1] == before).all()
    np.testing.assert_array_equal(found, attacks.run_attack(model, images, aims, attack, seed=5))
    assert found.dtype == np.float32 and found.min() >= 0 and found.max() <= 1
    assert 0 < np.abs(found - images).max() <= 10 / 255 + 1e-6

    def loss(x):
        return F.cross_entropy(model(torch.from_numpy(x)), torch.from_numpy(aims), reduction="none")

    noise = np.sign(_rng().standard_normal(images.shape)).astype(np.float32) * 10 / 255
    moved = loss(np.clip(images + noise, 0, 1).astype(np.float32))
    better = loss(found) < moved if targeted else loss(found) > moved
    assert better.all()


def test_deepfool_changes_predictions_by_less_than_fgsm_needs():
    images, _ = _images(_rng(), 20)
    model = attacks.PixelModel(_model(), *STATISTICS)
    with torch.no_grad():
        labels = model(torch.from_numpy(images)).argmax(1).numpy()
        found = attacks.run_attack(model, images, labels, attacks.Attack("deepfool", steps=50))
        changed = model(torch.from_numpy(found)).argmax(1).numpy() != labels
    assert changed.mean() > 0.8 and found.min() >= 0 and found.max() <= 1
    size = np.linalg.norm((found - images).reshape(20, -1), axis=1)
    needed = np.full(20, np.inf)  # L2 of the weakest FGSM of a sweep that changes the prediction
    for epsilon in range(1, 100, 3):
        weaker = attacks.run_attack(model, images, labels, attacks.Attack("fgsm", epsilon))
        with torch.no_grad():
            hit = model(torch.from_numpy(weaker)).argmax(1).numpy() != labels
        l2 = np.linalg.norm((weaker - images).reshape(20, -1), axis=1)
        needed = np.where(hit, np.minimum(needed, l2), needed)
    assert np.isfinite(needed).any() and (size[changed] < needed[changed] * 1.03).all()


def test_adaptive_attack_without_weight_is_fgsm_in_one_step_and_stays_in_the_ball():
    rng = _rng()
    model = attacks.PixelModel(_model(), *STATISTICS)
    images, labels = _images(rng, 20)
    with torch.no_grad():
        labels = model(torch.from_numpy(images)).argmax(1).numpy()
    rows = torch.from_numpy(rng.random((CLASSES, FILTERS)).astype(np.float32))

    def score(f, z):
        return det.outside_share(f, z, rows)

    one = attacks.adaptive_attack(model, images, labels, score, epsilon=5, weight=0, steps=1)
    fgsm = attacks.run_attack(model, images, labels, attacks.Attack("fgsm", 5))
    np.testing.assert_allclose(one, fgsm, atol=1e-6)
    many = attacks.adaptive_attack(model, images, labels, score, epsilon=5, weight=3, steps=10)
    assert np.abs(many - images).max() <= 5 / 255 + 1e-6 and many.min() >= 0 and many.max() <= 1


def test_adaptive_attack_lowers_the_score_of_what_it_changes():
    model = _quarters()
    data = _data(200, int(_rng().integers(2**31)))
    images, labels = adv._pixels(data.test_images), data.test_labels
    network = adv.Network(model, STATISTICS, images, labels)
    found = {}
    for weight in (0, 30):
        moved = attacks.adaptive_attack(network.model, images, labels, network.score, epsilon=60, weight=weight)
        seen = network.outputs(moved)
        changed = ~adv._right(seen, labels)
        found[weight] = det.OutsideShare(network.rows).score(seen), changed
    both = found[0][1] & found[30][1]
    assert both.sum() > 50  # knowing the score costs no success here
    assert found[30][0][both].mean() < 0.8 * found[0][0][both].mean()


def test_draw_targets_never_gives_the_label_and_gives_every_other_class():
    labels = np.repeat(np.arange(CLASSES), 200)
    targets = attacks.draw_targets(labels, CLASSES, int(_rng().integers(2**31)))
    assert (targets != labels).all()
    assert {(a, b) for a, b in zip(labels, targets, strict=True)} == {
        (a, b) for a in range(CLASSES) for b in range(CLASSES) if a != b
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cw", 1), "method must be one of fgsm, pgd, deepfool, got 'cw'"),
        (("pgd",), "epsilon must lie in (0, 255], in units of 1/255, got None"),
        (("fgsm", float("nan")), "epsilon must lie in (0, 255]"),
        (("deepfool", 2), "neither an epsilon nor a target"),
        (("pgd", 2, False, 0), "steps must be at least 1, got 0"),
    ],
)
def test_attack_errors(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        attacks.Attack(*arguments)


def test_images_must_be_in_pixel_space():
    model, attack = attacks.PixelModel(_model(), *STATISTICS), attacks.Attack("fgsm", 1)
    images, labels = _images(_rng())
    for bad, y, message in (
        (images * 255, labels, "images must lie in [0, 1]"),
        (images.astype(np.float64), labels, "images must be float32"),
        (images, labels[:-1], "labels must be int64 (12,)"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            attacks.run_attack(model, bad, y, attack)


# ---- detectors -------------------------------------------------------------------------------------------------------


def test_outside_share_is_its_definition():
    rng = _rng()
    f, z, rows = rng.standard_normal((9, FILTERS)), rng.standard_normal((9, CLASSES)), rng.random((CLASSES, FILTERS))
    f[0] = -1  # nothing is active: nothing lies in the row
    got = det.outside_share(*(torch.from_numpy(a) for a in (f, z, rows)))
    assert got[0] == 1
    for n in range(1, 9):
        inside = total = 0.0
        for k in range(FILTERS):
            inside += rows[z[n].argmax(), k] * max(f[n, k], 0)
            total += max(f[n, k], 0)
        assert got[n].item() == pytest.approx(1 - inside / total, abs=1e-12)


def test_consistency_features_by_hand():
    rows = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]], np.float32)
    outputs = det.Outputs(np.array([[6, 3, 1], [0, 0, 0]], np.float32), np.array([[0, 1, 0], [1, 0, 0]], np.float32))
    own, other, gap, entropy, agrees, log = det.consistency_features(outputs, rows)[0]
    assert (own, other, gap, agrees) == pytest.approx((0.3, 0.6, -0.3, 0))
    assert entropy == pytest.approx(-(0.6 * np.log(0.6) + 0.3 * np.log(0.3) + 0.1 * np.log(0.1)))
    assert log == pytest.approx(np.log(10))
    assert np.isfinite(det.consistency_features(outputs, rows)).all()


def test_forest_is_scikit_learns():
    rng = _rng()
    benign, attacked, new = _outputs(rng, 80), _outputs(rng, 40, 0.4), _outputs(rng, 50, 0.2)
    mine = det.Forest.fit(benign, attacked, seed=7, trees=15)
    peer = RandomForestClassifier(15, class_weight="balanced", min_samples_leaf=2, random_state=7)
    peer.fit(np.concatenate([benign.features, attacked.features]), np.repeat([0, 1], [80, 40]))
    np.testing.assert_allclose(mine.score(new), peer.predict_proba(new.features)[:, 1], atol=1e-12)
    assert roc_auc_score(np.repeat([0, 1], 40), mine.score(det.Outputs(*map(np.concatenate, zip(
        _outputs(rng, 40), _outputs(rng, 40, 0.8), strict=True))))) > 0.7  # fmt: skip


def test_regression_is_scikit_learns():
    rng = _rng()
    benign, attacked, new = _outputs(rng, 80), _outputs(rng, 40, 0.6), _outputs(rng, 50, 0.3)
    rows = rng.random((CLASSES, FILTERS)).astype(np.float32)
    peer = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
    x = [det.consistency_features(o, rows) for o in (benign, attacked)]
    peer.fit(np.concatenate(x), np.repeat([0, 1], [80, 40]))
    mine = det.GateRegression.fit(benign, attacked, rows)
    np.testing.assert_allclose(
        mine.score(new), peer.decision_function(det.consistency_features(new, rows)), rtol=1e-5, atol=1e-6
    )


def test_baselines_are_their_definitions():
    rng = _rng()
    outputs, labels = _outputs(rng, 60), rng.integers(0, CLASSES, 60)
    labels[labels == 2] = 1  # a class without images
    softmax = torch.from_numpy(outputs.logits).double().softmax(1).numpy()
    np.testing.assert_allclose(det.Softmax().score(outputs), 1 - softmax.max(1), atol=1e-12)
    features, seen = outputs.features.astype(np.float64), np.unique(labels)
    means = {c: features[labels == c].mean(0) for c in seen}
    covariance, _ = ledoit_wolf(
        np.array([f - means[c] for f, c in zip(features, labels, strict=True)]), assume_centered=True
    )
    expected = [min((f - m) @ np.linalg.solve(covariance, f - m) for m in means.values()) for f in features]
    np.testing.assert_allclose(det.Mahalanobis.fit(outputs, labels).score(outputs), expected, rtol=1e-8)


def test_the_threshold_holds_the_false_positives():
    rng = _rng()
    detector = det.Softmax()
    assert not detector.flags(_outputs(rng, 10)).any()  # not calibrated
    benign = _outputs(rng, 1000)
    detector.calibrate(benign, 0.05)
    assert 0.04 <= detector.flags(benign).mean() <= 0.05
    with pytest.raises(ValueError, match="false_positives must lie in"):
        detector.calibrate(benign, 1)


def _fitted(rng):
    benign, attacked = _outputs(rng, 60), _outputs(rng, 30, 0.5)
    rows = rng.random((CLASSES, FILTERS)).astype(np.float32)
    return [
        det.Forest.fit(benign, attacked, trees=4),
        det.GateRegression.fit(benign, attacked, rows),
        det.OutsideShare(rows),
        det.Softmax(),
        det.Mahalanobis.fit(benign, rng.integers(0, CLASSES, 60)),
    ]


def test_saved_detectors_are_the_same_and_need_no_scikit_learn(tmp_path):
    rng = _rng()
    new = _outputs(rng, 40)
    np.savez(tmp_path / "new.npz", *new)
    assert [d.name for d in _fitted(rng)] == list(det.DETECTORS)
    for detector in _fitted(rng):
        detector.calibrate(new)
        file = tmp_path / f"{detector.name}.safetensors"
        detector.save(file)
        loaded = det.load_detector(file)
        assert type(loaded) is type(detector) and loaded.threshold == detector.threshold
        np.testing.assert_array_equal(loaded.score(new), detector.score(new))
        np.save(tmp_path / f"{detector.name}.npy", detector.flags(new))
    code = f"""
import sys
sys.modules["sklearn"] = sys.modules["art"] = None
from pathlib import Path
import numpy as np
from csg_ext.analysis.detectors import Outputs, load_detector
folder = Path({str(tmp_path)!r})
new = Outputs(*np.load(folder / "new.npz").values())
for file in folder.glob("*.safetensors"):
    assert (load_detector(file).flags(new) == np.load(file.with_suffix(".npy"))).all(), file
print(len(list(folder.glob("*.safetensors"))))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "5", done.stderr


def test_damaged_and_hostile_detectors_are_refused(tmp_path):
    forest, regression, *_ = _fitted(_rng())
    file = tmp_path / "d.safetensors"

    def changed(detector, **arrays):
        detector.save(file)
        save_file(load_file(file) | arrays, file, {"detector": detector.name})

    inner = int(np.flatnonzero(forest.left)[1])  # node 0 as its own left child would be a leaf
    for field, value, message in (
        ("left", inner, "every child behind its parent"),  # would never end
        ("right", len(forest.left), "every child behind its parent"),
        ("feature", -1, "every child behind its parent"),
    ):
        array = getattr(forest, field).copy()
        array[inner] = value
        changed(forest, **{field: array})
        with pytest.raises(ValueError, match=message):
            det.load_detector(file)
    changed(forest, roots=np.array([-1]))
    with pytest.raises(ValueError, match="every child behind its parent"):
        det.load_detector(file)
    changed(forest, share=forest.share[:-1])
    with pytest.raises(ValueError, match="of one length"):
        det.load_detector(file)
    changed(regression, weight=regression.weight * np.nan)
    with pytest.raises(ValueError, match="weight must be finite float64"):
        det.load_detector(file)
    changed(regression, threshold=np.asarray(np.nan))
    with pytest.raises(ValueError, match="threshold must be a number"):
        det.load_detector(file)
    changed(regression, more=np.zeros(1))
    with pytest.raises(ValueError, match="expected the arrays bias"):
        det.load_detector(file)
    save_file({"x": np.zeros(1)}, file)
    with pytest.raises(ValueError, match="expected one of the detectors"):
        det.load_detector(file)
    file.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="expected a readable"):
        det.load_detector(file)
    with pytest.raises(ValueError, match="expected at least"):
        forest.score(det.Outputs(np.zeros((2, 1), np.float32), np.zeros((2, CLASSES), np.float32)))


# ---- measures --------------------------------------------------------------------------------------------------------


def test_auroc_and_its_resamples_are_scikit_learns():
    rng = _rng()
    benign, attacked = np.round(rng.random(40), 1), np.round(rng.random(30) + 0.2, 1)  # with ties
    counts = adv.bootstrap_counts(40, 20, 1)
    assert (counts.sum(1) == 40).all()
    found = adv.auroc(benign, attacked, counts, counts[:, :30])
    labels, scores = np.repeat([0, 1], [40, 30]), np.concatenate([benign, attacked])
    assert found.value == pytest.approx(roc_auc_score(labels, scores))
    for sample, weight in zip(found.samples, counts, strict=True):
        assert sample == pytest.approx(roc_auc_score(labels, scores, sample_weight=[*weight, *weight[:30]]))
    assert adv.auroc(benign, attacked[:0], counts, counts[:, :0]).interval()["value"] is None


def test_rates_count_what_they_say():
    class Own(det.Softmax):
        def score(self, outputs):
            return outputs.features[:, 0].astype(np.float64)

    def outputs(values):
        return det.Outputs(np.array(values, np.float32)[:, None], np.zeros((len(values), CLASSES), np.float32))

    changed = np.array([True, True, True, False])
    found = adv.rates(
        Own(threshold=0.5), outputs([0.1, 0.2, 0.9, 0.3]), outputs([0.6, 0.4, 0.8, 0.9]), changed, np.ones((1, 4))
    )
    assert {key: e.value for key, e in found.items()} == pytest.approx(
        {"auroc": (3 + 3 + 3) / 12, "tpr": 2 / 3, "fpr": 1 / 4, "evaded": 1 / 4}
    )
    assert all(e.samples[0] == pytest.approx(e.value) for e in found.values())


def test_intervals_cover_as_often_as_they_say():
    rng, inside, truth = _rng(), 0, 0.76025  # P(N(1, 1) > N(0, 1)) = Phi(1 / sqrt 2)
    counts = adv.bootstrap_counts(80, 300)
    for _ in range(150):
        found = adv.auroc(rng.standard_normal(80), rng.standard_normal(80) + 1, counts, counts).interval()
        inside += found["low"] <= truth <= found["high"]
    assert inside >= 128  # 95 % of 150 = 142.5; 128 is five standard deviations below


# ---- the experiment and the command ----------------------------------------------------------------------------------


def test_detectors_see_train_images_only(monkeypatch):
    data, model = _data(), _quarters()
    settings = adv.Settings(images=40, epsilons=(20,), train_epsilon=60, weights=(1,), steps=3)
    _, first, counts = adv.fit_detectors(model, data, STATISTICS, settings)
    data.test_images[:] = 255 - data.test_images
    data.test_labels[:] = 0
    _, second, _ = adv.fit_detectors(model, data, STATISTICS, settings)
    for a, b in zip(first, second, strict=True):
        for (name, x), y in zip(a.arrays().items(), b.arrays().values(), strict=True):
            np.testing.assert_array_equal(x, y, err_msg=f"{a.name} {name}")
    assert 0 < counts["fit_attacked"] <= counts["fit_benign"] <= 40 and 0 < counts["calibrate"] <= 40


def test_score_finds_an_attack_on_filters_of_one_class_each():
    data, model = _data(), _quarters()
    settings = adv.Settings(images=60, epsilons=(50,), train_epsilon=50, weights=(), steps=4)
    network, detectors, _ = adv.fit_detectors(model, data, STATISTICS, settings)
    report, estimates = adv.measure(network, detectors, data, settings)
    assert report["gated"] and (network.rows == model.gate.detach().numpy()).all()
    assert report["benign"] == 60
    found = {row["name"]: row for row in report["attacks"]}
    assert list(found) == ["pgd 50/255", "fgsm 50/255", "fgsm 50/255, targeted", "pgd 50/255, targeted", "deepfool"]
    assert found["pgd 50/255"]["changed"] > 30
    assert found["pgd 50/255"]["median_change"] == pytest.approx(50, abs=0.01)
    assert found["deepfool"]["median_change"] < 50
    assert estimates["deepfool"]["score"]["auroc"].value > 0.9  # the filters of two classes are active at a boundary


def test_rows_without_a_gate_are_the_filters_mutual_information():
    data, model = _data(), _quarters()
    with torch.no_grad():
        model.gate.fill_(0.5)
    network = adv.Network(model, STATISTICS, adv._pixels(data.train_images), data.train_labels)
    assert not network.gated
    features = network.outputs(adv._pixels(data.train_images)).features
    mi = [mutual_info_classif(features, data.train_labels == c, random_state=0) for c in range(CLASSES)]
    np.testing.assert_allclose(network.rows, mi / np.max(mi, 0), atol=1e-5)
    np.testing.assert_array_equal(network.rows.argmax(0), np.arange(CLASSES).repeat(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": 1}, "images must be at least 2, got 1"),
        ({"weights": (-1,)}, "weights must be finite and at least 0"),
        ({"train_attack": "deepfool"}, "train_attack must be fgsm or pgd"),
        ({"epsilons": (0,)}, "epsilon must lie in (0, 255]"),
    ],
)
def test_settings_errors(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        adv.Settings(**options)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run of csg-ext train, as far as csg-ext detect reads it: untrained arms on small images."""
    from safetensors.torch import save_file as save_tensors

    from csg_ext.data import load_images
    from csg_ext.runs import SOURCE
    from csg_ext.training.arm import build_model
    from csg_ext.training.config import TrainConfig

    folder = tmp_path_factory.mktemp("run")
    data = _data(80)
    arrays = {n: getattr(data, n) for n in ("train_images", "train_labels", "test_images", "test_labels")}
    np.savez(folder / "data.npz", **arrays)
    source = SOURCE | {"data": str(folder / "data.npz")}
    data = load_images(source["data"])
    config = TrainConfig(model="resnet20")
    run = {"config": config.as_dict(), "source": source, "sha256": data.fingerprint(), "statistics": data.statistics()}
    (folder / "run.json").write_text(json.dumps(run))
    for arm in ("std", "csg"):
        model = build_model(config, data)
        if arm == "csg":
            with torch.no_grad():
                model.gate.copy_(torch.rand_like(model.gate))
            model.csg.project_()
        (folder / arm).mkdir()
        save_tensors({k: v.contiguous() for k, v in model.state_dict().items()}, folder / arm / WEIGHTS)
    return folder


def test_detect_measures_both_arms_and_writes_detectors(run_folder, tmp_path, capsys):
    options = ["--images", "16", "--epsilons", "20", "--train-epsilon", "20", "--steps", "2", "--weights", "0", "5"]
    command = ["detect", str(run_folder), "--device", "cpu", *options]
    assert cli.main([*command, "--output", str(tmp_path / "a")]) == 0, capsys.readouterr().err
    text = capsys.readouterr().out
    report = json.loads((tmp_path / "a" / "detection.json").read_text())
    assert [c["name"] for c in report["checkpoints"]] == ["std", "csg"]
    assert [c["gated"] for c in report["checkpoints"]] == [False, True]
    attack = "adaptive 20/255, best weight of each image"
    for c in report["checkpoints"]:
        assert c["attacks"][-1]["name"] == attack
        for row in c["attacks"]:
            assert 0 <= row["changed"] <= c["benign"] <= c["test_images"] == 16
            assert set(row["detectors"]) == set(det.DETECTORS)
        loaded = det.load_detector(tmp_path / "a" / f"forest_{c['name']}.safetensors")
        assert loaded.threshold == c["thresholds"]["forest"]
    first, second = (c["attacks"][0]["detectors"]["softmax"]["evaded"]["value"] for c in report["checkpoints"])
    change = report["difference"]["pgd 20/255"]["softmax"]["evaded"]
    assert change["value"] == pytest.approx(second - first)
    assert attack in text and "STD" in text and "CSG - STD" in text
    assert cli.main([*command, "--output", str(tmp_path / "b")]) == 0
    again = json.loads((tmp_path / "b" / "detection.json").read_text())
    assert again == report


def test_detect_of_one_arm_and_its_errors(run_folder, tmp_path, capsys, monkeypatch):
    out = ["--output", str(tmp_path / "out"), "--device", "cpu"]
    small = ["--images", "8", "--epsilons", "30", "--train-epsilon", "30", "--steps", "1", "--weights"]
    assert cli.main(["detect", str(run_folder / "csg"), *small, *out]) == 0
    assert (tmp_path / "out" / "gate_regression.safetensors").is_file()
    assert "adaptive" not in capsys.readouterr().out
    assert cli.main(["detect", str(run_folder), "--images", "1", *out]) == 2
    assert "images must be at least 2" in capsys.readouterr().err
    assert cli.main(["detect", str(run_folder), "--train-epsilon", "1e-6", "--images", "8", *out]) == 2
    assert "give a larger train_epsilon" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "art", None)
    assert cli.main(["detect", str(run_folder), *out]) == 1
    assert "it needs art, which is missing: pip install 'csg-ext[train,analysis]'" in capsys.readouterr().err


def test_example(run_folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["adversarial_detection.py", str(run_folder / "csg"), "16", "30"])
    runpy.run_path("examples/adversarial_detection.py", run_name="__main__")
    text = capsys.readouterr().out
    assert re.fullmatch(
        r"PGD, 30/255: changes \d+ of \d+ right predictions\nflagged: \d+ of the changed, \d+ benign\n", text
    )
