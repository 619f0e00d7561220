"""The study of removed classes: what is taken away, its controls and its probe, on features made for it."""

import json

import numpy as np
import pytest
from example_scripts import load_study


@pytest.fixture
def study(tmp_path, monkeypatch):
    return load_study("removal", tmp_path, monkeypatch)


def _part(generator, count):
    """Three classes: two filters for each, which are 1 on it, and a faint copy of class 0 in a filter of class 1."""
    labels = np.arange(count) % 3
    features = np.repeat(np.eye(3)[labels], 2, axis=1) + 0.01 * generator.random((count, 6))
    features[:, 2] += 0.3 * (labels == 0)
    return features.astype(np.float32), labels


def test_what_is_left_of_a_class(study):
    generator = np.random.default_rng()
    train, test = _part(generator, 90), _part(generator, 60)
    weight, bias = np.repeat(np.eye(3), 2, axis=1), np.zeros(3)
    lost = np.arange(6) < 2
    left = study.after_removal(train, test, weight, bias, lost, 0)
    assert left["filters"] == 2 and left["class"] == 0 and left["others"] == 1
    assert left["probe"] == 1  # the faint copy tells
    train[0][:, 2] -= 0.3 * (train[1] == 0)
    test[0][:, 2] -= 0.3 * (test[1] == 0)
    assert study.after_removal(train, test, weight, bias, np.zeros(6, bool), 1)["class"] == 1

    found = study.measure(train, test, weight, bias, weight, seed=0)
    assert list(found) == ["weight", "mi", "gate", "random", "logit", "classes"]
    for name in ("weight", "mi", "gate"):
        assert found[name] == {"filters": 2, "class": 0, "others": 1, "probe": pytest.approx(found[name]["probe"])}
    assert found["random"]["filters"] == 2 and found["random"]["others"] < 1
    assert found["logit"] == {"filters": 0, "class": 0, "others": 1}
    each = found["classes"]
    assert each["before"] == {"class": [1, 1, 1], "others": [1, 1, 1]}
    assert each["gate"] | {"probe": []} == {"filters": [2] * 3, "class": [0] * 3, "others": [1] * 3, "probe": []}
    assert np.mean(each["random"]["others"]) == pytest.approx(found["random"]["others"])
    assert "gate" not in study.measure(train, test, weight, bias, None, seed=0)


def test_the_table_has_the_means_of_the_seeds(study):
    numbers = {key: 0.5 for key in study.MEASURES}
    for seed, value in enumerate((0.2, 0.4)):
        each = {key: [value + 0.01 * c for c in range(10)] for key in study.MEASURES}
        classes = {"before": each, "mi": each, "gate": {key: [1 - v for v in vs] for key, vs in each.items()}}
        arm = {"weight": numbers | {"class": value}, "logit": numbers, "classes": classes}
        (study.RESULTS / f"seed-{seed}.json").parent.mkdir(exist_ok=True)
        (study.RESULTS / f"seed-{seed}.json").write_text(json.dumps({"std": arm, "csg": arm}))
    study.PAGE.write_text(
        f"before\n{study.BEGIN_CLASSES}\nold\n<!-- end -->\n{study.BEGIN}\nold\n<!-- end -->\nafter\n"
    )
    study.report()
    page = study.PAGE.read_text()
    assert page.startswith("before\n") and page.endswith("after\n") and "old" not in page
    assert "| CSG | filters by the classifier's weights | 0.5 | 30.0% ± 14.1% | 50.0% ± 0.0% | 50.0% ± 0.0% |" in page
    same, gate = "| 0 | 20.0% → 20.0% | 20.0% → 20.0% ", "| 1 | 20.0% → 80.0% | 20.0% → 80.0% |"
    assert f"| T-shirt/top {same}{same}{gate}" in page  # the first seed's
    assert "| **mean** |  | 24.5% → 24.5% | 24.5% → 24.5% |" in page
