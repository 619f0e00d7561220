"""gated_pool as a Triton user would write it: a peer on GPUs, imported only where there is one.

Forward: a program reads the rows of BLOCK_K channels of one sample in masked tiles, sums them in fp32 and multiplies
the mean by the gate's row. Backward: a program writes grad_x of the same rows as a fill; the gate's gradient is one
index_add_ of (N, K) values. Strides tell Triton which axis is contiguous, so maps of rows and channels-last maps share
the kernels. Like every peer it is checked against fp64 before it is timed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # elements that a program holds at a time


@triton.jit
def _forward(x, gate, labels, out, pooled, k_size, s_size, x_n, x_k, x_s, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr):
    n = tl.program_id(1).to(tl.int64)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    row = x + n * x_n + k[:, None] * x_k
    total = tl.zeros((BLOCK_K, BLOCK_S), dtype=tl.float32)
    for begin in range(0, s_size, BLOCK_S):
        s = begin + tl.arange(0, BLOCK_S)
        inside = (k < k_size)[:, None] & (s < s_size)[None, :]
        total += tl.load(row + s[None, :] * x_s, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(total, axis=1) / s_size
    weight = tl.load(gate + tl.load(labels + n) * k_size + k, mask=k < k_size).to(tl.float32)
    tl.store(pooled + n * k_size + k, mean, mask=k < k_size)
    tl.store(out + n * k_size + k, mean * weight, mask=k < k_size)


@triton.jit
def _backward(grad, gate, labels, grad_x, k_size, s_size, x_n, x_k, x_s, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr):
    n = tl.program_id(1).to(tl.int64)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    weight = tl.load(gate + tl.load(labels + n) * k_size + k, mask=k < k_size).to(tl.float32)
    value = tl.load(grad + n * k_size + k, mask=k < k_size).to(tl.float32) * weight / s_size
    tile = tl.broadcast_to(value[:, None], (BLOCK_K, BLOCK_S)).to(grad_x.dtype.element_ty)
    row = grad_x + n * x_n + k[:, None] * x_k
    for begin in range(0, s_size, BLOCK_S):
        s = begin + tl.arange(0, BLOCK_S)
        tl.store(row + s[None, :] * x_s, tile, mask=(k < k_size)[:, None] & (s < s_size)[None, :])


def _launch(kernel: Any, x: Tensor, *tensors: Tensor) -> None:
    """Runs a kernel over x (N, K, S): tiles as wide along the contiguous axis as TILE and the map allow."""
    n, k, s = x.shape
    if x.stride(2) == 1:
        block_s = min(triton.next_power_of_2(s), 1024)
        block_k = min(triton.next_power_of_2(k), max(1, TILE // block_s))
    else:
        block_k = min(triton.next_power_of_2(k), 128)
        block_s = min(triton.next_power_of_2(s), TILE // block_k)
    grid = (triton.cdiv(k, block_k), n)
    kernel[grid](*tensors, k, s, *x.stride(), BLOCK_K=block_k, BLOCK_S=block_s)


class _GatedPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, labels: Tensor) -> Tensor:
        flat = x.flatten(2)
        out, pooled = gate.new_empty(flat.shape[:2]), gate.new_empty(flat.shape[:2], dtype=torch.float32)
        _launch(_forward, flat, flat, gate, labels, out, pooled)
        ctx.save_for_backward(gate, labels, pooled)
        ctx.like = x.shape, x.stride(), x.dtype
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, labels, pooled = ctx.saved_tensors
        shape, strides, dtype = ctx.like
        grad = grad.contiguous()
        grad_x = torch.empty_strided(shape, strides, dtype=dtype, device=grad.device)
        flat = grad_x.flatten(2)
        _launch(_backward, flat, grad, gate, labels, flat)
        grad_gate = torch.zeros(gate.shape, device=grad.device).index_add_(0, labels, grad * pooled)
        return grad_x, grad_gate.to(gate.dtype), None


def gated_pool(x: Tensor, gate: Tensor, labels: Tensor) -> Tensor:
    """G[labels] * mean(x), (N, K), from x (N, K, *spatial), contiguous or channels-last."""
    return _GatedPool.apply(x, gate.contiguous(), labels)
