"""What the fuzz tests share: how many examples, and tensors of drawn layouts, dtypes and extreme values.

CI draws the same examples in every run; CSG_FUZZ=N tries N new ones for each test.
"""

from __future__ import annotations

import os

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("CSG_FUZZ", "0"))
fuzz = settings(
    max_examples=EXAMPLES or 150,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SPECIAL = [float("inf"), float("-inf"), float("nan"), -0.0, 0.0]


def sizes(low, high):
    return st.integers(low, high)


@st.composite
def matrices(draw, shape, dtype, low=-2.0, high=2.0, finite=False, scaled=True):
    """Values of a magnitude that is drawn, some of them special."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    values = torch.rand(shape, generator=generator, dtype=torch.float64) * (high - low) + low
    info = torch.finfo(dtype)
    if scaled:  # products of the largest stay finite
        values *= draw(st.sampled_from([1.0, 1.0, info.smallest_normal / 4, info.tiny, info.max**0.4]))
    if not finite:
        special = draw(st.lists(st.sampled_from([*SPECIAL, info.smallest_normal / 8]), max_size=3))
        for value in special:
            chosen = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.01, 0.2]))
            values[chosen] = value
    return values.to(dtype)


@st.composite
def strided(draw, shape, dtype, written=False, **values):
    """A tensor of that shape: dense, its axes stored in another order, with gaps, at an odd offset, or expanded.

    written: it is to be written to, which an expanded one cannot be.
    """
    kind = draw(st.sampled_from(["dense", "order", "gaps", "offset"] + ["expanded"] * (not written)))
    if kind == "order":
        order = draw(st.permutations(range(len(shape))))
        stored = draw(matrices([shape[axis] for axis in order], dtype, **values))
        return stored.permute([order.index(axis) for axis in range(len(shape))])
    if kind == "gaps":
        axis = draw(st.integers(0, len(shape) - 1))
        wide = list(shape)
        wide[axis] = 2 * wide[axis]
        return draw(matrices(wide, dtype, **values))[(slice(None),) * axis + (slice(None, None, 2),)]
    if kind == "offset":
        size = int(torch.Size(shape).numel())
        return draw(matrices([size + 3], dtype, **values))[3:].view(shape)
    if kind == "expanded":
        axis = draw(st.integers(0, len(shape) - 1))
        narrow = list(shape)
        narrow[axis] = 1
        return draw(matrices(narrow, dtype, **values)).expand(shape)
    return draw(matrices(shape, dtype, **values))
