"""mutual_info's CUDA kernels, run on the CPU by tests/cuda_on_cpu, against the CPU kernel."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from stand_in import TYPES, Bool, Enum, Int64, Pointer, StandIn
from torch import Tensor

LIMIT = 1e-12  # the sums are integers; what is left is the last division


class MutualInfo(ctypes.Structure):
    _fields_ = [
        ("features", Pointer),
        ("type", Enum),
        *((name, Int64) for name in ("n", "k", "stride_n", "stride_k")),
        ("labels", Pointer),
        ("classes", Int64),
        ("neighbors", Int64),
        ("ties", Enum),
        ("noise", Pointer),
        ("multiclass", Bool),
        ("psi", Pointer),
        ("psi_bits", ctypes.c_int),
        ("out", Pointer),
    ]


def psi_table(n: int) -> tuple[Tensor, int]:
    bits = 57 - max(1, n).bit_length()
    psi = torch.special.digamma(torch.arange(n + 1, dtype=torch.float64))
    psi[0] = 0
    return (psi * 2.0**bits).round().to(torch.int64), bits


class Kernels(StandIn):
    def __init__(self) -> None:
        super().__init__()
        self.check_size(4, MutualInfo)
        self.outside = (-1, 0)  # the first label outside of the last call

    def mutual_info(
        self,
        features: Tensor,
        labels: Tensor,
        classes: int,
        k: int,
        noise: Tensor | None = None,
        multiclass: bool = False,
        features_at_once: int = 256,
    ) -> Tensor:
        """The result, and what is not written stays NaN; work memory for about so many features at once."""
        n, width = features.shape
        psi, bits = psi_table(n)
        keep = [self.guarded(t) for t in (features, labels, noise, psi)]
        out = self.empty(width, 1 if multiclass else classes, dtype=torch.float64)
        p = self.pointer
        parameters = MutualInfo(
            p(keep[0]),
            TYPES[features.dtype],
            *features.shape,
            *features.stride(),
            p(keep[1]),
            classes,
            k,
            noise is None,
            p(keep[2]),
            multiclass,
            p(keep[3]),
            bits,
            p(out),
        )
        needed = Int64()
        parameters.k = min(width, features_at_once)
        self.call("csg_mutual_info_bytes", parameters, ctypes.byref(needed))
        parameters.k = width
        work, outside = self.buffer(needed.value, torch.uint8).fill_(255), (Int64 * 2)()
        self.call("csg_mutual_info", parameters, Pointer(work.data_ptr()), needed, outside)
        self.outside = tuple(outside)
        return out


@pytest.fixture(scope="module")
def built() -> Kernels:
    return Kernels()


@pytest.fixture
def kernels(built: Kernels, request: pytest.FixtureRequest, capfd: pytest.CaptureFixture[str]) -> Iterator[Kernels]:
    built.at_end = True
    built.seed(sum(request.node.name.encode()))
    with capfd.disabled():  # an undefined operation ends the process: its message must get out
        yield built


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


# ---- Inputs that are hard: ties, duplicates, runs, outliers; classes that are rare, dominant or sorted.

FEATURES: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "relu": lambda rng, n: np.maximum(0, rng.standard_normal(n)),
    "integers": lambda rng, n: rng.integers(0, rng.integers(2, 30), n).astype(float),
    "constant": lambda rng, n: np.full(n, 3.7),
    "duplicates": lambda rng, n: np.round(rng.standard_normal(n), 2),
    "offset": lambda rng, n: 1e6 + rng.standard_normal(n),
    "large offset": lambda rng, n: 1e12 + np.round(rng.standard_normal(n) * 3),
    "heavy tails": lambda rng, n: np.exp(5 * rng.standard_normal(n)),
    "mostly zero": lambda rng, n: np.where(rng.random(n) < 0.97, 0, rng.standard_normal(n)),
    "signed zeros": lambda rng, n: np.where(rng.random(n) < 0.5, 0.0, -0.0) + rng.integers(0, 2, n),
    "sorted": lambda rng, n: np.sort(rng.standard_normal(n)),
}


def make_features(rng: np.random.Generator, n: int, width: int) -> Tensor:
    columns = [FEATURES[str(kind)](rng, n) for kind in rng.choice(list(FEATURES), width)]
    return torch.from_numpy(np.stack(columns, 1))


def make_labels(rng: np.random.Generator, n: int, kind: str) -> tuple[Tensor, int]:
    classes = int(rng.integers(2, 12))
    if kind == "many":
        classes = int(rng.integers(2, max(3, n // 2 + 1)))
    labels = rng.integers(0, classes, n)
    if kind == "rare":
        labels, classes = np.zeros(n, int), 4
        few = min(int(rng.integers(1, 12)), n - 1)
        labels[rng.choice(n, few, replace=False)] = rng.integers(1, 4, few)
    elif kind == "sorted":
        labels = np.sort(labels)
    elif kind == "skewed":
        labels = np.minimum(rng.geometric(0.4, n) - 1, classes - 1)
    elif kind == "one":
        labels, classes = np.zeros(n, int), 2
    return torch.from_numpy(labels), classes


LABELS = ["many", "few", "rare", "sorted", "skewed", "one"]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("noise", [False, True], ids=["exact", "noise"])
@pytest.mark.parametrize("kind", LABELS)
def test_random_problems(kernels: Kernels, kind: str, noise: bool) -> None:
    """Both estimates of every kind of feature, for every number of neighbours, in chunks of one size or another."""
    rng = np.random.default_rng(sum(kind.encode()) + noise)
    for number in range(12):
        kernels.seed(int(rng.integers(2**40)))
        kernels.at_end = number % 2 == 0
        n = int(rng.choice([rng.integers(2, 40), rng.integers(40, 300), rng.integers(300, 900)], p=[0.3, 0.5, 0.2]))
        k = int(rng.integers(1, 11)) if number % 6 else int(rng.integers(11, 40))
        features = make_features(rng, n, 5)
        features = features.float() if number % 3 == 0 else features
        labels, classes = make_labels(rng, n, kind)
        drawn = torch.from_numpy(rng.standard_normal((n, 5))) if noise else None
        for multiclass in (False, True):
            check(kernels, features, labels, classes, k, drawn, multiclass, features_at_once=int(rng.integers(1, 6)))
