"""Operators and PyTorch's eager forms on adversarial magnitudes, beside results in extended precision (80 bits)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import csg_ext
from csg_ext import reference

F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
TYPES = {
    "fp64": (F64, F64),
    "fp32": (F32, F32),
    "fp16": (F16, F16),
    "bf16": (BF16, BF16),
    "fp16, gate fp32": (F16, F32),
    "bf16, gate fp32": (BF16, F32),
}
SMALL, LONG, LONGEST = (16, 128, 7, 7), (2, 32, 112, 112), (1, 32, 1000, 1000)
MAGNITUDES = {
    "normal": "standard normal",
    "positive": "uniform in [0, 1)",
    "cancelling": "pairs of about +L and -L with L = 0.1 / eps, whose sums are standard normal, in random order",
    "wide": "10^u with random signs, u uniform in [-30, 30] (fp16: [-7, 4], fp64: [-300, 300])",
    "near overflow": "random signs, magnitudes of half the dtype's largest number to all of it, divided by S",
    "sums overflow": "the same, not divided",
    "subnormal": "uniform between the smallest normal numbers of both signs",
}
Exact = np.ndarray[Any, np.dtype[np.longdouble]]


def exact(t: Tensor) -> Exact:
    """Without rounding."""
    return t.detach().double().numpy().astype(np.longdouble)


def draw(magnitude: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Random values of one of MAGNITUDES, along the last axis for those that cancel."""
    info = torch.finfo(dtype)
    uniform = torch.rand(shape, dtype=F64)
    sign = torch.randint(0, 2, shape) * 2.0 - 1
    if magnitude == "normal":
        return torch.randn(shape, dtype=F64).to(dtype)
    if magnitude == "positive":
        return uniform.to(dtype).clamp(max=1)
    if magnitude == "cancelling":
        values = (0.1 / info.eps * (1 + uniform)).to(dtype)
        pairs = shape[-1] // 2
        values[..., pairs : 2 * pairs] = (torch.randn(*shape[:-1], pairs) - values[..., :pairs].double()).to(dtype)
        return values[..., torch.randperm(shape[-1])]
    if magnitude == "wide":
        low, high = {F16: (-7, 4), F64: (-300, 300)}.get(dtype, (-30, 30))
        return (sign * 10 ** (low + uniform * (high - low))).to(dtype)
    if magnitude == "subnormal":
        return (sign * uniform * info.smallest_normal).to(dtype)
    assert magnitude in ("near overflow", "sums overflow")
    return (sign * (0.5 + uniform / 2) * info.max / (1 if magnitude == "sums overflow" else shape[-1])).to(dtype)


@dataclass(frozen=True)
class Result:
    """One result of an operator, PyTorch's, the exact one, and the sum of the magnitudes of the terms that make it."""

    name: str
    ours: Tensor
    theirs: Tensor
    exact: Exact
    terms: Exact


@dataclass(frozen=True)
class Errors:
    """Of one result: in units of the last place of the exact value, and relative to the terms' magnitudes."""

    ulp_median: float
    ulp_max: float
    mean: float
    max: float
    lost: int  # not finite, though the exact value is in the dtype's range


def ulp(values: Exact, dtype: torch.dtype) -> Exact:
    info = torch.finfo(dtype)
    _, exponent = np.frexp(values)
    return np.maximum(np.ldexp(np.longdouble(info.eps), exponent - 1), np.longdouble(info.smallest_normal) * info.eps)


def errors(got: Tensor, result: Result) -> Errors:
    """Over the elements that are in range and finite in both results."""
    dtype, want = got.dtype, result.exact
    assert tuple(got.shape) == want.shape, f"{result.name}: shape {tuple(got.shape)}, expected {want.shape}"
    inside = np.abs(want) <= torch.finfo(dtype).max
    lost = int((inside & ~got.isfinite().numpy()).sum())
    finite = inside & (result.ours.isfinite() & result.theirs.isfinite()).numpy()
    error = np.abs(exact(got)[finite] - want[finite])
    units = error / ulp(want[finite], dtype)
    # A result that is smaller than the dtype's spacing there is off by the spacing, however small its terms.
    share = error / np.maximum(result.terms[finite], torch.finfo(dtype).smallest_normal)
    if not error.size:
        return Errors(0.0, 0.0, 0.0, 0.0, lost)
    return Errors(float(np.median(units)), float(units.max()), float(share.mean()), float(share.max()), lost)


# ---- gated_pool ------------------------------------------------------------------------------------------------------


def projection(gate: Exact) -> tuple[Exact, Exact]:
    """clip(gate / column's maximum), one-hot where that is not positive; and the maxima, 1 there."""
    top = gate.max(0)
    one_hot = (np.arange(len(gate))[:, None] == gate.argmax(0)).astype(np.longdouble)
    alive, top = top > 0, np.where(top > 0, top, 1)
    return np.where(alive, np.clip(gate / top, 0, 1), one_hot), top


def scatter(rows: Exact, labels: Tensor, classes: int) -> Exact:
    """The sums of the rows of each class."""
    if labels.is_floating_point():
        return exact(labels).T @ rows
    total = np.zeros((classes, rows.shape[1]), np.longdouble)
    np.add.at(total, labels.numpy(), rows)
    return total


@dataclass
class Pool:
    """A call of gated_pool with what its gradients need."""

    x: Tensor
    gate: Tensor
    labels: Tensor
    up: Tensor  # gradients of the two results
    up_pooled: Tensor
    pool: str = "avg"
    project: bool = False

    def run(self, function: Any, second: bool = False) -> dict[str, Tensor]:
        """What the function and autograd make of it."""
        x, gate, up = (t.detach().clone().requires_grad_() for t in (self.x, self.gate, self.up))
        soft = self.labels.is_floating_point()
        labels = self.labels.clone().requires_grad_(soft)
        out, pooled = function(x, gate, labels, pool=self.pool, project=self.project, return_pooled=True)
        found = {"out": out, "pooled": pooled}
        if second:
            grads = torch.autograd.grad(out, (x, gate), up, create_graph=True)
            names = ("second derivative, x", "second derivative, gate", "second derivative, upstream gradient")
            given = (self.x, self.gate.flip(0))
            found = dict(zip(names, torch.autograd.grad(grads, (x, gate, up), given), strict=True))
            found[names[0]] = found[names[0]].flatten(2)[..., -1]
            return found
        inputs = (x, gate, labels) if soft else (x, gate)
        grads = torch.autograd.grad((out, pooled), inputs, (self.up, self.up_pooled))
        flat = grads[0].flatten(2)  # every position has the same value, or one has it all
        at = self.x.flatten(2).double().argmax(2, keepdim=True)
        found["gradient of x"] = flat[..., -1] if self.pool == "avg" else flat.gather(2, at)[..., 0]
        found |= dict(zip(("gradient of gate", "gradient of weights"), grads[1:], strict=False))
        return found

    def exact(self, second: bool = False) -> dict[str, tuple[Exact, Exact]]:
        """Every result, and the sum of the magnitudes of its terms."""
        x, gate, up, up_pooled = exact(self.x.flatten(2)), exact(self.gate), exact(self.up), exact(self.up_pooled)
        used, top = projection(gate) if self.project else (gate, None)
        soft = self.labels.is_floating_point()
        weights = exact(self.labels) if soft else np.eye(len(gate), dtype=np.longdouble)[self.labels.numpy()]
        row, rows = weights @ used, np.abs(weights) @ np.abs(used)
        positions = x.shape[2] if self.pool == "avg" else 1
        mean, means = x.mean(2), np.abs(x).mean(2)
        if self.pool == "max":
            mean = x.max(2)
            means = np.abs(mean)
        along, size = up * mean, np.abs(up) * means
        total, totals = (scatter(values, self.labels, len(gate)) for values in (along, size))
        if second:
            v = weights @ exact(self.gate.flip(0))  # given to the gradient of x: x itself; of the gate: it upside down
            return {
                "second derivative, x": (up * v / positions, np.abs(up * v) / positions),
                "second derivative, gate": (total, totals),
                "second derivative, upstream gradient": ((row + v) * mean, (rows + np.abs(v)) * means),
            }
        found = {
            "out": (row * mean, rows * means),
            "pooled": (mean, means),
            "gradient of x": ((up * row + up_pooled) / positions, (np.abs(up) * rows + np.abs(up_pooled)) / positions),
        }
        if top is not None:
            largest = gate == top
            found["gradient of gate"] = (
                ((gate >= 0) * total - largest * (total * used).sum(0)) / top,
                ((gate >= 0) * totals + largest * (totals * used).sum(0)) / top,
            )
        else:
            found["gradient of gate"] = (total, totals)
        if soft:
            found["gradient of weights"] = (along @ used.T, size @ np.abs(used).T)
        return found

    def results(self, second: bool = False) -> Iterator[Result]:
        ours, theirs = self.run(csg_ext.gated_pool, second), self.run(reference.gated_pool, second)
        for name, (value, terms) in self.exact(second).items():
            yield Result(name, ours[name].detach(), theirs[name].detach(), value, terms)


def pool_case(
    types: str,
    magnitude: str,
    shape: tuple[int, ...] = SMALL,
    layout: str = "rows",
    upstream: str = "normal",
    soft: bool = False,
    classes: int = 5,
    **options: Any,
) -> Pool:
    """x of the magnitude, gradients of the results of another, on a random gate."""
    x_type, gate_type = TYPES[types]
    n, k, *spatial = shape
    x = draw(magnitude, (n, k, int(np.prod(spatial))), x_type).view(shape)
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "channels last" else x
    gate = torch.rand(classes, k, dtype=F64).to(gate_type) + (0.5 if options.get("project") else 0)
    labels = torch.rand(n, classes, dtype=F64).to(gate_type) if soft else torch.randint(classes, (n,))
    up, up_pooled = (draw(upstream, (n, k), gate_type) for _ in range(2))
    return Pool(x, gate, labels, up, up_pooled, **options)


# ---- the gate's own operators ----------------------------------------------------------------------------------------


def project_case(gate: Tensor, method: str) -> Iterator[Result]:
    value = exact(gate)
    if method == "scale":
        want, _ = projection(value)
    else:
        want = np.clip(value, 0, 1)
        want[value.argmax(0), np.arange(value.shape[1])] = 1
    got, theirs = csg_ext.project_gate(gate, method), reference.project_gate(gate, method)
    yield Result(f"project_gate, {method}", got, theirs, want, want)


STEPS: dict[str, dict[str, Any]] = {
    "lr": {"lr": 0.1},
    "momentum": {"lr": 0.1, "momentum": 0.9},
    "nesterov, weight decay": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
}


def step_case(gate: Tensor, grads: list[Tensor], options: dict[str, Any], method: str = "scale") -> Iterator[Result]:
    """The last of some steps from the same state; PyTorch: torch.optim.SGD and the projection in plain operators."""
    momentum = options.get("momentum", 0.0)
    ours, theirs = gate.clone(), torch.nn.Parameter(gate.clone())
    buffer = torch.zeros_like(gate) if momentum else None
    sgd = torch.optim.SGD([theirs], **options)
    for number, grad in enumerate(grads):
        if number == len(grads) - 1:  # both from what ours is by now: the error is that of one step
            value, velocity = exact(ours), exact(buffer) if buffer is not None else None
            with torch.no_grad():
                theirs.copy_(ours)
                if buffer is not None and number:
                    sgd.state[theirs]["momentum_buffer"].copy_(buffer)
        csg_ext.gate_step_(ours, grad, buffer, first_step=number == 0, method=method, **options)
        theirs.grad = grad.clone()
        sgd.step()
        with torch.no_grad():
            theirs.copy_(reference.project_gate(theirs, method))
    grad, lr, decay = exact(grads[-1]), np.longdouble(options["lr"]), np.longdouble(options.get("weight_decay", 0.0))
    d, size = grad + decay * value, np.abs(grad) + decay * np.abs(value)
    name = f"gate_step_, {method}"
    if buffer is not None and velocity is not None:
        factor = np.longdouble(momentum)
        velocity, speed = factor * velocity + d, factor * np.abs(velocity) + size
        yield Result(f"{name}: momentum", buffer, sgd.state[theirs]["momentum_buffer"], velocity, speed)
        d, size = (d + factor * velocity, size + factor * speed) if options.get("nesterov") else (velocity, speed)
    stepped, size = value - lr * d, np.abs(value) + lr * size
    if method == "scale":
        want, top = projection(stepped)
        at = stepped.argmax(0)[None]
        terms = size / top + np.abs(want) * np.take_along_axis(size, at, 0) / top
    else:
        want, terms = np.clip(stepped, 0, 1), size
        want[stepped.argmax(0), np.arange(want.shape[1])] = 1
        # Which of two entries is the largest is no question of rounding: columns where it is one are left out.
        second, first = np.sort(stepped, 0)[-2:]
        clear = first - second > 4 * torch.finfo(ours.dtype).eps * size.max(0)
        ours, theirs, want, terms = ours[:, clear], theirs[:, clear], want[:, clear], terms[:, clear]
    yield Result(f"{name}: gate", ours, theirs.detach(), want, terms)


def norm_cases(gate: Tensor) -> Iterator[Result]:
    """The penalty and the density; PyTorch: the formulas, for half gates in float32, as ours."""
    size, budget = np.abs(exact(gate)).sum(), gate.shape[1]
    theirs = gate.abs().sum(dtype=torch.promote_types(gate.dtype, F32))
    terms = np.atleast_1d(size + budget)
    penalty = np.atleast_1d(max(size - budget, np.longdouble(0)))
    penalties = csg_ext.gate_penalty(gate).view(1), torch.relu(theirs - budget).view(1)
    yield Result("gate_penalty", *penalties, penalty, terms)
    density = np.atleast_1d(size / gate.numel())
    yield Result("l1_density", csg_ext.l1_density(gate).view(1), (theirs / gate.numel()).view(1), density, density)


# ---- mutual information ----------------------------------------------------------------------------------------------


def harmonic(n: int) -> Exact:
    """psi(i) + Euler's constant for i in [1, n], at index i: the constant drops out of every difference."""
    return np.concatenate([np.zeros(2, np.longdouble), np.cumsum(1 / np.arange(1, n, dtype=np.longdouble))])[: n + 1]


def nearest_neighbours(features: np.ndarray, labels: np.ndarray, classes: int, k: int = 3) -> Exact:
    """The estimate of every feature without equal values, by counting: distances in fp64, as everyone compares them."""
    n, psi = len(features), harmonic(len(features))
    found = np.empty((features.shape[1], classes), np.longdouble)
    for column, x in enumerate(features.T):
        distance = np.abs(x[:, None] - x)
        np.fill_diagonal(distance, np.inf)
        for c in range(classes):
            side = labels == c
            same = side[:, None] == side
            radius = np.partition(np.where(same, distance, np.inf), k - 1, 1)[:, k - 1 : k]
            inside = (distance <= radius).sum(1)
            sizes = np.where(side, side.sum(), n - side.sum())
            found[column, c] = psi[n] + (psi[k] - psi[inside] - psi[sizes]).mean()
    return np.maximum(found, 0)


def mutual_info_case(features: Tensor, labels: Tensor, classes: int, seed: int) -> Result:
    """scikit-learn's values, with its scaling and its noise, which leave no two values equal."""
    from sklearn.feature_selection import mutual_info_classif
    from sklearn.preprocessing import scale

    x, y = features.double().numpy(), labels.numpy()
    ours = csg_ext.class_mutual_info(features, labels, num_classes=classes, random_state=seed)
    theirs = np.stack(
        [mutual_info_classif(x, y == c, discrete_features=False, random_state=seed) for c in range(classes)]
    )
    noised = scale(x, with_mean=False)
    noised += 1e-10 * np.maximum(1, np.abs(noised).mean(0)) * np.random.RandomState(seed).standard_normal(x.shape)
    want = nearest_neighbours(noised, y, classes)
    terms = np.full_like(want, 2 * np.log(len(y)))  # psi(n) and what is taken from it, at most
    return Result("class_mutual_info", ours, torch.from_numpy(theirs.T.copy()), want, terms)


def binned_case(features: Tensor, labels: Tensor, classes: int, bins: int) -> Result:
    """The estimate from bins; PyTorch: the same in its operators, which CUDA uses."""
    from csg_ext.metrics.approximate import _by_sorting

    n, counts = len(labels), torch.bincount(labels, minlength=classes)
    ours = csg_ext.metrics.approximate_class_mutual_info(features, labels, num_classes=classes, bins=bins)
    theirs = _by_sorting(features, labels, counts, bins)

    def term(count: Exact) -> Exact:
        return np.where(count > 0, count * np.log(np.maximum(count, 1)) - 0.5, 0)

    want = np.empty((features.shape[1], classes), np.longdouble)
    for column, x in enumerate(features.double().numpy().T):
        first = np.searchsorted(np.sort(x), x)  # the rank of the first of equals
        of = np.zeros((bins, classes), np.longdouble)
        np.add.at(of, (first * bins // n, labels.numpy()), 1)
        bin_sizes, sizes = of.sum(1, keepdims=True), of.sum(0)
        sums = (term(of) + term(bin_sizes - of) - term(bin_sizes)).sum(0)
        want[column] = (sums - term(sizes) - term(n - sizes) + term(np.longdouble(n))) / n
    want = np.maximum(want, 0)
    return Result("approximate_class_mutual_info", ours, theirs, want, np.full_like(want, np.log(n)))
