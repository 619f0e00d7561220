"""The launchers of the CUDA kernels on tensors, run by tests/cuda_on_cpu; the structs mirror those in csrc."""

from __future__ import annotations

import ctypes

import torch
from mutual_info_inputs import psi_table
from stand_in import TYPES, Bool, Double, Enum, Int64, Pointer, StandIn, Traffic
from torch import Tensor


class GateRows(ctypes.Structure):
    _fields_ = [
        ("gate", Pointer),
        ("type", Enum),
        ("rows", Int64),
        ("labels", Pointer),
        ("col_max", Pointer),
        ("col_arg", Pointer),
    ]


class Forward(ctypes.Structure):
    _fields_ = [
        ("x", Pointer),
        ("x_type", Enum),
        ("pool", Enum),
        *((name, Int64) for name in ("n", "k", "s", "stride_n", "stride_k", "stride_s")),
        ("rows", GateRows),
        ("out", Pointer),
        ("pooled", Pointer),
        ("index", Pointer),
    ]


class Backward(ctypes.Structure):
    _fields_ = [
        ("grad_out", Pointer),
        ("grad_pooled", Pointer),
        ("pooled", Pointer),
        ("index", Pointer),
        ("pool", Enum),
        *((name, Int64) for name in ("n", "k", "s")),
        ("rows", GateRows),
        ("grad_x", Pointer),
        ("x_type", Enum),
        *((name, Int64) for name in ("stride_n", "stride_k", "stride_s")),
        ("grad_gate", Pointer),
    ]


class Step(ctypes.Structure):
    _fields_ = [
        ("gate", Pointer),
        ("grad", Pointer),
        ("buffer", Pointer),
        ("type", Enum),
        ("c", Int64),
        ("k", Int64),
        *((name, Double) for name in ("lr", "momentum", "dampening", "weight_decay")),
        ("nesterov", Bool),
        ("first_step", Bool),
        ("projection", Enum),
    ]


class ColumnMax(ctypes.Structure):
    _fields_ = [
        ("gate", Pointer),
        ("type", Enum),
        ("c", Int64),
        ("k", Int64),
        ("col_max", Pointer),
        ("col_arg", Pointer),
    ]


class MutualInfo(ctypes.Structure):
    _fields_ = [
        ("features", Pointer),
        ("type", Enum),
        *((name, Int64) for name in ("n", "k", "stride_n", "stride_k")),
        ("labels", Pointer),
        ("classes", Int64),
        ("neighbors", Int64),
        ("ties", Enum),
        ("noise", Pointer),
        ("noise_stride_n", Int64),
        ("noise_stride_k", Int64),
        ("multiclass", Bool),
        ("psi", Pointer),
        ("psi_bits", ctypes.c_int),
        ("out", Pointer),
    ]


class Kernels(StandIn):
    """The launchers on tensors."""

    def __init__(self) -> None:
        super().__init__()
        for index, struct in enumerate((Forward, Backward, Step, ColumnMax, MutualInfo)):
            self.check_size(index, struct)
        self.outside = (-1, 0)  # of the last mutual_info: the first label outside, and the work memory
        self.work = torch.empty(0, dtype=torch.uint8)

    def column_max(self, gate: Tensor) -> tuple[Tensor, Tensor]:
        gate = self.guarded(gate)
        top, where = self.empty(gate.shape[1], dtype=gate.dtype), self.empty(gate.shape[1], dtype=torch.int64)
        p = self.pointer
        self.call("csg_column_max", ColumnMax(p(gate), TYPES[gate.dtype], *gate.shape, p(top), p(where)))
        return top, where

    def rows(
        self, gate: Tensor, labels: Tensor | None, project: bool, copy: bool = True
    ) -> tuple[GateRows, list[Tensor | None]]:
        top, where = self.column_max(gate) if project else (None, None)
        keep = [self.guarded(gate) if copy else gate, self.guarded(labels), top, where]
        p = self.pointer
        rows = GateRows(p(keep[0]), TYPES[gate.dtype], gate.shape[0], p(keep[1]), p(top), p(where))
        return rows, keep

    def forward(
        self,
        x: Tensor,
        gate: Tensor,
        labels: Tensor | None,
        pool: str = "avg",
        project: bool = False,
        copy: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """x (N, K, S) with any strides the kernels take."""
        n, k, s = x.shape
        x = self.guarded(x) if copy else x
        rows, keep = self.rows(gate, labels, project, copy)
        out, pooled = self.empty(n, k, dtype=gate.dtype), self.empty(n, k, dtype=gate.dtype)
        index = self.empty(n, k, dtype=torch.int64) if pool == "max" else None
        p = self.pointer
        parameters = Forward(
            p(x), TYPES[x.dtype], pool == "max", n, k, s, *x.stride(), rows, p(out), p(pooled), p(index)
        )
        self.call("csg_gated_pool_forward", parameters)
        del keep
        return out, pooled, index

    def backward(
        self,
        x: Tensor,
        gate: Tensor,
        labels: Tensor | None,
        grad_out: Tensor | None,
        grad_pooled: Tensor | None,
        pooled: Tensor,
        index: Tensor | None,
        project: bool = False,
        want: tuple[bool, bool] = (True, True),
    ) -> tuple[Tensor | None, Tensor | None]:
        """x gives the shape, the type and the layout of grad_x: (N, K) shared values where x.stride(2) is 0 (avg)."""
        n, k, s = x.shape
        rows, keep = self.rows(gate, labels, project)
        keep += [self.guarded(t) for t in (grad_out, grad_pooled, pooled, index)]
        shared = index is None and s > 1 and x.stride(2) == 0
        blank = torch.empty_like(x[..., :1] if shared else x).fill_(float("nan"))
        grad_x = self.guarded(blank) if want[0] else None
        grad_gate = self.empty(*gate.shape, dtype=gate.dtype) if want[1] else None
        strides = (k, 1, 0) if shared else x.stride() if grad_x is None else grad_x.stride()
        p = self.pointer
        parameters = Backward(
            *map(p, keep[4:]), index is not None, n, k, s, rows, p(grad_x), TYPES[x.dtype], *strides, p(grad_gate)
        )
        self.call("csg_gated_pool_backward", parameters)
        return grad_x.expand(n, k, s) if shared and grad_x is not None else grad_x, grad_gate

    def step(
        self,
        gate: Tensor,
        grad: Tensor | None,
        buffer: Tensor | None = None,
        *,
        lr: float = 0.0,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        first_step: bool = False,
        method: str = "scale",
    ) -> tuple[Tensor, Tensor | None]:
        gate, grad, buffer = self.guarded(gate), self.guarded(grad), self.guarded(buffer)
        p = self.pointer
        parameters = Step(
            *map(p, (gate, grad, buffer)),
            TYPES[gate.dtype],
            *gate.shape,
            *(lr, momentum, dampening, weight_decay, nesterov, first_step, method == "euclidean"),
        )
        self.call("csg_gate_step", parameters)
        return gate, buffer

    def mutual_info(
        self,
        features: Tensor,
        labels: Tensor,
        classes: int,
        k: int,
        noise: Tensor | None = None,
        multiclass: bool = False,
        features_at_once: int = 256,
        copy: bool = True,
    ) -> Tensor:
        """The result, and what is not written stays NaN; work memory for about so many features at once."""
        n, width = features.shape
        psi, bits = psi_table(n)
        keep = [self.guarded(t) if copy else t for t in (features, labels, noise, psi)]
        out = self.empty(width, 1 if multiclass else classes, dtype=torch.float64)
        p = self.pointer
        parameters = MutualInfo(
            p(keep[0]),
            TYPES[features.dtype],
            *features.shape,
            *features.stride(),
            p(keep[1]),
            classes,
            k,
            noise is None,
            p(keep[2]),
            *((0, 0) if noise is None else noise.stride()),
            multiclass,
            p(keep[3]),
            bits,
            p(out),
        )
        needed = Int64()
        parameters.k = min(width, features_at_once)
        self.call("csg_mutual_info_bytes", parameters, ctypes.byref(needed))
        parameters.k = width
        self.work, outside = self.buffer(needed.value, torch.uint8).fill_(255), (Int64 * 2)()
        self.call("csg_mutual_info", parameters, Pointer(self.work.data_ptr()), needed, outside)
        self.outside = tuple(outside)
        return out


class CountedKernels(Traffic, Kernels):
    """The launchers, and what they load and store."""
