"""Tests of `csg-ext train` from end to end: the files, Ctrl-C and --resume, refusals; and of all commands."""

from __future__ import annotations

import base64
import io
import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from short_run import SHORT

import csg_ext
from csg_ext import cli
from csg_ext.data import load_images
from csg_ext.report.pictures import NAMES
from csg_ext.training import compare
from csg_ext.training.config import TrainConfig
from csg_ext.training.display import Progress

ROOT = Path(__file__).resolve().parent.parent


def _start(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "csg_ext", "train", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_train_writes_and_prints_the_comparison(run):
    folder, out, err = run
    summary = json.loads((folder / "summary.json").read_text())
    assert {"accuracy", "mis", "mis_ceiling"} <= summary["std"].keys()
    assert {"accuracy", "mis", "mis_ceiling", "l1_density", "class_agreement", "one_hot_accuracy"} <= summary[
        "csg"
    ].keys()
    assert "l1_density" not in summary["std"]
    std, csg = summary["std"], summary["csg"]
    assert summary["gap_closed"] == pytest.approx((csg["mis"] - std["mis"]) / (std["mis_ceiling"] - std["mis"]))
    assert std["steps"] == csg["steps"] == 36 and std["threads"] == 1
    assert (
        summary["seed"] == 0 and summary["config"]["epochs"] == 6 and summary["versions"]["torch"] == torch.__version__
    )
    assert summary["data"]["train"] == 400 and len(summary["data"]["sha256"]) == 64
    table = (folder / "table.txt").read_text()
    assert table in out and f"{csg['mis']:.4f}" in table and f"{std['accuracy']:.2%}" in table
    assert "no gap to close" not in table
    assert "not below its ceiling, so there is no gap to close" in compare.table(summary | {"gap_closed": None})
    page = (folder / "report.html").read_text()
    for name in NAMES:
        assert f" {name}.png" in out
        with Image.open(folder / f"{name}.png") as picture:
            assert min(picture.size) > 150 and len(np.unique(picture.convert("L"))) > 20
        assert base64.b64encode((folder / f"{name}.png").read_bytes()).decode() in page
    for arm in ("std", "csg"):
        assert "csg.gate" in load_file(folder / arm / "model.safetensors")
        assert len((folder / arm / "metrics.csv").read_text().splitlines()) == 7
    assert "CSG epoch   6/6" in err and "STD epoch   6/6" in err


def test_an_existing_run_is_not_overwritten(run, digits, capsys):
    folder, _, _ = run
    before = (folder / "summary.json").read_bytes()
    assert cli.main(["train", "--data", str(digits), "--output", str(folder), *SHORT]) == 2
    assert "already holds a run: give --resume, --overwrite or another --output" in capsys.readouterr().err
    assert cli.main(["train", "--resume", "--output", str(folder), "--lr", "0.3"]) == 2
    assert "lr was 0.1, got 0.3" in capsys.readouterr().err
    assert (folder / "summary.json").read_bytes() == before


def test_resuming_a_finished_run_only_reports(run, capsys):
    folder, out, _ = run
    weights = (folder / "csg" / "model.safetensors").stat().st_mtime_ns
    assert cli.main(["train", "--resume", "--output", str(folder), "--epochs", "6"]) == 0
    assert (folder / "table.txt").read_text() in capsys.readouterr().out
    assert (folder / "csg" / "model.safetensors").stat().st_mtime_ns == weights


def test_ctrl_c_and_resume_end_where_an_uninterrupted_run_ends(run, digits, tmp_path):
    folder = tmp_path / "cut"
    process = _start("--data", str(digits), "--output", str(folder), *SHORT)
    assert process.stderr is not None
    for line in process.stderr:
        if " epoch " in line:
            process.send_signal(signal.SIGINT)
            break
    _, rest = process.communicate(timeout=120)
    assert process.returncode == 130, rest
    assert f"Interrupted; the state is saved. Continue with: csg-ext train --resume --output {folder}" in rest
    assert not (folder / "summary.json").exists()
    steps = {
        arm: torch.load(folder / arm / "last.ckpt", weights_only=True)["csg_ext"]["step_count"]
        for arm in ("std", "csg")
        if (folder / arm / "last.ckpt").exists()
    }
    assert steps and min(steps.values()) < 36
    noted = json.loads((folder / "run.json").read_text())
    assert 0 < noted["seconds"] < 120
    (folder / "run.json").write_text(json.dumps(noted | {"seconds": 5000}))
    assert cli.main(["train", "--resume", "--output", str(folder)]) == 0
    assert 5000 < json.loads((folder / "summary.json").read_text())["seconds"] < 5120  # of both parts
    for arm in ("std", "csg"):
        whole, resumed = (load_file(f / arm / "model.safetensors") for f in (run[0], folder))
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_the_seconds_of_a_run_that_is_killed_are_noted_by_epochs(digits, tmp_path, monkeypatch):
    noted = []

    def run_arms(config, data, folder, display, **_):
        row = {"epoch": 1, "seconds": 3.0, "train_accuracy": 0.5, "loss_std": 1.0, "l1_density": None}
        for message in ({"step": 1, "steps": 9, "epochs": 1, "row": None}, {"epochs": 1, "row": row}):
            display("std", message)
            noted.append(json.loads((folder / "run.json").read_text()).get("seconds"))
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "run_arms", run_arms)
    assert cli.main(["train", "--data", str(digits), "--output", str(tmp_path / "o")]) == 130
    assert noted[0] is None and 0 <= noted[1] < 60


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data", "/nowhere"], "/nowhere, which does not exist"),
        (["--epochs", "0"], "epochs must be at least 1, got 0"),
        (["--model", "vgg"], "model must be one of resnet20"),
        (["--device", "tpu"], "device must be auto, cpu, cuda or cuda:INDEX, got 'tpu'"),
        (["--resume"], "--resume expects a run in"),
        (["--schedule", "epochs", "--period", "60"], "the schedule never takes the CSG path in 2244 steps"),
        (["--csg-lr", "0.05"], "csg_lr must be left out with the joint schedule, which takes both paths in every step"),
        (["--csg-at", "1"], "csg_at must be left out with the joint schedule, which takes both paths in every step"),
        (["--schedule", "joint", "--period", "3"], "takes both paths in every step, got 3"),
        (
            ["--schedule", "steps", "--csg-at", "1", "--csg-share", "0.5"],
            "csg_share must be left out with csg_at, which says what takes the CSG path, got 0.5",
        ),
        (["--resume", "--overwrite"], "--resume and --overwrite exclude each other, got both"),
        (["--batch-size", "12001"], "batch_size must be at most 12000, the number of train images, got 12001"),
        (["--shift", "29"], "shift must be at most 28, the side of the train images, got 29"),
        (["--threads", "100000"], "threads must be at most 1024, got 100000"),
        (["--threads", "0"], "threads must be at least 1, got 0"),
        (["--output", "/proc/none/o"], "/proc/none: No such file or directory"),
        (["--data", ""], "--data must be a path, got an empty one"),
        (["--output", ""], "--output must be a path, got an empty one"),
        (["--data", "https://x/a.tar"], "expected shards in the file system, got 'https://x/a.tar'"),
        (["--hold-out", "0"], "hold_out: count must lie in [1, 11999], got 0"),
        (["--split-seed", str(2**63)], f"split_seed must be an integer below 2^63, got {2**63}"),
        (["--memory-limit", "inf"], "memory_limit must be a number, finite, got inf"),
        (["--test-share", "nan"], "test_share must be a number, finite, got nan"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, capsys, arguments, message):
    assert cli.main(["train", "--output", str(tmp_path / "o"), *arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("csg-ext train: error: ") and message in lines[0]
    assert not (tmp_path / "o").exists()


def test_resume_refuses_other_images(tmp_path, capsys, digits):
    out = tmp_path / "o"
    out.mkdir()
    source = {"data": str(digits), "image_size": None, "strict": False, "hold_out": None}
    stored = {"config": TrainConfig().as_dict(), "source": source, "sha256": "0" * 64}
    (out / "run.json").write_text(json.dumps(stored))
    assert cli.main(["train", "--output", str(out), "--resume"]) == 2
    assert "--resume expects the images that the run began with" in capsys.readouterr().err


def test_resume_finds_images_that_moved(tmp_path, capsys, monkeypatch):
    images, moved, out = tmp_path / "images", tmp_path / "moved", str(tmp_path / "o")
    _folder_of_images(images)
    asked = []
    monkeypatch.setattr(compare, "run_arms", lambda config, data, *a, **k: asked.append(data.name) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["train", "--data", str(images), "--output", out])
    images.rename(moved)
    assert cli.main(["train", "--resume", "--output", out]) == 2
    gone = "images, which does not exist; if the run's images have moved, give --data PATH\n"
    assert capsys.readouterr().err.endswith(gone)
    assert cli.main(["train", "--data", str(images), "--output", str(tmp_path / "new")]) == 2
    assert capsys.readouterr().err.endswith("images, which does not exist\n")
    for arguments in (["--data", str(moved)], []):  # the second time run.json knows
        with pytest.raises(ZeroDivisionError):
            cli.main(["train", "--resume", "--output", out, *arguments])
    assert asked == ["images", "moved", "moved"]
    (moved / "b" / "0.png").unlink()
    (tmp_path / "again").symlink_to(moved)
    assert cli.main(["train", "--resume", "--output", out, "--data", str(tmp_path / "again")]) == 2
    assert "--resume expects the images that the run began with, got others from" in capsys.readouterr().err
    assert json.loads((tmp_path / "o" / "run.json").read_text())["source"]["data"] == str(moved)


def test_a_run_does_not_go_among_its_images(tmp_path, capsys, monkeypatch):
    _folder_of_images(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for place in ("a/..", "a", "b/run", "Train"):
        assert cli.main(["train", "--data", str(tmp_path), "--output", str(tmp_path / place)]) == 2
        assert "--output must be a folder apart from the images in --data, got" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
    monkeypatch.setattr(compare, "run_arms", lambda *a, **k: (_ for _ in ()).throw(ValueError("stop here")))
    for _ in range(2):
        assert (
            cli.main(["train", "--data", str(tmp_path), "--output", str(tmp_path / "runs/train"), "--overwrite"]) == 2
        )
        assert "stop here" in capsys.readouterr().err


def _folder_of_images(root: Path) -> None:
    rng = np.random.default_rng(0)
    for name in "ab":
        (root / name).mkdir(parents=True)
        for i in range(12):
            Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(root / name / f"{i}.png")
    (root / "a" / "broken.png").write_bytes(b"x")


def test_skipped_images_are_named_and_strict_refuses_them(tmp_path, capsys, monkeypatch):
    _folder_of_images(tmp_path / "images")
    monkeypatch.setattr(compare, "run_arms", lambda *a, **k: (_ for _ in ()).throw(ValueError("stop here")))
    common = ["train", "--data", str(tmp_path / "images"), "--output", str(tmp_path / "o")]
    assert cli.main([*common, "--strict"]) == 2
    assert "with strict every image must decode, got a/broken.png" in capsys.readouterr().err
    assert cli.main(common) == 2
    err = capsys.readouterr().err
    assert "Left out of the images: 1\n  a/broken.png" in err
    assert (tmp_path / "o" / "skipped.txt").read_text().startswith("a/broken.png")
    data = load_images(tmp_path / "images")
    names = (tmp_path / "o" / "test_images.txt").read_text().splitlines()
    assert names == data.test_names and len(names) == len(data.test_labels)
    for name, image, label in zip(names, data.test_images, data.test_labels, strict=True):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "images" / name)), image[0])
        assert name.startswith(f"{data.classes[label]}/")
    held = data.hold_out(4)
    assert set(held.train_names) | set(held.test_names) == set(data.train_names) and len(held.test_names) == 4


def test_names_that_are_not_utf_8_are_written_as_they_are(tmp_path, monkeypatch):
    _folder_of_images(tmp_path / "images")
    (tmp_path / "images" / "a" / os.fsdecode(b"\xff.png")).write_bytes(b"x")
    monkeypatch.setattr(compare, "run_arms", lambda *a, **k: (_ for _ in ()).throw(ValueError("stop here")))
    assert cli.main(["train", "--data", str(tmp_path / "images"), "--output", str(tmp_path / "o")]) == 2
    assert b"a/\xff.png: " in (tmp_path / "o" / "skipped.txt").read_bytes()


def test_an_arm_that_fails_is_one_sentence(tmp_path, capsys, digits):
    """A loss that is no number: the arm's own sentence, and the other arm stops."""
    status = cli.main(
        ["train", "--data", str(digits), "--output", str(tmp_path / "o"), *SHORT, "--lr", "1e30", "--lr-warmup", "0"]
    )
    err = capsys.readouterr().err
    assert status == 1
    assert "is not finite at step 2 of 36: try a learning rate below lr=1e+30" in err.strip().splitlines()[-1]


def test_progress_without_a_terminal_is_lines():
    stream = io.StringIO()
    row = {"epoch": 2, "seconds": 3.0, "train_accuracy": 0.5, "loss_std": 1.0, "l1_density": None}
    with Progress(("std", "csg"), stream) as display:
        display("std", {"step": 5, "steps": 10, "epochs": 4, "row": None})
        display("std", {"step": 10, "steps": 20, "epochs": 4, "row": row})
        display("csg", {"warning": "the gate stalls"})
        display("", {"interrupting": True})
    assert stream.getvalue().splitlines() == [
        " STD epoch   2/4      3 s  train accuracy 50.0%, loss 1.000",
        "CSG: warning: the gate stalls",
        "Stopping after the current step; both arms save their state ...",
    ]


def test_progress_on_a_terminal_is_a_bar_for_each_arm():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    row = {"epoch": 1, "seconds": 3.0, "train_accuracy": 0.5, "loss_std": 1.0, "l1_density": 0.3}
    with Progress(("std", "csg"), stream) as display:
        display("csg", {"step": 10, "steps": 20, "epochs": 2, "row": row})
        display("csg", {"evaluating": True})
        assert display.bars is not None and display.bars["csg"].n == 10 and display.bars["csg"].total == 20
    assert "CSG  50%" in stream.getvalue() and "measuring mutual information" in stream.getvalue()


# ---- all commands ----------------------------------------------------------------------------------------------------


# Runs csg-ext where none of the extras' packages is installed.
BARE = """
import sys
names = "PIL art braceexpand jinja2 lightning matplotlib plotly safetensors sklearn tensorboard torchmetrics tqdm"
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in names.split():
            raise ModuleNotFoundError(f"No module named {name!r}", name=name.partition(".")[0])
sys.meta_path.insert(0, Missing())
from csg_ext import cli
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "words, status, said",
    [
        (["mis", "f.npz"], 0, "no picture: it needs matplotlib, which is missing: pip install 'csg-ext[train]'"),
        (["mis", "f.safetensors"], 1, "error: it needs safetensors, which is missing: pip install 'csg-ext[train]'"),
        (["train"], 1, "csg-ext train: error: it needs tqdm, which is missing: pip install 'csg-ext[train]'"),
        (["evaluate", "f.npz"], 2, "csg-ext evaluate: error: "),
        (["detect", "f.npz"], 1, "error: it needs art, which is missing: pip install 'csg-ext[train,analysis]'"),
        (["info"], 0, ""),
    ],
)
def test_without_the_extras_a_command_names_what_it_lacks(tmp_path, words, status, said):
    features, labels = torch.randn(40, 3), torch.arange(40) % 2
    np.savez(tmp_path / "f.npz", features=features, labels=labels)
    save_file({"features": features, "labels": labels}, tmp_path / "f.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", BARE, *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == status, done.stderr
    assert said in done.stderr and "Traceback" not in done.stderr
    assert "MIS: mutual information" in done.stdout or words != ["mis", "f.npz"]


def _unheard(*words: str | Path, errors_too: bool = False) -> tuple[int, str]:
    """The exit status and errors of a command whose output is a pipe that nobody reads, as after `| head -0`."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "csg_ext", *map(str, words)],
        stdout=write,
        stderr=write if errors_too else subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    os.close(write)
    return done.returncode, done.stderr or ""


def test_a_reader_who_is_gone_costs_no_results(run, digits, tmp_path):
    said = "the output is read no further; the files are written all the same\n"
    assert _unheard("evaluate", run[0], "--output", tmp_path / "e") == (0, f"csg-ext evaluate: {said}")
    assert json.loads((tmp_path / "e" / "evaluation.json").read_text())["checkpoints"]
    folder = tmp_path / "r"
    words = "train", "--data", digits, "--output", folder, *SHORT, "--epochs", "1"
    assert _unheard(*words, errors_too=True) == (0, "")
    assert (folder / "report.html").exists()
    assert _unheard("info") == _unheard("train", "--help") == (0, "")


def test_info_and_help(capsys):
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in text for name in TrainConfig().as_dict())


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0 and capsys.readouterr().out == f"csg-ext {csg_ext.__version__}\n"
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {csg_ext.__version__}\n" in citation


def test_python_m(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["csg-ext", "info", "--json"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("csg_ext", run_name="__main__")
    assert caught.value.code == 0 and json.loads(capsys.readouterr().out)


def test_plain_pytorch_example():
    done = subprocess.run(
        [sys.executable, "examples/train_plain_pytorch.py", "7", "640"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    first, last = done.stdout.splitlines()
    assert first.startswith("step    0") and last.startswith("step    6")
    density = float(last.split()[-1])
    assert 0.1 <= density < 1 and density != 0.5
