"""Inputs of gated_pool in every dtype and layout, and the comparison with its definition in fp64."""

from __future__ import annotations

import torch
from tolerances import assert_within
from torch import Tensor

import csg_ext
from csg_ext import reference

F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
TYPES = [(F32, F32), (F64, F64), (F16, F16), (BF16, BF16), (F16, F32), (BF16, F32)]
TYPE_IDS = [f"{str(a)[6:]}-{str(b)[6:]}" for a, b in TYPES]

# Odd sizes on purpose: below one vector, not a multiple of one, exactly one, several blocks of channels.
SHAPES = [(3, 5), (1, 1, 1), (4, 7, 9), (2, 3, 1, 1), (8, 64, 4, 4), (3, 33, 7, 7), (2, 300, 13, 5), (2, 3, 67, 41)]
SHAPES += [(2, 5, 3, 4, 5), (2, 1030, 2, 2), (1, 1, 50, 60), (5, 16, 3, 3)]


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def sliced(x: Tensor) -> Tensor:
    """The middle of a larger tensor: rows stay contiguous, channels and samples do not, the start is misaligned."""
    n, k, *rest = x.shape
    big = x.new_zeros(n + 2, k + 3, *rest)
    big[1 : n + 1, 2 : k + 2] = x
    return big[1 : n + 1, 2 : k + 2]


def strided(x: Tensor) -> Tensor:
    """Every second position of a larger tensor: no native layout."""
    if x.dim() < 3:
        return x
    big = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])
    big[..., ::2] = x
    return big[..., ::2]


LAYOUTS = {"rows": lambda x: x, "channels_last": channels_last, "sliced": sliced, "strided": strided}


def inputs(shape, types, device="cpu", classes=6, soft=False, project=False):
    x = torch.randn(*shape, device=device).to(types[0])
    gate = torch.rand(classes, shape[1], device=device)
    if project:
        gate = gate * 3 - 0.7
        gate[:, ::5] = -gate[:, ::5].abs() - 0.1  # columns without a positive entry
    gate = gate.to(types[1])
    if soft:
        labels = torch.rand(shape[0], classes, device=device).to(types[1])
    else:
        labels = torch.randint(0, classes, (shape[0],), device=device)
    return x, gate, labels


def reference_gate(gate: Tensor, options: dict) -> Tensor:
    return (reference.project_gate(gate) if options.get("project") else gate).detach()


def compare(x, gate, labels, **options):
    """Forward and backward of the kernel against the fp64 definition."""
    x, gate = x.detach().requires_grad_(), gate.detach().requires_grad_()
    x64, gate64 = x.detach().double().requires_grad_(), gate.detach().double().requires_grad_()
    soft = labels.is_floating_point()
    labels64 = labels.double() if soft else labels
    out, pooled = csg_ext.gated_pool(x, gate, labels, return_pooled=True, **options)
    want, want_pooled = reference.gated_pool(x64, gate64, labels64, return_pooled=True, **options)
    assert out.dtype == pooled.dtype == gate.dtype
    row = reference.gate_rows(gate64, labels64, options.get("project", False)).detach()
    channels_second = options.get("channel_dim", 1) == 1
    magnitude = x64.detach().abs()
    if x.dim() > 2:
        magnitude = magnitude.flatten(2).mean(2) if channels_second else magnitude.mean(1)
    row_magnitude = row.abs() if not soft else labels64.abs() @ reference_gate(gate64, options).abs()
    row_error = 0.0 if gate.dtype in (F32, F64) or not soft else torch.finfo(gate.dtype).eps
    assert_within(pooled, want_pooled, magnitude, "pooled")
    assert_within(out, want, magnitude * row_magnitude * (1 + row_error / torch.finfo(F32).eps), "out")

    grad_out, grad_pooled = torch.randn_like(out), torch.randn_like(pooled)
    got_x, got_gate = torch.autograd.grad((out, pooled), (x, gate), (grad_out, grad_pooled))
    want_x, want_gate = torch.autograd.grad(
        (want, want_pooled), (x64, gate64), (grad_out.double(), grad_pooled.double())
    )
    spread = grad_out.double().abs() * row_magnitude + grad_pooled.double().abs()
    spatial = [1] * (x.dim() - 2)
    magnitude_x = spread.reshape(*spread.shape, *spatial) if channels_second else spread[:, None]
    soft_row = torch.finfo(gate.dtype).eps / torch.finfo(F32).eps if soft and gate.dtype in (F16, BF16) else 1.0
    assert got_x.dtype == x.dtype and got_gate.dtype == gate.dtype
    assert_within(got_x, want_x, magnitude_x * soft_row, "gradient of x")
    # Each term carries the rounding of pooled (and, for weights, of the terms) to the gate's dtype.
    product, rounded = (grad_out.double() * want_pooled.detach()).abs(), grad_out.double().abs() * magnitude
    if soft:
        terms = product.sum(0, keepdim=True) * labels64.abs().max() + rounded.sum(0, keepdim=True)
    else:
        terms = torch.zeros_like(gate64).index_add(0, labels, product + rounded)
    if options.get("project"):
        top = gate64.detach().max(0).values
        terms = terms * (1 + len(gate)) if soft else terms + (product + rounded).sum(0)
        terms = terms / torch.where(top > 0, top, 1.0)
    rounding = torch.finfo(gate.dtype).eps / torch.finfo(F32).eps if gate.dtype in (F16, BF16) else 1.0
    assert_within(got_gate, want_gate, terms * max(1.0, rounding / 40), "gradient of gate")
