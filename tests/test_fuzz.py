"""Operators on drawn shapes, strides, layouts, dtypes and extreme values, against the definition in fp64.

CI draws the same examples in every run; CSG_FUZZ=N tries N new ones for each test.
"""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerances import assert_within

import csg_ext
from csg_ext import reference

EXAMPLES = int(os.environ.get("CSG_FUZZ", "0"))
fuzz = settings(
    max_examples=EXAMPLES or 150,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SPECIAL = [float("inf"), float("-inf"), float("nan"), -0.0, 0.0]


@st.composite
def matrices(draw, shape, dtype, low=-2.0, high=2.0, finite=False):
    """Values of a magnitude that is drawn, some of them special."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    values = torch.rand(shape, generator=generator, dtype=torch.float64) * (high - low) + low
    info = torch.finfo(dtype)
    # Products of the largest stay finite.
    values *= draw(st.sampled_from([1.0, 1.0, info.smallest_normal / 4, info.tiny, info.max**0.4]))
    if not finite:
        special = draw(st.lists(st.sampled_from([*SPECIAL, info.smallest_normal / 8]), max_size=3))
        for value in special:
            chosen = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.01, 0.2]))
            values[chosen] = value
    return values.to(dtype)


@st.composite
def strided(draw, shape, dtype):
    """A tensor of that shape: dense, its axes stored in another order, with gaps, at an odd offset, or expanded."""
    kind = draw(st.sampled_from(["dense", "order", "gaps", "offset", "expanded"]))
    if kind == "order":
        order = draw(st.permutations(range(len(shape))))
        stored = draw(matrices([shape[axis] for axis in order], dtype))
        return stored.permute([order.index(axis) for axis in range(len(shape))])
    if kind == "gaps":
        axis = draw(st.integers(0, len(shape) - 1))
        wide = list(shape)
        wide[axis] = 2 * wide[axis]
        return draw(matrices(wide, dtype))[(slice(None),) * axis + (slice(None, None, 2),)]
    if kind == "offset":
        size = int(torch.Size(shape).numel())
        return draw(matrices([size + 3], dtype))[3:].view(shape)
    if kind == "expanded":
        axis = draw(st.integers(0, len(shape) - 1))
        narrow = list(shape)
        narrow[axis] = 1
        return draw(matrices(narrow, dtype)).expand(shape)
    return draw(matrices(shape, dtype))


def sizes(low, high):
    return st.integers(low, high)


@fuzz
@given(st.data())
def test_gated_pool(data):
    spatial = data.draw(st.lists(sizes(1, 9), max_size=3))
    n, k, c = data.draw(sizes(0, 5)), data.draw(sizes(0, 40)), data.draw(sizes(1, 6))
    dtype = data.draw(st.sampled_from(DTYPES))
    tokens = len(spatial) == 1 and data.draw(st.booleans())
    shape = [n, *spatial, k] if tokens else [n, k, *spatial]
    x = data.draw(strided(shape, dtype)).requires_grad_()
    gate_dtype = data.draw(st.sampled_from([dtype, torch.float32 if dtype.itemsize == 2 else dtype]))
    gate = data.draw(matrices([c, k], gate_dtype, low=0.0, high=1.0, finite=True)).clamp(0, 1).requires_grad_()
    labels = torch.tensor(data.draw(st.lists(sizes(0, c - 1), min_size=n, max_size=n)), dtype=torch.long)
    pool = data.draw(st.sampled_from(["avg", "max"]))
    options = {"pool": pool, "return_pooled": True, "channel_dim": -1 if tokens else 1}
    got = csg_ext.gated_pool(x, gate, labels, **options)
    x64, gate64 = (t.detach().double().requires_grad_() for t in (x, gate))
    want = reference.gated_pool(x64, gate64, labels, **options)
    rows = gate64.detach()[labels]
    average = reference.gated_pool(x64.detach().abs(), gate64.detach(), labels, **options)[1].nan_to_num(0, 0, 0)
    assert_within(got[0], want[0], average * rows, "gated")
    assert_within(got[1], want[1], average, "pooled")
    if pool == "avg" and n and k:
        cotangent = data.draw(matrices([n, k], dtype, finite=True)).to(gate_dtype)
        grads = torch.autograd.grad(got[0], [x, gate], cotangent)
        wanted = torch.autograd.grad(want[0], [x64, gate64], cotangent.double())
        assert grads[0].shape == x.shape and grads[1].shape == gate.shape
        assert_within(grads[0], wanted[0], wanted[0].abs(), "grad_x")
        terms = (cotangent.double().abs() * average).nan_to_num(0, 0, 0)
        magnitude = torch.zeros(c, k, dtype=torch.float64).index_add_(0, labels, terms)
        rounding = torch.finfo(gate_dtype).eps / torch.finfo(torch.float32).eps
        assert_within(grads[1], wanted[1], magnitude * max(1.0, rounding), "grad_gate")


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


@fuzz
@given(st.data())
def test_class_mutual_info(data):
    n, k, c = data.draw(sizes(2, 40)), data.draw(sizes(1, 5)), data.draw(sizes(2, 5))
    dtype = data.draw(st.sampled_from(DTYPES))
    levels = data.draw(st.sampled_from([1, 2, 5, 1000]))  # few levels: many equal values
    features = data.draw(matrices([n, k], dtype, finite=True))
    if levels < 1000:
        features = (features.double() * levels).round().clamp(-1e4, 1e4).to(dtype)
    rest = data.draw(st.lists(sizes(0, c - 1), min_size=n - 2, max_size=n - 2))
    labels = torch.tensor([0, 1, *rest])  # two classes at least
    neighbors = data.draw(sizes(1, min(6, n - 1)))
    got = csg_ext.class_mutual_info(features, labels, num_classes=c, n_neighbors=neighbors, ties="exact")
    want = reference.class_mutual_info(features, labels, c, neighbors)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


@fuzz
@given(st.data())
def test_any_arguments_give_a_result_or_a_sentence(data):
    shapes = st.lists(sizes(0, 4), max_size=5)
    dtypes = st.sampled_from([*DTYPES, torch.int64, torch.int32, torch.bool, torch.complex64])
    x, gate, labels, other = (torch.ones(data.draw(shapes), dtype=data.draw(dtypes)) for _ in range(4))
    calls = {
        "gated_pool": lambda: csg_ext.gated_pool(
            x, gate, labels, channel_dim=data.draw(st.sampled_from([1, -1, 0, 7]))
        ),
        "project_gate": lambda: csg_ext.project_gate(gate),
        "gate_step_": lambda: csg_ext.gate_step_(gate, other, lr=0.1, momentum=0.5),
        "class_mutual_info": lambda: csg_ext.class_mutual_info(x, labels),
        "gate_penalty": lambda: csg_ext.gate_penalty(gate, 1.0),
        "l1_density": lambda: csg_ext.l1_density(gate),
    }
    name = data.draw(st.sampled_from(sorted(calls)))
    try:
        calls[name]()
    except (TypeError, ValueError) as error:
        assert str(error).count("\n") == 0 and 10 < len(str(error)) < 300, str(error)


if __name__ == "__main__":
    pytest.main([__file__])
