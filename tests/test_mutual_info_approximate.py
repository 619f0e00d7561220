"""Tests of approximate_class_mutual_info: its definition in NumPy, analytic cases, class_mutual_info, bits, bad input.

Values that agree to 1e-12 stand for equal counts: a sample in the wrong bin moves some value by about 1/N.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from mutual_info_inputs import FEATURES, LABELS, make_features, make_labels
from scipy import integrate, stats

from csg_ext.metrics import approximate_class_mutual_info
from csg_ext.metrics.approximate import _by_sorting
from csg_ext.ops.mutual_info import class_mutual_info

op = torch.ops.csg_ext.binned_class_mutual_info


def definition(features: np.ndarray, labels: np.ndarray, classes: int, bins: int) -> np.ndarray:
    """Plug-in MI of the bin with 1[label = c], less Miller's and Madow's correction of each of the three entropies."""
    n = len(labels)

    def entropy(groups: np.ndarray) -> float:
        counts = np.unique(groups, return_counts=True)[1]
        return float(-(counts / n * np.log(counts / n)).sum() + (len(counts) - 1) / (2 * n))

    mi = np.zeros((features.shape[1], classes))
    for k, column in enumerate(features.astype(np.float64).T):
        b = np.searchsorted(np.sort(column), column) * bins // n  # by the rank of the first of equal values
        for c in range(classes):
            is_class = labels == c
            mi[k, c] = entropy(b) + entropy(is_class) - entropy(2 * b + is_class)
    return np.maximum(mi, 0)


def both(features, labels, classes, bins, device="cpu") -> np.ndarray:
    """The kernel's values, after comparing them with those of torch's operators."""
    got = approximate_class_mutual_info(features.to(device), labels, num_classes=classes, bins=bins)
    assert got.device.type == device
    sizes = torch.bincount(labels, minlength=classes)
    other = _by_sorting(features, labels, sizes, min(bins, len(labels)))
    assert (got.cpu() - other).abs().max() <= 1e-12
    return got.cpu().numpy()


@pytest.mark.parametrize("kind", LABELS)
def test_definition(cpu_level, kind):
    rng = np.random.default_rng(sum(kind.encode()))
    for n in (1, 2, 7, 40, 333, 1200):
        for bins in (1, 2, 7, 64, n, 5000):
            features = make_features(rng, n, 4)
            labels, classes = make_labels(rng, n, kind) if n > 9 else (torch.from_numpy(rng.integers(0, 2, n)), 3)
            few = min(classes, 6)
            want = definition(features.numpy(), labels.numpy(), few, bins)
            assert np.abs(both(features, labels, classes, bins)[:, :few] - want).max() <= 1e-12, (n, bins)


def test_many_classes_and_samples(device, cpu_level):
    rng = np.random.default_rng(7)
    n = 20_000
    features = torch.from_numpy(np.stack([make(rng, n) for make in FEATURES.values()], 1))
    for classes in (2, 1000):
        labels = torch.from_numpy(rng.integers(0, classes, n)).clamp_(max=classes - 2 if classes > 2 else 1)
        got = both(features, labels, classes, 64, device)
        want = definition(features.numpy(), labels.numpy(), 2, 64)
        assert np.abs(got[:, :2] - want).max() <= 1e-12
        assert classes == 2 or (got[:, -1] == 0).all()  # no samples


def test_values_that_crowd_or_overflow(cpu_level):
    """Buckets that many values share: outliers, clusters within clusters, the largest and the smallest doubles."""
    rng = np.random.default_rng(0)
    n = 3000
    normal = rng.standard_normal(n)
    largest = np.finfo(np.float64).max
    features = np.stack(
        [
            np.exp(100 * normal),
            np.where(rng.random(n) < 0.5, 1e-9 * normal, 1 + 1e-9 * np.round(normal, 1)),
            np.where(rng.random(n) < 0.01, 1e300 * normal, normal),
            np.where(rng.random(n) < 0.3, largest * np.sign(normal), largest * rng.uniform(-1, 1, n)),
            5e-324 * rng.integers(-40, 40, n),
            np.nextafter(1, 2) - 2.0**-52 * rng.integers(0, 100, n),
            np.sort(normal)[::-1],
        ],
        1,
    )
    labels = torch.from_numpy(rng.integers(0, 7, n))
    for bins in (3, 64, 1000):
        want = definition(features, labels.numpy(), 7, bins)
        assert np.abs(both(torch.from_numpy(features), labels, 7, bins) - want).max() <= 1e-12


def test_bits_depend_on_the_order_of_the_values_alone():
    """Monotone maps, the order of the samples, threads, chunks, instruction sets and layouts do not change a bit."""
    rng = np.random.default_rng(1)
    features = make_features(rng, 2000, 11).float().numpy().clip(-50, 50)
    labels = rng.integers(0, 40, 2000)
    want = approximate_class_mutual_info(features, labels)
    assert want.shape == (11, 40) and want.dtype == np.float64 and want.max() > 0
    order = rng.permutation(2000)
    others = [approximate_class_mutual_info(features[order], labels[order])]
    others += [approximate_class_mutual_info(np.exp(features.astype(np.float64) / 100) * 3 - 7, labels)]
    others += [approximate_class_mutual_info(features, labels, chunk_size=size) for size in (1, 4, 7)]
    read_only = features.copy()
    read_only.flags.writeable = False
    wide = np.zeros((2000, 23), np.float32)
    wide[:, 1::2] = features
    for array in (read_only, np.asfortranarray(features), features.astype(">f4"), wide[:, 1::2], features[::-1]):
        others.append(approximate_class_mutual_info(array, labels[::-1] if array.strides[0] < 0 else labels))
    threads, level = torch.get_num_threads(), torch.ops.csg_ext._cpu_level(-1)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            others.append(approximate_class_mutual_info(features, labels))
        for lower in range(level):
            torch.ops.csg_ext._cpu_level(lower)
            others.append(approximate_class_mutual_info(features, labels))
    finally:
        torch.set_num_threads(threads)
        torch.ops.csg_ext._cpu_level(level)
    assert all(np.array_equal(want, other) for other in others)


def test_dtypes(device):
    labels = torch.randint(0, 5, (700,))
    features = torch.randn(700, 3)
    for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int32):
        given = (features * 4).to(dtype)
        got = approximate_class_mutual_info(given.to(device), labels)
        assert got.dtype == torch.float64
        want = definition(given.double().numpy(), labels.numpy(), 5, 64)
        assert np.abs(got.cpu().numpy() - want).max() <= 1e-12


def test_zeros_share_a_bin():
    """A rectified feature tells of its zeros what "is it zero" tells, with as many bins as there may be."""
    labels = np.arange(1000) % 2
    zero_for = np.where(labels == 1, 0.0, 1 + np.arange(1000))
    mi = approximate_class_mutual_info(np.stack([zero_for, np.zeros(1000)], 1), labels, bins=2)
    assert mi[0] == pytest.approx(math.log(2), abs=1 / 1000) and (mi[1] == 0).all()
    assert approximate_class_mutual_info(np.arange(9.0)[:, None], np.zeros(9, int)).tolist() == [[0]]


@pytest.mark.parametrize("shift", [0.0, 0.5, 1.0, 3.0])
def test_two_normal_distributions(shift):
    rng = np.random.default_rng(int(10 * shift))
    y = np.arange(20_000) % 2
    got = approximate_class_mutual_info(rng.standard_normal((20_000, 8)) + shift * y[:, None], y)

    def h(x: float) -> float:
        p = (stats.norm.pdf(x) + stats.norm.pdf(x, shift)) / 2
        return float(-p * np.log(p))

    want = integrate.quad(h, -9, 9 + shift, limit=200)[0] - stats.norm.entropy()
    assert abs(got.mean() - want) < 0.002 and np.abs(got - want).max() < 0.01


def test_near_the_neighbours_estimate(device):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 10, 10000)
    a = rng.normal(size=(10000, 8)) + np.linspace(0, 4, 8) * (np.arange(8) == y[:, None])
    for features in (a, np.maximum(a, 0)):
        exact = class_mutual_info(features, y, ties="exact")
        got = approximate_class_mutual_info(torch.from_numpy(features).to(device), torch.from_numpy(y))
        assert np.abs(got.cpu().numpy() - exact).max() < 0.006


def test_operator():
    x, y = torch.randn(30, 3), torch.randint(0, 4, (30,))
    without_values = op(x.to("meta"), y.to("meta"), 4, 5)
    assert without_values.shape == (3, 4) and without_values.dtype == torch.float64
    x[3, 1], x[4, 2] = math.nan, math.inf
    assert op(x, y, 4, 5).isnan().tolist() == [[False] * 4, [True] * 4, [True] * 4]
    assert op(x[:, :0], y, 4, 5).shape == (0, 4)
    for arguments, message in [
        ((x, y, 4, 0), "bins must be at least 1, got 0"),
        ((x, y, 0, 5), r"num_classes must be in \[1, 2\^26\), got 0"),
        ((x, y + 9, 4, 5), r"labels\[0\] = \d+ is outside \[0, 4\)"),
        ((x, y[:3], 4, 5), r"labels must be int64 of the shape \(N,\) = \(30,\), got int64 of \(3,\)"),
        ((x[:0], y[:0], 4, 5), r"must have at least one sample, got \(0, 3\)"),
    ]:
        with pytest.raises(RuntimeError, match=f"^binned_class_mutual_info: .*{message}"):
            op(*arguments)
        if "labels[" not in message.replace("\\", ""):  # no values are needed to refuse it
            with pytest.raises(RuntimeError, match=f"^binned_class_mutual_info: .*{message}"):
                op(arguments[0].to("meta"), arguments[1].to("meta"), *arguments[2:])


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"bins": 0}, ValueError, "bins must be at least 1, got 0"),
        ({"bins": 2.5}, TypeError, "bins must be an integer, got 2.5"),
        ({"features": np.full((4, 2), np.nan)}, ValueError, "features must be finite, got 8 values that are not"),
        ({"labels": np.zeros(3, int)}, ValueError, r"labels must be \(4,\) like the features' first axis"),
        ({"num_classes": 2}, ValueError, r"labels must lie in \[0, 2\), got 3"),
        ({"features": np.array([["a"]])}, TypeError, "features must be numbers"),
    ],
)
def test_bad_input(changes, error, message):
    arguments = {"features": np.zeros((4, 2)), "labels": np.arange(4)} | changes
    with pytest.raises(error, match=f"^approximate_class_mutual_info: {message}"):
        approximate_class_mutual_info(**arguments)


def test_progress():
    done = []
    features, labels = torch.randn(20, 10), torch.arange(20) % 3
    approximate_class_mutual_info(features, labels, chunk_size=4, progress=lambda *now: done.append(now))
    assert done == [(4, 10), (8, 10), (10, 10)]
