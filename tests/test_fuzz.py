"""gated_pool and the gate's operators on drawn inputs (tests/fuzzing.py), against the definition in fp64."""

from __future__ import annotations

import pytest
import torch
from fuzzing import DTYPES, fuzz, matrices, sizes, strided
from hypothesis import given
from hypothesis import strategies as st
from tolerances import CHAIN, accumulator, assert_within

import csg_ext
from csg_ext import reference
from csg_ext.optim import ProjectedSGD

RATES = [0.0, 1e-3, 0.1, 0.9, 1.0, 1e4, 1e-30, 1e30, float("inf")]


def subnormal(dtype):
    """The distance of two subnormal numbers: what rounding one of them errs by, at most."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


@fuzz
@given(st.data())
def test_gated_pool(data):
    spatial = data.draw(st.lists(sizes(1, 9), max_size=3))
    n, k, c = data.draw(sizes(0, 5)), data.draw(sizes(0, 40)), data.draw(sizes(1, 6))
    dtype = data.draw(st.sampled_from(DTYPES))
    tokens = len(spatial) == 1 and data.draw(st.booleans())
    soft, project = data.draw(st.booleans()), data.draw(st.booleans())
    shape = [n, *spatial, k] if tokens else [n, k, *spatial]
    x = data.draw(strided(shape, dtype)).requires_grad_()
    gate_dtype = data.draw(st.sampled_from([dtype, torch.float32 if dtype.itemsize == 2 else dtype]))
    gate = data.draw(matrices([c, k], gate_dtype, low=-1.0 if project else 0.0, high=1.0, finite=True, scaled=not soft))
    gate = (gate if project else gate.clamp(0, 1)).requires_grad_()
    if soft:
        weight_dtype = data.draw(st.sampled_from([gate_dtype, torch.promote_types(gate_dtype, torch.float32)]))
        labels = data.draw(matrices([n, c], weight_dtype, low=-1.0, high=1.0, finite=True, scaled=False))
        labels.requires_grad_()
    else:
        labels = torch.tensor(data.draw(st.lists(sizes(0, c - 1), min_size=n, max_size=n)), dtype=torch.long)
    pool = data.draw(st.sampled_from(["avg", "max"]))
    options = {"pool": pool, "return_pooled": True, "channel_dim": -1 if tokens else 1, "project": project}
    got = csg_ext.gated_pool(x, gate, labels, **options)
    x64, gate64 = (t.detach().double().requires_grad_() for t in (x, gate))
    labels64 = labels.detach().double().requires_grad_() if soft else labels
    want = reference.gated_pool(x64, gate64, labels64, **options)

    # A row of soft labels is a matrix product in the gate's dtype; an entry that is divided by its column's is not.
    least, eps = subnormal(gate_dtype), torch.finfo(gate_dtype).eps
    unit = CHAIN * torch.finfo(accumulator(dtype)).eps
    with torch.no_grad():
        used = reference.project_gate(gate64) if project else gate64
        rows = labels64 @ used if soft else used[labels]
        row_error = labels64.abs() @ used.abs() * (c + 3) * eps + least * (c + 1) if soft else torch.zeros(n, k)
        size = rows.abs() + row_error / unit
        # What was added up; a maximum is one of the values.
        average = reference.gated_pool(x64.abs() if pool == "avg" else x64, used, labels64, **options)[1]
        average = average.abs().nan_to_num(0, 0, 0)
    assert_within(got[0], want[0], average * size, "gated")
    assert_within(got[1], want[1], average, "pooled")
    if not (n and k):
        return

    inputs, inputs64 = ([x, gate, labels], [x64, gate64, labels64]) if soft else ([x, gate], [x64, gate64])
    cotangent = data.draw(matrices([n, k], dtype, finite=True)).to(gate_dtype)
    grads = torch.autograd.grad(got[0], inputs, cotangent, retain_graph=True)
    wanted = torch.autograd.grad(want[0], inputs64, cotangent.double(), retain_graph=True)
    assert all(grad.shape == t.shape and grad.dtype == t.dtype for grad, t in zip(grads, inputs, strict=True))
    spread = torch.autograd.grad(want[1], x64, cotangent.double().abs() * row_error / unit, retain_graph=True)[0]
    assert_within(grads[0], wanted[0], wanted[0].abs() + spread, "grad_x")
    top = gate64.detach().max(0).values
    if project and not bool(((top > 1e-3) & (top < 1e3)).all()):
        return  # its division may overflow where the definition's does not, and the other way around
    # A pooled value was rounded, also where it is subnormal, before it is multiplied.
    terms = cotangent.double().abs() * (average * max(1.0, eps / torch.finfo(torch.float32).eps) + least / unit)
    if soft:
        columns = labels64.detach().abs().T @ terms + n * least / unit
        assert_within(grads[2], wanted[2], terms @ used.abs().T * max(1.0, eps / unit * k), "grad_labels")
    else:
        columns = torch.zeros(c, k, dtype=torch.float64).index_add_(0, labels, terms)
    if project:
        columns = (columns + (columns * used).sum(0)) / top
        # 0 * inf: where a pooled value is infinite, the order of operations decides what its column gets.
        finite = want[1].detach().isfinite().all(0)
        assert_within(grads[1][:, finite], wanted[1][:, finite], columns[:, finite], "grad_gate")
    else:
        assert_within(grads[1], wanted[1], columns, "grad_gate")


@fuzz
@given(st.data())
def test_project_gate(data):
    c, k = data.draw(sizes(1, 12)), data.draw(sizes(0, 70))
    dtype, method = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(["scale", "euclidean"]))
    gate = data.draw(strided([c, k], dtype))
    got = csg_ext.project_gate(gate, method=method)
    want = reference.project_gate(gate.double(), method)
    infinite = gate.double().max(0).values.isinf() if k else torch.zeros(0, dtype=torch.bool)
    # inf / inf: no number says what the largest entry is there, but the column stays a column of the same NaN.
    assert_within(got[:, ~infinite], want[:, ~infinite], 0.0, method)
    assert torch.equal(got[:, infinite].isnan(), reference.project_gate(gate, method)[:, infinite].isnan())


def update(gate, grad, buffer, lr, momentum, dampening, weight_decay, nesterov, first_step):
    """What torch.optim.SGD documents: (gate before its projection, buffer, everything that was added up)."""
    d = grad + weight_decay * gate if weight_decay else grad
    seen = [d]
    if buffer is not None:
        buffer = d if first_step else momentum * buffer + (1 - dampening) * d
        d = d + momentum * buffer if nesterov else buffer
        seen += [buffer, d]
    return gate - lr * d, buffer, [*seen, lr * d, gate - lr * d]


def assert_projected(got, u, error, method):
    """got is the projection of some matrix that lies within error of u (finite columns), by column."""
    dtype, top, worst = got.dtype, u.max(0).values, error.max(0).values
    got, eps, least = got.double(), 2 * torch.finfo(dtype).eps, subnormal(dtype)
    assert bool(((got >= 0) & (got <= 1)).all()) and bool((got.max(0).values == 1).all()), "outside V_G"
    first = u >= top - 2 * worst  # may be the largest entry
    if method == "euclidean":
        want, bound = u.clamp(0, 1), error + eps + least
        wrong = ((got - want).abs() > bound) & ~(first & (got == 1))
    else:
        want = (u / top).clamp(0, 1)
        bound = (error + want * worst) / (top - worst) + eps * want + least
        dead = (top < -worst) & ((got != 0) & (got != 1) | (got == 1) & ~first | (got.sum(0) != 1))
        wrong = torch.where(top > worst, (got - want).abs() > bound, dead)
    assert not bool(wrong.any()), f"{method}: wrong at {wrong.nonzero()[0].tolist()}"


@fuzz
@given(st.data())
def test_gate_step(data):
    c, k = data.draw(sizes(1, 12)), data.draw(sizes(0, 70))
    dtype, method = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(["scale", "euclidean"]))
    gate, grad = data.draw(strided([c, k], dtype, written=True)), data.draw(strided([c, k], dtype))
    buffer = data.draw(strided([c, k], dtype, written=True)) if data.draw(st.booleans()) else None
    rate = st.sampled_from(RATES)
    options = {"lr": data.draw(rate), "weight_decay": data.draw(rate), "first_step": data.draw(st.booleans())}
    options["momentum"] = data.draw(rate) if buffer is not None else 0.0
    options["dampening"] = data.draw(st.sampled_from([0.0, 0.0, 0.1, 1.0, -2.0, 1e30]))
    options["nesterov"] = options["momentum"] > 0 and options["dampening"] == 0 and data.draw(st.booleans())
    before = [None if t is None else t.to(torch.float64, copy=True) for t in (gate, grad, buffer)]
    kept = grad.clone()
    assert csg_ext.gate_step_(gate, grad, buffer, **options, method=method) is gate
    torch.testing.assert_close(grad, kept, rtol=0, atol=0, equal_nan=True)

    u, moved, _ = update(*before, **options)
    finite = [None if t is None else t.abs().nan_to_num(0, 0, 0) for t in before]
    # The same sums of absolute values.
    turned = options | {"lr": -options["lr"], "dampening": 1 - abs(1 - options["dampening"])}
    size, moved_size, sizes_seen = update(*finite, **turned)
    acc = accumulator(dtype)
    eps, least, largest = torch.finfo(acc).eps, subnormal(acc), torch.finfo(acc).max / 8
    calm = torch.stack(sizes_seen).lt(largest).all(0)  # nothing overflows but what was infinite: inf and NaN as in fp64
    if buffer is not None:
        error = 16 * eps * moved_size + 4 * least
        fits = calm & ((moved.abs() < torch.finfo(dtype).max / 2) | ~moved.isfinite())
        magnitude = (error / (CHAIN * eps))[fits]
        assert_within(buffer[fits], moved[fits], magnitude, "momentum_buffer")
    if k == 0:
        return
    calm = calm.all(0)
    assert bool((gate.isnan() | ((gate >= 0) & (gate <= 1))).all()), "neither NaN nor in [0, 1]"
    nan, infinite = u.isnan().any(0), u.max(0).values.isinf()
    assert bool(gate[:, calm & nan].isnan().all()), "NaN was lost"
    exact = calm & infinite & ~nan  # only the signs of the infinite entries matter
    want = reference.project_gate(u[:, exact], method)
    if method == "scale":
        torch.testing.assert_close(gate[:, exact].double(), want, rtol=0, atol=0, equal_nan=True)
    else:
        assert torch.equal(gate[:, exact][u[:, exact].isinf()].double(), want[u[:, exact].isinf()])
    chosen = calm & ~nan & ~infinite
    if bool(chosen.any()):
        error = 16 * eps * size + 8 * least * (1 + options["lr"] * (1 + options["momentum"]))
        error = torch.where(u.isfinite(), error, 0)
        assert_projected(gate[:, chosen], u[:, chosen], error[:, chosen], method)


@fuzz
@given(st.data())
def test_projected_sgd(data):
    """Some steps of torch.optim.SGD on gates, each followed by the projection, in fp64."""
    method = data.draw(st.sampled_from(["scale", "euclidean"]))
    options = {"lr": data.draw(st.floats(0, 10)), "weight_decay": data.draw(st.sampled_from([0.0, 0.01, 1.0]))}
    options["momentum"] = data.draw(st.sampled_from([0.0, 0.5, 0.9]))
    options["dampening"] = data.draw(st.sampled_from([0.0, 0.0, 0.3]))
    options["nesterov"] = options["momentum"] > 0 and options["dampening"] == 0 and data.draw(st.booleans())
    values = {"dtype": torch.float64, "finite": True, "scaled": False}
    shapes = data.draw(st.lists(st.tuples(sizes(1, 9), sizes(0, 40)), min_size=1, max_size=3))
    gates = [data.draw(strided(list(shape), written=True, **values)).requires_grad_() for shape in shapes]
    others = [gate.detach().clone().requires_grad_() for gate in gates]
    mine, sgd = ProjectedSGD(gates, **options, method=method), torch.optim.SGD(others, **options)
    for _ in range(data.draw(sizes(1, 4))):
        for gate, other, shape in zip(gates, others, shapes, strict=True):
            grad = data.draw(st.none() | matrices(list(shape), **values))
            gate.grad = other.grad = grad
        mine.step()
        sgd.step()
        for gate, other in zip(gates, others, strict=True):
            if other.grad is not None:
                other.data = reference.project_gate(other.detach(), method)
            torch.testing.assert_close(gate, other, rtol=0, atol=1e-8)


@fuzz
@given(st.data())
def test_penalty_and_density(data):
    c, k = data.draw(sizes(1, 12)), data.draw(sizes(1, 40))
    dtype, norm = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(["l1", "l2", "smooth_l1"]))
    gate = data.draw(strided([c, k], dtype, scaled=False)).requires_grad_()
    budget = data.draw(st.none() | st.floats(0.1, 100))
    entries = gate.detach().double().abs()
    total = entries.sum()
    excess = (total - (k if budget is None else budget)).clamp(min=0)
    want = {"l1": excess, "l2": excess**2, "smooth_l1": torch.where(excess < 1, excess**2 / 2, excess - 0.5)}[norm]
    slope = {"l1": (excess > 0).double(), "l2": 2 * excess, "smooth_l1": excess.clamp(max=1)}[norm]
    got = csg_ext.gate_penalty(gate, budget, norm)
    density = csg_ext.l1_density(gate)
    close = {"rtol": 64 * torch.finfo(dtype).eps, "equal_nan": True, "check_dtype": False}
    error = 16 * torch.finfo(dtype).eps * (total + k + (budget or 0))  # of the excess
    torch.testing.assert_close(density, total / (c * k), atol=0, **close)
    if total.isfinite():
        torch.testing.assert_close(got, want, atol=float(error * (slope + error)), **close)
        if abs(total - (k if budget is None else budget)) > error:
            (grad,) = torch.autograd.grad(got, gate)
            wanted = gate.detach().double().sign() * slope
            torch.testing.assert_close(grad, wanted, atol=float(2 * error), **close)
    else:
        assert got.isnan() if total.isnan() else got.isinf()


@fuzz
@given(st.data())
def test_any_arguments_give_a_result_or_a_sentence(data):
    shapes = st.lists(sizes(0, 4), max_size=5)
    dtypes = st.sampled_from([*DTYPES, torch.int64, torch.int32, torch.bool, torch.complex64])
    others = [None, "a", [1], torch.ones(2, 3).to_sparse(), torch.ones(2, 3, device="meta"), float("nan")]

    def drawn():
        tensor = torch.ones(data.draw(shapes), dtype=data.draw(dtypes))
        changed = data.draw(st.sampled_from(["not"] * 6 + ["expanded", "other", "requires_grad"]))
        if changed == "expanded":
            return tensor[None].expand(3, *tensor.shape)
        if changed == "requires_grad" and tensor.is_floating_point():
            return tensor.requires_grad_()
        return data.draw(st.sampled_from(others)) if changed == "other" else tensor

    x, gate, labels, other = (drawn() for _ in range(4))
    text = data.draw(st.sampled_from(["avg", "max", "scale", "l2", "exact", "balanced", "", 3, None, ["max"]]))
    number = data.draw(st.sampled_from([0, 1, -1, 7, 0.5, 2**40, 2**70, float("nan"), float("inf"), None, "b", True]))
    calls = {
        "gated_pool": lambda: csg_ext.gated_pool(x, gate, labels, pool=text, project=bool(number)),
        "gated_pool, axes": lambda: csg_ext.gated_pool(x, gate, labels, channel_dim=number),
        "project_gate": lambda: csg_ext.project_gate(gate, text),
        "project_gate_": lambda: csg_ext.project_gate_(gate),
        "gate_step_": lambda: csg_ext.gate_step_(gate, other, x, lr=0.1, momentum=number),
        "gate_step_, rates": lambda: csg_ext.gate_step_(gate, other, lr=number, dampening=number, method=text),
        "class_mutual_info": lambda: csg_ext.class_mutual_info(x, labels, ties=text),
        "class_mutual_info, numbers": lambda: csg_ext.class_mutual_info(x, labels, num_classes=number, protocol=text),
        "class_mutual_info, neighbors": lambda: csg_ext.class_mutual_info(x, labels, n_neighbors=number, device=text),
        "class_entropy": lambda: csg_ext.class_entropy(labels, number, text),
        "mutual_info_classif": lambda: csg_ext.mutual_info_classif(x, labels, n_neighbors=number, random_state=text),
        "approximate": lambda: csg_ext.metrics.approximate_class_mutual_info(x, labels, bins=number),
        "gate_penalty": lambda: csg_ext.gate_penalty(gate, number, text),
        "l1_density": lambda: csg_ext.l1_density(gate),
        "best_class": lambda: csg_ext.best_class(x),
        "mutual_information_score": lambda: csg_ext.mutual_information_score(x),
    }
    name = data.draw(st.sampled_from(sorted(calls)))
    try:
        calls[name]()
    except (TypeError, ValueError, NotImplementedError) as error:
        named = "approximate_class_mutual_info" if name == "approximate" else name.split(",")[0]
        assert str(error).startswith(f"{named}: "), f"{type(error).__name__}: {error}"
        assert str(error).count("\n") == 0 and 10 < len(str(error)) < 300, str(error)


if __name__ == "__main__":
    pytest.main([__file__])
