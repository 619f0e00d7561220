"""Dead filters, a class without a filter and checkpoints without a gate: what the commands say of them, and no NaN."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.feature_selection import mutual_info_classif
from torch import nn

from csg_ext import cli, metrics
from csg_ext.data import load_images
from csg_ext.report import draw, read_run
from csg_ext.runs import read_checkpoint, restore
from csg_ext.training import compare
from csg_ext.training.arm import evaluate

SAID = "2 of 64 filters are dead (one activation on all images) and have no class: "
NO_FILTER = "1 of 3 classes has no filter by the gate: 2."


@pytest.fixture(scope="module")
def dead() -> list[int]:
    return sorted(np.random.default_rng(7).choice(64, 2, replace=False).tolist())


@pytest.fixture(scope="module")
def blind(run, digits, dead, tmp_path_factory) -> Path:
    """The short run, two filters of its CSG arm switched off, and every filter of class 2 given to class 1."""
    folder = shutil.copytree(run[0], tmp_path_factory.mktemp("blind") / "run")
    file = folder / "csg" / "model.safetensors"
    data = load_images(digits)
    model = restore(read_checkpoint(file), data)
    last = [m for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d)][-1]
    with torch.no_grad():
        last.bias[dead] = -1e6  # below zero on every image
        model.gate[1] = torch.maximum(model.gate[1], model.gate[2])
        model.gate[2] = 0
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, file)
    numbers, arrays = evaluate(model, data, "csg")
    np.savez(folder / "csg" / "arrays.npz", **arrays)
    summary = json.loads((folder / "summary.json").read_text())
    summary["csg"] |= numbers
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def _call(capsys, *arguments) -> str:
    status = cli.main([*map(str, arguments)])
    out, err = capsys.readouterr()
    assert status == 0, err
    assert "nan" not in out.lower()
    return out


def _json(file: Path):
    def refuse(name):
        raise AssertionError(f"{file} holds {name}")

    return json.loads(file.read_text(), parse_constant=refuse)


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_dead_filters_are_the_constant_columns(kind):
    features = torch.rand(20, 6, dtype=torch.float64).numpy()
    features[:, 2], features[:, 4] = 0, 0.1
    assert metrics.dead_filters(kind(features)).tolist() == [False, False, True, False, True, False]
    with pytest.raises(ValueError, match=r"features must be \(N, K\) and not empty, got \(3,\)"):
        metrics.dead_filters(kind(features)[0, :3])


def test_agreement_leaves_dead_filters_out():
    gate, mi = torch.rand(4, 30).numpy(), torch.rand(30, 4).numpy()
    live = torch.rand(30).numpy() < 0.5
    live[0] = True
    expected = np.mean([gate[:, k].argmax() == mi[k].argmax() for k in np.flatnonzero(live)])
    assert metrics.class_agreement(gate, np.where(live[:, None], mi, 0)) == pytest.approx(expected)
    assert metrics.class_agreement(gate, np.zeros((30, 4))) == 0


def test_training_measures_dead_filters_as_zero(blind, dead):
    with np.load(blind / "csg" / "arrays.npz") as arrays:
        mi, features, labels = arrays["mi"], arrays["features"], arrays["labels"]
    assert np.flatnonzero((features == features[0]).all(0)).tolist() == dead
    k = next(k for k in range(64) if k not in dead)
    for c in range(3):  # a live filter has scikit-learn's value, whose noise depends on the features before
        assert mi[k, c] == pytest.approx(mutual_info_classif(features[:, [k]], labels == c)[0], abs=0.05)
    assert (mi[dead] == 0).all()
    summary = json.loads((blind / "summary.json").read_text())
    assert summary["csg"]["dead_filters"] == 2 and summary["csg"]["mis"] == pytest.approx(mi.max(1).sum() / 64)
    row = next(row for row in compare.rows(summary) if row[0].startswith("dead filters"))
    assert row[1:] == (str(summary["std"]["dead_filters"]), "2")


def test_mis(blind, dead, tmp_path, capsys):
    out = _call(capsys, "mis", blind / "csg", "--output", tmp_path)
    assert SAID + ", ".join(map(str, dead)) + "." in out
    found = _json(tmp_path / "mis.json")
    assert found["dead_filters"] == dead and sum(found["filters_per_class"]) == 62
    with np.load(tmp_path / "mutual_information.npz") as arrays:
        assert (arrays["mi"][dead] == 0).all() and (arrays["best_class"][dead] == -1).all()
        assert found["mis"] == pytest.approx(arrays["mi"].max(1).mean())
    assert (tmp_path / "mutual_information.png").stat().st_size > 1000


def test_mis_of_nothing_but_dead_filters(tmp_path, capsys):
    np.savez(tmp_path / "f.npz", features=np.ones((40, 3), np.float32), labels=np.arange(40) % 2)
    out = _call(capsys, "mis", tmp_path / "f.npz", "--output", tmp_path)
    assert "3 of 3 filters are dead" in out and "2 of 2 classes have no filter by mutual information" in out
    assert _json(tmp_path / "mis.json")["mis"] == 0


def test_evaluate(blind, dead, tmp_path, capsys):
    out = _call(capsys, "evaluate", blind, "--device", "cpu", "--output", tmp_path)
    assert f"CSG: {SAID}{dead[0]}, {dead[1]}.\n" in out and f"CSG: {NO_FILTER}\n" in out
    std, csg = _json(tmp_path / "evaluation.json")["checkpoints"]
    assert csg["dead"] == dead and csg["measures"]["dead_filters"] == 2
    assert csg["measures"]["classes_without_filter_gate"] == 1
    assert f"STD: No measure by the gate: {'the checkpoint has no trained gate: its entries are all 0.5'}." in out
    assert len(std["dead"]) == std["measures"]["dead_filters"]


def test_report(browser, blind, dead, capsys):
    _call(capsys, "report", blind)
    page = browser.open(blind / "report.html")
    shown = [note.get_property("textContent") for note in page.all("section[aria-labelledby=table-title] .note")]
    assert f"CSG: {SAID}{dead[0]}, {dead[1]}." in shown and f"CSG: {NO_FILTER}" in shown
    page.choose("order", "class")
    columns = page.js("return document.getElementById('matrix').layout.xaxis.ticktext.length")
    assert columns == 32
    for column in (62, 63):  # dead ones stand at the end
        page.point(1, column)
        text = page.text("#status")
        assert text.startswith(tuple(f"Filter {k} (dead), class 1: gate " for k in dead))
        assert "none: it is dead" in page.text("#filter-facts")
        assert "It is dead" in page.text("#filter-images")
    page.choose("class", 2)
    assert page.text("#class-note").startswith("0 of 64 filters")
    assert page.errors() == []


def test_pictures_of_dead_filters(blind, dead):
    run = read_run(blind)
    csg = run.arms[1]
    assert (csg.filter_classes[dead] == -1).all() and 2 not in csg.filter_classes
    csg.features[:] = 1.0  # and of nothing but dead ones
    csg.__dict__.pop("dead", None)
    assert all(picture.png.startswith(b"\x89PNG") for picture in draw(run))


# ---- checkpoints without a gate ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gateless(run, tmp_path_factory) -> Path:
    folder = shutil.copytree(run[0], tmp_path_factory.mktemp("gateless") / "run")
    for arm in ("std", "csg"):
        file = folder / arm / "model.safetensors"
        weights = load_file(file)
        del weights["csg.gate"]
        save_file(weights, file)
    return folder


def test_evaluate_without_a_gate(run, gateless, tmp_path, capsys):
    out = _call(capsys, "evaluate", gateless / "std", "--device", "cpu", "--output", tmp_path / "a")
    assert "STD: No measure by the gate: the checkpoint holds no gate." in out
    _call(capsys, "evaluate", run[0] / "std", "--device", "cpu", "--output", tmp_path / "b")
    (a,), (b,) = (_json(tmp_path / x / "evaluation.json")["checkpoints"] for x in "ab")
    assert a["measures"] == b["measures"]


def test_localize_without_a_gate(gateless, digits, tmp_path, capsys):
    np.save(tmp_path / "masks.npy", load_images(digits).test_images[:, 0] > 120)
    files = ["--data", digits, "--masks", tmp_path / "masks.npy", "--output", tmp_path]
    out = _call(capsys, "localize", gateless, "--device", "cpu", *files)
    for arm in ("std", "csg"):
        assert f"{arm}: no map of the gate, as the checkpoint holds no gate" in out
    found = _json(tmp_path / "localization.json")["checkpoints"]
    assert all(0 < a["methods"]["cam"]["energy"] < 1 and 0 < a["methods"]["gradient"]["energy"] < 1 for a in found)


def test_detect_without_a_gate(gateless, tmp_path, capsys):
    small = ["--images", "20", "--epsilons", "8", "--weights", "--steps", "1", "--device", "cpu"]
    _call(capsys, "detect", gateless / "std", *small, "--output", tmp_path)
    (found,) = _json(tmp_path / "detection.json")["checkpoints"]
    assert found["gated"] is False


def test_report_without_a_gate(gateless, capsys):
    _call(capsys, "report", gateless)
    names = [picture.name for picture in draw(read_run(gateless))]
    assert "gate" not in names and "class_agreement" not in names and len(names) == 9
