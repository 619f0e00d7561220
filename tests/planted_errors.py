"""Errors that the sanitizers must report in the operators' own libraries: `planted_errors.py overrun | overflow`.

CTest runs it where the libraries are sanitized, and wants the report; without sanitizers nothing may show.
"""

from __future__ import annotations

import ctypes
import sys

import numpy as np
import torch

import csg_ext


def overrun() -> None:
    """A feature map whose memory ends one element before its last channel does."""
    n, k, s = 2, 5, 49
    size = n * k * s
    allocate = ctypes.CDLL(None).malloc
    allocate.restype, allocate.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    memory = ctypes.cast(allocate(4 * (size - 1)), ctypes.POINTER(ctypes.c_float))
    x = torch.from_numpy(np.ctypeslib.as_array(memory, (n, k, s)))
    csg_ext.gated_pool(x, torch.ones(3, k), torch.tensor([0, 2]))


def overflow() -> None:
    """A table of digamma whose sums exceed 64 bits."""
    n = 40
    labels = torch.arange(n) % 2
    table = torch.full((n + 1,), 2**62)
    torch.ops.csg_ext.class_mutual_info(torch.rand(n, 3), labels, 2, 3, None, False, table, 50)


if __name__ == "__main__":
    {"overrun": overrun, "overflow": overflow}[sys.argv[1]]()
