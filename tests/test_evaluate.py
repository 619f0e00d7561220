"""Tests of `csg-ext evaluate` on a short run: what it reports, writes and prints, and each refusal."""

from __future__ import annotations

import contextlib
import io
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
from PIL import Image
from safetensors.torch import load_file, save_file
from short_run import SHORT
from torch import nn

from csg_ext import cli, evaluate, metrics
from csg_ext.analysis import evaluation
from csg_ext.data import load_images
from csg_ext.runs import read_checkpoint, restore, training_statistics
from csg_ext.training.arm import predict

# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True, scope="module")
def _few_draws():
    """Fewer splits and permutations: here they need no precision."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "SPLITS", 10)
        patch.setattr(evaluation, "PERMUTATIONS", 100)
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
        for name in {"accuracy", "mis", "mis_ceiling", "l1_density", "class_agreement", "one_hot_accuracy"} | {
            *("class_selectivity", "exclusivity", "quiet_filters", "mis_of_ceiling", "weight_agreement"),
            "weight_own_accuracy",
        }:
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


def test_a_confidence_of_one_is_in_the_last_bin():
    """Of 15 bins: 0.95 and what rounds to 1 share the last, in which 3 of 4 are right."""
    margin = float(np.log(0.95 / 0.05))
    logits = torch.tensor([[margin, 0.0], [margin, 0.0], [200.0, 0.0], [200.0, 0.0]])
    found = evaluation._calibration_error(logits, torch.tensor([0, 0, 0, 1]))
    assert found == pytest.approx(abs((0.95 * 2 + 2) / 4 - 3 / 4), abs=1e-6)


@pytest.mark.parametrize("samples", [5, 8])
def test_few_images_have_a_difference_of_mis_without_an_interval(samples):
    def measured(seed):
        rng = np.random.default_rng(seed)
        features, logits = rng.standard_normal((samples, 3)), rng.standard_normal((samples, 2))
        hits = {"accuracy": rng.random(samples) > 0.5}
        return evaluation.Evaluation(
            numbers={"accuracy": float(hits["accuracy"].mean()), "mis": 0.1 * seed},
            hits=hits,
            features=features,
            logits=logits,
            labels=np.arange(samples) % 2,
            mi=np.zeros((3, 2)),
            gate=None,
            owners={},
            dead=np.zeros(3, bool),
            confusion=np.eye(2),
            similarity=None,
            remarks=[],
        )

    found = evaluation.evaluation_differences(measured(1), measured(2))
    assert found["accuracy"]["method"] == "paired bootstrap"
    assert found["mis"]["method"] == (None if samples < 8 else "split halves")
    assert (found["mis"]["low"] is None) == (samples < 8)


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
    assert {key for key, _, _ in evaluation._ROWS} == csg.keys()
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


def test_images_that_are_gone_are_asked_for(run, digits, tmp_path, capsys):
    folder = tmp_path / "r"
    shutil.copytree(run[0], folder)
    about = json.loads((folder / "run.json").read_text())
    about["source"]["data"] = str(tmp_path / "gone.npz")
    (folder / "run.json").write_text(json.dumps(about))
    assert _evaluate(tmp_path / "o", folder / "csg") == 2
    gone = "gone.npz, which does not exist; if the run's images have moved, give --data PATH\n"
    assert capsys.readouterr().err.endswith(gone)
    assert _evaluate(tmp_path / "o", folder / "csg", "--data", digits) == 0


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


def test_two_classes(digits, tmp_path, capsys):
    """Of two classes a filter has the same mutual information with both: the means tell them apart."""
    folder = tmp_path / "run"
    assert cli.main(["train", "--data", str(digits), "--output", str(folder), "--classes", "0,1", *SHORT]) == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert (folder / "gate.png").exists() and not (folder / "class_agreement.png").exists()
    assert _evaluate(tmp_path / "o", folder) == 0
    for checkpoint, arm in zip(
        json.loads((tmp_path / "o" / "evaluation.json").read_text())["checkpoints"], ("std", "csg"), strict=True
    ):
        with np.load(folder / arm / "arrays.npz") as arrays:
            features, labels, mi, gate = (arrays[name] for name in ("features", "labels", "mi", "gate"))
        assert np.array_equal(mi[:, 0], mi[:, 1])
        higher = (features[labels == 1].mean(0) > features[labels == 0].mean(0)).astype(int)
        assert 0 < higher.mean() < 1  # filters for either class
        assert checkpoint["measures"]["classes_without_filter_mi"] == 0
        if arm == "csg":
            want = np.mean((gate.argmax(0) == higher)[mi.max(1) > 0])
            assert checkpoint["measures"]["class_agreement"] == pytest.approx(want)
            assert summary["csg"]["class_agreement"] == pytest.approx(want)


def test_other_images_with_the_classes_in_another_order(report, run, digits, tmp_path, capsys):
    """--data counts its classes in an order of its own, or not all of them: what counts is the run's."""
    with np.load(digits) as arrays:
        stored = dict(arrays)
    turned = {key: 2 - stored[key] for key in ("train_labels", "test_labels")}
    np.savez(tmp_path / "turned.npz", **(stored | turned | {"classes": np.array(["2", "1", "0"])}))
    more = {"classes": np.array(["3", "2", "1", "0"])}
    for part in ("train", "test"):
        more[f"{part}_labels"] = np.r_[turned[f"{part}_labels"] + 1, 0]
        more[f"{part}_images"] = np.r_[stored[f"{part}_images"], stored[f"{part}_images"][:1]]
    np.savez(tmp_path / "more.npz", **more)
    np.savez(tmp_path / "named.npz", **(stored | {"classes": np.array(["zero", "one", "two"])}))
    want = [checkpoint["confusion"] for checkpoint in report[0]["checkpoints"]]
    for name in ("turned.npz", "more.npz"):
        assert _evaluate(tmp_path / "o", run[0], "--data", tmp_path / name) == 0
        numbers = json.loads((tmp_path / "o" / "evaluation.json").read_text())
        assert [checkpoint["confusion"] for checkpoint in numbers["checkpoints"]] == want
        assert numbers["data"]["classes"] == ["0", "1", "2"]
    # Numbers are no names: a run whose classes have names takes them as the labels.
    copy = tmp_path / "run"
    shutil.copytree(run[0], copy)
    settings = json.loads((copy / "run.json").read_text())
    settings["images"]["classes"] = ["zero", "one", "two"]
    (copy / "run.json").write_text(json.dumps(settings))
    for name in (digits, tmp_path / "named.npz"):
        assert _evaluate(tmp_path / "o", copy, "--data", name) == 0
        numbers = json.loads((tmp_path / "o" / "evaluation.json").read_text())
        assert [checkpoint["confusion"] for checkpoint in numbers["checkpoints"]] == want
    capsys.readouterr()
    assert _evaluate(tmp_path / "o", run[0], "--data", tmp_path / "named.npz") == 2
    assert "classes that the network was trained on, 0, 1, 2, got one, two, zero" in capsys.readouterr().err
    assert _evaluate(tmp_path / "o", run[0], copy, "--data", digits) == 2
    said = capsys.readouterr().err
    assert "same classes, in the same order, and of one shape, got the classes ['0', '1', '2'] and ['zero'," in said


def test_other_images_in_the_size_and_colour_of_the_run(report, run, digits, tmp_path, capsys):
    """A folder keeps its images' own size and colours when a run is trained on it; here they are the run's."""
    data = load_images(digits)
    for side, place in ((8, tmp_path / "colour"), (16, tmp_path / "large")):
        for part in ("train", "test"):
            labelled = zip(getattr(data, f"{part}_images"), getattr(data, f"{part}_labels"), strict=True)
            for i, (image, label) in enumerate(labelled):
                folder = place / part / str(label)
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image[0]).convert("RGB").resize((side, side)).save(folder / f"{i}.png")

    def measured(*arguments):
        assert _evaluate(tmp_path / "o", run[0], *arguments) == 0
        return json.loads((tmp_path / "o" / "evaluation.json").read_text())

    numbers = measured("--data", tmp_path / "colour")
    assert [c["confusion"] for c in numbers["checkpoints"]] == [c["confusion"] for c in report[0]["checkpoints"]]
    assert numbers["data"]["shape"] == [1, 8, 8]
    assert measured("--data", tmp_path / "large")["data"]["shape"] == [1, 8, 8]
    assert measured("--data", tmp_path / "large", "--image-size", "16")["data"]["shape"] == [1, 16, 16]
    load_images(tmp_path / "large").save(tmp_path / "large.npz")
    capsys.readouterr()
    assert _evaluate(tmp_path / "o", run[0], "--data", tmp_path / "large.npz") == 2
    shapes = "--data must hold images of the shape that the network was trained on, [1, 8, 8], got [1, 16, 16]"
    assert shapes in capsys.readouterr().err
    assert _evaluate(tmp_path / "o", run[0], "--data", tmp_path / "large.npz", "--image-size", "8") == 2
    assert "image_size applies to image folders and shards, got 8 for 16 x 16 images" in capsys.readouterr().err


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
    key = "model.classifier.weight"
    for name, other in (("sparse", good["state_dict"][key].to_sparse()), ("meta", good["state_dict"][key].to("meta"))):
        torch.save(good | {"state_dict": good["state_dict"] | {key: other}}, folder / f"{name}.ckpt")
    save_file({"conv1.weight": torch.zeros(3)}, folder / "other.safetensors")
    (folder / "hollow").mkdir()
    with np.load(digits) as arrays:
        fourth = {key: np.r_[np.full(3, 3), arrays[key][3:]] for key in ("train_labels", "test_labels")}
        np.savez(folder / "four.npz", **(dict(arrays) | fourth | {"classes": np.array(list("abcd"))}))
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
        (["deeper.ckpt", *DATA], "deeper.ckpt: expected the weights of resnet32 for 3 classes .*: 72 are missing "),
        (["wide.ckpt", *DATA], r"for 3 classes .*, got csg.gate with shape \(1000000, 1000000\) instead of \(3, 64\)"),
        (
            ["nan.ckpt", *DATA],
            r"nan.ckpt: expected finite weights, got 3 values of NaN or infinity \(classifier.bias\)",
        ),
        (["sparse.ckpt", *DATA], r"sparse.ckpt: expected dense real tensors, .* 1 of them \(classifier.weight\)"),
        (["meta.ckpt", *DATA], r"meta.ckpt: expected dense real tensors, .* 1 of them \(classifier.weight\)"),
        (["run/csg", *DATA], "model.safetensors: expected a readable .safetensors file, got one that fails with"),
        (["badrun/csg"], "run.json: expected the settings of a run as JSON, got: "),
        (["oddrun/csg"], "run.json: expected the settings of a run with config, source and sha256, got other JSON"),
        (["typerun/csg"], "run.json: the source's data must be a path or null, got 3"),
        (["otherrun/csg"], "expected the images that the run saw, got others from "),
        (["otherrun/csg", "RUN"], "both checkpoints must be measured on the same images, got runs on different ones"),
        (["alone.safetensors", *DATA], "alone.safetensors holds weights alone: expected run.json of its run in "),
        (["other.safetensors", *DATA], "other.safetensors holds weights alone"),
        (["hollow"], "expected model.safetensors or last.ckpt in .*hollow, got neither"),
        (["otherrun"], "expected model.safetensors or last.ckpt in .*otherrun/std, got neither"),
        (["missing"], "got .*missing: no such file"),
        (
            ["RUN", "--data", "four.npz"],
            "--data must hold the classes that the network was trained on, 0, 1, 2, got a, b, c, d",
        ),
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

    monkeypatch.setattr(evaluate, "evaluate_images", interrupted)
    assert _evaluate(tmp_path / "o", run[0]) == 130
    assert capsys.readouterr().err == "Interrupted; nothing is written\n" and not (tmp_path / "o").exists()
