"""mutual_info's CUDA kernels, run on the CPU by tests/cuda_on_cpu, against the CPU kernel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mutual_info_inputs import FEATURES, LABELS, make_features, make_labels, psi_table
from stand_in_kernels import Kernels
from torch import Tensor

LIMIT = 1e-12  # the sums are integers; what is left is the last division


def check(
    kernels: Kernels,
    features: Tensor,
    labels: Tensor,
    classes: int,
    k: int,
    noise: Tensor | None = None,
    multiclass: bool = False,
    **options: int,
) -> None:
    got = kernels.mutual_info(features, labels, classes, k, noise, multiclass, **options)
    assert kernels.outside == (-1, 0)
    want = torch.ops.csg_ext.class_mutual_info(features, labels, classes, k, noise, multiclass, *psi_table(len(labels)))
    torch.testing.assert_close(got, want, rtol=LIMIT, atol=LIMIT)


DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
EXACT_OR_NOISE = pytest.mark.parametrize("noise", [False, True], ids=["exact", "noise"])


def normal(rng: np.random.Generator, features: Tensor, noise: bool) -> Tensor | None:
    """Column by column, as the package draws it, or row by row."""
    if not noise:
        return None
    drawn = torch.from_numpy(rng.standard_normal(features.shape))
    return drawn if rng.integers(2) else drawn.t().contiguous().t()


@EXACT_OR_NOISE
@pytest.mark.parametrize("kind", LABELS)
def test_random_problems(kernels: Kernels, kind: str, noise: bool) -> None:
    """Both estimates of every kind of feature, for every number of neighbours, in chunks of one size or another."""
    rng = np.random.default_rng(sum(kind.encode()) + noise)
    for number in range(9):
        kernels.seed(int(rng.integers(2**40)))
        kernels.at_end = number % 2 == 0
        n = int(rng.choice([rng.integers(2, 40), rng.integers(40, 300), rng.integers(300, 700)], p=[0.3, 0.5, 0.2]))
        k = int(rng.integers(1, 11)) if number % 6 else int(rng.integers(11, 40))
        features = make_features(rng, n, 5)
        features = features.float() if number % 3 == 0 else features
        labels, classes = make_labels(rng, n, kind)
        drawn = normal(rng, features, noise)
        for multiclass in (False, True):
            check(kernels, features, labels, classes, k, drawn, multiclass, features_at_once=int(rng.integers(1, 6)))


@EXACT_OR_NOISE
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t).removeprefix("torch."))
def test_every_type_and_layout(kernels: Kernels, dtype: torch.dtype, noise: bool) -> None:
    rng = np.random.default_rng(1)
    labels = torch.from_numpy(rng.integers(0, 4, 67))
    values = torch.from_numpy(np.maximum(-0.5, rng.standard_normal((67, 35)))).to(dtype)
    drawn = normal(rng, values, noise)
    wide = torch.stack([values, -values], 2)
    for features in (values, values.t().contiguous().t(), wide[..., 0], values[:1].expand(67, 35)):
        check(kernels, features, labels, 4, 3, drawn)
    few = values[:9]  # fewer than 4 k + 8: every target in turn
    for multiclass in (False, True):
        check(kernels, few, labels[:9], 4, 3, None if drawn is None else drawn[:9], multiclass)


@EXACT_OR_NOISE
@pytest.mark.parametrize("k", [1, 3, 4, 7, 8, 15, 16, 60])
def test_numbers_of_neighbors(kernels: Kernels, k: int, noise: bool) -> None:
    rng = np.random.default_rng(k)
    features = torch.from_numpy(np.stack([FEATURES[kind](rng, 270) for kind in ("normal", "relu", "duplicates")], 1))
    for classes in (2, 5, 40):
        labels = torch.from_numpy(rng.integers(0, classes, 270))
        check(kernels, features.float(), labels, classes, k, normal(rng, features, noise))


@EXACT_OR_NOISE
@pytest.mark.parametrize("classes", [2, 60])
def test_several_tiles(kernels: Kernels, classes: int, noise: bool) -> None:
    """Features longer than a block's part, long runs of one class, more tiles than blocks."""
    rng = np.random.default_rng(classes)
    n = 2500
    features = torch.from_numpy(np.stack([FEATURES[kind](rng, n) for kind in ("normal", "relu")], 1)).float()
    labels = torch.from_numpy(rng.integers(0, classes, n))
    check(kernels, features, labels, classes, 3, normal(rng, features, noise))
    ordered = torch.arange(n)[:, None].double()
    check(kernels, ordered // 7, torch.arange(n) * classes // n, classes, 3, normal(rng, ordered, noise))


@pytest.mark.parametrize("classes", [3, 500])
def test_long_balls(kernels: Kernels, classes: int) -> None:
    """A sample whose neighbours reach into a long run: looked at class by class, or sample by sample."""
    rng = np.random.default_rng(classes)
    for position in (0, 200, 399):
        values = np.zeros(400)
        values[:position] = -1 - rng.random(position)
        values[400 - position :] = 0
        values[rng.choice(400, 3, replace=False)] = [0.5, 0.75, 1.5]
        features = torch.from_numpy(np.stack([values, -values], 1))
        check(kernels, features, torch.from_numpy(rng.integers(0, classes, 400)), classes, 3)


@EXACT_OR_NOISE
def test_sizes_of_classes(kernels: Kernels, noise: bool) -> None:
    """Absent and single classes; a class of 2 k + 1 or 2 k + 2; one that leaves 0, 1, 2 k + 1 or 2 k + 2 samples."""
    rng = np.random.default_rng(5)
    k, n = 3, 90
    singles = ([82, 1, 1, 1, 1, 4], [1] * 90, [2, 3] + [1] * 85)
    for sizes in ([90, 0], [89, 0, 1], [88, 2], [83, 7], [82, 8], [75, 7, 8], [45, 45], *singles):
        labels = torch.from_numpy(rng.permutation(np.repeat(np.arange(len(sizes)), sizes)))
        features = make_features(rng, n, 4)
        for multiclass in (False, True):
            check(kernels, features, labels, len(sizes) + 1, k, normal(rng, features, noise), multiclass)


def test_largest_values(kernels: Kernels) -> None:
    """Differences of the largest doubles do not overflow: a sample stands alone, far from the others of its class."""
    rng = np.random.default_rng(6)
    for n in (12, 80):
        features = torch.from_numpy(rng.uniform(-1, 1, (n, 4)))
        labels = torch.arange(n) % 3
        features[labels == 1] = -features[labels == 1].abs()
        features[1] = 1
        check(kernels, features * torch.finfo(torch.float64).max, labels, 3, 3)


@pytest.mark.parametrize("n", [12, 300])
def test_infinite_variance_gives_nan(kernels: Kernels, n: int) -> None:
    rng = np.random.default_rng(n)
    features, labels = make_features(rng, n, 5), torch.from_numpy(rng.integers(0, 3, n))
    features[:, 2] = torch.from_numpy(1e200 * rng.standard_normal(n))
    noise = normal(rng, features, True)
    got = kernels.mutual_info(features, labels, 3, 3, noise)
    assert got.isnan().any(1).nonzero().tolist() == [[2]] and got[2].isnan().all()
    want = torch.ops.csg_ext.class_mutual_info(features, labels, 3, 3, noise, False, *psi_table(n))
    torch.testing.assert_close(got, want, rtol=LIMIT, atol=LIMIT, equal_nan=True)


@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 127, 128, 129, 135, 136, 255, 257, 1000, 2063, 4099])
def test_scale_is_that_of_numpy(kernels: Kernels, n: int) -> None:
    """The standard deviation and the size of the noise, bit for bit: they stand side by side in the work memory."""
    rng = np.random.default_rng(n)
    column = np.exp(rng.standard_normal(n) * 2)
    features = torch.from_numpy(column)[:, None]
    kernels.mutual_info(features, torch.from_numpy(rng.integers(0, 2, n)), 2, 3, torch.zeros(n, 1).double())
    deviation = np.std(column) or 1.0
    size = 1e-10 * max(1.0, np.mean(np.abs(column / deviation)))
    assert np.array([deviation, size]).tobytes() in kernels.work.numpy().tobytes()


@EXACT_OR_NOISE
def test_same_bits_on_every_schedule(kernels: Kernels, noise: bool) -> None:
    """The order in which threads and blocks run, and the features taken at a time, change no bit of any result."""
    rng = np.random.default_rng(7)
    features = make_features(rng, 500, 7)
    labels, drawn = torch.from_numpy(rng.integers(0, 9, 500)), normal(rng, features, noise)
    results = []
    for seed in range(4):
        kernels.seed(seed)
        results.append(kernels.mutual_info(features, labels, 9, 3, drawn, features_at_once=1 + 2 * seed))
    assert all(torch.equal(results[0], other) for other in results[1:])


@EXACT_OR_NOISE
@pytest.mark.parametrize("by_rows", [False, True], ids=["columns apart", "rows apart"])
@pytest.mark.parametrize("n", [9, 67])
def test_offsets_beyond_31_bits(kernels: Kernels, n: int, by_rows: bool, noise: bool) -> None:
    """Features and noise more than 2^31 elements from the first: memory is reserved, only what is read is touched."""
    far = 2**31 + 64
    strides = (far // (n - 1), 1) if by_rows else (1, far // 2)
    last = (n - 1) * strides[0] + 2 * strides[1]
    assert last >= 2**31
    labels, values, drawn = torch.arange(n) % 4, torch.randn(n, 3), torch.randn(n, 3).double()
    features = kernels.sparse(last + 1, torch.float16).as_strided((n, 3), strides)
    features.copy_(values)
    far_noise = None
    if noise:
        far_noise = kernels.sparse(last + 1, torch.float64).as_strided((n, 3), strides)
        far_noise.copy_(drawn)
    for multiclass in (False, True):
        got = kernels.mutual_info(features, labels, 4, 3, far_noise, multiclass, copy=False)
        want = kernels.mutual_info(values.half(), labels, 4, 3, drawn if noise else None, multiclass)
        assert torch.equal(got, want)
        arguments = (labels, 4, 3, far_noise, multiclass, *psi_table(n))
        assert torch.equal(torch.ops.csg_ext.class_mutual_info(features, *arguments), want)


def test_labels_outside(kernels: Kernels) -> None:
    features = torch.randn(50, 3)
    for label in (-1, 4, 2**40):
        labels = torch.zeros(50, dtype=torch.int64)
        labels[[17, 30]] = label
        out = kernels.mutual_info(features, labels, 4, 3)
        assert kernels.outside == (17, label)
        assert out.isnan().all()


def test_a_failed_call_fails_nothing_else(kernels: Kernels) -> None:
    """Whichever runtime call fails, its error is returned once, and the next launch is not blamed for it."""
    features, labels, gate = torch.randn(60, 3), torch.arange(60) % 4, torch.rand(3, 5)
    calls = 0
    while True:
        kernels.library.cuda_on_cpu_fail_call(calls)
        try:
            kernels.mutual_info(features, labels, 4, 3, features_at_once=2)
            break
        except AssertionError as error:
            assert "a runtime call was made to fail" in str(error)
        finally:
            kernels.library.cuda_on_cpu_fail_call(-1)
        kernels.step(gate, None)
        calls += 1
    assert calls == 6  # clear sizes and summary, copy it, wait; clear the sums of either chunk
