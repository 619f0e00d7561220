"""Files that a user was handed: none is executed, whatever it holds and whatever reads it (docs/security.md)."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import csg_ext
from csg_ext import cli
from csg_ext.analysis.detectors import load_detector
from csg_ext.analysis.masks import read_arrays
from csg_ext.data import load_images
from csg_ext.mis import read_features
from csg_ext.runs import read_checkpoint
from csg_ext.training import AtomicCheckpointIO, load_checkpoint, load_weights


class Hostile:
    """Unpickling it makes the folder `mark`."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path) -> Path:
    """What hostile files make when they are executed; none may."""
    place = tmp_path / "executed"
    pickle.loads(pickle.dumps(Hostile(place)))  # the weapon works
    place.rmdir()
    yield place
    assert not place.exists()


def torch_file(path: Path, mark: Path) -> Path:
    torch.save({"state_dict": {"weight": torch.zeros(2)}, "extra": Hostile(mark)}, path)
    return path


def legacy_file(path: Path, mark: Path) -> Path:
    torch.save({"state_dict": {}, "extra": Hostile(mark)}, path, _use_new_zipfile_serialization=False)
    return path


def bare_pickle(path: Path, mark: Path) -> Path:
    path.write_bytes(pickle.dumps(Hostile(mark)))
    return path


def object_array(mark: Path) -> np.ndarray:
    array = np.empty(3, object)
    array[:] = [Hostile(mark)] * 3
    return array


def npy(path: Path, mark: Path) -> Path:
    np.save(path, object_array(mark), allow_pickle=True)
    return path


def npz(path: Path, mark: Path) -> Path:
    names = ("features", "labels", "train_images", "train_labels", "test_images", "test_labels", "test_masks")
    np.savez(path, **{name: object_array(mark) for name in names}, mi=object_array(mark))
    return path


def refused(read, path: Path) -> None:
    """Reading raises one clear sentence: it names the file, is one line, and advises nothing unsafe."""
    with pytest.raises(ValueError) as caught:
        read(path)
    text = str(caught.value)
    assert str(path) in text and "expected" in text and "\n" not in text, text
    assert "weights_only" not in text and "unsafely" not in text, text


@pytest.mark.parametrize("write", [torch_file, legacy_file, bare_pickle])
@pytest.mark.parametrize(
    "read",
    [
        load_checkpoint,
        AtomicCheckpointIO().load_checkpoint,
        lambda path: AtomicCheckpointIO().load_checkpoint(path, weights_only=False),
        lambda path: load_weights(nn.Linear(2, 1), path),
        read_checkpoint,
    ],
    ids=["load_checkpoint", "AtomicCheckpointIO", "AtomicCheckpointIO, not weights_only", "load_weights", "runs"],
)
def test_checkpoints(tmp_path, mark, write, read):
    refused(read, write(tmp_path / "given.ckpt", mark))


@pytest.mark.parametrize(
    "read, name",
    [
        (read_features, "given.npz"),
        (read_features, "given.safetensors"),
        (lambda path: read_features(path, path), "given.npy"),
        (load_images, "given.npz"),
        (read_arrays, "given.npz"),
        (read_arrays, "given.npy"),
        (lambda path: load_weights(nn.Linear(2, 1), path), "given.safetensors"),
        (read_checkpoint, "given.safetensors"),
        (load_detector, "given.safetensors"),
    ],
)
def test_arrays(tmp_path, mark, read, name):
    refused(read, bare_pickle(tmp_path / name, mark))
    if not name.endswith(".safetensors"):
        refused(read, (npy if name.endswith(".npy") else npz)(tmp_path / name, mark))


def test_a_run_that_was_handed_over(run, tmp_path, mark, capsys):
    """Hostile parts of a run: evaluating, measuring and reporting it refuses them."""
    folder = Path(shutil.copytree(run[0], tmp_path / "run"))
    for arm in ("std", "csg"):
        torch_file(folder / arm / "last.ckpt", mark)
        npz(folder / arm / "arrays.npz", mark)
        (folder / arm / "model.safetensors").unlink()
    for command in (["report", folder], ["evaluate", folder], ["mis", folder / "csg"]):
        assert cli.main([str(part) for part in command] + ["--output", str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err.strip()
        assert "expected" in said and "\n" not in said and "weights_only" not in said, said


def test_damaged_arrays(tmp_path, mark):
    """Every cut of a compressed archive, and every damaged byte of its middle, is one sentence or the arrays."""
    content = io.BytesIO()
    np.savez_compressed(content, features=np.random.default_rng().random((40, 3)), labels=np.arange(40) % 2)
    whole = content.getvalue()
    path = tmp_path / "features.npz"
    for size in range(0, len(whole) - 1, 7):
        path.write_bytes(whole[:size])
        refused(read_features, path)
    reasons = set()
    for place in range(40, len(whole) // 2, 5):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            read_features(path)
        except ValueError as error:
            assert str(path) in str(error)
            reasons.add(str(error).rpartition("fails with: ")[2])
    assert any("decompress" in reason for reason in reasons)  # zlib's own error was among them


@pytest.mark.parametrize("name, content", [("given.npz", "npy"), ("given.npz", "member"), ("given.npy", "npz")])
def test_arrays_under_the_wrong_name(tmp_path, name, content):
    path, inner = tmp_path / name, io.BytesIO()
    (np.savez if content == "npz" else np.save)(inner, np.arange(4))
    path.write_bytes(inner.getvalue())
    if content == "member":  # NumPy gives a member without its header as bytes
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("features", b"no array")
            archive.writestr("labels.npy", inner.getvalue())
    refused(lambda path: read_features(path, path if name.endswith(".npy") else None), path)


def test_archives_write_nothing(tmp_path, monkeypatch):
    """Names that lead out of an archive: a .npz is read by its arrays' names and a shard where it lies."""
    place = tmp_path / "below" / "here"
    place.mkdir(parents=True)
    monkeypatch.chdir(place)
    inner = io.BytesIO()
    np.save(inner, np.arange(4))
    for name in ("../../features.npy", str(tmp_path / "features.npy")):
        with zipfile.ZipFile("given.npz", "w") as archive:
            archive.writestr(name, inner.getvalue())
            archive.writestr("labels.npy", inner.getvalue())
        with pytest.raises(ValueError, match="expected the array features"):
            read_features("given.npz")
    with tarfile.open("given.tar", "w") as archive:
        member = tarfile.TarInfo("../../features.png")
        member.size = 3
        archive.addfile(member, io.BytesIO(b"abc"))
    with pytest.raises(ValueError, match="must lie below the shard"):
        load_images(place)
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")) == [
        "below", "below/here", "below/here/given.npz", "below/here/given.tar"
    ]  # fmt: skip


def test_nothing_in_the_package_can_execute_a_file():
    """No call that runs what it reads, outside the one unpickler that builds arrays only (test_data.py tests it)."""
    found = []
    for path in sorted(Path(csg_ext.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            call = ast.unparse(node.func)
            options = {option.arg: ast.unparse(option.value) for option in node.keywords}
            if (
                call in ("eval", "exec", "os.system", "torch.hub.load", "importlib.util.spec_from_file_location")
                or call.endswith((".extractall", ".extract", "yaml.load"))
                or call in ("pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "shelve.open")
                or (call == "torch.load" and options.get("weights_only") != "True")
                or options.get("allow_pickle") == "True"
                or options.get("shell") == "True"
            ):
                found.append(f"{path.name}: {ast.unparse(node)}")
    assert not found


def test_settings_are_data(run, tmp_path, capsys):
    """run.json names settings and images; what is no setting is refused, not evaluated."""
    folder = Path(shutil.copytree(run[0], tmp_path / "run"))
    stored = json.loads((folder / "run.json").read_text())
    stored["config"]["model"] = "__import__('os').mkdir('executed')"
    (folder / "run.json").write_text(json.dumps(stored))
    assert cli.main(["evaluate", str(folder), "--output", str(tmp_path / "out")]) == 2
    assert "model must be one of resnet20" in capsys.readouterr().err
