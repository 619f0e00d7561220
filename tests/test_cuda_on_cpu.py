"""The CUDA kernels, compiled by a C++ compiler against tests/cuda_on_cpu and run on the CPU, against the reference."""

from __future__ import annotations

import itertools
import subprocess

import numpy as np
import pytest
import torch
from stand_in import HERE, KERNELS, STAND_IN, TYPES, build
from stand_in_kernels import Backward, ColumnMax, Forward, GateRows, Kernels, Step
from torch import Tensor

from csg_ext import reference

COMBINATIONS = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.float32),
]
# One rounding to the type (unit roundoff) plus what fp32 (fp64) sums of a few thousand numbers near 1 lose.
TOLERANCE = {
    torch.float64: (0.0, 1e-13),
    torch.float32: (2.0**-22, 2e-6),
    torch.float16: (2.0**-11 * 1.01, 2e-6),
    torch.bfloat16: (2.0**-8 * 1.01, 2e-6),
}


# ---- What is compared.


def close(got: Tensor, expected: Tensor, scale: float = 1.0) -> None:
    relative, absolute = TOLERANCE[got.dtype]
    torch.testing.assert_close(got.double(), expected.double(), rtol=relative, atol=absolute * scale, equal_nan=True)


def layouts(n: int, k: int, s: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """(N, K, S) tensors of every layout that the kernels read."""
    last = lambda *shape: torch.randn(*shape).to(dtype).transpose(1, 2)  # noqa: E731
    rows = lambda *shape: torch.randn(*shape).to(dtype)  # noqa: E731
    return {
        "rows": rows(n, k, s),
        "rows, every second sample": rows(2 * n, k, s)[::2],
        "rows, a slice of the channels": rows(n, k + 3, s)[:, 2 : k + 2],
        "rows, every second channel": rows(n, 2 * k, s)[:, 1::2],
        "rows, cut from longer ones": rows(n, k, s + 3)[..., 2 : s + 2],
        "rows, one sample expanded": rows(1, k, s).expand(n, k, s),
        "rows, one channel expanded": rows(n, 1, s).expand(n, k, s),
        "channels last": last(n, s, k),
        "channels last, a slice of the channels": last(n, s, k + 8)[:, 8:],
        "channels last, an odd slice": last(n, s, k + 3)[:, 1 : k + 1],
        "channels last, every second position": last(n, 2 * s, k)[..., ::2],
        "channels last, one position expanded": last(n, 1, k).expand(n, k, s),
        "channels last, one sample expanded": last(1, s, k).expand(n, k, s),
    }


def expected_forward(x: Tensor, gate: Tensor, labels: Tensor | None, pool: str, project: bool) -> tuple[Tensor, ...]:
    labels = torch.arange(x.shape[0]) if labels is None else labels
    out, pooled = reference.gated_pool(
        x.double(), gate.double(), labels, pool=pool, return_pooled=True, project=project
    )
    return out, pooled


def check_forward(
    kernels: Kernels, x: Tensor, gate: Tensor, labels: Tensor | None, pool: str, project: bool = False
) -> tuple[Tensor, Tensor | None]:
    out, pooled, index = kernels.forward(x, gate, labels, pool, project)
    expected_out, expected_pooled = expected_forward(x, gate, labels, pool, project)
    close(pooled, expected_pooled)
    close(out, expected_out, scale=max(1.0, gate.abs().max().item()))
    if index is not None:  # numpy: the first maximum; the first NaN if there is one
        np.testing.assert_array_equal(index.numpy(), x.double().numpy().argmax(2))
    return pooled, index


def check_backward(
    kernels: Kernels,
    x: Tensor,
    gate: Tensor,
    labels: Tensor | None,
    pool: str,
    project: bool,
    grads: str = "both",
) -> None:
    n, k, s = x.shape
    # What the forward pass would hand over, rounded to the gate's type.
    wide = x.double()
    if pool == "max":
        index = torch.from_numpy(wide.numpy().argmax(2))
        pooled = wide.gather(2, index[..., None]).squeeze(2).to(gate.dtype)
    else:
        index, pooled = None, wide.mean(2).to(gate.dtype)
    grad_out = torch.randn(n, k).to(gate.dtype) if grads in ("both", "out") else None
    grad_pooled = torch.randn(n, k).to(gate.dtype) if grads in ("both", "pooled") else None
    got_x, got_gate = kernels.backward(x, gate, labels, grad_out, grad_pooled, pooled, index, project)

    chosen = torch.arange(n) if labels is None else labels
    upstream = torch.zeros(n, k, dtype=torch.float64) if grad_out is None else grad_out.double()
    leaf = gate.double().requires_grad_()
    row = reference.gate_rows(leaf, chosen, project)
    (row * pooled.double() * upstream).sum().backward()
    per_row = upstream * row.detach() + (0 if grad_pooled is None else grad_pooled.double())
    if pool == "max":
        expected_x = torch.zeros(n, k, s, dtype=torch.float64).scatter(2, index[..., None], per_row[..., None])
    else:
        expected_x = (per_row / s)[..., None].expand(n, k, s)
    scale = max(1.0, gate.abs().max().item())
    close(got_x, expected_x, scale)
    if pool == "avg" and s > 1:
        blank = torch.empty(n, k, 1, dtype=x.dtype).expand(n, k, s)
        shared, _ = kernels.backward(blank, gate, labels, grad_out, grad_pooled, pooled, index, project)
        assert torch.equal(shared, got_x)
    close(got_gate, leaf.grad, scale * max(1.0, n**0.5) * (4 if project else 1))


SIZES = [(3, 5, 1, 1), (4, 16, 2, 3), (5, 24, 7, 7), (3, 8, 13, 5), (3, 5, 33, 21), (1, 3, 112, 112)]
SIZE_IDS = ["x".join(map(str, size)) for size in SIZES]


# ---- gated_pool.


@pytest.mark.parametrize("pool", ["avg", "max"])
@pytest.mark.parametrize(("n", "k", "height", "width"), SIZES, ids=SIZE_IDS)
def test_every_layout(kernels: Kernels, n: int, k: int, height: int, width: int, pool: str) -> None:
    for number, (name, x) in enumerate(layouts(n, k, height * width, torch.float32).items()):
        kernels.at_end = number % 2 == 0
        gate, labels = torch.rand(4, k), torch.randint(4, (n,))
        try:
            check_forward(kernels, x, gate, labels, pool)
            check_backward(kernels, x, gate, labels, pool, project=False)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize("pool", ["avg", "max"])
@pytest.mark.parametrize(("x_type", "gate_type"), COMBINATIONS, ids=lambda t: str(t).removeprefix("torch."))
def test_every_type(kernels: Kernels, x_type: torch.dtype, gate_type: torch.dtype, pool: str) -> None:
    for s, channels_last, at_end in itertools.product((3, 49, 65, 1100), (False, True), (False, True)):
        kernels.at_end = at_end
        n, k = 3, 16 if at_end else 21
        x = torch.randn(n, s, k).transpose(1, 2) if channels_last else torch.randn(n, k, s)
        gate, labels = torch.rand(3, k).to(gate_type), torch.randint(3, (n,))
        check_forward(kernels, x.to(x_type), gate, labels, pool, project=at_end)
        check_backward(kernels, x.to(x_type), gate, labels, pool, project=at_end)


def test_rounding(kernels: Kernels) -> None:
    """Every half value survives; fp32 gradients are rounded to half types as torch rounds them, ties and all."""
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).reshape(64, 1024, 1)
        _, pooled, _ = kernels.forward(x, torch.ones(1, 1024), torch.zeros(64, dtype=torch.int64))
        torch.testing.assert_close(pooled, x.float()[..., 0], rtol=0, atol=0, equal_nan=True)
        exponents = torch.randint(-30, 20, (20, 1000)).float()
        grads = torch.cat([torch.randn(20, 1000) * exponents.exp2(), pooled[:20, :1000] * (1 + 2.0**-11)])
        blank = torch.zeros(40, 1000, 1, dtype=dtype)
        zeros = torch.zeros(40, 1000)
        got, _ = kernels.backward(blank, torch.ones(40, 1000), None, None, grads, zeros, None, want=(True, False))
        torch.testing.assert_close(got[..., 0], grads.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("pool", ["avg", "max"])
def test_nan_and_infinity(kernels: Kernels, pool: str, channels_last: bool) -> None:
    for s in (3, 49, 2500):
        x = torch.randn(6, 5, s)
        x[0, 0] = -torch.inf
        x[1, 0, -1] = torch.nan
        x[2, 1, [1, 2]] = torch.nan
        x[3, 2, [0, -1]] = torch.inf
        x[4] = 0.5  # ties everywhere
        x[5, 3] = torch.nan
        x = x.transpose(1, 2).contiguous().transpose(1, 2) if channels_last else x
        check_forward(kernels, x, torch.rand(2, 5) + 0.5, torch.randint(2, (6,)), pool)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_projection(kernels: Kernels, dtype: torch.dtype) -> None:
    """Negative entries, ties, columns without a positive entry and columns with a NaN, forward and gradient."""
    gate = torch.randn(7, 70)
    gate[:, 1] = -gate[:, 1].abs() - 0.1
    gate[:, 2] = 0
    gate[[1, 4], 3] = 3.0
    gate[0, 4] = torch.nan
    gate[[2, 5], 65] = torch.nan
    gate[:, 6] = 1.0
    gate[::2, 7] = 0  # at the edge of the clip, where the gradient passes
    gate[1, 7] = 0.5
    gate = gate.to(dtype)
    labels = torch.randint(7, (40,))
    top, where = kernels.column_max(gate)
    torch.testing.assert_close(top, gate.max(0).values, rtol=0, atol=0, equal_nan=True)
    np.testing.assert_array_equal(where.numpy(), gate.double().numpy().argmax(0))
    x = torch.randn(40, 70, 6).to(dtype)
    check_forward(kernels, x, gate, labels, "avg", project=True)
    # The reference gives a column with a NaN the gradient of its NaN alone; the kernels make all of it NaN.
    number = ~gate.isnan().any(0)
    _, got = kernels.backward(
        x, gate, labels, torch.randn(40, 70).to(dtype), None, torch.randn(40, 70).to(dtype), None, True, (False, True)
    )
    assert got[:, ~number].isnan().all()
    for grads in ("both", "out", "pooled"):
        check_backward(kernels, x[:, number], gate[:, number], labels, "avg", True, grads)


@pytest.mark.parametrize("pool", ["avg", "max"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_rows_of_whole_vectors(kernels: Kernels, dtype: torch.dtype, pool: str) -> None:
    """Rows that are read 16 bytes at a time, and the same rows an element beside a 16-byte boundary, or in samples
    that lie apart."""
    kernels.at_end = False
    width, gate, labels = 16 // dtype.itemsize, torch.rand(3, 20).to(dtype), torch.randint(3, (4,))
    for s in (width, 3 * width, 64, 112, 240):
        for ahead, between in ((0, 0), (1, 0), (0, width), (0, 1)):
            flat = kernels.guarded(torch.randn(ahead + 4 * (20 * s + between)).to(dtype))
            flat[::7] = flat.max()
            x = flat.as_strided((4, 20, s), (20 * s + between, s, 1), ahead)
            out, pooled, index = kernels.forward(x, gate, labels, pool, copy=False)
            expected_out, expected_pooled = expected_forward(x, gate, labels, pool, False)
            close(pooled, expected_pooled)
            close(out, expected_out)
            if index is not None:
                np.testing.assert_array_equal(index.numpy(), x.double().numpy().argmax(2))


@pytest.mark.parametrize("project", [False, True])
@pytest.mark.parametrize(
    ("n", "c", "k"), [(600, 3, 5), (300, 1000, 7), (40, 90, 130), (9, 1, 33), (1, 2, 1), (300, 1100, 1000)]
)
def test_gate_gradient(kernels: Kernels, n: int, c: int, k: int, project: bool) -> None:
    x, gate = torch.randn(n, k, 2), torch.rand(c, k)
    check_backward(kernels, x, gate, torch.randint(c, (n,)), "avg", project)
    check_backward(kernels, x, torch.rand(n, k), None, "avg", project)
    labels = torch.randint(c, (n,))
    grad = torch.randn(n, k)
    for want in ((True, False), (False, True), (False, False)):
        grad_x, grad_gate = kernels.backward(x, gate, labels, grad, None, grad, None, project, want)
        assert (grad_x is not None, grad_gate is not None) == want


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("pool", ["avg", "max"])
def test_labels_out_of_range(kernels: Kernels, pool: str, channels_last: bool) -> None:
    """A sample whose label names no row becomes NaN and touches nobody else; what it pooled stays right."""
    labels = torch.tensor([0, -1, 2, 3, 1, 2**62, -(2**63)])
    good = (labels >= 0) & (labels < 3)
    for s in (4, 49, 3000):
        x = torch.randn(7, s, 6).transpose(1, 2) if channels_last else torch.randn(7, 6, s)
        gate, grad = torch.rand(3, 6), torch.randn(7, 6)
        out, pooled, index = kernels.forward(x, gate, labels, pool)
        expected, expected_pooled = expected_forward(x, gate, labels.where(good, 0), pool, False)
        close(pooled, expected_pooled)
        close(out[good], expected[good])
        assert out[~good].isnan().all()
        for project in (False, True):
            grad_x, grad_gate = kernels.backward(x, gate, labels, grad, grad, pooled, index, project)
            of_good = [None if t is None else t[good] for t in (x, labels, grad, pooled, index)]
            alone_x, alone_gate = kernels.backward(
                of_good[0], gate, of_good[1], of_good[2], of_good[2], of_good[3], of_good[4], project
            )
            close(grad_x[good], alone_x)
            close(grad_gate, alone_gate)
            if pool == "avg":
                assert grad_x[~good].isnan().all()
            else:
                assert torch.equal(grad_x[~good].isnan().sum(2), torch.ones_like(index[~good]))
        # The gated path brings nothing: the label does not matter.
        grad_x, grad_gate = kernels.backward(x, gate, labels, None, grad, pooled, index)
        assert not grad_x.isnan().any() and not grad_gate.any()


@pytest.mark.parametrize("row", [-1, 3, 2**40])
def test_maxima_outside_the_gate(kernels: Kernels, row: int) -> None:
    """col_arg is an argument of the operator: the gradient of the gate is written nowhere else."""
    kernels.at_end = row > 0
    gate, grad = kernels.guarded(torch.rand(3, 6)), kernels.guarded(torch.randn(7, 6))
    rows, keep = kernels.rows(gate, torch.randint(3, (7,)), project=True)
    keep[3].fill_(row)
    grad_gate, p = kernels.empty(3, 6, dtype=torch.float32), kernels.pointer
    layout = (False, 7, 6, 1, rows, None, TYPES[gate.dtype], 6, 1, 1)
    kernels.call("csg_gated_pool_backward", Backward(p(grad), None, p(grad), None, *layout, p(grad_gate)))
    assert not grad_gate.isnan().any()


def test_empty(kernels: Kernels) -> None:
    before = kernels.launches()
    none = torch.empty(0, dtype=torch.int64)
    for shape in ((0, 4, 9), (3, 0, 9)):
        out, pooled, _ = kernels.forward(torch.empty(shape), torch.ones(2, shape[1]), none[: shape[0]])
        assert out.shape == pooled.shape == shape[:2]
    kernels.step(torch.empty(0, 3), None)
    kernels.step(torch.empty(3, 0), None)
    assert kernels.launches() == before
    nothing = torch.empty(0, 4)
    for project in (False, True):
        _, grad_gate = kernels.backward(
            torch.empty(0, 4, 9), torch.ones(2, 4), none, nothing, nothing, nothing, None, project
        )
        assert torch.equal(grad_gate, torch.zeros(2, 4))


def test_launches(kernels: Kernels) -> None:
    """Forward is one launch, backward two, a gate step one."""
    for x in layouts(2, 4, 9, torch.float32).values():
        gate, labels, grad = torch.rand(3, 4), torch.randint(3, (2,)), torch.randn(2, 4)
        before = kernels.launches()
        _, pooled, _ = kernels.forward(x, gate, labels)
        assert kernels.launches() == before + 1
        kernels.backward(x, gate, labels, grad, grad, pooled, None)
        assert kernels.launches() == before + 3
        kernels.backward(torch.empty(2, 4, 1).expand(2, 4, 9), gate, labels, grad, grad, pooled, None)
        assert kernels.launches() == before + 5
        kernels.step(gate, gate, gate, lr=0.1)
        assert kernels.launches() == before + 6


def test_same_bits_on_every_schedule(kernels: Kernels) -> None:
    """The order in which threads and blocks run changes no bit of any result."""
    torch.manual_seed(1)
    gate, labels = torch.rand(5, 40), torch.randint(5, (30,))
    grad, buffer = torch.randn(5, 40), torch.randn(5, 40)
    results: list[list[Tensor]] = []
    for seed in range(4):
        kernels.seed(seed)
        torch.manual_seed(2)
        found = list(kernels.step(gate, grad, buffer, lr=0.1, momentum=0.9, nesterov=True))
        for s, channels_last, pool in itertools.product((49, 700), (False, True), ("avg", "max")):
            n = 30 if s == 49 else 3
            x = torch.randn(n, s, 40).transpose(1, 2) if channels_last else torch.randn(n, 40, s)
            out, pooled, index = kernels.forward(x, gate, labels[:n], pool, True)
            upstream = torch.randn(n, 40)
            found += [out, pooled, *kernels.backward(x, gate, labels[:n], upstream, upstream, pooled, index, True)]
        results.append(found)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_offsets_beyond_31_bits(kernels: Kernels) -> None:
    """Elements more than 2^31 apart in x and in the gate: memory is reserved, but only what is read is ever touched."""
    far = 2**31 + 64
    flat = kernels.sparse(far + 2 * 3 * 1200, torch.float16)
    for shape, strides in (
        ((2, 3, 5), (far, 5, 1)),
        ((2, 3, 1200), (far, 1200, 1)),
        ((1, 2, 5), (0, far, 1)),
        ((1, 2, 1200), (0, far, 1)),
        ((2, 3, 5), (far, 1, 3)),
        ((2, 8, 2), (8, 1, far)),
        ((2, 3, 2), (3, 1, far)),
    ):
        x = flat.as_strided(shape, strides)
        x.copy_(torch.randn(shape))
        gate, labels = torch.rand(2, shape[1]), torch.tensor([1, 0])[: shape[0]]
        out, pooled, _ = kernels.forward(x, gate, labels, copy=False)
        expected_out, expected_pooled = expected_forward(x, gate, labels, "avg", False)
        close(pooled, expected_pooled)
        close(out, expected_out)
    rows, k = 2**31 // 512 + 2, 512
    gate = kernels.sparse(rows * k, torch.float16).view(rows, k)
    gate[-1], gate[1] = 0.5, 0.25
    x, labels = torch.randn(2, k, 3).half(), torch.tensor([rows - 1, 1])
    out, pooled, _ = kernels.forward(x, gate, labels, copy=False)
    close(out, pooled.double() * torch.tensor([[0.5], [0.25]]))


# Samples, rows and channels, positions: each makes more than 2^31 elements of x, and all but the last of out, too.
LARGE = [(2**20 + 1, 64, 49), (2**15 + 1, 2**16, 2), (2**15 + 1, 2**16, 1), (2, 2**16, 2**15 + 1), (3, 2**15, 2**15)]


@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_more_than_31_bits_of_elements(kernels: Kernels, shape: tuple[int, int, int]) -> None:
    """The first and the last tiles of maps, results and gradients that are only reserved; small integers: exact."""
    n, k, s = shape
    p, count = kernels.pointer, 16 if s < 2**15 else 1  # channels that the last tile has at least
    chosen = torch.arange(k - count, k)
    for pool, channels_last in itertools.product(("avg", "max"), (False, True)):
        strides = (k * s, 1, k) if channels_last else (k * s, s, 1)
        x, grad_x = (kernels.sparse(n * k * s, torch.float16).as_strided(shape, strides) for _ in range(2))
        out, pooled, up = (kernels.sparse(n * k, torch.float32).view(n, k) for _ in range(3))
        index, labels = kernels.sparse(n * k, torch.int64).view(n, k), kernels.sparse(n, torch.int64)
        gate = torch.zeros(2, k)
        gate[1], labels[-1] = 4, 1
        first, last = (chosen % 7).float(), (chosen % 5 + 8).float()
        x[-1, -count:, 0] = first
        x[-1, -count:, -1] = last
        rows, keep = kernels.rows(gate, None, False)
        rows.labels = p(labels)
        layout = (TYPES[x.dtype], pool == "max", n, k, s, *strides)
        with kernels.ends_only():
            kernels.call("csg_gated_pool_forward", Forward(p(x), *layout, rows, p(out), p(pooled), p(index)))
        want = last if pool == "max" else (last + (first if s > 1 else 0)) / s
        assert torch.equal(pooled[-1, -count:], want) and torch.equal(out[-1, -count:], 4 * want)
        assert pool == "avg" or (index[-1, -count:] == s - 1).all()
        up[-1, -count:], index[-1, -count:] = 6, s - 1
        parameters = Backward(
            p(up), None, p(pooled), p(index), pool == "max", n, k, s, rows, p(grad_x), TYPES[x.dtype], *strides, None
        )
        with kernels.ends_only():
            kernels.call("csg_gated_pool_backward", parameters)
        assert (grad_x[-1, -count:, -1] == (24 if pool == "max" else torch.tensor(24 / s).half())).all()
        del keep


@pytest.mark.parametrize("project", [False, True])
def test_gates_of_more_than_31_bits_of_elements(kernels: Kernels, project: bool) -> None:
    c, k, p = 2**11 + 1, 2**20, kernels.pointer
    gate, buffer, up, pooled, grad_gate = (kernels.sparse(c * k, torch.float32).view(c, k) for _ in range(5))
    top, where, labels = kernels.sparse(k, torch.float32), kernels.sparse(k, torch.int64), torch.arange(c)
    labels = kernels.guarded(labels)
    gate[0, -9:], gate[-1, -9:], up[-1, -9:], pooled[-1, -9:] = 1, 2, 3, 2
    with kernels.ends_only():
        kernels.call("csg_column_max", ColumnMax(p(gate), TYPES[gate.dtype], c, k, p(top), p(where)))
        assert (top[-9:] == 2).all() and (where[-9:] == c - 1).all()
        rows = GateRows(p(gate), TYPES[gate.dtype], c, p(labels), *((p(top), p(where)) if project else (None, None)))
        backward = (p(up), None, p(pooled), None, False, c, k, 1, rows, None, TYPES[gate.dtype], k, 1, 1, p(grad_gate))
        kernels.call("csg_gated_pool_backward", Backward(*backward))
        assert (grad_gate[-1, -9:] == (0 if project else 6)).all()  # what moves the maximum moves nothing, projected
        options = (0.5, 1.0, 0.0, 0.0, False, False, not project)
        kernels.call("csg_gate_step", Step(p(gate), p(up), p(buffer), TYPES[gate.dtype], c, k, *options))
    assert (buffer[-1, -9:] == 3).all() and (gate[0, -9:] == 1).all() and (gate[-1, -9:] == 0.5).all()


# ---- gate_step.


@pytest.mark.parametrize("method", ["scale", "euclidean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_gate_step(kernels: Kernels, dtype: torch.dtype, method: str) -> None:
    options = [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        {"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.05},
        {"momentum": 0.9, "first_step": True},
    ]
    for number, (classes, option) in enumerate(itertools.product((1, 2, 10, 97), options)):
        kernels.at_end = number % 2 == 0
        k = 21 if number % 3 else 65
        gate, grad = (torch.rand(classes, k) + 0.5).to(dtype), torch.randn(classes, k).to(dtype)
        if classes > 1 and k == 21:
            gate[:, 2] = -2 - gate[:, 2].abs()  # stays without a positive entry
            gate[-1, 3] = torch.nan
            grad[0, 4] = torch.nan
        buffer = torch.randn(classes, k).to(dtype) if option else None
        got, got_buffer = kernels.step(gate, grad, buffer, lr=0.1, method=method, **option)
        wide = [None if t is None else t.double() for t in (gate, grad, buffer)]
        expected, expected_buffer = reference.gate_step(*wide, lr=0.1, method=method, **option)
        close(got, expected)
        if buffer is not None:
            close(got_buffer, expected_buffer)
    projected, _ = kernels.step(gate, None, method=method)
    close(projected, reference.project_gate(gate.double(), method))


@pytest.mark.parametrize("classes", [500, 600, 1000, 2048, 2100])
def test_gate_step_of_many_classes(kernels: Kernels, classes: int) -> None:
    """Columns that fit in registers, loosely and tightly, and those that do not; the largest entry is exactly 1."""
    for dtype in (torch.float32, torch.bfloat16):
        gate, grad, buffer = (torch.randn(classes, 59).to(dtype) for _ in range(3))
        got, got_buffer = kernels.step(gate, grad, buffer, lr=0.1, momentum=0.9)
        expected, expected_buffer = reference.gate_step(
            gate.double(), grad.double(), buffer.double(), lr=0.1, momentum=0.9
        )
        close(got, expected)
        close(got_buffer, expected_buffer)
        assert (got.max(0).values == 1).all()


# ---- The stand-in itself.

CAUGHT = {
    "missing-barrier": "wrong: out",
    "divergent-barrier": "wait at different barriers",
    "exit-before-barrier": "waits for ever at a barrier that another thread does not reach",
    "dynamic-overrun": "touched memory outside its buffers",
    "static-overrun": "wrote outside its shared memory",
    "global-overread": "touched memory outside its buffers",
    "misaligned": "misaligned address",
    "absent-lane": "which takes no part",
    "lane-never-comes": "waits for ever",
    "too-much-shared": "static and dynamic together, is over",
}


@pytest.mark.parametrize("bug", ["none", *CAUGHT])
def test_planted_bugs_are_caught(bug: str) -> None:
    program = build("planted", [STAND_IN, HERE / "planted.cpp"])
    for seed in range(3):
        run = subprocess.run([str(program), bug, str(seed)], capture_output=True, text=True, timeout=20)
        output = run.stdout + run.stderr
        assert (run.returncode == 0) == (bug == "none"), output
        assert CAUGHT.get(bug, "right") in output


def test_driver() -> None:
    """The self-check that CTest runs."""
    program = build("driver", [*KERNELS, STAND_IN, HERE / "driver.cpp"])
    run = subprocess.run([str(program)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr
