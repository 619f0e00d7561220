"""Tests of `csg-ext evaluate` and its measures: against references written out here, simulations, and a short run."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy import stats
from torch import nn

from csg_ext import cli, evaluate, metrics, plots
from csg_ext.data import load_images
from csg_ext.nn import build_backbone
from csg_ext.runs import read_checkpoint, restore, training_statistics
from csg_ext.training.arm import predict

# ---- cluster tests ---------------------------------------------------------------------------------------------------


def _linear(rng, n=60, k=12, c=4):
    return rng.random((n, k)), rng.standard_normal((c, k)), rng.standard_normal(c), rng.integers(0, c, k)


@pytest.mark.parametrize("complement", [False, True])
def test_cluster_predictions_are_those_of_a_masked_classifier(complement):
    rng = np.random.default_rng(int(torch.randint(2**31, ())))
    a, w, b, owner = _linear(rng)
    kept = rng.integers(0, 4, 60)
    got = metrics.cluster_predictions(a, w, b, owner, kept, complement=complement)
    for n in range(60):
        scores = b.copy()
        for k in range(12):
            if (owner[k] == kept[n]) != complement:
                scores += a[n, k] * w[:, k]
        assert got[n] == scores.argmax()
    accuracy = metrics.complement_accuracy if complement else metrics.cluster_accuracy
    assert accuracy(a, w, b, owner, kept) == np.mean(got == kept)


def test_predicted_class_alone():
    rng = np.random.default_rng(int(torch.randint(2**31, ())))
    a, w, b, owner = _linear(rng)
    labels = rng.integers(0, 4, 60)
    std = (a @ w.T + b).argmax(1)
    got = metrics.predicted_class_accuracy(a, w, b, owner, labels)
    assert got == np.mean(metrics.cluster_predictions(a, w, b, owner, std) == labels)
    assert metrics.predicted_class_accuracy(a, w, b, owner, std) == metrics.cluster_accuracy(a, w, b, owner, std)


def test_an_ideally_class_specific_network():
    """Every filter fires for its class and speaks for it alone: they suffice, and without them nothing is left."""
    rng = np.random.default_rng(0)
    labels, owner = np.repeat(np.arange(4), 25), np.arange(12) % 4
    features = (owner == labels[:, None]) * (1 + rng.random((100, 12)))
    weight, bias = (owner == np.arange(4)[:, None]).astype(float), np.zeros(4)
    assert metrics.cluster_accuracy(features, weight, bias, owner, labels) == 1
    assert metrics.predicted_class_accuracy(features, weight, bias, owner, labels) == 1
    assert metrics.complement_accuracy(features, weight, bias, owner, labels) == 0.25  # ties: always class 0


def test_cluster_predictions_refuse_other_shapes():
    a, w, b, owner = _linear(np.random.default_rng(0))
    with pytest.raises(
        ValueError, match=r"cluster_predictions: .* got \(60, 12\), \(12, 4\), \(4,\), \(12,\), \(60,\)"
    ):
        metrics.cluster_predictions(a, w.T, b, owner, np.zeros(60, int))
    with pytest.raises(ValueError, match=r"got .*, \(59,\)$"):
        metrics.cluster_predictions(a, w, b, owner, np.zeros(59, int))


# ---- similarity of filters -------------------------------------------------------------------------------------------


def test_filter_similarity_is_the_absolute_cosine():
    kernels = torch.randn(7, 3, 3, 3, dtype=torch.float64)
    kernels[2] = -2 * kernels[5]
    kernels[4] = 0
    want = F.cosine_similarity(kernels.flatten(1)[:, None], kernels.flatten(1)[None], dim=2).abs().numpy()
    got = metrics.filter_similarity(kernels.numpy())
    assert np.abs(got - want).max() < 1e-12 and got[2, 5] == pytest.approx(1) and (got[4] == 0).all()
    with pytest.raises(
        ValueError, match=r"filter_similarity: kernels must be \(K, ...\) with values, got shape \(3,\)"
    ):
        metrics.filter_similarity(np.zeros(3))


def test_block_score_and_its_p_value_are_the_enumerations():
    rng = np.random.default_rng(int(torch.randint(2**31, ())))
    s = metrics.filter_similarity(rng.standard_normal((7, 4)))
    owner = np.array([5, 0, 5, 0, 0, 2, 5])

    def means(classes):
        pairs = list(itertools.combinations(range(7), 2))
        same = [s[i, j] for i, j in pairs if classes[i] == classes[j]]
        other = [s[i, j] for i, j in pairs if classes[i] != classes[j]]
        return np.mean(same), np.mean(other)

    got = metrics.block_score(s, owner, permutations=20000)
    within, between = means(owner)
    assert got[:3] == pytest.approx((within - between, within, between), rel=1e-12)
    everything = [np.subtract(*means(owner[list(p)])) for p in itertools.permutations(range(7))]
    exact = np.mean(np.array(everything) >= within - between - 1e-12)
    assert abs(got.p_value - exact) < 0.02  # 5 standard errors


def test_block_score_sees_blocks_and_has_no_value_without_pairs():
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(4), 8)
    kernels = rng.standard_normal((4, 20))[owner] + 0.5 * rng.standard_normal((32, 20))
    got = metrics.block_score(metrics.filter_similarity(kernels), owner)
    assert got.score > 0.4 and got.p_value == 1 / 2001
    for classes in (np.arange(32), np.zeros(32, int)):
        assert np.isnan(metrics.block_score(np.eye(32), classes)).all()
    with pytest.raises(ValueError, match=r"block_score: .* got \(32, 32\) and \(31,\)"):
        metrics.block_score(np.eye(32), owner[1:])
    with pytest.raises(ValueError, match="block_score: permutations must be at least 1, got 0"):
        metrics.block_score(np.eye(32), owner, permutations=0)


def test_last_convolution_is_the_gated_layers():
    backbone = build_backbone("resnet20", 1)
    assert metrics.last_convolution(backbone, 64) is backbone.stages[-1].conv2
    with pytest.raises(
        ValueError, match="last_convolution: model must hold a convolution with 63 filters, got CifarRes"
    ):
        metrics.last_convolution(backbone, 63)


# ---- intervals -------------------------------------------------------------------------------------------------------


def test_paired_bootstrap_is_scipys():
    rng = np.random.default_rng(int(torch.randint(2**31, ())))
    a = rng.random(300) < 0.7
    b = np.where(rng.random(300) < 0.8, a, rng.random(300) < 0.9)
    got = metrics.paired_bootstrap(a, b, resamples=20000)
    want = stats.bootstrap(
        (a.astype(float), b.astype(float)),
        lambda x, y, axis: y.mean(axis) - x.mean(axis),
        paired=True,
        n_resamples=20000,
        method="percentile",
        random_state=rng,
    )
    assert got.difference == pytest.approx(b.mean() - a.mean(), abs=1e-12)
    assert got.low == pytest.approx(want.confidence_interval.low, abs=0.005)
    assert got.high == pytest.approx(want.confidence_interval.high, abs=0.005)
    assert got == metrics.paired_bootstrap(a, b, resamples=20000)  # seeded
    wide = metrics.paired_bootstrap(a, b, confidence=0.99)
    assert wide.low < got.low and wide.high > got.high
    assert metrics.paired_bootstrap(a, a) == (0, 0, 0)


def test_paired_bootstrap_covers_the_true_difference():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):  # accuracies 0.8 and 0.84 that mostly err together
        u, v = rng.random(200), rng.random(200)
        a, b = u < 0.8, np.where(v < 0.3, rng.random(200) < 0.84, u < 0.84)
        interval = metrics.paired_bootstrap(a, b, resamples=400, seed=seed)
        covered += interval.low <= 0.04 <= interval.high
    assert 0.9 <= covered / 200 <= 0.99


def test_split_halves_give_the_standard_error_of_a_mean():
    values = np.random.default_rng(0).standard_normal((500, 2)) * [1, 3]
    got = metrics.split_half_interval(lambda rows: values[rows].mean(0), 500, splits=2000)
    for i, interval in enumerate(got):
        assert interval.difference == pytest.approx(values[:, i].mean(), abs=1e-12)
        reach = 1.959964 * values[:, i].std(ddof=1) / np.sqrt(500)
        assert interval.high - interval.difference == pytest.approx(reach, rel=0.08)
        assert interval.high + interval.low == pytest.approx(2 * interval.difference)


def _two_networks(n: int, rng, filters: int = 4, classes: int = 4):
    """Features of two networks that see the same noise in part, the second more class-specific; and labels."""
    labels = rng.integers(0, classes, n)
    own = np.arange(filters) % classes == labels[:, None]
    noise, other = rng.standard_normal((2, n, filters))
    return 1.5 * own + noise, 2 * own + 0.7 * noise + np.sqrt(0.51) * other, labels


def _gain(first, second, labels, rows=slice(None)) -> float:
    """The difference of the two MIS on some rows."""
    return float(
        np.subtract(
            *(
                metrics.mutual_information_score(metrics.class_mutual_info(x[rows], labels[rows], num_classes=4))
                for x in (second, first)
            )
        )
    )


def test_split_halves_cover_the_true_difference_of_mis():
    rng = np.random.default_rng(1)
    truth = _gain(*_two_networks(100_000, rng))
    found = []
    for seed in range(60):
        first, second, labels = _two_networks(200, rng)
        found += metrics.split_half_interval(
            lambda rows, a=first, b=second, y=labels: _gain(a, b, y, rows), 200, splits=8, seed=seed
        )
    gains, low, high = np.array(found).T
    assert np.mean((low <= truth) & (truth <= high)) >= 0.87
    assert np.mean(high - gains) / 1.959964 == pytest.approx(gains.std(), rel=0.25)


def test_a_bootstrap_would_bias_mis():
    """Why there are split halves: samples drawn twice are neighbours at no distance."""
    rng = np.random.default_rng(0)
    first, second, labels = _two_networks(400, rng)
    interval = metrics.split_half_interval(lambda rows: _gain(first, second, labels, rows), 400)[0]
    resampled = [_gain(first, second, labels, rng.integers(0, 400, 400)) for _ in range(30)]
    assert interval.difference - np.mean(resampled) > 2 * np.std(resampled) / np.sqrt(30) + 0.01


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: metrics.paired_bootstrap([1, 0], [1]),
            r"first and second must be \(N,\) alike, got \(2,\) and \(1,\)",
        ),
        (lambda: metrics.paired_bootstrap([1], [1], resamples=0), "resamples must be at least 1, got 0"),
        (lambda: metrics.paired_bootstrap([1], [1], confidence=1), r"confidence must lie in \(0, 1\), got 1"),
        (lambda: metrics.split_half_interval(len, 1), "n and splits must be at least 2 and 1, got 1 and 100"),
        (lambda: metrics.split_half_interval(len, 4, confidence=0), r"confidence must lie in \(0, 1\), got 0"),
    ],
)
def test_intervals_refuse(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- pictures --------------------------------------------------------------------------------------------------------


def test_confusion_picture_shows_shares_of_the_true_class():
    counts = np.array([[3, 1, 0], [0, 5, 0], [0, 0, 0]])
    figure, axes = plots.plot_confusion(counts, ["a", "b", "c"])
    assert axes.images[0].get_array().tolist() == [[0.75, 0.25, 0], [0, 1, 0], [0, 0, 0]]
    assert {t.get_position(): t.get_text() for t in axes.texts} == {(0, 0): "75", (1, 0): "25", (1, 1): "100"}
    assert [t.get_text() for t in axes.get_yticklabels()] == ["a", "b", "c"]
    assert axes.get_title(loc="left") == "Accuracy 88.89%" and axes.get_ylabel() == "true class"
    many, axes = plots.plot_confusion(np.eye(100, dtype=int), [str(i) for i in range(100)])
    assert many.get_size_inches().max() < 20 and not axes.texts
    with pytest.raises(ValueError, match=r"plot_confusion: .* got shape \(3, 2\)"):
        plots.plot_confusion(counts[:, :2], ["a", "b", "c"])


def test_similarity_picture_is_sorted_by_class():
    s = metrics.filter_similarity(np.random.default_rng(0).standard_normal((5, 4)))
    figure, axes = plots.plot_filter_similarity(s, [2, 0, 2, 0, 0], ["a", "b", "c"])
    shown = np.ma.filled(axes.images[0].get_array(), np.nan)
    want = s[np.ix_([1, 3, 4, 0, 2], [1, 3, 4, 0, 2])]
    np.fill_diagonal(want, np.nan)
    assert np.array_equal(shown, want, equal_nan=True)
    assert axes.images[0].get_clim() == (0, np.nanmax(want))
    assert axes.get_yticks().tolist() == [1, 3.5] and [t.get_text() for t in axes.get_yticklabels()] == ["a", "c"]
    assert plots.plot_filter_similarity(s, [0] * 5, ["a"], top=2)[1].images[0].get_clim() == (0, 2)
    with pytest.raises(ValueError, match=r"plot_filter_similarity: .* got \(5, 5\) and \(4,\)"):
        plots.plot_filter_similarity(s, [0] * 4, ["a"])


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True, scope="module")
def _few_draws():
    """Fewer splits and permutations: here they need no precision."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "SPLITS", 10)
        patch.setattr(evaluate, "PERMUTATIONS", 100)
        yield


def _evaluate(output: Path, *arguments) -> int:
    return cli.main(["evaluate", *map(str, arguments), "--device", "cpu", "--output", str(output)])


@pytest.fixture(scope="module")
def report(run, tmp_path_factory):
    """(evaluation.json of the run, what was printed, the folder)."""
    folder = tmp_path_factory.mktemp("evaluate") / "o"
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert _evaluate(folder, run[0]) == 0
    return json.loads((folder / "evaluation.json").read_text()), out.getvalue(), folder


def test_a_run_is_both_arms_as_training_measured_them(report, run):
    numbers, _, folder = report
    summary = json.loads((run[0] / "summary.json").read_text())
    for checkpoint, arm in zip(numbers["checkpoints"], ("std", "csg"), strict=True):
        assert checkpoint["name"] == arm and checkpoint["model"] == "resnet20"
        for name in {"accuracy", "mis", "mis_ceiling", "l1_density", "class_agreement", "one_hot_accuracy"}:
            assert (name in checkpoint["measures"]) == (name in summary[arm])
            if name in summary[arm]:
                assert checkpoint["measures"][name] == pytest.approx(summary[arm][name], abs=1e-6)
        with np.load(run[0] / arm / "arrays.npz") as arrays:
            assert checkpoint["confusion"] == arrays["confusion"].tolist()
        for stem in ("confusion", "filter_similarity"):
            with Image.open(folder / f"{stem}_{arm}.png") as picture:
                assert picture.size[0] > 400
    assert numbers["data"]["classes"] == ["0", "1", "2"] and numbers["data"]["test"] == 137


def test_measures_are_what_they_say(report, run, digits):
    """Every number again, from the weights, in this file's own words."""
    measures = report[0]["checkpoints"][1]["measures"]
    data = load_images(digits)
    stored = read_checkpoint(run[0] / "csg" / "model.safetensors")
    model = restore(stored, data)
    assert training_statistics(stored, data) == data.statistics()
    features, logits = predict(model, data.test_images, data.statistics())
    labels, gate = data.test_labels, model.gate.detach().numpy()
    weight, bias = model.classifier.weight.detach().numpy(), model.classifier.bias.detach().numpy()
    owner = gate.argmax(0)
    assert measures["cluster_accuracy_gate"] == metrics.cluster_accuracy(features, weight, bias, owner, labels)
    assert measures["complement_accuracy_gate"] == metrics.complement_accuracy(features, weight, bias, owner, labels)
    assert measures["predicted_class_accuracy_gate"] == metrics.predicted_class_accuracy(
        features, weight, bias, owner, labels
    )
    probability = torch.from_numpy(logits).double().softmax(1).numpy()
    confidence, right = probability.max(1), logits.argmax(1) == labels
    bins = np.minimum((confidence * 15).astype(int), 14)
    error = sum(abs(right[bins == b].mean() - confidence[bins == b].mean()) * np.mean(bins == b) for b in set(bins))
    assert measures["calibration_error"] == pytest.approx(error, abs=1e-5)
    entropy = metrics.class_entropy(labels, 3)
    mi = metrics.class_mutual_info(features, labels)
    assert measures["mis_bound"] == entropy.max()
    assert measures["mis_normalized"] == pytest.approx((mi / entropy).max(1).mean(), abs=1e-6)
    kernels = load_file(run[0] / "csg" / "model.safetensors")["backbone.stages.8.conv2.weight"].numpy()
    block = metrics.block_score(metrics.filter_similarity(kernels), owner, permutations=100)
    assert (measures["block_score_gate"], measures["block_score_p_value_gate"]) == (block.score, block.p_value)
    rows = np.random.default_rng(0).permutation(400)[:137]  # filters' classes by MI: from train images
    mi = metrics.class_mutual_info(
        predict(model, data.train_images[rows], data.statistics())[0], data.train_labels[rows]
    )
    assert measures["cluster_accuracy_mi"] == metrics.cluster_accuracy(features, weight, bias, mi.argmax(1), labels)
    assert measures["classes_without_filter_mi"] == 3 - len(set(mi.argmax(1)))


def test_the_difference_and_its_interval(report):
    numbers, _, _ = report
    std, csg = (c["measures"] for c in numbers["checkpoints"])
    change = numbers["difference"]
    assert change.keys() == {name for name in std.keys() & csg.keys() if "p_value" not in name}
    for name, d in change.items():
        assert d["difference"] == pytest.approx(csg[name] - std[name], abs=1e-12)
        accuracy, information = "accuracy" in name, name in ("mis", "mis_normalized", "mis_ceiling")
        assert d["method"] == ("paired bootstrap" if accuracy else "split halves" if information else None)
        if d["method"]:
            assert d["low"] <= d["difference"] <= d["high"]
        if information:
            assert d["low"] < d["high"]


def test_the_table_shows_every_measure(report):
    numbers, out, _ = report
    std, csg = (c["measures"] for c in numbers["checkpoints"])
    d = numbers["difference"]["mis"]
    line = next(line for line in out.splitlines() if line.startswith("MIS: "))
    assert line.split()[-5:] == [
        f"{std['mis']:.4f}",
        f"{csg['mis']:.4f}",
        f"{d['difference']:+.4f}",
        f"[{d['low']:+.4f},",
        f"{d['high']:+.4f}]",
    ]
    assert re.search(rf"L1-density of the gate +-  +{csg['l1_density']:.4f}\n", out)
    assert re.search(r"STD +CSG  CSG - STD \[95% interval\]\n", out)
    assert {key for key, _, _ in evaluate._ROWS} == csg.keys()
    assert "Measuring on digits: 137 test images, 8x8, 3 classes." in out
    assert "Written to " in out and "filter_similarity_csg.png" in out


def test_single_checkpoints(report, run, digits, tmp_path, capsys):
    want = report[0]["checkpoints"][1]["measures"]
    moved = tmp_path / "moved.ckpt"
    shutil.copy(run[0] / "csg" / "last.ckpt", moved)
    for name, *arguments in (
        ("csg", run[0] / "csg"),
        ("csg", run[0] / "csg" / "last.ckpt"),
        ("moved.ckpt", moved, "--data", digits),
    ):
        assert _evaluate(tmp_path / "o", *arguments) == 0
        numbers = json.loads((tmp_path / "o" / "evaluation.json").read_text())
        assert numbers["checkpoints"][0]["name"] == name and "difference" not in numbers
        assert numbers["checkpoints"][0]["measures"] == want
    assert (tmp_path / "o" / "confusion.png").exists() and (tmp_path / "o" / "filter_similarity.png").exists()
    assert "interval" not in capsys.readouterr().out
    assert _evaluate(tmp_path / "none", moved) == 2
    assert "moved.ckpt has no run.json of its run beside it: give the images as --data" in capsys.readouterr().err


def test_two_checkpoints(report, run, tmp_path, capsys):
    """Given the other way round the difference changes its sign; a run beside another checkpoint is its CSG arm."""
    assert _evaluate(tmp_path / "o", run[0], run[0] / "std") == 0
    numbers = json.loads((tmp_path / "o" / "evaluation.json").read_text())
    assert [c["name"] for c in numbers["checkpoints"]] == ["first", "second"]
    for name, d in numbers["difference"].items():
        other = report[0]["difference"][name]
        assert d["difference"] == pytest.approx(-other["difference"], abs=1e-12)
        if name.startswith("mis") and d["low"] is not None:
            assert (d["low"], d["high"]) == pytest.approx((-other["high"], -other["low"]), abs=1e-12)
    assert f"first: {run[0]}/csg/model.safetensors" in capsys.readouterr().out
    assert (tmp_path / "o" / "confusion_second.png").exists()


def test_seeds_and_statistics_of_the_run(report, run, digits, tmp_path):
    """Other images are normalised as the run's were; a run of an earlier version has no statistics of its own."""
    copy = tmp_path / "run"
    shutil.copytree(run[0], copy)
    stored = json.loads((copy / "run.json").read_text())
    data = load_images(digits)
    dark = tmp_path / "dark.npz"
    data.train_images //= 2
    data.save(dark)

    def accuracies(*arguments):
        assert _evaluate(tmp_path / "o", copy / "csg", *arguments) == 0
        return json.loads((tmp_path / "o" / "evaluation.json").read_text())["checkpoints"][0]["confusion"]

    want = report[0]["checkpoints"][1]["confusion"]
    assert accuracies("--data", dark) == want
    del stored["statistics"]
    (copy / "run.json").write_text(json.dumps(stored))
    assert accuracies() == want
    assert accuracies("--data", dark) != want


# ---- bad input -------------------------------------------------------------------------------------------------------


class _Hostile:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.fixture(scope="module")
def files(run, digits, tmp_path_factory) -> Path:
    """A folder of checkpoints that must be refused."""
    folder = tmp_path_factory.mktemp("bad")
    last, weights = run[0] / "csg" / "last.ckpt", run[0] / "csg" / "model.safetensors"
    good = torch.load(last, weights_only=True)
    torch.save(good | {"extra": _Hostile()}, folder / "hostile.ckpt")
    (folder / "pickle.ckpt").write_bytes(pickle.dumps(_Hostile()))
    (folder / "short.ckpt").write_bytes(last.read_bytes()[:-5000])
    (folder / "empty.ckpt").write_bytes(b"")
    torch.save([1, 2], folder / "list.ckpt")
    torch.save({"epoch": 3}, folder / "none.ckpt")
    torch.save(nn.Linear(3, 2).state_dict(), folder / "linear.pt")
    torch.save(good | {"csg_ext": {"config": {"model": "vgg"}}}, folder / "vgg.ckpt")
    torch.save(good | {"csg_ext": {"config": {"depth": 1}}}, folder / "depth.ckpt")
    torch.save(good | {"csg_ext": {"config": 7}}, folder / "seven.ckpt")
    torch.save(good | {"csg_ext": good["csg_ext"] | {"config": good["csg_ext"]["config"] | {"model": "resnet32"}}},
               folder / "deeper.ckpt")  # fmt: skip
    wide = {"model.csg.gate": torch.ones(()).expand(10**6, 10**6)}
    torch.save(good | {"state_dict": good["state_dict"] | wide}, folder / "wide.ckpt")
    nan = {"model.classifier.bias": torch.full((3,), float("nan"))}
    torch.save(good | {"state_dict": good["state_dict"] | nan}, folder / "nan.ckpt")
    with zipfile.ZipFile(last) as old, zipfile.ZipFile(folder / "packed.ckpt", "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    for run_name in ("run", "badrun", "oddrun", "typerun", "otherrun"):
        (folder / run_name / "csg").mkdir(parents=True)
        shutil.copy(run[0] / "run.json", folder / run_name)
        shutil.copy(weights, folder / run_name / "csg")
    (folder / "run" / "csg" / "model.safetensors").write_bytes(weights.read_bytes()[:-100])
    (folder / "badrun" / "run.json").write_text("{")
    (folder / "oddrun" / "run.json").write_text('{"config": {}, "source": 3, "sha256": ""}')
    stored = json.loads((run[0] / "run.json").read_text())
    other = stored | {"sha256": "0" * 64}
    (folder / "typerun" / "run.json").write_text(json.dumps(stored | {"source": {"data": 3}}))
    (folder / "otherrun" / "run.json").write_text(json.dumps(other))
    shutil.copy(weights, folder / "alone.safetensors")
    save_file({"conv1.weight": torch.zeros(3)}, folder / "other.safetensors")
    (folder / "hollow").mkdir()
    with np.load(digits) as arrays:
        fourth = {key: np.r_[np.full(3, 3), arrays[key][3:]] for key in ("train_labels", "test_labels")}
        np.savez(folder / "four.npz", **(dict(arrays) | fourth | {"classes": np.array(list("abcd"))}))
        colour = {key: np.repeat(arrays[key], 3, 1) for key in ("train_images", "test_images")}
        np.savez(folder / "colour.npz", **(dict(arrays) | colour))
    return folder


DATA = ["--data", "DIGITS"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["hostile.ckpt", *DATA],
            "hostile.ckpt: expected a checkpoint .*, got one that holds more than tensors and pla",
        ),
        (["pickle.ckpt", *DATA], "pickle.ckpt: expected a checkpoint of csg-ext, got a file that is none: "),
        (["short.ckpt", *DATA], "short.ckpt: expected a checkpoint of csg-ext, got a file that is none: "),
        (["empty.ckpt", *DATA], "empty.ckpt: expected a checkpoint of csg-ext, got a file that is none: "),
        (["packed.ckpt", *DATA], "packed.ckpt: expected a checkpoint of csg-ext, got a compressed archive"),
        (["list.ckpt", *DATA], "list.ckpt: expected a checkpoint of csg-ext, got a list"),
        (["none.ckpt", *DATA], "none.ckpt: expected a checkpoint of csg-ext, got epoch"),
        (["linear.pt", *DATA], "linear.pt holds weights alone: expected run.json of its run in "),
        (["vgg.ckpt", *DATA], "vgg.ckpt: expected the settings of a run, .* model must be one of resnet20"),
        (["depth.ckpt", *DATA], "depth.ckpt: expected the settings of a run, .* 'depth'"),
        (["seven.ckpt", *DATA], "seven.ckpt: expected the settings of a run"),
        (["deeper.ckpt", *DATA], "deeper.ckpt: expected the weights of resnet32, which it lacks: "),
        (["wide.ckpt", *DATA], r"csg.gate must be float32 \(3, 64\) for 3 .*, got float32 \(1000000, 1000000\)"),
        (["nan.ckpt", *DATA], "nan.ckpt: classifier.bias must be finite, got NaN"),
        (["run/csg", *DATA], "model.safetensors: expected a readable .safetensors file, got one that fails with"),
        (["badrun/csg"], "run.json: expected the settings of a run as JSON, got: "),
        (["oddrun/csg"], "run.json: expected the settings of a run with config, source and sha256, got other JSON"),
        (["typerun/csg"], "expected a run.json that names its images, got one that fails with: "),
        (["otherrun/csg"], "expected the images that the run saw, got others from "),
        (["otherrun/csg", "RUN"], "both checkpoints must be measured on the same images, got runs on different ones"),
        (["alone.safetensors", *DATA], "alone.safetensors holds weights alone: expected run.json of its run in "),
        (["other.safetensors", *DATA], "other.safetensors holds weights alone"),
        (["hollow"], "expected model.safetensors or last.ckpt in .*hollow, got neither"),
        (["otherrun"], "expected model.safetensors or last.ckpt in .*otherrun/std, got neither"),
        (["missing"], "got .*missing: no such file"),
        (
            ["RUN", "--data", "four.npz"],
            r"csg.gate must be float32 \(4, 64\) for 4 classes .*, got float32 \(3, 64\)",
        ),
        (["RUN", "--data", "colour.npz"], r"conv.weight must be float32 \(16, 3, 3, 3\) for 3 classes and 3 channels"),
        (["RUN", "--seed", "-1"], "seed must be at least 0, got -1"),
        (["RUN", "--image-size", "8"], "--image-size applies to --data, which is not given"),
        (["RUN", "RUN", "RUN"], "expected one or two checkpoints, got 3"),
        (["RUN", "--device", "tpu"], "device must be auto, cpu, cuda or cuda:INDEX, got 'tpu'"),
    ],
)
def test_bad_input_is_one_sentence(files, run, digits, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    known = {"RUN": run[0], "DIGITS": digits}
    words = [str(known.get(word, files / word if (files / word).exists() else word)) for word in arguments]
    assert cli.main(["evaluate", "--output", str(tmp_path / "o"), *words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and re.match(f"csg-ext evaluate: error: .*({message})", lines[0]), lines
    assert not (tmp_path / "o").exists() and not (tmp_path / "executed").exists()


@pytest.mark.parametrize("statistics", [[[0.5, 0.5], [1.0, 1.0]], [[0.5], ["x"]], [[0.5]], 3])
def test_statistics_that_do_not_fit(run, digits, statistics):
    stored = read_checkpoint(run[0] / "csg" / "model.safetensors")
    stored.run["statistics"] = statistics
    with pytest.raises(ValueError, match=r"run.json must hold the statistics of 1 channels, got "):
        training_statistics(stored, load_images(digits))


def test_ctrl_c_writes_nothing(run, tmp_path, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "evaluate_model", interrupted)
    assert _evaluate(tmp_path / "o", run[0]) == 130
    assert capsys.readouterr().err == "Interrupted; nothing is written\n" and not (tmp_path / "o").exists()
