"""Every file that the package reads, damaged: a short form, the same each time, of what tests/fuzz_files.py tries."""

from __future__ import annotations

import copy
import io
import json
import os
import random
import zipfile

import fuzz_files
import numpy as np
import pytest
import torch
from fuzz_mutate import change_value
from safetensors.numpy import save

from csg_ext.data.images import ImageData
from csg_ext.training.arm import fit_arm
from csg_ext.training.checkpoint import TrainingInterrupted
from csg_ext.training.config import TrainConfig
from csg_ext.training.files import CHECKPOINT
from csg_ext.training.monitor import DivergedError

RUNS = int(os.environ.get("CSG_FUZZ", "0"))
TARGETS = fuzz_files.targets()


@pytest.mark.parametrize("name", TARGETS)
def test_variants_of_whole_files(name, tmp_path):
    counts = fuzz_files.drawn(name, TARGETS[name], tmp_path, RUNS or 60, seed=RUNS and int.from_bytes(os.urandom(4)))
    assert counts[False] > 0


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("run.json", lambda run: run["config"].update(epochs=2.5), "epochs must be an integer, got 2.5"),
        ("run.json", lambda run: run["config"].update(lr=2**1100), "lr must be a number, got 1358"),
        ("run.json", lambda run: run["config"].update(csg_at=[0, "x"]), "every item of csg_at must be an integer"),
        ("run.json", lambda run: run["config"].update(flip=1), "flip must be true or false, got 1"),
        ("run.json", lambda run: run["source"].update(classes=[7]), "the source's classes must be a list of names"),
        ("run.json", lambda run: run["source"].update(data="a\0b"), "the source's data must be a path or null"),
        ("run.json", lambda run: run["images"].update(classes=[7]), "images must hold classes and shape, got"),
        ("run.json", lambda run: run["images"].update(shape=[1, 28, True]), "images must hold classes and shape, got"),
        ("run.json", lambda run: run.update(seconds=-1), "seconds must be a number, finite and at least 0, got -1"),
        ("summary.json", lambda summary: summary["data"].update(shape=[4, 4]), "expected the numbers that"),
        ("metrics.json", lambda rows: rows[1].update(loss_std="1"), "loss_std must be a number, got '1'"),
        ("result.json", lambda result: result.pop("mis"), "mis must be a number, got None"),
        ("mis-summary.json", lambda summary: summary["data"].pop("classes"), "expected the names of the classes"),
    ],
)
def test_settings_and_numbers(name, change, message, tmp_path):
    target = TARGETS[name]
    content = json.loads(target.seeds[0])
    change(content)
    fuzz_files.place(target, tmp_path)
    for text in (json.dumps(content).encode(), b"[" * 100_000, b"\xff", b"{}"):
        (tmp_path / target.file).write_bytes(text)
        with pytest.raises(ValueError, match=message if text[:2] in (b'{"', b"[{") else "expected"):
            target.read(tmp_path)


def many_names(rng):
    """Names of arrays that are long, have line breaks or are none, and a lot of them."""
    names = ["a\nb\r\u2028", "x" * 5000, "y\0z", " ", *(f"{n}-{rng.random()}" for n in range(3000))]
    return rng.sample(names, len(names))


@pytest.mark.parametrize("name", ["images.npz", "features.npz", "masks.npz", "arrays.npz"])
def test_names_in_an_archive(name, tmp_path):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for member in many_names(random.Random()):
            archive.writestr(f"{member}.npy", fuzz_files.saved(np.save, np.zeros(1)))
    fuzz_files.place(TARGETS[name], tmp_path)
    assert not fuzz_files.check(TARGETS[name], tmp_path, content.getvalue())


@pytest.mark.parametrize("name", ["features.safetensors", "weights.safetensors", "detector"])
def test_names_in_safetensors(name, tmp_path):
    metadata = {"detector": "softmax"} if name == "detector" else None
    content = save({member: np.zeros(1) for member in many_names(random.Random())}, metadata)
    fuzz_files.place(TARGETS[name], tmp_path)
    assert not fuzz_files.check(TARGETS[name], tmp_path, content)


@pytest.mark.parametrize("name", ["checkpoint", "weights"])
@pytest.mark.parametrize("value", [1, torch.zeros(1)])
def test_names_in_a_checkpoint(name, value, tmp_path):
    content = fuzz_files.saved(lambda file: torch.save(dict.fromkeys(many_names(random.Random()), value), file))
    fuzz_files.place(TARGETS[name], tmp_path)
    assert not fuzz_files.check(TARGETS[name], tmp_path, content)


@pytest.mark.parametrize("act", ["write", "run", "wait", "allocate", "raise"])
def test_what_must_not_be_is_noticed(act, tmp_path):
    acts = {
        "write": lambda folder: (folder / "other").write_bytes(b""),
        "run": lambda folder: os.system("true"),
        "wait": lambda folder: [None for _ in iter(int, 1)],
        "allocate": lambda folder: bytearray(2**33),
        "raise": lambda folder: {}["missing"],
    }
    target = fuzz_files.Target("x", [b""], acts[act], {})
    with pytest.raises((AssertionError, fuzz_files.Hang, MemoryError, KeyError)):
        fuzz_files.check(target, tmp_path, b"x")


def changed_state(state, rng):
    """A checkpoint with one part left out or replaced, somewhere below."""
    if isinstance(state, torch.Tensor):
        return rng.choice([state[None], state.double() * float("nan"), torch.zeros(3), state.to_sparse(), "x", None])
    if isinstance(state, dict) and state and rng.random() < 0.95:
        key = rng.choice(list(state))
        if rng.random() < 0.15:
            return {k: v for k, v in state.items() if k != key}
        return {**state, key: changed_state(state[key], rng)}
    if isinstance(state, list) and state and rng.random() < 0.9:
        place = rng.randrange(len(state))
        return [*state[:place], changed_state(state[place], rng), *state[place + 1 :]]
    return change_value(state, rng)


def test_changed_states_of_a_run(tmp_path):
    """last.ckpt that holds something else: resuming goes on, or is one sentence."""
    rng = np.random.default_rng(3)
    images, labels = rng.integers(0, 256, (8, 1, 8, 8), np.uint8), np.arange(8) % 2
    data = ImageData("x", images, labels, images, labels, ["a", "b"])
    config = TrainConfig(epochs=2, batch_size=4, low_share=0, precision="fp32")
    with pytest.raises(TrainingInterrupted):
        fit_arm("csg", config, data, tmp_path, stop_after=3)
    whole = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    draw = random.Random(RUNS and int.from_bytes(os.urandom(4)))
    refused = 0
    for _ in range(RUNS or 15):
        state = changed_state(copy.deepcopy(whole), draw)
        torch.save(state, tmp_path / CHECKPOINT)
        try:
            fit_arm("csg", config, data, tmp_path, resume=True)
        except (ValueError, OSError, DivergedError) as error:  # a weight may be NaN
            assert type(error) in (ValueError, DivergedError) and "\n" not in str(error), repr(error)
            refused += 1
    assert refused > 0
