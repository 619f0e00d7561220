"""Tests of class_mutual_info's values: scikit-learn, the definition, analytic cases; invariances; bound, protocol."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from mutual_info_inputs import EQUAL, FEATURES, LABELS, make_features, make_labels, sample
from scipy import integrate, stats
from sklearn.feature_selection import mutual_info_classif as sklearn_mutual_info_classif

import csg_ext
from csg_ext import reference
from csg_ext.ops import mutual_info


def scikit_learn(features, target, k, seed):
    """scikit-learn's value; 0 where it refuses because every class has one sample."""
    try:
        return sklearn_mutual_info_classif(features, target, discrete_features=False, n_neighbors=k, random_state=seed)
    except ValueError as error:
        assert "0 sample" in str(error)
        return np.zeros(features.shape[1])


def random_case(rng, most=500):
    """features (N, 4), labels of at least two classes, C, k."""
    n = int(rng.choice([rng.integers(2, 40), rng.integers(40, most)], p=[0.3, 0.7]))
    k = int(rng.integers(1, min(10, n - 1) + 1))
    labels, classes = make_labels(rng, n, str(rng.choice(LABELS)))
    y = labels.numpy()
    if len(np.unique(y)) == 1:
        y[0] = (y[0] + 1) % classes
    return make_features(rng, n, 4).numpy(), y, classes, k


# ---- values ----------------------------------------------------------------------------------------------------------


def test_noise_gives_scikit_learns_values(cpu_level):
    """Some 2,000 values per instruction set, one against the rest and multi-class, fp64 and fp32, any strides."""
    rng = np.random.default_rng(cpu_level)
    worst, count = 0.0, 0
    for case in range(120):
        x, y, classes, k = random_case(rng)
        if case % 3 == 1:
            x = x.astype(np.float32)
        if case % 3 == 2:
            x = np.asfortranarray(x)
        seed = int(rng.integers(0, 2**32))
        mi = csg_ext.class_mutual_info(x, y, num_classes=classes, n_neighbors=k, random_state=seed)
        assert mi.shape == (4, classes) and mi.dtype == np.float64
        for c in range(classes) if classes <= 4 else rng.choice(classes, 4, replace=False):
            error = np.abs(mi[:, c] - scikit_learn(x, y == c, k, seed))
            assert error.max() <= EQUAL, (cpu_level, case, c, k, error)
            worst, count = max(worst, error.max()), count + 4
        if len(np.unique(y)) < len(y):
            error = np.abs(
                csg_ext.mutual_info_classif(x, y, n_neighbors=k, random_state=seed) - scikit_learn(x, y, k, seed)
            )
            assert error.max() <= EQUAL, (cpu_level, case, k, error)
            worst, count = max(worst, error.max()), count + 4
    assert count > 1600 and worst < EQUAL


def test_noise_at_larger_sizes(cpu_level):
    """Sizes at which the sort and the searches leave their first blocks."""
    rng = np.random.default_rng(10 + cpu_level)
    n, k = 6000, 3
    x = np.stack([FEATURES[kind](rng, n) for kind in ("normal", "relu", "heavy tails", "integers")], 1)
    for classes in (2, 300):
        y = rng.integers(0, classes, n)
        mi = csg_ext.class_mutual_info(x, y, n_neighbors=k, random_state=1)
        for c in (0, classes - 1):
            assert np.abs(mi[:, c] - scikit_learn(x, y == c, k, 1)).max() <= EQUAL


def test_exact_gives_the_definitions_values(cpu_level):
    rng = np.random.default_rng(20 + cpu_level)
    for case in range(60):
        x, y, classes, k = random_case(rng, 250)
        if case % 4 == 0 and len(y) > 2:
            k = int(rng.integers(1, min(51, len(y))))
        if case % 4 == 1:
            x = x.astype(np.float32)
        chosen = range(classes) if classes <= 4 else rng.choice(classes, 4, replace=False)
        mi = csg_ext.class_mutual_info(x, y, num_classes=classes, n_neighbors=k, ties="exact")
        tx, ty = torch.from_numpy(x), torch.from_numpy(y)
        want = [[reference.mutual_info(column, ty == c, k).item() for c in chosen] for column in tx.T]
        assert np.abs(mi[:, list(chosen)] - want).max() <= EQUAL, (cpu_level, case, k)


def test_definition_of_the_matrix():
    x, y = (torch.from_numpy(a) for a in sample(120, 3, 4))
    assert (csg_ext.class_mutual_info(x, y, ties="exact") - reference.class_mutual_info(x, y, 4)).abs().max() < 1e-12


def test_values_near_the_largest_doubles():
    x, y = sample(200)
    large = (x - 1) * (1.7e308 / np.abs(x - 1).max())  # differences overflow
    assert np.array_equal(
        csg_ext.class_mutual_info(large, y, ties="exact"), csg_ext.class_mutual_info(large / 4, y, ties="exact")
    )


def mixture_mi(p, distance):
    """MI of a mixture of N(0, 1) and N(distance, 1), weights 1 - p and p, with its component, by quadrature."""

    def density(x):
        return (1 - p) * stats.norm.pdf(x) + p * stats.norm.pdf(x, distance)

    entropy = integrate.quad(lambda x: -density(x) * math.log(density(x)), -12, 12 + distance, limit=200)[0]
    return entropy - stats.norm.entropy()


@pytest.mark.parametrize("ties", ["noise", "exact"])
def test_gaussian_mixture(ties):
    rng = np.random.default_rng(0)
    n, p = 40000, 0.3
    y = (rng.random(n) < p).astype(int)
    distances = np.array([0.0, 0.5, 1.0, 2.0, 4.0])
    mi = csg_ext.class_mutual_info(rng.standard_normal((n, 5)) + y[:, None] * distances, y, ties=ties)
    want = [mixture_mi(p, d) for d in distances]
    assert np.abs(mi[:, 1] - want).max() < 0.01  # the estimate's standard error is near 0.004
    assert np.abs(mi[:, 0] - mi[:, 1]).max() < 1e-12  # two classes: the same question


@pytest.mark.parametrize("ties", ["noise", "exact"])
@pytest.mark.parametrize("protocol", ["one-vs-rest", "balanced"])
def test_perfect_dependence_is_the_entropy(ties, protocol):
    rng = np.random.default_rng(0)
    y = rng.choice(4, 3000, p=[0.6, 0.3, 0.08, 0.02])
    x = 100.0 * (np.arange(4) == y[:, None]) + rng.standard_normal((3000, 4))
    mi = csg_ext.class_mutual_info(x, y, ties=ties, protocol=protocol)
    bound = csg_ext.class_entropy(y, protocol=protocol)
    fewest = 60 if protocol == "one-vs-rest" else 2 * 60 // 2
    assert np.abs(mi.diagonal() - bound).max() < 1 / fewest  # psi(n) - log(n) is near -1 / 2n
    assert np.array_equal(mi.argmax(axis=0), np.arange(4))


def test_constant_feature_tells_nothing():
    x, y = np.full((200, 3), 2.5), np.arange(200) % 4
    assert (csg_ext.class_mutual_info(x, y, ties="exact") == 0).all()
    assert (csg_ext.class_mutual_info(x, y) < 0.1).all()


# ---- invariances -----------------------------------------------------------------------------------------------------


def test_order_of_samples_does_not_matter_to_exact_ties(cpu_level):
    rng = np.random.default_rng(0)
    for k in (1, 3, 10, 20):
        x, y = sample(700, seed=k)
        order = rng.permutation(len(y))
        assert np.array_equal(
            csg_ext.class_mutual_info(x, y, n_neighbors=k, ties="exact"),
            csg_ext.class_mutual_info(x[order], y[order], n_neighbors=k, ties="exact"),
        )


def test_maps_that_keep_distances_keep_bits():
    """Scaling by a power of two, mirroring, and a shift where it is exact. Other monotone maps change distances,
    and with them the estimate."""
    x, y = sample(600)
    x = np.round(x * 2**10) / 2**10
    exact = csg_ext.class_mutual_info(x, y, ties="exact")
    for other in (x * 2.0**-40, x * 2.0**30, -x, x + 8, 3 - x):
        assert np.array_equal(csg_ext.class_mutual_info(other, y, ties="exact"), exact)
    noise = csg_ext.class_mutual_info(x, y)
    for scale in (0.25, 2.0**20):  # scikit-learn divides by the standard deviation
        assert np.array_equal(csg_ext.class_mutual_info(x * scale, y), noise)
    assert not np.array_equal(csg_ext.class_mutual_info(x**3, y, ties="exact"), exact)


@pytest.mark.parametrize("ties", ["noise", "exact"])
def test_names_of_classes_do_not_matter(ties):
    x, y = sample(500, c=7)
    order = np.random.default_rng(0).permutation(7)
    renamed = csg_ext.class_mutual_info(x, order[y], ties=ties)
    assert np.array_equal(renamed[:, order], csg_ext.class_mutual_info(x, y, ties=ties))


def test_order_of_features_does_not_matter_to_exact_ties():
    x, y = sample(300, k=13)
    assert np.array_equal(
        csg_ext.class_mutual_info(x[:, ::-1].copy(), y, ties="exact"),
        csg_ext.class_mutual_info(x, y, ties="exact")[::-1],
    )


# ---- bound, protocol -------------------------------------------------------------------------------------------------


def test_entropy_and_normalized():
    x, y = sample(400, c=4)
    bound = csg_ext.class_entropy(y, 6)
    assert isinstance(bound, np.ndarray) and bound.shape == (6,)
    want = [stats.entropy([np.mean(y == c), np.mean(y != c)]) for c in range(6)]
    assert np.abs(bound - want).max() < 1e-14 and (bound[4:] == 0).all()
    assert csg_ext.class_entropy(np.zeros(3, int)).tolist() == [0]
    tensor = csg_ext.class_entropy(torch.from_numpy(y), 6)
    assert isinstance(tensor, torch.Tensor) and np.array_equal(tensor.numpy(), bound)
    for ties in ("noise", "exact"):
        mi = csg_ext.class_mutual_info(x, y, num_classes=6, ties=ties)
        normalized = csg_ext.class_mutual_info(x, y, num_classes=6, ties=ties, normalize=True)
        assert np.array_equal(normalized[:, :4], mi[:, :4] / bound[:4]) and (normalized[:, 4:] == 0).all()
    balanced = csg_ext.class_mutual_info(x, y, protocol="balanced", normalize=True)
    assert np.abs(balanced * math.log(2) - csg_ext.class_mutual_info(x, y, protocol="balanced")).max() < 1e-15
    assert csg_ext.class_entropy([0, 0, 0, 1, 2, 2], 4, protocol="balanced").tolist() == [
        math.log(2),
        0,
        math.log(2),
        0,
    ]


def test_balanced_is_scikit_learns_value_on_the_drawn_samples():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 3))
    y = rng.choice(6, 500, p=[0.55, 0.2, 0.15, 0.09, 0.005, 0.005])
    y[:7] = [4, 4, 4, 5, 1, 1, 1]
    y[7:][y[7:] >= 4] = 0  # class 4 has three samples, class 5 one
    x[:, 0] += y == 2
    seed, k = 11, 4
    mi = csg_ext.class_mutual_info(x, y, num_classes=7, n_neighbors=k, protocol="balanced", random_state=seed)
    assert (mi[:, 5:] == 0).all()  # one sample, none
    for c in range(5):
        members = np.flatnonzero(y == c)
        rows, is_class = mutual_info._draw_balanced(members, 500, (seed, c))
        m = min(len(members), 500 - len(members))
        assert (np.diff(rows) > 0).all() and is_class.sum() == m == len(rows) - m
        assert np.array_equal(is_class == 1, y[rows] == c)
        assert np.abs(mi[:, c] - scikit_learn(x[rows], y[rows] == c, k, seed)).max() <= EQUAL
    other = csg_ext.class_mutual_info(x, y, num_classes=7, n_neighbors=k, protocol="balanced", random_state=12)
    assert not np.array_equal(other, mi)
    assert 0.05 < mi[0, 2] < math.log(2)
    exact = csg_ext.class_mutual_info(x, y, protocol="balanced", ties="exact", random_state=seed)
    rows, is_class = mutual_info._draw_balanced(np.flatnonzero(y == 1), 500, (seed, 1))
    want = reference.mutual_info(torch.from_numpy(x[rows, 1]), torch.from_numpy(is_class)).item()
    assert exact[1, 1] == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("n, m", [(10, 3), (10, 5), (10, 8), (10, 10), (1000, 400)])
def test_draws_are_uniform(n, m):
    hits = np.zeros(n)
    trials = 4000 if n == 10 else 400
    for seed in range(trials):
        drawn = mutual_info._draw(np.random.RandomState([seed, 1]), n, m)
        assert len(np.unique(drawn)) == m
        hits[drawn] += 1
    p = m / n
    assert np.abs(hits - trials * p).max() <= 5 * math.sqrt(trials * p * (1 - p))
