"""Errors against extended precision are no larger than those of PyTorch's eager form in the same dtype.

What is compared: the mean of the errors, relative to the sums of the magnitudes of the terms, and the largest of them.
Sums in another order have other errors: the mean may be larger by what one more rounding adds to it, eps / 4 of the
result's dtype, the largest, which is one element's, by two roundings, eps. The gradient of x has no long
sums: eps / 16.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from fractions import Fraction

import error_cases
import numpy as np
import pytest
import torch
from error_cases import LONG, MAGNITUDES, STEPS, TYPES, Result, errors, pool_case

import csg_ext
from csg_ext.ops.mutual_info import _psi

DTYPES = {name: TYPES[name][0] for name in ("fp64", "fp32", "fp16", "bf16")}


def assert_no_larger(results: Iterable[Result], what: str, slack: float = 1 / 4) -> None:
    """slack: of the mean, in units of eps."""
    count = 0
    for result in results:
        assert result.ours.dtype == result.theirs.dtype
        ours, theirs = errors(result.ours, result), errors(result.theirs, result)
        eps = torch.finfo(result.ours.dtype).eps
        text = f"{what}, {result.name}: ours {ours}, PyTorch's {theirs}"
        assert ours.mean <= theirs.mean + (1 / 16 if result.name == "gradient of x" else slack) * eps, text
        assert ours.max <= theirs.max + eps, text
        assert ours.lost <= theirs.lost, text
        count += 1
    assert count


@pytest.mark.parametrize("layout", ["rows", "channels last"])
@pytest.mark.parametrize("types", TYPES)
def test_gated_pool(cpu_level, types, layout):
    for magnitude in MAGNITUDES:
        assert_no_larger(pool_case(types, magnitude, layout=layout).results(), magnitude)
    assert_no_larger(pool_case(types, "positive", (3, 5, 9, 9), layout).results(), "fewer channels than a vector")


@pytest.mark.parametrize("layout", ["rows", "channels last"])
@pytest.mark.parametrize("types", TYPES)
def test_long_rows(cpu_level, types, layout):
    for magnitude in ("normal", "positive"):
        assert_no_larger(pool_case(types, magnitude, LONG, layout).results(), magnitude)
    assert_no_larger(pool_case(types, "positive", (1, 16, 300_000), layout).results(), "300,000 positions")


@pytest.mark.parametrize("types", TYPES)
def test_gradients(cpu_level, types):
    options = [{}, {"project": True}, {"soft": True}, {"soft": True, "project": True}, {"pool": "max"}]
    for magnitude, option in itertools.product(MAGNITUDES, options):
        if magnitude == "sums overflow" and option == {"project": True}:
            continue  # which parts of the sums overflow depends on their order, in PyTorch's form, too
        case = pool_case(types, "positive", (16, 64, 5, 5), upstream=magnitude, **option)
        assert_no_larger(case.results(), f"{magnitude}, {option}")
    for magnitude in MAGNITUDES:
        case = pool_case(types, "normal", (16, 64, 5, 5), upstream=magnitude)
        assert_no_larger(case.results(second=True), f"{magnitude}, second derivatives")


@pytest.mark.parametrize("dtype", DTYPES)
def test_gate(cpu_level, dtype):
    for magnitude in MAGNITUDES:
        gate = error_cases.draw(magnitude, (10, 300), DTYPES[dtype])
        for method in ("scale", "euclidean"):
            assert_no_larger(error_cases.project_case(gate, method), f"{magnitude}, {method}")
    for magnitude, method, (name, options) in itertools.product(MAGNITUDES, ("scale", "euclidean"), STEPS.items()):
        if magnitude == "sums overflow":
            continue  # momentum overflows, and inf - inf is no number, in PyTorch's form either
        gate = torch.rand(10, 300).to(DTYPES[dtype])
        grads = [error_cases.draw(magnitude, (10, 300), DTYPES[dtype]) for _ in range(3)]
        assert_no_larger(error_cases.step_case(gate, grads, options, method), f"{magnitude}, {method}, {name}")
    for shape in ((10, 64), (1000, 2048)):
        assert_no_larger(error_cases.norm_cases(torch.rand(shape).to(DTYPES[dtype])), f"{shape}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_mutual_information(cpu_level, dtype):
    for n, width in ((300, 16), (2000, 1)):
        labels = torch.randint(5, (n,))
        features = (torch.randn(n, width) + labels[:, None] * torch.rand(width)).to(DTYPES[dtype])
        result = error_cases.mutual_info_case(features, labels, 5, int(torch.randint(1000, ())))
        assert_no_larger([result], f"scikit-learn, {n} samples", slack=0)
        # Five values of psi, each off by at most 2^-54, and two roundings of a result below log 2.
        assert errors(result.ours, result).max <= 2**-54
    labels = torch.randint(5, (300,))
    features = (torch.randn(300, 16) + labels[:, None] * torch.rand(16)).to(DTYPES[dtype])
    for bins in (7, 20):
        assert_no_larger([error_cases.binned_case(features, labels, 5, bins)], f"{bins} bins", slack=0)


def test_table_of_digamma():
    table, bits = _psi(600, torch.device("cpu"))
    harmonic = Fraction(0)
    assert table[0] == table[1] == 0
    for i in range(2, 601):
        harmonic += Fraction(1, i - 1)
        assert abs(int(table[i]) - harmonic * 2**bits) <= Fraction(1, 2)


def test_a_larger_error_is_found():
    """Sums of a float32 map one after the other, as a kernel of one's own might add them."""
    case = pool_case("fp32", "positive", LONG)
    result = next(case.results())
    values = case.x.flatten(2).numpy()
    chain = torch.from_numpy(np.add.accumulate(values, 2, dtype=np.float32)[..., -1].copy())
    worse = case.gate[case.labels] * (chain / values.shape[2])
    assert errors(worse, result).mean > 2 * errors(result.theirs, result).mean
    with pytest.raises(AssertionError, match="positive, out: ours"):
        assert_no_larger([Result("out", worse, result.theirs, result.exact, result.terms)], "positive")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_norms_of_half_gates_are_float32(dtype):
    """A penalty is added to losses in float32, and soon exceeds float16's largest number, 65504."""
    gate = torch.ones(1000, 100, dtype=dtype)
    assert csg_ext.gate_penalty(gate).item() == 99_900
    assert csg_ext.gate_penalty(gate[:10], norm="l2").item() == 900.0**2
    assert csg_ext.gate_penalty(gate, norm="smooth_l1").item() == 99_899.5
    gate = torch.rand(1000, 300).to(dtype).requires_grad_()
    density, penalty = csg_ext.l1_density(gate), csg_ext.gate_penalty(gate)
    assert density.dtype == penalty.dtype == torch.float32
    size = gate.detach().double().sum()
    torch.testing.assert_close(density.double(), size / gate.numel())
    torch.testing.assert_close(penalty.double(), size - 300)
    (grad,) = torch.autograd.grad(penalty, gate)
    assert grad.dtype == dtype and torch.equal(grad, gate.detach().sign())
