"""What the benchmarks of mutual information measure: sizes, inputs, peers. Every result is checked first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import measure
import numpy as np
import torch
from sklearn.feature_selection import mutual_info_classif
from torch import Tensor

import csg_ext
from csg_ext.metrics import approximate_class_mutual_info
from csg_ext.ops import mutual_info

NEIGHBORS = 3


@dataclass(frozen=True)
class Case:
    """N samples of K features, C classes. kind: "normal", or "relu" with many zeros."""

    n: int
    k: int
    c: int
    kind: str = "normal"

    @property
    def id(self) -> str:
        """A readable name."""
        return f"{self.n}x{self.k}x{self.c}" + ("" if self.kind == "normal" else f"-{self.kind}")

    def inputs(self) -> tuple[Tensor, Tensor]:
        """fp32 features (N, K), each shifted for one class, and labels with every class; on the device."""
        y = torch.randint(0, self.c, (self.n,), device=measure.DEVICE)
        y[: self.c] = torch.arange(self.c, device=measure.DEVICE)
        own = torch.randint(0, self.c, (self.k,), device=measure.DEVICE)
        x = torch.randn(self.n, self.k, device=measure.DEVICE)
        for begin in range(0, self.k, 64):
            x[:, begin : begin + 64] += 2 * (own[begin : begin + 64] == y[:, None])
        return (x.relu_() if self.kind == "relu" else x), y


SIZES = [Case(2000, 16, 10), Case(5000, 32, 100)] if measure.QUICK else [Case(10_000, 64, 10), Case(50_000, 512, 1000)]
LARGE = [] if measure.QUICK else [Case(50_000, 2048, 1000)]


def scikit_learn(x: np.ndarray, y: np.ndarray, classes: list[int], jobs: int | None = None) -> np.ndarray:
    """The same matrix by scikit-learn: a call for every class."""
    columns = [
        mutual_info_classif(x, y == c, discrete_features=False, n_neighbors=NEIGHBORS, random_state=0, n_jobs=jobs)
        for c in classes
    ]
    return np.stack(columns, 1)


def ours(case: Case, x: Tensor, y: Tensor, ties: str) -> Callable[[], Tensor]:
    """class_mutual_info with all that belongs to a call."""
    return lambda: csg_ext.class_mutual_info(x, y, num_classes=case.c, n_neighbors=NEIGHBORS, ties=ties)


def kernel(case: Case, x: Tensor, y: Tensor, ties: str) -> Callable[[], Tensor]:
    """The operator alone on all columns: the noise is drawn beforehand, nothing is checked in Python."""
    psi, bits = mutual_info._psi(case.n, x.device)
    noise = mutual_info._noise(0, case.n, case.k, 0, case.k).to(x.device) if ties == "noise" else None
    op = torch.ops.csg_ext.class_mutual_info.default
    return lambda: op(x, y, case.c, NEIGHBORS, noise, False, psi, bits)


def approximate(case: Case, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    """approximate_class_mutual_info with all that belongs to a call."""
    return lambda: approximate_class_mutual_info(x, y, num_classes=case.c)


def check(case: Case) -> None:
    """Two features and classes equal scikit-learn's; kernel and function agree; exact ties are near on normal ones."""
    x, y = case.inputs()
    noise = ours(case, x, y, "noise")()
    few, labels = x[:, :2].cpu().numpy(), y.cpu().numpy()
    alone = csg_ext.class_mutual_info(x[:, :2], y, num_classes=case.c, n_neighbors=NEIGHBORS)
    error = np.abs(alone[:, [0, case.c - 1]].cpu().numpy() - scikit_learn(few, labels, [0, case.c - 1])).max()
    assert error <= 1e-9, f"{case.id}: scikit-learn's value differs by {error}"
    assert torch.equal(noise, kernel(case, x, y, "noise")()), f"{case.id}: the kernel alone differs"
    exact = ours(case, x, y, "exact")()
    assert torch.equal(exact, kernel(case, x, y, "exact")()), f"{case.id}: the kernel alone differs"
    if case.kind == "normal":
        assert (exact - noise).abs().max() < 1e-3, f"{case.id}: exact ties differ from noise"
    assert (approximate(case, x, y)() - exact).abs().max() < 0.03, f"{case.id}: the approximation is far off"
