"""The reproduction study's scripts: one small job from start to table, and a short fine-tuning."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from example_scripts import EXAMPLES, load_script

from csg_ext.data import ImageData


@pytest.fixture
def study(tmp_path, monkeypatch):
    module = load_script("reproduction/study", monkeypatch)
    monkeypatch.setattr(sys.modules["studies"], "RESULTS", tmp_path / "results")
    return module


@pytest.fixture
def studies(study):
    """What is trained and what came of it, as it is in the repository."""
    module = sys.modules["studies"]
    module.RESULTS = EXAMPLES / "reproduction" / "results"  # `study` puts it back
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
        kept = json.loads(job.path.read_text())
        right = np.unpackbits(np.frombuffer(bytes.fromhex(kept["right"]), np.uint8))[: kept["images"]]
        assert kept["images"] == 20 and right.mean() == pytest.approx(kept["accuracy"])
    ((_, _, std, csg),) = sys.modules["studies"].pairs(tiny)
    row = study.tables.main_table(tiny)[2]
    more = study.tables.main_table(replace(tiny, seeds=range(2)))
    assert more[-1] == "1 of 2 seeds so far, too few for an interval or a verdict."
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
    on_the_test_part = {s.name for s in study.STUDIES if s.hold_out is None}
    shared = {f"shared-{sharing}{suffix}" for sharing in (1, 2, 4) for suffix in ("", "-long")}
    assert on_the_test_part == {"demo", "demo-low", "long", "long-low", "fixed", "full", "scenes", "crowded"} | shared
    for s in study.STUDIES:
        other = next((o for o in study.STUDIES if o.name == s.std), s)
        assert "std" in other.arms and set(s.seeds) <= set(other.seeds)
        assert (other.hold_out, other.data) == (s.hold_out, s.data)


def test_crowded_classes_are_variants_of_the_items(study):
    from csg_ext.data import load_images

    data = load_images()
    found = study.crowded(data)
    assert len(found.classes) == len(set(found.classes)) == 80
    assert np.array_equal(study.crowded(data).test_images, found.test_images)
    for n, label in enumerate(found.test_labels):
        item, way, tone, size = found.classes[label].split(", ")
        assert item == data.classes[data.test_labels[n]]
        image = found.test_images[n, 0].astype(float)
        image = 255 - image if tone == "negative" else image
        image = image[::-1] if way == "upside down" else image
        original = data.test_images[n, 0].astype(float)
        if size == "half":
            assert not image[:7].any() and not image[21:].any() and not image[:, :7].any() and not image[:, 21:].any()
            image = image[7:21, 7:21]
            original = original.reshape(14, 2, 14, 2).mean((1, 3)).round()
        assert np.array_equal(image, original)


def test_what_is_not_trained_is_told(study):
    assert study.tables.main_table(study.STUDIES[0]) == ["Not trained yet."]


def test_tables_say_what_is_missing(study, studies):
    half = replace(study.STUDIES[0], seeds=range(6))
    lines = study.tables.main_table(half)
    assert "5 of 6 seeds so far" in lines[-1]
    assert not any("verdict" in line or "| yes |" in line for line in lines[:-1])
    assert any("| yes |" in line for line in study.tables.main_table(study.STUDIES[0]))


@pytest.mark.parametrize("sharing", [1, 2, 4])
def test_scenes_of_two_items_hold_those_of_their_class(study, sharing):
    from torch.nn.functional import interpolate

    from csg_ext.data import load_images

    data = load_images()
    found = study.shared(data, sharing)
    assert len(found.classes) == 10 and np.array_equal(np.bincount(found.test_labels), [200] * 10)
    assert np.array_equal(study.shared(data, sharing).train_images[-50:], found.train_images[-50:])
    held = [name.split(" + ") for name in found.classes]
    counts = [sum(item in pair for pair in held) for item in data.classes]
    assert set(counts) == ({sharing} if sharing < 4 else {4, 0})
    small = interpolate(torch.from_numpy(data.test_images).float(), size=20, mode="bilinear", antialias=True)
    small = {
        image.round().to(torch.uint8).numpy().tobytes(): n for image, n in zip(small, data.test_labels, strict=True)
    }
    for scene, label in zip(found.test_images[:200, 0], found.test_labels, strict=False):
        quadrants = [scene[y : y + 20, x : x + 20] for y in (0, 20) for x in (0, 20)]
        items = [data.classes[small[q.tobytes()]] for q in quadrants if q.any()]
        assert sorted(items) == sorted(held[label])


def test_filters_of_items_are_told_from_those_of_classes(study):
    from csg_ext import metrics

    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(600) % 10)
    item, last = (labels < 4).astype(float), (labels == 9).astype(float)  # the first item's classes, the last class
    features = (np.stack([item, item, last, last], 1) + 0.2 * rng.random((600, 4))).astype(np.float32)
    for count in (2, 3, 4):
        mi = metrics.class_mutual_info(features[:, :count], labels, num_classes=10)
        assert study.filters_of_items(features[:, :count], labels, mi, 4) == pytest.approx(2 / count)


def test_the_aim_for_density_depends_on_the_number_of_classes(study, studies):
    found = [s for s in [*study.STUDIES, *study.OTHERS] if s.hold_out is None]
    complete = [s for s in found if len(studies.pairs(s)) == len(s.seeds) >= study.tables.FEWEST]
    assert len(complete) >= 10
    for s in complete:
        densest = max(pair.csg["l1_density"] for pair in studies.pairs(s))
        reached = "yes" if densest <= 1.05 / (80 if s.name == "crowded" else 10) else "no"
        assert f"| L1-density at most 1.05 / C | {reached} |" in study.tables.main_table(s)


def test_the_summary_counts_what_the_tables_say(study, studies):
    found = [s for s in [*study.STUDIES, *study.OTHERS] if s.hold_out is None]
    complete = [s for s in found if len(studies.pairs(s)) == len(s.seeds) >= study.tables.FEWEST]
    rows = [row.strip("| ").split(" | ") for row in study.tables.summary_table(found)[2:]]
    assert [row[0] for row in rows] == [s.text for s in complete]
    for row, s in zip(rows, complete, strict=True):
        table = study.tables.main_table(s)
        assert int(row[-1]) == sum(line.endswith("| yes |") for line in table)
        mean = next(line for line in table if line.startswith("| mean")).strip("| ").split(" | ")
        assert row[2] == mean[3] and row[4] == mean[8]


def test_fine_tuning_a_pretrained_network(monkeypatch, capsys):
    finetune = load_script("reproduction/finetune", monkeypatch)
    monkeypatch.setattr(finetune, "IMAGES", 64)
    data = finetune.load_images()
    data = replace(data, test_images=data.test_images[:100], test_labels=data.test_labels[:100])
    model = finetune.fine_tune("csg", 0, data, finetune.SETTINGS | {"epochs": 1})
    assert model.gate.shape == (10, 1280) and model.gate.max(0).values.eq(1).all()
    result = finetune.measure(model, "csg", data)
    right = np.unpackbits(np.frombuffer(bytes.fromhex(result["right"]), np.uint8))[: result["images"]]
    assert result["images"] == 100 and right.mean() == pytest.approx(result["accuracy"])
    assert 0.1 <= result["l1_density"] <= 1 and 0 < result["mis"] < result["mis_ceiling"] + 0.325

    monkeypatch.setattr(sys, "argv", ["finetune.py", "csg", "0", "--set", "rate=1"])
    with pytest.raises(SystemExit):
        finetune.main()
    assert "--set must be NAME=NUMBER with NAME one of epochs, " in capsys.readouterr().err


def test_scenes_of_two_objects_train_with_labels_of_both(monkeypatch):
    from sklearn.feature_selection import mutual_info_classif

    objects = load_script("reproduction/objects", monkeypatch)
    train, test = objects.scenes(2, "train", 64), objects.scenes(2, "test", 80)
    assert train.labels.shape == (64, 2) and (test.masks.sum((2, 3)) <= 20 * 20).all()
    model = objects.fit("csg", 0, train, 10, replace(objects.CONFIG, epochs=1))
    assert model.gate.max(0).values.eq(1).all() and model.gate.min() < 0.5
    result = objects.measure(model, "csg", train, test)
    right = np.unpackbits(np.frombuffer(bytes.fromhex(result["right"]), np.uint8))[: result["images"]]
    assert result["images"] == 80 and right.mean() == pytest.approx(result["accuracy"])

    target = objects.present(torch.from_numpy(test.labels), 10).numpy() > 0
    assert target.sum() == 160 and target[np.arange(80), test.labels[:, 1]].all()
    scores = np.random.default_rng().normal(size=(80, 10)).astype(np.float32)
    sets = [set(np.argsort(row)[-2:]) == set(labels) for row, labels in zip(scores, test.labels, strict=True)]
    assert objects.all_found(scores, target).tolist() == sets
    assert objects.all_found(target.astype(np.float32), target).all()
    found = objects.class_information(scores, target)
    for c in (0, 7):
        wanted = mutual_info_classif(scores, target[:, c], discrete_features=False, random_state=0)
        assert found[:, c] == pytest.approx(wanted, abs=1e-9)


def test_the_effect_is_told_beside_the_ceiling(study, studies):
    demo = study.STUDIES[0]
    runs = [(pair.std, pair.csg) for pair in studies.pairs(demo)]
    gained = np.mean([100 * (b["mis"] - a["mis"]) / a["mis_ceiling"] for a, b in runs])
    (row,) = study.tables.effect_table([demo])[2:]
    assert row.startswith(f"| {demo.text} | 5 |") and f"| {gained:+.1f} ± " in row
