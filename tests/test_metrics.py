"""Tests of the measures: against scikit-learn called class by class, analytic cases, and matrices worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.feature_selection import mutual_info_classif

from csg_ext import metrics
from csg_ext.metrics import class_mutual_info


def _sample(n: int = 300, k: int = 3, c: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    y = rng.integers(0, c, n)
    return rng.normal(size=(n, k)) + 2 * (np.arange(k) == y[:, None]), y


def test_matrix_is_scikit_learns_class_by_class():
    a, y = _sample()
    mi = class_mutual_info(a, y, random_state=5, n_neighbors=4)
    assert mi.shape == (3, 4) and mi.dtype == np.float64
    for c in range(4):
        expected = mutual_info_classif(a, y == c, discrete_features=False, n_neighbors=4, random_state=5)
        assert np.abs(mi[:, c] - expected).max() < 1e-9
    assert metrics.best_class(mi).tolist() == [0, 1, 2]


def test_known_values():
    """A feature that tells the class reaches the class's entropy; one that tells nothing stays near zero."""
    rng = np.random.default_rng(0)
    y = np.arange(2000) % 5
    a = np.stack([(y == 2) * 100 + rng.normal(size=2000), rng.normal(size=2000)], 1)
    mi = class_mutual_info(a, y)
    assert mi[0, 2] == pytest.approx(metrics.entropy_bound(5), abs=0.01)
    assert mi[1].max() < 0.03
    assert mi[0].argmax() == 2


def test_matrix_takes_float32_and_absent_classes():
    a, y = _sample(c=3)
    mi = class_mutual_info(a.astype(np.float32), y, num_classes=5)
    assert mi.shape == (3, 5) and np.isfinite(mi).all()
    assert np.allclose(mi[:, :3], class_mutual_info(a, y), atol=1e-3)
    assert (mi[:, 3:] < 0.01).all()


@pytest.mark.parametrize(
    "features, labels, message",
    [
        (np.zeros(3), np.zeros(3, int), r"features must be \(N, K\), got shape \(3,\)"),
        (np.zeros((3, 2)), np.zeros(4, int), r"labels must be \(3,\) like .* got shape \(4,\)"),
        (np.zeros((3, 2)), np.zeros(3), "labels must be integers, got float64"),
        (
            np.full((3, 2), np.nan),
            np.zeros(3, int),
            "features must be finite, got 6 values that are not, first in column 0",
        ),
        (np.zeros((3, 2)), np.array([0, -1, 0]), "labels must be non-negative, got -1"),
        (np.zeros((3, 2)), np.array([0, 7, 0]), r"labels must lie in \[0, 3\), got 7"),
    ],
)
def test_bad_input(features, labels, message):
    with pytest.raises(ValueError, match=f"class_mutual_info: {message}"):
        class_mutual_info(features, labels, num_classes=3)


def test_scores_of_a_matrix():
    mi = np.array([[0.1, 0.3], [0.2, 0.0], [0.0, 0.1]])
    assert metrics.mutual_information_score(mi) == pytest.approx(0.2)
    assert metrics.best_class(mi).tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match="non-empty"):
        metrics.mutual_information_score(np.zeros((0, 2)))


def test_scores_of_a_tensor():
    mi = torch.tensor([[0.1, 0.3], [0.2, 0.0], [0.0, 0.1]])
    assert metrics.mutual_information_score(mi) == pytest.approx(0.2)
    best = metrics.best_class(mi)
    assert isinstance(best, torch.Tensor) and best.tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match=r"best_class: mi must be a non-empty \(K, C\) matrix, got shape \(2,\)"):
        metrics.best_class(torch.zeros(2))
    for wrong in (torch.zeros(2, 2, dtype=torch.complex64), [["a"]], None):
        with pytest.raises(TypeError, match="best_class: mi must be .*numbers, got "):
            metrics.best_class(wrong)
    assert metrics.mutual_information_score(torch.tensor([[1, 2], [3, 0]])) == 2.5
    assert metrics.best_class(torch.tensor([[False, True]])).tolist() == [1]


def test_ceiling_is_the_mean_of_every_class_with_its_own_score():
    a, y = _sample(k=4)
    expected = np.mean([class_mutual_info(a[:, [c]], y)[0, c] for c in range(4)])
    assert metrics.mis_ceiling(a, y) == pytest.approx(expected)
    assert metrics.mis_ceiling(torch.from_numpy(a), torch.from_numpy(y)) == metrics.mis_ceiling(a, y)
    assert metrics.mis_ceiling(a, y, ties="exact") == pytest.approx(expected, abs=0.02)
    with pytest.raises(ValueError, match=r"mis_ceiling: logits must be \(N, C\), got shape \(300,\)"):
        metrics.mis_ceiling(a[:, 0], y)
    assert metrics.mis_ceiling(a[:, ::-1], y) < expected / 2  # scores of the wrong classes tell less


def test_bound():
    assert metrics.entropy_bound(10) == pytest.approx(0.325, abs=5e-4)
    assert metrics.entropy_bound(6) == pytest.approx(0.451, abs=5e-4)
    assert metrics.entropy_bound(1000) == pytest.approx(0.0079, abs=5e-5)
    with pytest.raises(ValueError, match="at least 2, got 1"):
        metrics.entropy_bound(1)


def test_gap_closed():
    assert metrics.gap_closed(0.25, 0.2, 0.3) == pytest.approx(0.5)
    assert metrics.gap_closed(0.15, 0.2, 0.3) == pytest.approx(-0.5)
    assert math.isnan(metrics.gap_closed(0.25, 0.3, 0.3))


def test_agreement():
    gate = np.array([[1, 0.2, 0, 1], [0, 1, 0.1, 0], [0, 0, 1, 0.9]])
    mi = np.array([[0.3, 0.1, 0.1], [0.0, 0.2, 0.1], [0.0, 0.2, 0.1], [0.1, 0.0, 0.2]])
    assert metrics.class_agreement(gate, mi) == 0.5
    with pytest.raises(ValueError, match=r"got gate \(3, 4\) and mi \(3, 4\)"):
        metrics.class_agreement(gate, mi.T)


def test_two_classes_are_told_apart_by_the_means():
    """ "Is it the one" and "is it the other" are one question: both columns of the matrix are equal."""
    rng = np.random.default_rng(int(torch.randint(2**31, ())))
    labels = np.arange(400) % 2
    features = rng.normal(size=(400, 6)).astype(np.float32)
    features[:, :3] += 2 * (labels == 0)[:, None]
    features[:, 3:] += 2 * (labels == 1)[:, None]
    mi = metrics.class_mutual_info(features, labels)
    assert np.array_equal(mi[:, 0], mi[:, 1])
    want = [0, 0, 0, 1, 1, 1]
    assert metrics.best_class(mi, features, labels).tolist() == want
    found = metrics.best_class(torch.from_numpy(mi), torch.from_numpy(features), torch.from_numpy(labels))
    assert isinstance(found, torch.Tensor) and found.tolist() == want
    gate = np.eye(2)[:, want]
    assert metrics.class_agreement(gate, mi, features, labels) == 1
    with pytest.raises(ValueError, match="features and labels must be given with two classes, whose MI is the same"):
        metrics.class_agreement(gate, mi)


def test_ties_among_several_classes():
    """A class without samples never wins."""
    mi = np.array([[0.1, 0.3, 0.3, 0.0], [0.0, 0.0, 0.0, 0.0], [0.2, 0.1, 0.2, 0.3]])
    features = np.array([[9.0, 1, 0], [1, -1, 0], [2, -2, 0], [2, -3, 0]])
    assert metrics.best_class(mi, features, np.array([0, 1, 2, 2])).tolist() == [2, 0, 3]
    assert metrics.best_class(mi).tolist() == [1, 0, 3]
    for wrong, message in (
        ((features,), "must be given together"),
        ((features, np.array([0, 1, 2])), r"must be \(N, 3\) and \(N,\), got \(4, 3\) and \(3,\)"),
        ((features, np.array([0, 1, 2, 4])), r"labels must be integers in \[0, 4\)"),
        ((features, np.array([0.0, 1, 2, 2])), r"labels must be integers in \[0, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            metrics.best_class(mi, *wrong)


def test_block_score_of_equal_negative_similarities():
    found = metrics.block_score(np.full((6, 6), -0.5), np.array([0, 0, 0, 1, 1, 1]), permutations=50)
    assert found.score == pytest.approx(0) and found.p_value == 1


def test_labels_of_another_shape():
    """(N, 1) would be compared with every prediction."""
    features, weight, bias, gate = np.eye(3), np.eye(3), np.zeros(3), np.eye(3)
    for labels in (np.arange(3)[:, None], np.zeros(1, int)):
        with pytest.raises(ValueError, match=r"own_filter_accuracy: labels must be \(3,\) like features"):
            metrics.own_filter_accuracy(features, weight, bias, gate, labels)
        with pytest.raises(ValueError, match=r"predicted_class_accuracy: labels must be \(3,\) like features"):
            metrics.predicted_class_accuracy(features, weight, bias, np.arange(3), labels)


def test_own_filter_accuracy():
    gate = np.array([[1, 0.6, 0], [0, 1, 1]])  # filter 0 belongs to class 0, filters 1 and 2 to class 1
    weight, bias = np.array([[1.0, 9.0, 9.0], [9.0, 1.0, 1.0]]), np.array([0.0, 0.5])
    features = np.array([[3.0, 0, 0], [0, 1, 1], [1, 0, 0], [2.0, 1, 1]])  # scores 3:0.5, 0:2.5, 1:0.5, 2:2.5
    assert metrics.own_filter_accuracy(features, weight, bias, gate, np.array([0, 1, 1, 1])) == 0.75
    with pytest.raises(ValueError, match="must be"):
        metrics.own_filter_accuracy(features, weight.T, bias, gate, np.zeros(4, int))


def test_density_is_exported_here_too():
    assert metrics.l1_density(torch.ones(2, 3)).item() == 1
