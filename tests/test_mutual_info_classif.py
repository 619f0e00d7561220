"""Tests of mutual_info_classif: what scikit-learn's function takes, draws and returns; bad input."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from mutual_info_inputs import EQUAL, sample
from scipy import sparse
from sklearn.feature_selection import SelectKBest
from sklearn.feature_selection import mutual_info_classif as sklearn_mutual_info_classif
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import csg_ext


class Frame:
    """What a DataFrame is to NumPy."""

    def __init__(self, values):
        self.values, self.shape = values, values.shape

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.values, dtype)


def test_classif_takes_what_scikit_learn_takes():
    x, y = sample(300)
    names = np.array(["ant", "bee", "cat", "dog", "emu"])
    want = sklearn_mutual_info_classif(x, y, random_state=0)
    for features, target in [
        (x, names[y]),
        (x, names[y].astype(object)),
        (x, y.astype(float)),
        (x, y[:, None]),
        (x.tolist(), y.tolist()),
        (Frame(x), Frame(y)),
        (Frame(x.astype(object)), y),
        (torch.from_numpy(x), torch.from_numpy(y)),
        (np.asfortranarray(x), y - 7),
    ]:
        got = csg_ext.mutual_info_classif(features, target, random_state=0, n_jobs=2, copy=False)
        assert isinstance(got, np.ndarray) and got.shape == (6,) and np.abs(got - want).max() <= EQUAL
    for features in (x[:, :1], x.astype(np.float32), (4 * x).astype(int), x > 1):
        for options in ({}, {"discrete_features": "auto", "n_neighbors": 5}):
            got = csg_ext.mutual_info_classif(features, y, random_state=1, **options)
            want = sklearn_mutual_info_classif(features, y, random_state=1, **({"discrete_features": False} | options))
            assert np.abs(got - want).max() <= EQUAL
    one_class = sklearn_mutual_info_classif(x, np.zeros(300), random_state=0)
    assert np.abs(csg_ext.mutual_info_classif(x, np.zeros(300), random_state=0) - one_class).max() <= EQUAL


def test_classif_draws_scikit_learns_numbers():
    x, y = sample(100)
    ours, theirs = np.random.RandomState(5), np.random.RandomState(5)
    for _ in range(2):
        got = csg_ext.mutual_info_classif(x, y, random_state=ours)
        assert np.abs(got - sklearn_mutual_info_classif(x, y, random_state=theirs)).max() <= EQUAL
    assert ours.standard_normal() == theirs.standard_normal()
    np.random.seed(3)
    got = csg_ext.mutual_info_classif(x, y), np.random.standard_normal()
    np.random.seed(3)
    want = sklearn_mutual_info_classif(x, y), np.random.standard_normal()
    assert np.abs(got[0] - want[0]).max() <= EQUAL and got[1] == want[1]


def test_classif_in_a_pipeline():
    x, y = sample(300)
    targets = np.array(["ant", "bee", "cat", "dog", "emu"])[y]

    def pipeline(score):
        return make_pipeline(StandardScaler(), SelectKBest(lambda a, b: score(a, b, random_state=0), k=3))

    ours, theirs = pipeline(csg_ext.mutual_info_classif), pipeline(sklearn_mutual_info_classif)
    assert np.array_equal(ours.fit_transform(x, targets), theirs.fit_transform(x, targets))
    assert np.abs(ours[-1].scores_ - theirs[-1].scores_).max() <= EQUAL
    assert SelectKBest(csg_ext.mutual_info_classif, k=2).fit_transform(x, y).shape == (300, 2)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"X": sparse.csr_matrix(np.eye(4))}, ValueError, "X must be dense, .*sklearn.feature_selection.mutual_inf"),
        ({"X": torch.eye(4).to_sparse()}, ValueError, "X must be dense, got Tensor; sklearn.feature_selection"),
        ({"discrete_features": True}, ValueError, "discrete_features must be False or 'auto', got True; sklearn.feat"),
        ({"discrete_features": [0]}, ValueError, r"discrete_features must be False or 'auto', got \[0\]; sklearn.feat"),
        ({"discrete_features": "no"}, ValueError, "discrete_features must be False or 'auto', got 'no'"),
        ({"random_state": "x"}, ValueError, "random_state must be None, an integer or a RandomState, got 'x'"),
        ({"random_state": np.random.default_rng()}, ValueError, "random_state must be None, an integer or a RandomSt"),
        ({"random_state": -1}, ValueError, r"random_state must be in \[0, 2\^32\), got -1"),
        ({"n_neighbors": 0}, ValueError, "n_neighbors must be at least 1, got 0"),
        ({"n_neighbors": 2.5}, TypeError, "n_neighbors must be an integer, got 2.5"),
        ({"y": [0.5, 1, 2, 2]}, ValueError, "y must be class labels, got float64 values that are no whole numbers"),
        ({"y": [np.nan, 1, 2, 2]}, ValueError, "y must be class labels"),
        ({"y": np.array(["a", "b", None, "b"], object)}, ValueError, "y must be labels that sort, got object values"),
        ({"y": np.array(["a", "b", np.nan, "b"], object)}, ValueError, "y must be labels that sort, .* it holds NaN"),
        ({"y": [0, 1, 1]}, ValueError, r"y must be \(4,\) like X's first axis, got shape \(3,\)"),
        ({"y": [0, 1, 2, 3]}, ValueError, "y must have a class of at least two samples, got 4 classes of one"),
        ({"X": np.zeros(4)}, ValueError, r"X must be \(N, K\), got shape \(4,\)"),
        ({"X": [["a", "b"]] * 4}, TypeError, "X must be numbers, got <U1"),
        ({"X": np.full((4, 2), np.inf)}, ValueError, "X must be finite, got 8 values that are not, first in column 0"),
    ],
)  # fmt: skip
def test_classif_bad_input(changes, error, message):
    arguments = {"X": np.eye(4), "y": [0, 0, 1, 1]} | changes
    with pytest.raises(error, match=f"^mutual_info_classif: {message}"):
        csg_ext.mutual_info_classif(arguments.pop("X"), arguments.pop("y"), **arguments)


def test_scikit_learn_is_not_imported():
    code = (
        "import sys, numpy as np, csg_ext\n"
        "x, y = np.random.rand(50, 3), np.arange(50) % 3\n"
        "csg_ext.mutual_info_classif(x, y), csg_ext.class_mutual_info(x, y), csg_ext.metrics.mis_ceiling(x, y)\n"
        "print([m for m in ('sklearn', 'scipy', 'torchmetrics') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
