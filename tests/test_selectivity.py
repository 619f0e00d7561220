"""Tests of the measures of class selectivity, against their definitions written as loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from csg_ext import metrics

RNG = np.random.default_rng()


def _features(n=300, k=12, c=5):
    labels = RNG.integers(0, c, n)
    labels[:c] = np.arange(c)
    centres = RNG.normal(0, 1.5, (c, k))
    return np.maximum(centres[labels] + RNG.normal(0, 1, (n, k)), 0).astype(np.float32), labels


def _loop(features, labels):
    found = []
    for values in features.astype(np.float64).T:
        means = sorted(values[labels == c].mean() for c in np.unique(labels))
        rest = np.mean(means[:-1])
        found.append((means[-1] - rest) / (means[-1] + rest) if means[-1] > 0 else 0)
    return np.array(found)


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy, lambda x: x.tolist()], ids=["array", "tensor", "list"])
def test_class_selectivity_is_its_definition(kind):
    features, labels = _features()
    features[:, 3] = 0  # a dead filter
    found = metrics.class_selectivity(kind(features), labels)
    assert found == pytest.approx(_loop(features, labels), abs=1e-6) and found[3] == 0
    assert metrics.class_selectivity(kind(features), labels, 9) == pytest.approx(found)  # empty classes count as none
    own = np.eye(5)[labels]
    assert metrics.class_selectivity(own, labels) == pytest.approx(np.ones(5))
    assert metrics.class_selectivity(np.ones((300, 2)), labels) == pytest.approx(np.zeros(2))


def test_exclusivity_is_its_definition():
    mi = RNG.random((40, 6)) - 0.1
    top = np.sort(mi.clip(0), axis=1)
    assert metrics.exclusivity(mi) == pytest.approx(1 - top[:, -2] / top[:, -1])
    assert metrics.exclusivity(torch.from_numpy(mi)) == pytest.approx(metrics.exclusivity(mi))
    assert metrics.exclusivity([[0.0, -0.1], [0.3, -0.2]]).tolist() == [0, 1]


def test_quiet_filters_are_those_below_the_others_mean():
    features, labels = _features()
    classes = RNG.integers(-1, 5, 12)
    found = metrics.quiet_filters(features, labels, classes)
    for k, c in enumerate(classes):
        own = labels == c
        assert found[k] == (c >= 0 and features[own, k].mean() < features[~own, k].mean())
    # Mutual information does not see the difference, ranks do.
    speaks = np.stack([labels == 2, labels != 2], 1) + 0.1 * RNG.random((300, 2))
    mi = metrics.class_mutual_info(speaks, labels)
    assert mi.argmax(1).tolist() == [2, 2] and mi[0, 2] == pytest.approx(mi[1, 2], abs=0.1)
    assert metrics.quiet_filters(speaks, labels, [2, 2]).tolist() == [False, True]
    assert [roc_auc_score(labels == 2, column) for column in speaks.T] == [1, 0]
    assert not metrics.quiet_filters(speaks, labels, [7, 7]).any()  # no sample of the class


def test_specificity_puts_them_together():
    features, labels = _features()
    weight, logits = RNG.normal(size=(5, 12)), RNG.normal(size=(300, 5)) + 3 * np.eye(5)[labels]
    mi = metrics.class_mutual_info(features, labels)
    mi[4] = 0
    ceilings = metrics.class_mutual_info(logits, labels).diagonal()
    found = metrics.specificity(features, labels, mi, weight, ceilings)
    assert found["mis_of_ceiling"] == pytest.approx(
        np.mean([m.max() / ceilings[m.argmax()] if m.max() > 0 else 0 for m in mi])
    )
    assert found["weight_agreement"] == pytest.approx(
        np.mean([weight[:, k].argmax() == mi[k].argmax() for k in range(12) if k != 4])
    )
    assert found["class_selectivity"] == pytest.approx(_loop(features, labels).mean(), abs=1e-6)
    assert found["exclusivity"] == pytest.approx(metrics.exclusivity(mi).mean())
    signed = metrics.specificity(features - 0.5, labels, mi, weight, ceilings)
    assert "class_selectivity" not in signed and signed["exclusivity"] == found["exclusivity"]
    two = metrics.class_mutual_info(features, labels > 2)
    assert "exclusivity" not in metrics.specificity(features, labels > 2, two, weight[:2], ceilings[:2])


def test_bad_arguments_are_named():
    features, labels = _features()
    for call, message in (
        (lambda: metrics.class_selectivity(features - 1, labels), "features must not be negative"),
        (lambda: metrics.class_selectivity(features, labels * 0), "labels must name at least two classes, got one"),
        (lambda: metrics.class_selectivity(features, labels[:-1]), r"must be \(N, K\) and \(N,\), got \(300, 12\)"),
        (lambda: metrics.class_selectivity(features, labels, 3), r"labels must be integers in \[0, 3\)"),
        (lambda: metrics.class_selectivity(features, labels * 0.5), "labels must be integers"),
        (lambda: metrics.exclusivity(np.ones((4, 1))), r"mi must be \(K, C\) with two classes or more"),
        (
            lambda: metrics.quiet_filters(features, labels, np.zeros(3, int)),
            r"classes must be \(12,\) like the filters",
        ),
        (
            lambda: metrics.quiet_filters(features, labels, np.zeros(12)),
            r"classes must be \(K,\) integers, got float64",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
