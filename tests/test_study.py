"""The reproduction study's script: one small job from start to table."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from csg_ext.data import ImageData


@pytest.fixture
def study(tmp_path, monkeypatch):
    path = Path(__file__).parents[1] / "examples" / "reproduction" / "study.py"
    spec = importlib.util.spec_from_file_location("study", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "study", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    return module


def test_a_job_is_trained_kept_and_tabulated(study, tmp_path):
    rng = np.random.default_rng()
    images, labels = rng.integers(0, 256, (60, 1, 12, 12), np.uint8), np.arange(60) % 3
    data = ImageData("noise", images[:40], labels[:40], images[40:], labels[40:], ["a", "b", "c"])
    data.save(tmp_path / "noise.npz")
    tiny = study.Study("tiny", "", {"epochs": 1, "batch_size": 20}, ("std", "csg"), range(1), hold_out=None)
    for arm in tiny.arms:
        job = study.Job(tiny, arm, 0)
        assert job.start(tmp_path / "noise.npz", tmp_path / arm).wait() == 0, (tmp_path / arm / "log.txt").read_text()
        job.keep(tmp_path / arm)
        kept = study.load(tiny, arm)[0]
        right = np.unpackbits(np.frombuffer(bytes.fromhex(kept["right"]), np.uint8))[: kept["images"]]
        assert kept["images"] == 20 and right.mean() == pytest.approx(kept["accuracy"])
    std, csg = (study.load(tiny, arm)[0] for arm in tiny.arms)
    row = study.main_table(tiny)[2]
    assert f"{100 * (csg['accuracy'] - std['accuracy']):+.2f}" in row
    assert (
        f"{csg['l1_density']:.4f}" in row
        and f"{(csg['mis'] - std['mis']) / (std['mis_ceiling'] - std['mis']):.2f}" in row
    )


def test_every_study_has_settings_that_exist(study):
    from csg_ext.training.config import TrainConfig

    assert len({s.name for s in study.STUDIES}) == len(study.STUDIES)
    for s in study.STUDIES:
        TrainConfig(**s.settings)
    assert all((s.hold_out is None) == (s.name in ("main", "demo", "scenes")) for s in study.STUDIES)
