"""Tests of `csg-ext report` without a browser: what goes into the page, bad runs and arguments."""

from __future__ import annotations

import base64
import json
import re
import shutil

import numpy as np
import pytest
import torch
from short_run import report_command

from csg_ext.data import ImageData
from csg_ext.report import collect, page, write_report
from csg_ext.report.pictures import relative


@pytest.mark.parametrize("shape", [(3, 5), (600, 1000)])
def test_quantised_matrices_are_the_matrices(shape):
    matrix = torch.randn(shape, dtype=torch.float64).numpy()
    stored = collect.quantise(matrix)
    integers = np.frombuffer(base64.b64decode(stored["values"]), "<u2" if stored["bits"] == 16 else "u1").reshape(shape)
    assert np.abs(stored["low"] + stored["step"] * integers - matrix).max() <= stored["step"] / 2 * (1 + 1e-9)
    assert stored["step"] * (2 ** stored["bits"] - 1) == pytest.approx(np.ptp(matrix))
    constant = collect.quantise(np.full((2, 2), 0.3))
    assert constant["low"] == 0.3 and base64.b64decode(constant["values"]) == bytes(8)


def test_the_filters_of_two_classes():
    """Their mutual information is the same with both; the means tell the classes apart. The page gets them as they are:
    of rounded values others could be the largest."""
    features = np.float32([[0, 2, 1], [0, 3, 1], [1, 0, 1], [2, 0, 1]])
    mi = np.repeat([[0.4], [0.5], [0.6]], 2, axis=1)
    arm = collect.Arm("STD", None, None, "", mi, features, np.array([0, 0, 1, 1]), np.eye(2), [], ([0.5], [0.2]))
    assert arm.mi_classes.tolist() == arm.filter_classes.tolist() == [1, 0, -1]


def test_filters_that_are_silent_on_nearly_all_images_have_a_scale():
    features = np.zeros((300, 4), np.float32)
    features[:2, 0], features[:, 1], features[:, 2] = [2, 4], np.arange(300), -1  # one of 150 images; all; never
    shown = relative(features)
    assert shown[:2, 0].tolist() == [0.5, 1] and not shown[2:, 0].any() and not shown[:, 2:].any()
    assert shown[:, 1] == pytest.approx(np.arange(300) / np.quantile(np.arange(300), 0.99))


def test_images_of_other_channels_are_shown_by_their_mean():
    images = torch.randint(256, (5, 3, 4, 6), dtype=torch.uint8).numpy()
    assert collect.visible(images) is images and collect.visible(images[:, :1]).shape == (5, 1, 4, 6)
    np.testing.assert_array_equal(collect.visible(images[:, :2])[:, 0], images[:, :2].mean(1).astype(np.uint8))
    labels = np.array([0, 1, 0, 1, 0])
    for shown in (images[:, :2], images[:, :2, :1], images):
        data = ImageData("toy", shown, labels, shown, labels, ["a", "b"])
        sheet = collect._Thumbnails(data, 10**6, [4, 2])
        assert sheet.sprite()["images"] == [4, 2]


def test_runs_of_one_name_are_told_apart(run, tmp_path):
    for parent in "ab":
        shutil.copytree(run[0], tmp_path / parent / "run")
    status, _, err = report_command(tmp_path / "a" / "run", tmp_path / "b" / "run", "--output", tmp_path / "both")
    assert status == 0, err
    text = (tmp_path / "both" / "report.html").read_text()
    assert "a/run" in text and "b/run" in text


def test_training_ends_by_naming_thereport_command(run):
    folder, out, _ = run
    assert out.strip().splitlines()[-1].endswith(str(folder / "report.html"))
    assert (folder / "report.html").stat().st_size < 10e6


def test_json_cannot_end_its_script():
    text = page.embedded_json({"</script>": ["<!--", "é\u2028"]})
    assert "<" not in text and json.loads(text) == {"</script>": ["<!--", "é\u2028"]}
    with pytest.raises(ValueError):
        page.embedded_json(float("nan"))


def _change_arrays(file, **arrays):
    with np.load(file) as archive:
        kept = dict(archive)
    np.savez(file, **kept | arrays)


def _without(name):
    return lambda folder: (folder / name).unlink()


def _without_number(folder):
    summary = json.loads((folder / "summary.json").read_text())
    del summary["std"]["mis_bound"]
    (folder / "summary.json").write_text(json.dumps(summary))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda folder: shutil.rmtree(folder), "no such file"),
        (_without("run.json"), "expected model.safetensors or last.ckpt"),
        (_without("summary.json"), "must be a finished run, got .* without summary.json"),
        (_without("csg/arrays.npz"), "must be a finished run, got .* without csg/arrays.npz"),
        (lambda folder: (folder / "std/arrays.npz").write_bytes(b"PK\3\4 no"), "std/arrays.npz: expected the arrays"),
        (lambda folder: (folder / "summary.json").write_text("{"), "summary.json: expected the numbers .* as JSON"),
        (lambda folder: (folder / "summary.json").write_text("{}"), "summary.json: expected the numbers"),
        (_without_number, "summary.json: expected the numbers .* without std.mis_bound"),
        (lambda folder: (folder / "csg/metrics.json").write_text("[1]"), "csg/metrics.json: expected the epochs"),
        (
            lambda folder: np.savez(folder / "csg/arrays.npz", mi=np.zeros((2, 2))),
            "csg/arrays.npz: expected the arrays",
        ),
        (
            lambda folder: _change_arrays(folder / "csg" / "arrays.npz", mi=np.zeros((2, 3))),
            r"mi must be finite and of shape \(64, 3\), got shape \(2, 3\)",
        ),
    ],
)
def test_bad_runs(run, tmp_path, damage, expected):
    folder = shutil.copytree(run[0], tmp_path / "run")
    (folder / "report.html").unlink()
    damage(folder)
    status, _, err = report_command(folder, "--output", tmp_path / "page")
    assert status == 2
    assert re.fullmatch(rf"csg-ext report: error: .*{expected}.*\n", err), err
    assert not (tmp_path / "page").exists()


def test_images_that_moved_have_a_remedy_that_works(run, digits, tmp_path):
    """The report has no --data: training notes the new place, after which both write the page."""
    from csg_ext import cli

    folder = tmp_path / "r"
    shutil.copytree(run[0], folder)
    about = json.loads((folder / "run.json").read_text())
    about["source"]["data"] = str(tmp_path / "gone.npz")
    (folder / "run.json").write_text(json.dumps(about))
    status, _, err = report_command(folder)
    remedy = f"csg-ext train --resume --output {folder} --data PATH"
    assert status == 2 and err.endswith(f"if the run's images have moved, {remedy} notes their new place\n")
    assert cli.main([*remedy.replace("PATH", str(digits)).split()[1:]]) == 0
    (folder / "report.html").unlink()
    assert report_command(folder)[0] == 0 and (folder / "report.html").is_file()


def test_bad_arguments(run, tmp_path):
    status, _, err = report_command(run[0], run[0])
    assert status == 2 and "--output must name the folder" in err
    status, _, err = report_command(run[0] / "csg")
    assert status == 2 and "without run.json" in err
    with pytest.raises(ValueError, match="at least one run"):
        write_report([], tmp_path)
