"""How far a kernel's result may be from the fp64 definition, derived per dtype.

A result is rounded once to its dtype (eps(out) relative), after sums in the accumulator (fp32, or fp64 for double):
a chain of at most 160 additions (a block of 2048 values in 16 partial sums) errs by at most 160 eps(acc) of the mean
magnitude. Half inputs are exact in fp32. A gradient of the gate multiplies a rounded gradient by a pooled value that
was itself rounded to the dtype, and adds one per sample of a class.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHAIN = 160


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_within(got: Tensor, want: Tensor, magnitude: Tensor | float, what: str) -> None:
    """|got - want| <= 2 eps(dtype) |want| + CHAIN eps(acc) magnitude + a subnormal; NaN exactly where want is NaN."""
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    info, acc = torch.finfo(got.dtype), torch.finfo(accumulator(got.dtype))
    got64, want64 = got.detach().double().cpu(), want.detach().double().cpu()
    if isinstance(magnitude, Tensor):
        magnitude = magnitude.detach().double().cpu()
    bound = 2 * info.eps * want64.abs() + CHAIN * acc.eps * magnitude + info.smallest_normal * info.eps
    assert torch.equal(got64.isnan(), want64.isnan()), f"{what}: NaN at other places"
    finite = want64.isfinite()
    assert torch.equal(got64[~finite & ~want64.isnan()], want64[~finite & ~want64.isnan()]), (
        f"{what}: infinities differ"
    )
    error = (got64 - want64).abs()
    ok = (error <= bound) | ~finite
    worst = (error / bound).where(finite, 0.0).max().item() if error.numel() else 0.0
    assert bool(ok.all()), f"{what}: error {worst:.2f} times the bound"
