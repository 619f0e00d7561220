"""Tests of the alternate training: steps, both arms' equal terms, exact resume, interruption, damage, full disks."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import textwrap
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from csg_ext import cli, train
from csg_ext.data import Batches, ImageData
from csg_ext.nn import GatedModel, build_backbone
from csg_ext.training import Schedule, TrainConfig
from csg_ext.training.arm import fit_arm, train_arm
from csg_ext.training.checkpoint import AtomicCheckpointIO, Interruption, TrainingInterrupted
from csg_ext.training.files import ARRAYS, CHECKPOINT, METRICS_CSV, METRICS_JSON, RESULT, WEIGHTS, atomic_file
from csg_ext.training.module import AlternateTraining
from csg_ext.training.monitor import DensityWarning, DivergedError
from csg_ext.training.network import build_model

STEPS = 5  # per epoch, with the digits below


def _digits() -> ImageData:
    """Three digits at 8 x 8: 330 train images, 5 steps of 64 an epoch."""
    digits = load_digits()
    keep = digits.target < 3
    images, labels = (digits.images[keep] * 15.9).astype(np.uint8)[:, None], digits.target[keep].astype(np.int64)
    return ImageData("digits", images[:330], labels[:330], images[330:], labels[330:], ["0", "1", "2"])


DATA = _digits()
CONFIG = TrainConfig(
    epochs=3, schedule="steps", period=4, csg_share=0.5, final_std=0.1, flip=False, low_share=0.0, weight_decay=5e-4
)


@contextlib.contextmanager
def _one_thread():
    """One thread, as a second one only costs on images this small; no remarks on runs too short to become sparse."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DensityWarning)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _quiet():
    with _one_thread():
        yield


# ---- one step, against plain PyTorch


@pytest.mark.parametrize("schedule, projection", [("steps", "scale"), ("joint", "scale"), ("joint", "euclidean")])
def test_steps_are_the_methods(tmp_path, schedule, projection):
    """The trainer's steps equal the method written out: losses, SGD with momentum, projected gate, rates.

    Four steps, as rounding grows fast from step to step: one flipped ReLU is seen in the fourth digit.
    """
    config = replace(CONFIG, epochs=1, batch_size=80, schedule=schedule, period=2, final_std=0.25, precision="fp32")
    config = replace(config, penalty="l2", lambda_1=0.7, lambda_2=0.01, gate_lr=0.1, lr=0.02, projection=projection)
    module = fit_arm("csg", config, DATA, tmp_path)
    model, total = build_model(config, DATA), 4
    mean, std = DATA.statistics()
    batches = Batches(DATA.train_images, DATA.train_labels, 80, seed=0, mean=mean, std=std, shift=2)
    rates = Schedule.of(config, total)
    weights = torch.optim.SGD(model.weights(), lr=config.lr, momentum=0.9, weight_decay=5e-4)
    gate_steps = 0
    for step in range(total):
        x, y = batches[step]
        late = step == 3
        csg = not late and (schedule == "joint" or step % 2 == 1)
        both = csg and schedule == "joint"
        loss = torch.zeros(())
        features = model.backbone(x).mean((2, 3))
        if not csg or both:
            loss = loss + F.cross_entropy(model.classifier(features), y)
        if csg:
            excess = F.relu(model.gate.abs().sum() - 64)
            gated = F.cross_entropy(model.classifier(features * model.gate[y]), y)
            loss = loss + 0.7 * gated + config.lambda_2 * excess**2
        model.zero_grad()
        loss.backward()
        weights.param_groups[0]["lr"] = config.lr * rates.lr_factor(step)
        weights.step()
        if csg:
            gate_steps += 1
            with torch.no_grad():
                moved = model.gate - config.gate_lr * rates.gate_lr_factor(step) * model.gate.grad
                top = moved.max(0).values
                assert (top > 0).all()  # else the projection has a special case
                projected = moved / top if projection == "scale" else torch.where(moved == top, 1, moved)
                model.gate.copy_(projected.clamp(0, 1))
    assert gate_steps == (3 if schedule == "joint" else 1)
    for (name, ours), theirs in zip(module.model.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)


def test_arms_share_everything_but_the_path(tmp_path, monkeypatch):
    """Same initial weights, batches and rates: with no CSG step the two arms are the same network, bit for bit."""
    monkeypatch.setattr(Schedule, "check_takes_csg", lambda self: None)
    config = replace(CONFIG, epochs=1, csg_share=0.0)
    std, csg = (fit_arm(arm, config, DATA, tmp_path / arm).model.state_dict() for arm in ("std", "csg"))
    assert all(torch.equal(std[key], csg[key]) for key in std)
    other = fit_arm("csg", replace(config, csg_share=0.5), DATA, tmp_path / "other").model
    assert not torch.equal(other.classifier.weight, std["classifier.weight"])
    assert std["csg.gate"].eq(0.5).all() and not other.gate.eq(0.5).any()
    assert other.gate.max(0).values.eq(1).all() and 0 <= other.gate.min()
    assert not torch.equal(
        build_model(replace(config, seed=1), DATA).classifier.weight, build_model(config, DATA).classifier.weight
    )


def test_a_gate_that_is_dealt_out_stays_so(tmp_path):
    config = replace(CONFIG, schedule="joint", gate_init="one-hot", gate_lr=0.0)
    model = fit_arm("csg", config, DATA, tmp_path).model
    want = torch.zeros(3, 64)
    want[torch.arange(64) % 3, torch.arange(64)] = 1
    assert torch.equal(model.gate, want)
    learnt = fit_arm("csg", replace(config, gate_init="half", gate_lr=2.0), DATA, tmp_path / "learnt").model
    assert not torch.equal(learnt.gate, want) and not torch.equal(learnt.classifier.weight, model.classifier.weight)


def test_history_and_files(tmp_path):
    messages = []
    result = train_arm("csg", CONFIG, DATA, tmp_path, report=messages.append)
    rows = json.loads((tmp_path / METRICS_JSON).read_text())
    assert [row["epoch"] for row in rows] == [1, 2, 3] and [row["step"] for row in rows] == [5, 10, 15]
    with (tmp_path / METRICS_CSV).open() as file:
        assert [float(row["loss_std"]) for row in csv.DictReader(file)] == [row["loss_std"] for row in rows]
    assert all(0 <= row["train_accuracy"] <= 1 and row["loss_csg"] > 0 for row in rows[:2])
    assert rows[-1]["l1_density"] == pytest.approx(result["l1_density"])
    assert json.loads((tmp_path / RESULT).read_text()) == result
    assert {"accuracy", "mis", "mis_ceiling", "l1_density", "class_agreement", "one_hot_accuracy"} <= result.keys()
    assert {"weight_own_accuracy", "weight_agreement", "class_selectivity", "mis_of_ceiling"} <= result.keys()
    assert messages[-1] == {"evaluating": True} and sum(bool(m.get("row")) for m in messages) == 3
    with np.load(tmp_path / ARRAYS) as arrays:
        assert arrays["mi"].shape == (64, 3) and arrays["gate"].shape == (3, 64)
        assert arrays["confusion"].sum() == len(DATA.test_labels)
        assert np.trace(arrays["confusion"]) / arrays["confusion"].sum() == pytest.approx(result["accuracy"])
    model = GatedModel(build_backbone("resnet20", 1), 3)
    model.load_state_dict(load_file(tmp_path / WEIGHTS))
    assert torch.equal(
        model.gate.detach(), torch.load(tmp_path / CHECKPOINT, weights_only=True)["state_dict"]["model.csg.gate"]
    )


def test_it_learns(tmp_path):
    config = replace(CONFIG, epochs=12, period=3, csg_share=1 / 3, precision="fp32", gate_lr=20.0)
    result = train_arm("csg", config, DATA, tmp_path)
    assert result["accuracy"] > 0.9 and result["l1_density"] < 0.4
    assert result["mis"] <= result["mis_bound"] + 0.05


# ---- every other setting


OTHER = replace(
    CONFIG,
    period=3,
    csg_at=(1,),
    gate_warmup=0.2,
    lambda_2_ramp=0.3,
    csg_lr=0.05,
    lr_decay="multistep",
    label_smoothing=0.1,
    mixup=0.2,
    cutmix=1.0,
    clip_norm=0.5,
    gate_clip_norm=0.1,
    precision="fp32",
)


def test_other_settings_resume_bit_for_bit_and_log_for_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    expected = fit_arm("csg", OTHER, DATA, tmp_path / "whole").model.state_dict()
    with pytest.raises(TrainingInterrupted):
        fit_arm("csg", OTHER, DATA, tmp_path / "two", stop_after=7, tensorboard=True)
    module = fit_arm("csg", OTHER, DATA, tmp_path / "two", resume=True, tensorboard=True)
    assert all(torch.equal(value, expected[key]) for key, value in module.model.state_dict().items())
    events = EventAccumulator(str(tmp_path / "two" / "tensorboard")).Reload()
    for tag, key in (("l1_density", "l1_density"), ("loss_std", "loss_std")):
        assert [e.step for e in events.Scalars(tag)] == [5, 10, 15]
        assert [e.value for e in events.Scalars(tag)] == pytest.approx([row[key] for row in module.history])
    assert events.Scalars("gate_penalty")[-1].value == pytest.approx(float(module.model.csg.penalty()))
    assert [(i.step, i.height, i.width) for i in events.Images("gate")] == [(s, 3, 64) for s in (5, 10, 15)]


def test_settings_survive_json_and_old_checkpoints_resume(tmp_path):
    assert TrainConfig(**json.loads(json.dumps(OTHER.as_dict()))) == OTHER
    with pytest.raises(TrainingInterrupted):
        fit_arm("csg", CONFIG, DATA, tmp_path, stop_after=2)
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    for name in ("csg_at", "lr_decay", "mixup"):
        del state["csg_ext"]["config"][name]
    torch.save(state, tmp_path / CHECKPOINT)
    assert fit_arm("csg", CONFIG, DATA, tmp_path, resume=True, stop_after=15).step_count == 15


def test_command_line_options_and_an_old_runs_logs(tmp_path):
    options = ["--csg-at", "0", "2", "--csg-lr", "0.05", "--clip-norm", "1", "--lr-decay", "multistep", "--tensorboard"]
    found = vars(cli._parser().parse_args(["train", *options]))
    assert found["tensorboard"] and found["csg_at"] == [0, 2] and found["csg_lr"] == 0.05 and found["clip_norm"] == 1.0
    config = TrainConfig(**{name: found[name] for name in ("csg_at", "csg_lr", "clip_norm", "lr_decay")})
    assert config.csg_at == (0, 2) and config.lr_decay == "multistep"
    logs = tmp_path / "csg" / "tensorboard"
    logs.mkdir(parents=True)
    for name in ("events.out.tfevents.1", "mine.txt"):
        (logs / name).touch()
    train._clear(tmp_path)
    assert [p.name for p in logs.iterdir()] == ["mine.txt"]


def test_gate_warm_up_trains_the_gate_alone(tmp_path):
    config = replace(CONFIG, epochs=1, gate_warmup=1.0, final_std=0.0)
    start, end = build_model(config, DATA).state_dict(), fit_arm("csg", config, DATA, tmp_path).model.state_dict()
    assert {k for k in end if not torch.equal(end[k], start[k])} == {"csg.gate"}


# ---- resume


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The checkpoint of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    with _one_thread():
        fit_arm("csg", CONFIG, DATA, folder)
    return torch.load(folder / CHECKPOINT, weights_only=True)


def _same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a if k != "seconds")
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def _assert_same_run(folder, whole) -> None:
    resumed = torch.load(folder / CHECKPOINT, weights_only=True)
    for part in ("state_dict", "optimizer_states", "csg_ext"):
        assert _same(resumed[part], whole[part]), part


@pytest.mark.parametrize("stop", [1, STEPS - 1, STEPS, STEPS + 2, 2 * STEPS, 3 * STEPS - 1])
def test_resume_is_bit_for_bit(tmp_path, whole, stop):
    """In mid-epoch, at an epoch's last step and at its end: weights, optimizers, history."""
    with pytest.raises(TrainingInterrupted, match=f"after step {stop} of 15"):
        fit_arm("csg", CONFIG, DATA, tmp_path, stop_after=stop)
    module = fit_arm("csg", CONFIG, DATA, tmp_path, resume=True)
    assert module.step_count == 15
    _assert_same_run(tmp_path, whole)


@pytest.mark.parametrize("stops", [(STEPS, 2 * STEPS), (1, 2, STEPS, 2 * STEPS - 1, 2 * STEPS)])
def test_resume_is_bit_for_bit_again_and_again(tmp_path, whole, stops):
    for stop in stops:
        with pytest.raises(TrainingInterrupted, match=f"after step {stop} of 15"):
            fit_arm("csg", CONFIG, DATA, tmp_path, resume=True, stop_after=stop)
    assert fit_arm("csg", CONFIG, DATA, tmp_path, resume=True).step_count == 15
    _assert_same_run(tmp_path, whole)


def test_ctrl_c_in_mid_epoch_then_again_then_resume(tmp_path, whole):
    def press(at):
        todo = [signal.SIGINT]

        def report(message):
            if message.get("step", 0) >= at and todo:
                os.kill(os.getpid(), todo.pop())

        return report

    before = signal.getsignal(signal.SIGINT)
    stops = []
    for at in (1, STEPS + 1):
        with pytest.raises(TrainingInterrupted) as caught:
            fit_arm("csg", CONFIG, DATA, tmp_path, resume=True, report=press(at))
        stops.append(int(str(caught.value).split()[3]))
    assert 0 < stops[0] < stops[1] < 15
    assert signal.getsignal(signal.SIGINT) is before
    fit_arm("csg", CONFIG, DATA, tmp_path, resume=True)
    _assert_same_run(tmp_path, whole)


def test_resume_after_the_end_trains_nothing(tmp_path, whole):
    fit_arm("csg", CONFIG, DATA, tmp_path)
    names = ("metrics.json", "metrics.csv")
    written = [(tmp_path / name).read_text() for name in names]
    for name in names:
        (tmp_path / name).unlink()
    module = fit_arm("csg", CONFIG, DATA, tmp_path, resume=True)
    assert module.step_count == 15
    _assert_same_run(tmp_path, whole)
    assert [(tmp_path / name).read_text() for name in names] == written


def test_resume_refuses_other_settings_and_other_arms(tmp_path):
    fit_arm("csg", replace(CONFIG, epochs=1), DATA, tmp_path)
    with pytest.raises(ValueError, match="settings that it began with, got another epochs, lr"):
        fit_arm("csg", replace(CONFIG, lr=0.2), DATA, tmp_path, resume=True)
    with pytest.raises(ValueError, match="expected a checkpoint of csg-ext's arm 'std', got 'csg'"):
        fit_arm("std", replace(CONFIG, epochs=1), DATA, tmp_path, resume=True)


def test_resume_refuses_the_checkpoint_of_another_model(tmp_path):
    config = replace(CONFIG, epochs=1)
    fit_arm("csg", config, DATA, tmp_path)
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    state["state_dict"]["model.classifier.weight"] = torch.zeros(7, 64)
    torch.save(state, tmp_path / CHECKPOINT)
    with pytest.raises(ValueError, match=r"got model.classifier.weight with shape \(7, 64\) instead of \(3, 64\)"):
        fit_arm("csg", config, DATA, tmp_path, resume=True)


def test_damaged_checkpoint(tmp_path):
    (tmp_path / CHECKPOINT).write_bytes(b"PK\3\4 damaged")
    with pytest.raises(ValueError, match="last.ckpt: expected a checkpoint of csg-ext, got one that fails"):
        fit_arm("csg", CONFIG, DATA, tmp_path, resume=True)


def test_a_second_ctrl_c_acts_at_once():
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


# ---- full disks


def test_failed_write_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    """The disk fills in the middle of the second checkpoint: the first one survives, and the run resumes from it."""
    config = replace(CONFIG, epochs=2)
    with pytest.raises(TrainingInterrupted):
        fit_arm("csg", config, DATA, tmp_path, stop_after=3)
    old = (tmp_path / CHECKPOINT).read_bytes()
    save = torch.save

    def full(checkpoint, file):
        file.write(b"part of a checkpoint")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"last.ckpt cannot be written \(No space left on device\); the old file is kept"):
        fit_arm("csg", config, DATA, tmp_path, resume=True)
    assert (tmp_path / CHECKPOINT).read_bytes() == old
    assert not list(tmp_path.glob(".*.part"))
    monkeypatch.setattr(torch, "save", save)
    assert fit_arm("csg", config, DATA, tmp_path, resume=True).step_count == 10


def test_a_file_size_limit_stops_a_real_checkpoint_write(tmp_path):
    """The kernel refuses the write inside torch.save itself (RLIMIT_FSIZE)."""
    program = textwrap.dedent("""
        import resource, signal, sys, torch
        from csg_ext.training.checkpoint import AtomicCheckpointIO
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        io, path = AtomicCheckpointIO(), sys.argv[1]
        io.save_checkpoint({"w": torch.arange(10)}, path)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            io.save_checkpoint({"w": torch.zeros(1_000_000)}, path)
        except OSError as error:
            print(error.strerror)
        print(io.load_checkpoint(path)["w"].tolist())
    """)
    path = tmp_path / "last.ckpt"
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert first == f"{path} cannot be written (File too large); the old file is kept"
    assert second == str(list(range(10)))
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_atomic_file(tmp_path):
    target = tmp_path / "a.txt"
    with pytest.raises(ZeroDivisionError), atomic_file(target) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with atomic_file(target) as file:
        file.write(b"whole")
        assert not target.exists()
    assert target.read_bytes() == b"whole"
    with pytest.raises(OSError, match="cannot be written .*; nothing is written"), atomic_file(tmp_path / "no" / "b"):
        pass


def test_checkpoints_are_read_without_running_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"state_dict": Evil()}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="x.ckpt: expected a checkpoint of csg-ext"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "x.ckpt", weights_only=False)
    assert not (tmp_path / "ran").exists()


# ---- what must be noticed


def test_nan_loss_stops_with_one_sentence_and_keeps_the_last_good_state(tmp_path):
    config = replace(CONFIG, lr=1e30, lr_warmup=0.0, precision="fp32")
    with pytest.raises(DivergedError, match=r"the loss of arm std is not finite at step 2 of 15: try .* lr=1e\+30"):
        fit_arm("std", config, DATA, tmp_path)
    assert not (tmp_path / CHECKPOINT).exists()


def test_a_gate_of_nan_at_the_end_of_an_epoch_keeps_the_last_good_state(tmp_path, monkeypatch):
    """The loss of the step that spoils it is still finite."""
    plain = AlternateTraining.training_step

    def spoiling(self, batch, batch_idx):
        plain(self, batch, batch_idx)
        if self.step_count == 10:
            self.model.gate.data[0, 0] = torch.nan

    monkeypatch.setattr(AlternateTraining, "training_step", spoiling)
    message = "the loss of arm csg is finite, but the parameter csg.gate is NaN or infinite after step 10 of 15: try a"
    with pytest.raises(DivergedError, match=message):
        fit_arm("csg", CONFIG, DATA, tmp_path)
    assert torch.load(tmp_path / CHECKPOINT, weights_only=True)["csg_ext"]["step_count"] == 5


def _module(arm: str = "csg", **options) -> AlternateTraining:
    config = replace(CONFIG, epochs=4, **options)
    batches = Batches(DATA.train_images, DATA.train_labels, 64, mean=[0.5], std=[0.2])
    return AlternateTraining(build_model(config, DATA), batches, config, arm)


def test_an_arm_that_would_never_train_its_gate_is_refused():
    options = dict(schedule="epochs", period=60)
    with pytest.raises(ValueError, match="the schedule never takes the CSG path in 20 steps, 5 an epoch, got kind"):
        _module(**options)
    assert _module("std", **options).schedule.period == 60


@pytest.mark.parametrize("density, warns", [(0.98, True), (0.4, False)])
def test_a_density_that_stalls_is_said_once(density, warns):
    module = _module()
    module.model.csg.gate.data.fill_(density)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for epoch in range(1, 5):
            module.step_count = epoch * STEPS
            module.sums[3:] = 1  # the epoch had CSG steps
            module.end_epoch()
    assert [str(w.message).startswith("the gate's L1-density stalls at 0.98 after 10 of 20 steps") for w in caught] == [
        True
    ] * warns


def test_a_density_that_falls_is_fine():
    module = _module()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for epoch, density in enumerate((1.0, 0.9, 0.8, 0.7), 1):
            module.model.csg.gate.data.fill_(density)
            module.step_count = epoch * STEPS
            module.sums[3:] = 1  # the epoch had CSG steps
            module.end_epoch()


def test_unknown_arm():
    with pytest.raises(ValueError, match="arm must be 'std' or 'csg', got 'both'"):
        _module("both")
