"""Tests of csg_ext.analysis.detectors: against scikit-learn and definitions written out; saved and damaged files."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from adversarial_inputs import CLASSES, FILTERS, fresh_rng
from safetensors.numpy import load_file, save_file
from sklearn.covariance import ledoit_wolf
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from csg_ext.analysis import detectors as det


def _outputs(rng, n, shift=0.0):
    features = rng.random((n, FILTERS)).astype(np.float32)
    features[:, 0] += shift
    return det.Outputs(features, rng.standard_normal((n, CLASSES)).astype(np.float32))


def test_outside_share_is_its_definition():
    rng = fresh_rng()
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
    rng = fresh_rng()
    benign, attacked, new = _outputs(rng, 80), _outputs(rng, 40, 0.4), _outputs(rng, 50, 0.2)
    mine = det.Forest.fit(benign, attacked, seed=7, trees=15)
    peer = RandomForestClassifier(15, class_weight="balanced", min_samples_leaf=2, random_state=7)
    peer.fit(np.concatenate([benign.features, attacked.features]), np.repeat([0, 1], [80, 40]))
    np.testing.assert_allclose(mine.score(new), peer.predict_proba(new.features)[:, 1], atol=1e-12)
    assert roc_auc_score(np.repeat([0, 1], 40), mine.score(det.Outputs(*map(np.concatenate, zip(
        _outputs(rng, 40), _outputs(rng, 40, 0.8), strict=True))))) > 0.7  # fmt: skip


def test_regression_is_scikit_learns():
    rng = fresh_rng()
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
    rng = fresh_rng()
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
    rng = fresh_rng()
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
    rng = fresh_rng()
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
    forest, regression, *_ = _fitted(fresh_rng())
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
