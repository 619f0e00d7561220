"""What the CUDA kernels move, counted by the build of tests/cuda_on_cpu that counts: each byte once, in whole sectors."""

from __future__ import annotations

import itertools

import pytest
import torch
from stand_in import Counts, Moved
from stand_in_kernels import CountedKernels
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SIZES = [(16, 64, 49), (16, 64, 64), (4, 32, 784), (1, 5, 12544), (6, 48, 197)]
SIZE_IDS = ["7x7", "8x8", "28x28", "112x112", "197 tokens"]


@pytest.fixture(scope="module")
def kernels() -> CountedKernels:
    return CountedKernels()


def once(counts: Counts, size: int, edges: float = 0.0) -> None:
    """Every byte of `size` moves exactly once, and few sectors are touched by two accesses."""
    assert (counts.bytes, counts.touched_bytes) == (size, size)
    assert counts.touched_sectors <= counts.sectors <= counts.touched_sectors * (1 + edges)
