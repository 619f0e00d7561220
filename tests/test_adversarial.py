"""Tests of adversarial detection: what is measured, the experiment, `csg-ext detect`."""

from __future__ import annotations

import io
import json
import re
import runpy
import sys

import numpy as np
import pytest
import torch
from adversarial_inputs import CLASSES, STATISTICS, fresh_rng, quarters_data, quarters_model
from sklearn.feature_selection import mutual_info_classif
from sklearn.metrics import roc_auc_score

from csg_ext import cli, detect
from csg_ext.analysis import adversarial as adv
from csg_ext.analysis import detectors as det
from csg_ext.training.files import WEIGHTS

# ---- measures --------------------------------------------------------------------------------------------------------


def test_auroc_and_its_resamples_are_scikit_learns():
    rng = fresh_rng()
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
    rng, inside, truth = fresh_rng(), 0, 0.76025  # P(N(1, 1) > N(0, 1)) = Phi(1 / sqrt 2)
    counts = adv.bootstrap_counts(80, 300)
    for _ in range(150):
        found = adv.auroc(rng.standard_normal(80), rng.standard_normal(80) + 1, counts, counts).interval()
        inside += found["low"] <= truth <= found["high"]
    assert inside >= 128  # 95 % of 150 = 142.5; 128 is five standard deviations below


# ---- the experiment and the command ----------------------------------------------------------------------------------


def test_detectors_see_train_images_only():
    data, model = quarters_data(), quarters_model()
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
    data, model = quarters_data(), quarters_model()
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
    data, model = quarters_data(), quarters_model()
    with torch.no_grad():
        model.gate.fill_(0.5)
    network = adv.Network(model, STATISTICS, adv._pixels(data.train_images), data.train_labels)
    assert not network.gated
    features = network.outputs(adv._pixels(data.train_images)).features
    mi = [mutual_info_classif(features, data.train_labels == c, random_state=0) for c in range(CLASSES)]
    np.testing.assert_allclose(network.rows, mi / np.max(mi, 0), atol=1e-5)
    np.testing.assert_array_equal(network.rows.argmax(0), np.arange(CLASSES).repeat(2))
    with torch.no_grad():
        model.backbone.mask[[1, 6]] = 0  # dead: all 0
    network = adv.Network(model, STATISTICS, adv._pixels(data.train_images), data.train_labels)
    assert np.flatnonzero(network.rows.max(0) == 0).tolist() == [1, 6] and network.rows.max() == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": 1}, "images must be at least 2, got 1"),
        ({"weights": (-1,)}, "weights must be finite and at least 0"),
        ({"train_attack": "deepfool"}, "train_attack must be fgsm or pgd"),
        ({"epsilons": (4, 0)}, "epsilons must lie in (0, 255], in units of 1/255, got 0"),
        ({"train_epsilon": float("nan")}, "train_epsilon must lie in (0, 255], in units of 1/255, got nan"),
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
    data = quarters_data(80)
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
    text, shown = capsys.readouterr()
    assert shown.splitlines()[:2] == [
        "  std, 1 of 8: fitting the detectors on pgd 20/255",
        "  std, 2 of 8: pgd 20/255",
    ]
    assert shown.splitlines()[-1] == "  csg, 8 of 8: adaptive 20/255, weight 5"
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


def test_progress_on_a_terminal_counts_what_is_done(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with detect._Progress("std", 3) as progress:
        for step in ("fitting", "pgd", "fgsm"):
            progress(step)
            assert progress.bar.n == progress.begun - 1
        assert "std: fgsm:  67%" in str(progress.bar)


def test_detect_of_one_arm_and_its_errors(run_folder, tmp_path, capsys, monkeypatch):
    out = ["--output", str(tmp_path / "out"), "--device", "cpu"]
    small = ["--images", "8", "--epsilons", "30", "--train-epsilon", "30", "--steps", "1", "--weights"]
    assert cli.main(["detect", str(run_folder / "csg"), *small, *out]) == 0
    assert (tmp_path / "out" / "gate_regression.safetensors").is_file()
    assert "adaptive" not in capsys.readouterr().out
    assert cli.main(["detect", str(run_folder), "--images", "1", *out]) == 2
    assert "images must be at least 2" in capsys.readouterr().err
    assert cli.main(["detect", str(run_folder), "--train-epsilon", "1e-6", "--images", "8", *out]) == 2
    assert "give a larger train_epsilon (--train-epsilon of csg-ext detect)" in capsys.readouterr().err
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
