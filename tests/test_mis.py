"""Tests of `csg-ext mis`: every format, a run, its options, refusals, Ctrl-C."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import csg_ext
from csg_ext import cli, mis


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> Path:
    """A folder with the same features in every format."""
    folder = tmp_path_factory.mktemp("features")
    rng = np.random.default_rng(0)
    y = rng.integers(0, 5, 400)
    x = (rng.standard_normal((400, 12)) + 3 * (np.arange(12) % 4 == y[:, None])).astype(np.float32)
    np.savez(folder / "f.npz", features=x, labels=y)
    np.savez(folder / "unlabelled.npz", features=x)
    np.save(folder / "f.npy", x)
    np.save(folder / "labels.npy", y)
    np.save(folder / "bools.npy", y == 1)
    np.savez(folder / "complex.npz", features=x + 1j, labels=y)
    save_file({"features": torch.from_numpy(x), "labels": torch.from_numpy(y)}, folder / "f.safetensors")
    save_file({"features": torch.from_numpy(x), "other": torch.zeros(1)}, folder / "unlabelled.safetensors")
    (folder / "broken.npz").write_bytes(b"PK")
    (folder / "broken.safetensors").write_bytes(b"x")
    return folder


def _mis(folder: Path, output: Path, *arguments: str) -> int:
    words = [str(folder / word) if (folder / word).exists() else word for word in arguments]
    return cli.main(["mis", *words, "--device", "cpu", "--output", str(output)])


@pytest.mark.parametrize(
    "arguments",
    [
        ["f.npz"],
        ["f.npy", "--labels", "labels.npy"],
        ["f.safetensors"],
        ["unlabelled.npz", "--labels", "labels.npy"],
        ["unlabelled.safetensors", "--labels", "labels.npy"],
    ],
)
def test_mis_reads_every_format(features, tmp_path, capsys, arguments):
    assert _mis(features, tmp_path / "o", *arguments) == 0
    out = capsys.readouterr().out
    with np.load(features / "f.npz") as file:
        x, y = file["features"], file["labels"]
    mi = csg_ext.class_mutual_info(x, y)
    with np.load(tmp_path / "o" / "mutual_information.npz") as written:
        assert np.array_equal(written["mi"], mi) and np.array_equal(written["best_class"], mi.argmax(1))
        assert np.array_equal(written["bound"], csg_ext.class_entropy(y))
    numbers = json.loads((tmp_path / "o" / "mis.json").read_text())
    assert numbers["mis"] == csg_ext.mutual_information_score(mi)
    assert numbers["filters_per_class"] == [3, 3, 3, 3, 0] and numbers["settings"]["ties"] == "noise"
    assert f"nats     {numbers['mis']:.4f}" in out and f"class    {numbers['bound']:.4f}" in out
    assert f"entropy   {numbers['mis_normalized']:.4f}" in out
    assert "400 samples, 12 filters, 5 classes; 3 neighbours, ties noise, one-vs-rest, seed 0" in out
    assert f"  class 2  3   25.0%  mean MI {mi[2::4, 2].mean():.4f} nats\n" in out
    assert [line for line in out.splitlines() if "filter" in line and "class 4" in line] == [
        "1 of 5 classes has no filter by mutual information: class 4."
    ]
    assert "without a filter" not in out  # the same again
    with Image.open(tmp_path / "o" / "mutual_information.png") as picture:
        assert picture.size[0] > 500


def test_mis_passes_its_options_on(features, tmp_path, capsys):
    arguments = "f.npz --n-neighbors 5 --ties exact --protocol balanced --seed 3 --normalize --num-classes 50".split()
    assert _mis(features, tmp_path / "o", *arguments) == 0
    assert "50 classes; 5 neighbours, ties exact, balanced, seed 3" in capsys.readouterr().out
    with np.load(features / "f.npz") as file, np.load(tmp_path / "o" / "mutual_information.npz") as written:
        want = csg_ext.class_mutual_info(
            file["features"], file["labels"], num_classes=50, n_neighbors=5, ties="exact", protocol="balanced",
            random_state=3, normalize=True,
        )  # fmt: skip
        assert np.array_equal(written["mi"], want)


def test_mis_of_two_classes_as_bools(features, tmp_path):
    """Both classes have the same value for a filter: its class is the one in whose samples it is more active."""
    assert _mis(features, tmp_path / "o", "f.npz", "--labels", "bools.npy") == 0
    with np.load(features / "f.npz") as file:
        x, y = file["features"], file["labels"] == 1
    numbers = json.loads((tmp_path / "o" / "mis.json").read_text())
    one = int((x[y].mean(0) > x[~y].mean(0)).sum())
    assert numbers["filters_per_class"] == [12 - one, one] and 0 < one < 12


@pytest.mark.parametrize("name", [".", "csg", "csg/last.ckpt"])
def test_mis_of_a_run_takes_no_labels(run, features, tmp_path, capsys, name):
    words = ["mis", str(run[0] / name), "--labels", str(features / "labels.npy"), "--output", str(tmp_path / "o")]
    assert cli.main(words) == 2
    assert "--labels expects a file of features, got " in capsys.readouterr().err and not (tmp_path / "o").exists()


def test_mis_of_a_run_counts_its_classes(run, tmp_path, capsys):
    assert cli.main(["mis", str(run[0]), "--output", str(tmp_path / "o"), "--num-classes", "6"]) == 2
    assert "num_classes must be the 3 classes of std, got 6" in capsys.readouterr().err
    assert not any((tmp_path / "o").rglob("*.json"))


def test_mis_of_a_run(run, tmp_path, capsys):
    folder, _, _ = run
    assert cli.main(["mis", str(folder), "--output", str(tmp_path / "both")]) == 0
    out = capsys.readouterr().out
    assert "std: " in out and "csg: " in out
    summary = json.loads((folder / "summary.json").read_text())
    for arm in ("std", "csg"):
        numbers = json.loads((tmp_path / "both" / arm / "mis.json").read_text())
        assert numbers["mis"] == pytest.approx(summary[arm]["mis"], abs=1e-12)
    for name in ("csg", "csg/arrays.npz", "csg/last.ckpt", "csg/model.safetensors"):
        assert cli.main(["mis", str(folder / name), "--output", str(tmp_path / "one")]) == 0
        numbers = json.loads((tmp_path / "one" / "mis.json").read_text())
        assert numbers["mis"] == pytest.approx(summary["csg"]["mis"], abs=1e-12)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["f.npy"], "holds features alone: give their labels as --labels FILE.npy"),
        (["none.npz"], "none.npz: No such file or directory"),
        (["none.txt"], "expected features as .npz, .npy or .safetensors, .* got none.txt, which does not exist"),
        (["unlabelled.npz"], "expected the array labels, got features"),
        (["unlabelled.safetensors"], "expected the array labels, got features, other"),
        (["broken.npz"], "broken.npz: expected a readable NumPy file, got one that fails with: "),
        (["broken.safetensors"], "broken.safetensors: expected a readable .safetensors file, got one that fails with"),
        (["."], "expected a folder that csg-ext train wrote, with arrays.npz, got"),
        (["labels.npy", "--labels", "labels.npy"], r"features must be \(N, K\), got shape \(400,\)"),
        (["complex.npz"], "features must be numbers, got complex64"),
        (["f.npz", "--num-classes", "3"], r"labels must lie in \[0, 3\), got 4"),
        (["f.npz", "--n-neighbors", "0"], "n_neighbors must be at least 1, got 0"),
        (["f.npz", "--device", "tpu"], "device must be auto, cpu, cuda or cuda:INDEX, got 'tpu'"),
    ],
)
def test_mis_refuses_in_one_sentence(features, tmp_path, capsys, arguments, message):
    words = [str(features / word) if (features / word).exists() else word for word in arguments]
    assert cli.main(["mis", "--output", str(tmp_path / "o"), *words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and re.match(f"csg-ext mis: error: .*{message}", lines[0])
    assert not (tmp_path / "o").exists()


def test_mis_stops_at_ctrl_c(features, tmp_path, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(mis, "class_mutual_info", interrupted)
    assert _mis(features, tmp_path / "o", "f.npz") == 130
    assert capsys.readouterr().err == "Interrupted; nothing is written\n" and not (tmp_path / "o").exists()


def test_mis_shows_a_bar_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    bar = mis._Bar("f.npz")
    bar(8, 20)
    bar(20, 20)
    assert bar.bar.n == bar.bar.total == 20
    bar.close()
    assert "f.npz" in stream.getvalue()
