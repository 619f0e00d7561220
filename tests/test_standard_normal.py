"""NumPy's legacy stream of normal numbers, drawn column by column: the same bits, and the same state afterwards."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from csg_ext.ops import mutual_info
from csg_ext.ops.mutual_info import _noise

SIZES = [(1, 1), (3, 5), (7, 2), (300, 40), (2000, 131), (2, 200_000)]


@pytest.mark.parametrize("n, k", SIZES)
@pytest.mark.parametrize("before", [0, 1, 2])
@pytest.mark.parametrize("at_once", [2**24, 333])
def test_columns_equal_numpys(n, k, before, at_once, monkeypatch):
    """`before` numbers drawn first leave half a pair over, and other draws the words at an odd place; rows are drawn
    together as far as `at_once` numbers reach."""
    monkeypatch.setattr(mutual_info, "CHUNK_VALUES", at_once)
    theirs, ours = np.random.RandomState(n + before), np.random.RandomState(n + before)
    for rng in (theirs, ours):
        rng.bytes(4 * before)
        rng.standard_normal(before)
    want = theirs.standard_normal((n, k))
    begin, end = sorted(np.random.default_rng(k).integers(0, k + 1, 2))
    assert np.array_equal(_noise(ours, n, k, int(begin), int(end)).numpy(), want[:, begin:end])
    assert np.array_equal(ours.standard_normal(5), theirs.standard_normal(5))
    assert ours.bytes(9) == theirs.bytes(9)


def test_any_number_of_threads_draws_the_same():
    threads, drawn = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            drawn.append(_noise(5, 1000, 300, 0, 300))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])


def test_another_bit_generator_draws_itself():
    ours, theirs = (np.random.RandomState(np.random.PCG64(3)) for _ in range(2))
    assert np.array_equal(_noise(ours, 20, 4, 1, 3).numpy(), theirs.standard_normal((20, 4))[:, 1:3])
