"""Tests of csg_ext.analysis.attacks: FGSM, PGD, DeepFool and the adaptive attack, against their definitions."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from adversarial_inputs import CLASSES, FILTERS, STATISTICS, fresh_rng, quarters_data, quarters_model
from torch import nn

from csg_ext import nn as csg_nn
from csg_ext.analysis import adversarial as adv
from csg_ext.analysis import attacks
from csg_ext.analysis import detectors as det


class _Backbone(nn.Module):
    num_filters = FILTERS

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, FILTERS, 3, 2, 1)

    def forward(self, x):
        return F.relu(self.conv(x))


def _model():
    model = csg_nn.GatedModel(_Backbone(), CLASSES)
    with torch.no_grad():
        model.gate.copy_(torch.eye(CLASSES).repeat_interleave(FILTERS // CLASSES, 1) * 0.9 + 0.1)
    return model


def _images(rng, n=12):
    return rng.random((n, 1, 8, 8)).astype(np.float32), rng.integers(0, CLASSES, n)


def test_pixel_model_normalises_and_leaves_the_model_alone():
    model = _model().train()
    pixel = attacks.PixelModel(model, [0.4], [0.3])
    x = torch.rand(3, 1, 8, 8)
    expected = model((x - 0.4) / 0.3)
    torch.testing.assert_close(pixel(x), expected)
    features, logits = pixel.features_and_logits(x)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(features, model.pooled_features((x - 0.4) / 0.3))
    images, labels = _images(fresh_rng())
    attacks.run_attack(pixel, images, labels, attacks.Attack("pgd", 8))
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("targeted", [False, True])
def test_fgsm_is_one_step_along_the_sign_of_the_gradient(targeted):
    rng, model = fresh_rng(), _model()
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
    images, labels = _images(fresh_rng(), 20)
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

    noise = np.sign(fresh_rng().standard_normal(images.shape)).astype(np.float32) * 10 / 255
    moved = loss(np.clip(images + noise, 0, 1).astype(np.float32))
    better = loss(found) < moved if targeted else loss(found) > moved
    assert better.all()


def test_deepfool_changes_predictions_by_less_than_fgsm_needs():
    images, _ = _images(fresh_rng(), 20)
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
    rng = fresh_rng()
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
    model = quarters_model()
    data = quarters_data(200, int(fresh_rng().integers(2**31)))
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
    targets = attacks.draw_targets(labels, CLASSES, int(fresh_rng().integers(2**31)))
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
    images, labels = _images(fresh_rng())
    for bad, y, message in (
        (images * 255, labels, "images must lie in [0, 1]"),
        (images.astype(np.float64), labels, "images must be float32"),
        (np.float32(np.nan) * images, labels, "images must lie in [0, 1], got values from nan"),
        (images, labels[:-1], "labels must be int64 (12,)"),
        (images, labels - 5, f"labels must lie in [0, {CLASSES}), got -"),
        (images, labels + CLASSES, f"labels must lie in [0, {CLASSES}), got "),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            attacks.run_attack(model, bad, y, attack)


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0, "epsilon": 8, "weight": 1},
        {"steps": 2, "epsilon": -8, "weight": 1},
        {"steps": 2, "epsilon": float("nan"), "weight": 1},
        {"steps": 2, "epsilon": 8, "weight": float("inf")},
    ],
)
def test_adaptive_attack_errors(options):
    model, (images, labels) = attacks.PixelModel(_model(), *STATISTICS), _images(fresh_rng())
    with pytest.raises(ValueError, match=r"adaptive_attack: steps, epsilon and weight must be .*, got "):
        attacks.adaptive_attack(model, images, labels, lambda features, logits: features.sum(1), **options)
