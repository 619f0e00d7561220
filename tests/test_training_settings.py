"""Tests of a run's settings: the schedule's paths, rates and lambdas, image sizes, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from csg_ext.training import Schedule, TrainConfig, compare


def _schedule(**options) -> Schedule:
    defaults = dict(
        kind="steps",
        total_steps=100,
        steps_per_epoch=10,
        period=6,
        csg_share=1 / 3,
        warmup=0.0,
        final_std=0.1,
        lr_warmup=0.3,
    )
    return Schedule(**(defaults | options))


def test_alternation_by_steps():
    schedule = _schedule()
    paths = [schedule.path(s) for s in range(100)]
    assert paths[:12] == ["std"] * 4 + ["csg"] * 2 + ["std"] * 4 + ["csg"] * 2
    assert paths[90:] == ["std"] * 10
    assert set(_schedule(warmup=0.5).path(s) for s in range(50)) == {"std"}


def test_alternation_by_epochs_is_the_papers():
    schedule = _schedule(kind="epochs", period=3, final_std=0.0)
    assert [schedule.path(10 * e) for e in range(10)] == ["std", "std", "csg"] * 3 + ["std"]
    assert [schedule.path(10 * e + 9) for e in range(10)] == ["std", "std", "csg"] * 3 + ["std"]


def test_joint():
    paths = [_schedule(kind="joint").path(s) for s in range(100)]
    assert paths == ["joint"] * 90 + ["std"] * 10


@pytest.mark.parametrize("kind", ["steps", "epochs", "joint"])
def test_rates_follow_the_runs_clock_and_reach_zero(kind):
    """The released code's CSG rate never decayed, because it counted CSG epochs only."""
    schedule = _schedule(kind=kind)
    weights = [schedule.lr_factor(s) for s in range(100)]
    gate = [schedule.gate_lr_factor(s) for s in range(100)]
    assert weights[0] == pytest.approx(0.04) and max(weights) == pytest.approx(1) and np.argmax(weights) == 30
    assert weights[-1] < 1e-3 and gate[0] == 1 and gate[-1] < 1e-3
    assert all(a >= b for a, b in zip(gate, gate[1:], strict=False))
    assert all(a >= b for a, b in zip(weights[30:], weights[31:], strict=False))
    assert _schedule(lr_warmup=0.0).lr_factor(0) == 1


def test_the_rate_of_csg_steps_is_the_others_or_has_its_own_course():
    schedule = _schedule()
    assert all(schedule.csg_lr_factor(s) == schedule.lr_factor(s) for s in range(100))
    own = _schedule(csg_lr_warmup=0.0, csg_lr_decay="constant")
    assert all(own.csg_lr_factor(s) == 1 and own.lr_factor(s) == schedule.lr_factor(s) for s in range(100))


def test_which_epochs_and_gate_warm_up():
    """The CIFAR script's epochs, epoch % 3 == 1; a warm-up of the gate alone follows the STD path's."""
    schedule = _schedule(kind="epochs", period=3, csg_at=(1,), final_std=0.0)
    assert [schedule.path(10 * e) for e in range(7)] == ["std", "csg", "std"] * 2 + ["std"]
    schedule = _schedule(kind="joint", warmup=0.1, gate_warmup=0.2)
    paths = [schedule.path(s) for s in range(100)]
    assert paths == ["std"] * 10 + ["gate"] * 20 + ["joint"] * 60 + ["std"] * 10


def test_lambdas_rise_and_rates_fall_in_steps():
    schedule = _schedule(warmup=0.2, lambda_1_ramp=0.1, lambda_2_ramp=0.4, lr_decay="multistep", lr_warmup=0.0)
    factors = [schedule.lambda_factors(s) for s in range(100)]
    assert factors[20] == pytest.approx((0.1, 0.025)) and factors[29] == pytest.approx((1, 0.25))
    assert factors[59] == pytest.approx((1, 1)) and factors[99] == (1, 1) and _schedule().lambda_factors(0) == (1, 1)
    for rates in ([schedule.lr_factor(s) for s in range(100)], [schedule.gate_lr_factor(s) for s in range(100)]):
        assert rates == pytest.approx([1.0] * 40 + [0.1] * 20 + [0.01] * 20 + [0.001] * 20)
    assert _schedule(lr_decay="constant", lr_warmup=0.0).lr_factor(99) == 1


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(kind="epochs", period=60), "kind 'epochs', period 60, csg_share 0.3333"),
        (dict(period=150), "kind 'steps', period 150"),
        (dict(period=1), "period 1, csg_share 0.3333"),
        (dict(period=6, csg_at=()), r"period 6, csg_at \[\]"),
        (dict(kind="joint", warmup=0.95), "warmup 0.95 and final_std 0.1"),
    ],
)
def test_a_schedule_without_the_csg_path_is_found(options, message):
    schedule = _schedule(**options)
    assert {schedule.path(s) for s in range(100)} == {"std"}
    with pytest.raises(ValueError, match=f"never takes the CSG path in 100 steps, 10 an epoch, got .*{message}"):
        schedule.check_takes_csg()


def test_one_step_of_the_csg_path_is_enough():
    random = np.random.default_rng(0)
    for _ in range(300):
        schedule = _schedule(
            kind=str(random.choice(["steps", "epochs", "joint"])),
            period=int(random.integers(1, 120)),
            csg_at=None if random.random() < 0.5 else (0,),
            csg_share=random.random(),
            warmup=random.random(),
            gate_warmup=0.0 if random.random() < 0.7 else 0.01,
            final_std=random.random() / 2,
            steps_per_epoch=int(random.choice([5, 10, 50])),
        )
        if {schedule.path(s) for s in range(100)} == {"std"}:
            with pytest.raises(ValueError, match="never takes the CSG path"):
                schedule.check_takes_csg()
        else:
            schedule.check_takes_csg()


def test_the_period_follows_the_schedule_and_is_stored():
    assert [TrainConfig(schedule=kind).period for kind in ("joint", "steps", "epochs")] == [60, 60, 3]
    assert TrainConfig(schedule="epochs").as_dict()["period"] == 3
    assert TrainConfig(schedule="epochs", period=60).period == 60  # as an earlier run has stored it


def test_a_schedule_needs_a_run():
    with pytest.raises(ValueError, match="total_steps and steps_per_epoch must be at least 1 .* got 0 and 0"):
        Schedule().path(0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"csg_at": (3,), "period": 3}, r"csg_at must lie in \[0, 3\), the period, got \[3\]"),
        ({"lr_decay": "linear"}, "lr_decay must be one of cosine, multistep, constant, got 'linear'"),
        ({"schedule": "steps", "csg_lr_decay": "linear"}, "csg_lr_decay must be one of .* got 'linear'"),
        ({"schedule": "steps", "csg_lr_warmup": 2.0}, r"csg_lr_warmup must lie in \[0, 1\], got 2.0"),
        ({"csg_lr_warmup": 0.1}, "csg_lr_warmup must be left out with the joint schedule, .* got 0.1"),
        ({"period": 0}, "period must be at least 1, got 0"),
        ({"gate_warmup": -0.1}, r"gate_warmup must lie in \[0, 1\], got -0.1"),
        ({"label_smoothing": 2.0}, r"label_smoothing must lie in \[0, 1\], got 2.0"),
        ({"lambda_1": -1.0}, "lambda_1 must be a non-negative number, got -1.0"),
        ({"penalty": "l0"}, "penalty must be one of l1, l2, smooth_l1, got 'l0'"),
        ({"projection": "l2"}, "projection must be one of scale, euclidean, got 'l2'"),
        ({"gate_init": "ones"}, "gate_init must be one of half, one-hot, got 'ones'"),
        ({"clip_norm": 0.0}, "clip_norm must be positive and finite, got 0.0"),
        ({"gate_clip_norm": math.inf}, "gate_clip_norm must be positive and finite, got inf"),
        ({"mixup": -1.0}, "mixup must be a non-negative number, got -1.0"),
        ({"schedule": "random"}, "schedule must be one of steps, epochs, joint, got 'random'"),
        ({"model": "vgg"}, "model must be one of resnet20, .* got 'vgg'"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"lr": float("nan")}, "lr must be a non-negative number, got nan"),
        ({"lr": 1e300}, r"lr must be at most 3.4e\+38, got 1e\+300"),
        ({"weight_decay": 1e300}, r"weight_decay must be at most 3.4e\+38, got 1e\+300"),
        ({"lambda_1": 1e39}, r"lambda_1 must be at most 3.4e\+38, got 1e\+39"),
        ({"epochs": 10**12}, "epochs must be at most 1000000, got 1000000000000"),
        ({"csg_share": 1.5}, r"csg_share must lie in \[0, 1\], got 1.5"),
        ({"budget": -1.0}, "budget must be positive, got -1.0"),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


def test_sizes():
    config = TrainConfig(epochs=5, low_scale=0.7, low_share=0.6)
    assert config.sizes(28) == [20, 20, 20, 28, 28] and config.sizes(32) == [24] * 3 + [32] * 2
    assert config.sizes(3) == [3] * 5 and replace(config, low_share=0.0).sizes(28) == [28] * 5


@pytest.mark.parametrize(
    "name, kernels_error, message",
    [
        ("cuda", "torch 2.13.0 has no CUDA.", "needs csg_ext's CUDA kernels, which are not there: torch 2.13.0 has no"),
        ("cuda:2", None, "device must be one of the 2 GPUs, counted from 0, got 'cuda:2'"),
        ("cuda:x", None, "device must be auto, cpu, cuda or cuda:INDEX, got 'cuda:x'"),
        ("cuda:1", None, None),
    ],
)
def test_a_gpu_that_cannot_be_used_is_refused_at_once(monkeypatch, name, kernels_error, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(compare, "CUDA_ERROR", kernels_error)
    assert compare.pick_device("auto") == ("cpu" if kernels_error else "cuda")
    if message is None:
        assert compare.pick_device(name) == name
    else:
        with pytest.raises(ValueError, match=message):
            compare.pick_device(name)
