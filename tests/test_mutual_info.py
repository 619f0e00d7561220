"""Tests of class_mutual_info and mutual_info_classif: scikit-learn, the definition, analytic cases, bits, bad input."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
import time
import warnings
from _thread import interrupt_main

import numpy as np
import pytest
import torch
from scipy import integrate, sparse, stats
from sklearn.feature_selection import SelectKBest
from sklearn.feature_selection import mutual_info_classif as sklearn_mutual_info_classif
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import csg_ext
from csg_ext import reference
from csg_ext.ops import mutual_info

EQUAL = 1e-9  # what "scikit-learn's value" means


def scikit_learn(features, target, k, seed):
    """scikit-learn's value; 0 where it refuses because every class has one sample."""
    try:
        return sklearn_mutual_info_classif(features, target, discrete_features=False, n_neighbors=k, random_state=seed)
    except ValueError as error:
        assert "0 sample" in str(error)
        return np.zeros(features.shape[1])


def feature(rng, n, kind):
    """One feature with what makes nearest neighbours hard."""
    normal = rng.standard_normal(n)
    match kind:
        case "normal":
            return normal
        case "relu":
            return np.maximum(0, normal)
        case "mostly_zero":
            return np.where(rng.random(n) < 0.97, 0, normal)
        case "integers":
            return rng.integers(0, rng.integers(2, 30), n).astype(float)
        case "constant":
            return np.full(n, 3.7)
        case "duplicates":
            return np.round(normal, 2)
        case "offset_1e6":
            return 1e6 + normal
        case "offset_1e12":
            return 1e12 + np.round(3 * normal)
        case "bfloat16":
            return torch.from_numpy(normal).bfloat16().double().numpy()
        case "heavy_tails":
            return np.exp(5 * normal)
        case "sorted":
            return np.sort(normal)
    raise ValueError(kind)


FEATURES = (
    "normal relu mostly_zero integers constant duplicates offset_1e6 offset_1e12 bfloat16 heavy_tails sorted".split()
)


def labelling(rng, n, kind):
    """Labels and the number of classes; at least two classes are present."""
    if kind == "many":
        classes = int(rng.integers(2, max(3, n // 2 + 1)))
        y = rng.integers(0, classes, n)
    elif kind == "few":
        classes = int(rng.integers(2, 12))
        y = rng.integers(0, classes, n)
    elif kind == "blocks":
        classes = int(rng.integers(2, 12))
        y = np.sort(rng.integers(0, classes, n))
    elif kind == "skewed":
        classes = int(rng.integers(3, 12))
        y = np.minimum(rng.geometric(0.4, n) - 1, classes - 1)
    else:  # "dominant": all but a few samples in one class, and empty classes
        classes = 5
        y = np.zeros(n, np.int64)
        few = min(n - 1, int(rng.integers(1, 12)))
        y[rng.choice(n, few, replace=False)] = rng.integers(1, 4, few)
    if len(np.unique(y)) == 1:
        y[0] = (y[0] + 1) % classes
    return y, classes


LABELS = ["many", "few", "blocks", "skewed", "dominant"]


def random_case(rng, most=500):
    """features (N, 4), labels, C, k."""
    n = int(rng.choice([rng.integers(2, 40), rng.integers(40, most)], p=[0.3, 0.7]))
    k = int(rng.integers(1, min(10, n - 1) + 1))
    x = np.stack([feature(rng, n, kind) for kind in rng.choice(FEATURES, 4)], 1)
    return x, *labelling(rng, n, rng.choice(LABELS)), k


def sample(n=400, k=6, c=5, seed=0):
    """features (n, k), of which the first c tell a class each, and labels."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, c, n)
    x = rng.standard_normal((n, k)) + 2 * (np.arange(k) == y[:, None])
    return np.maximum(x, 0), y


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
    x = np.stack([feature(rng, n, kind) for kind in ("normal", "relu", "heavy_tails", "integers")], 1)
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


# ---- the same bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ties", ["noise", "exact"])
@pytest.mark.parametrize("protocol", ["one-vs-rest", "balanced"])
def test_threads_and_chunks_do_not_change_a_bit(ties, protocol, monkeypatch):
    x, y = sample(500, k=37, c=6)
    options = {"ties": ties, "protocol": protocol, "random_state": 3}
    want = csg_ext.class_mutual_info(x, y, **options)
    for size in (1, 3, 8, 36, 37, 1000):
        assert np.array_equal(csg_ext.class_mutual_info(x, y, chunk_size=size, **options), want)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert np.array_equal(csg_ext.class_mutual_info(x, y, **options), want)
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(mutual_info, "_NOISE_VALUES", 10 * len(y))  # the stream is drawn several times
    for size in (4, 7):
        assert np.array_equal(csg_ext.class_mutual_info(x, y, chunk_size=size, **options), want)
    rows = [
        mutual_info._class_mutual_info(
            x, y, begin, end, num_classes=None, n_neighbors=3, normalize=False, device=None, chunk_size=None,
            progress=None, **options,
        )
        for begin, end in ((0, 10), (10, 11), (11, 37))
    ]  # fmt: skip
    assert np.array_equal(np.concatenate(rows), want)


def test_instruction_sets_agree():
    op = torch.ops.csg_ext._cpu_level
    now, best = op(-1), op(2)
    try:
        for ties in ("noise", "exact"):
            x, y = sample(900, k=8, c=9)
            results = []
            for level in range(best + 1):
                op(level)
                results.append(csg_ext.class_mutual_info(x, y, ties=ties))
            assert all(np.array_equal(result, results[0]) for result in results)
    finally:
        op(now)


def test_layouts_and_kinds_of_arrays_do_not_change_a_bit(tmp_path):
    x, y = sample(300, k=9)
    x = x.astype(np.float32)
    want = csg_ext.class_mutual_info(x, y)
    read_only = x.copy()
    read_only.flags.writeable = False
    wide = np.zeros((600, 18), np.float32)
    wide[::2, ::2] = x
    np.save(tmp_path / "x.npy", x)
    fields = np.zeros((300, 9), [("pad", "u1"), ("x", "f4")])  # strides that are no multiple of the item
    fields["x"] = x
    fortran = np.asfortranarray(x)
    fortran.flags.writeable = False
    arrays = {
        "fp64": x.astype(np.float64),
        "read-only": read_only,
        "Fortran order": fortran,
        "strided": wide[::2, ::2],
        "reversed": x[::-1, ::-1].copy()[::-1, ::-1],
        "memory map": np.load(tmp_path / "x.npy", mmap_mode="r"),
        "other byte order": x.astype(">f4"),
        "structured": fields["x"],
        "long double": x.astype(np.longdouble),
        "objects": x.astype(object),
        "lists": x.tolist(),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, array in arrays.items():
            got = csg_ext.class_mutual_info(array, y)
            assert isinstance(got, np.ndarray) and np.array_equal(got, want), name
    for name in ("read-only", "Fortran order", "strided", "memory map"):
        tensor = mutual_info._in_place(arrays[name])
        assert tensor is not None and tensor.data_ptr() == arrays[name].ctypes.data, f"{name} is copied"
    assert not read_only.flags.writeable


def test_tensors_of_any_dtype_and_stride(device):
    x, y = sample(300, k=9)
    x = torch.from_numpy(np.round(x * 8) / 8)  # exact in every dtype
    want = csg_ext.class_mutual_info(x, torch.from_numpy(y), ties="exact")
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        t = x.to(device, dtype)
        for view in (t, t.T.contiguous().T, torch.stack([t, t], 2)[..., 1], t.clone().requires_grad_()):
            got = csg_ext.class_mutual_info(view, torch.from_numpy(y), ties="exact")
            assert got.device == t.device and got.dtype == torch.float64 and not got.requires_grad
            assert (got.cpu() - want).abs().max() < 1e-12
    counts = (8 * x).to(torch.int32)
    got = csg_ext.class_mutual_info(counts.to(device), torch.from_numpy(y).to(device), ties="exact")
    assert (got.cpu() - want).abs().max() < 1e-12  # times a power of two


def test_labels_of_any_integer_type():
    x, y = sample(200, c=3)
    want = csg_ext.class_mutual_info(x, y)
    for labels in (y.tolist(), y.astype(np.uint8), y.astype(np.int32), torch.from_numpy(y), torch.from_numpy(y).byte()):
        assert np.array_equal(csg_ext.class_mutual_info(x, labels), want)
    assert np.array_equal(csg_ext.class_mutual_info(x, y == 1), csg_ext.class_mutual_info(x, (y == 1).astype(int)))


def test_halves_whose_sum_overflows():
    x = torch.full((40000, 2), 1000.0).half() + torch.arange(40000)[:, None].half() % 64
    y = torch.arange(40000) % 2
    assert csg_ext.class_mutual_info(x, y, ties="exact").isfinite().all()


def test_moved_to_the_device_by_columns(device):
    x, y = sample(300, k=30)
    for ties in ("noise", "exact"):
        want = csg_ext.class_mutual_info(x, y, ties=ties)
        got = csg_ext.class_mutual_info(x, y, ties=ties, device=device, chunk_size=8)
        assert isinstance(got, np.ndarray) and np.abs(got - want).max() < 1e-12
        t = csg_ext.class_mutual_info(torch.from_numpy(x), y, ties=ties, device=device)
        assert t.device.type == "cpu" and np.array_equal(t.numpy(), got)


def test_opcheck(device):
    x, y = (torch.from_numpy(a).to(device) for a in sample(60, 3, 4))
    psi, bits = mutual_info._psi(60, x.device)
    noise = torch.randn(60, 3, dtype=torch.float64, device=device)
    for n, multiclass in ((noise, False), (None, False), (None, True)):
        torch.library.opcheck(torch.ops.csg_ext.class_mutual_info.default, (x, y, 4, 3, n, multiclass, psi, bits))


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


# ---- mutual_info_classif ---------------------------------------------------------------------------------------------


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


# ---- bad input, progress, interruption -------------------------------------------------------------------------------

X, Y = np.random.default_rng(0).standard_normal((20, 3)), np.arange(20) % 4


def holed(value, *places):
    x = X.copy()
    for place in places:
        x[place] = value
    return x


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"features": holed(np.nan, (3, 2), (5, 1))}, ValueError, "features must be finite, got 2 .* column 1"),
        ({"features": holed(np.inf, (3, 2))}, ValueError, "features must be finite, got 1 .* column 2"),
        ({"features": holed(-np.inf, (3, 0)).astype(">f8")}, ValueError, "features must be finite, got 1 .* column 0"),
        ({"features": torch.from_numpy(holed(np.nan, (3, 2))).half()}, ValueError, "features must be finite, got 1 v"),
        ({"features": X[:, 0]}, ValueError, r"features must be \(N, K\), got shape \(20,\)"),
        ({"features": X[:, :0]}, ValueError, r"features must have .* one column, got shape \(20, 0\)"),
        ({"features": X[:0]}, ValueError, r"features must have .* one sample .* got shape \(0, 3\)"),
        ({"features": X.astype(complex)}, TypeError, "features must be numbers, got complex128"),
        ({"features": torch.from_numpy(X).cfloat()}, TypeError, "features must be float32, .* got complex64"),
        ({"features": torch.from_numpy(X).to(torch.float8_e5m2)}, TypeError, "features must be .* got float8_e5m2"),
        ({"features": torch.from_numpy(X).to_sparse()}, TypeError, "features must be a dense tensor, got"),
        ({"features": [["a"] * 3] * 20}, TypeError, "features must be numbers, got <U1"),
        ({"features": X[:3], "labels": Y[:3]}, ValueError, r"features must have .* \+ 1 = 4 samples, got 3"),
        ({"n_neighbors": 20}, ValueError, r"features must have at least n_neighbors \+ 1 = 21 samples, got 20"),
        ({"features": torch.zeros(1, 1).expand(2**30, 1)}, ValueError, r"features must have fewer .* got 1073741824"),
        ({"labels": Y[:19]}, ValueError, r"labels must be \(20,\) like the features' first axis, got shape \(19,\)"),
        ({"labels": Y[:, None]}, ValueError, r"labels must be \(20,\) like .* got shape \(20, 1\)"),
        ({"labels": Y.astype(float)}, ValueError, "labels must be integers, got float64"),
        ({"labels": torch.from_numpy(Y).float()}, ValueError, "labels must be integers, got float32"),
        ({"labels": ["a"] * 20}, ValueError, "labels must be integers, got <U1"),
        ({"labels": Y - 1}, ValueError, "labels must be non-negative, got -1"),
        ({"labels": Y, "num_classes": 3}, ValueError, r"labels must lie in \[0, 3\), got 3"),
        ({"num_classes": 0}, ValueError, "num_classes must be at least 1, got 0"),
        ({"num_classes": 4.0}, TypeError, "num_classes must be an integer, got 4.0"),
        ({"labels": Y * 0 + 2}, ValueError, "labels must hold at least two classes, got class 2 only"),
        ({"n_neighbors": 0}, ValueError, "n_neighbors must be at least 1, got 0"),
        ({"n_neighbors": -3}, ValueError, "n_neighbors must be at least 1, got -3"),
        ({"n_neighbors": 3.0}, TypeError, "n_neighbors must be an integer, got 3.0"),
        ({"n_neighbors": True}, TypeError, "n_neighbors must be an integer, got True"),
        ({"ties": "jitter"}, ValueError, "ties must be 'noise' or 'exact', got 'jitter'"),
        ({"protocol": "one"}, ValueError, "protocol must be 'one-vs-rest' or 'balanced', got 'one'"),
        ({"random_state": None}, TypeError, "random_state must be an integer, got None"),
        ({"random_state": 2**32}, ValueError, r"random_state must be in \[0, 2\^32\), got 4294967296"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1, got 0"),
        ({"device": "abacus"}, ValueError, "device must be the name of a torch device, got 'abacus'"),
    ],
)  # fmt: skip
def test_bad_input(changes, error, message):
    arguments = {"features": X, "labels": Y} | changes
    with pytest.raises(error, match=f"^class_mutual_info: {message}"):
        csg_ext.class_mutual_info(arguments.pop("features"), arguments.pop("labels"), **arguments)


def test_cuda_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        ValueError, match="^class_mutual_info: device 'cuda' needs a GPU that this torch can use, got no"
    ):
        csg_ext.class_mutual_info(X, Y, device="cuda")


def test_bad_labels_of_class_entropy():
    for labels, message in (([0.5], "must be integers"), ([], "at least one sample"), ([-1], "must be non-negative")):
        with pytest.raises(ValueError, match=f"class_entropy: labels .*{message}"):
            csg_ext.class_entropy(np.array(labels, float if labels == [0.5] else int))
    with pytest.raises(ValueError, match="class_entropy: protocol must be"):
        csg_ext.class_entropy([0, 1], protocol="even")


def test_progress():
    calls = []
    x, y = sample(100, k=20)
    csg_ext.class_mutual_info(x, y, chunk_size=8, progress=lambda *call: calls.append(call))
    assert calls == [(8, 20), (16, 20), (20, 20)]


def test_ctrl_c_between_chunks():
    x, y = np.random.default_rng(0).standard_normal((2000, 256)), np.arange(2000) % 10
    done = []

    def progress(columns, total):
        done.append(columns)
        if len(done) == 1:
            threading.Timer(0.02, interrupt_main).start()

    with pytest.raises(KeyboardInterrupt):
        for _ in range(200):
            csg_ext.class_mutual_info(x, y, chunk_size=8, ties="exact", progress=progress)
            time.sleep(0.001)
    assert 1 <= len(done) < 200 * 32


def test_infinite_variance_is_named():
    x = np.random.default_rng(0).standard_normal((50, 3))
    x[:, 1] *= 1e200
    y = np.arange(50) % 3
    with pytest.raises(ValueError, match="finite variance .* in column 1"):
        csg_ext.class_mutual_info(x, y)
    with pytest.raises(ValueError, match="finite variance .* in column 1"):
        csg_ext.mutual_info_classif(x, y)
    assert np.array_equal(
        csg_ext.class_mutual_info(x, y, ties="exact"), csg_ext.class_mutual_info(x / [1, 2.0**600, 1], y, ties="exact")
    )
