"""gate_step_ and project_gate_: the optimizer step of a class-specific gate and its projection, fused."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from csg_ext import reference
from csg_ext.ops._errors import (
    check_dense,
    check_writable,
    dtype_name,
    explained,
    fake_check_device,
    fake_check_floating,
    real,
)

METHODS = {"scale": False, "euclidean": True}


def project_gate(gate: Tensor, method: str = "scale") -> Tensor:
    """Project a gate onto V_G = {G in [0,1]^(C x K) : max_c G[c, k] = 1 for every k}; out of place, differentiable.

    Source: Liang et al., ECCV 2020, section 3.3 (the approximate projected gradient).

    Args:
        gate: (C, K), floating point.
        method: "scale" divides each column by its inf-norm (over the positive part) and clips to [0, 1];
            "euclidean" takes the nearest point of V_G: clip, then set the first largest entry to 1.

    Returns:
        (C, K). A column without a positive entry becomes one-hot at its (first) largest entry; a column that holds a
        NaN becomes NaN throughout, so that it is seen.

    Raises:
        ValueError: a gate that is not a matrix, or an unknown method. TypeError: a dtype that is not floating point.

    Example:
        >>> gate = torch.tensor([[0.5, -1.0], [0.25, -2.0]])
        >>> project_gate(gate)
        tensor([[1.0000, 1.0000],
                [0.5000, 0.0000]])
        >>> project_gate(gate, "euclidean")
        tensor([[1.0000, 1.0000],
                [0.2500, 0.0000]])
    """
    _check_gate("project_gate", gate, method)
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    if (torch.is_grad_enabled() and gate.requires_grad) or transformed:
        return reference.project_gate(gate, method)
    return project_gate_(gate.detach().clone(memory_format=torch.contiguous_format), method)


def project_gate_(gate: Tensor, method: str = "scale") -> Tensor:
    """In-place :func:`project_gate`, one launch, outside autograd; returns ``gate``.

    Arguments and errors: as :func:`project_gate`; ValueError also for a gate that is expanded or overlaps itself, that
    is no leaf of the graph outside ``torch.no_grad()``, and for an inference tensor outside ``torch.inference_mode()``.
    """
    _check_gate("project_gate_", gate, method)
    check_writable("project_gate_", "gate", gate)
    return _step("project_gate_", gate, None, None, 0.0, 0.0, 0.0, 0.0, False, False, METHODS[method])


def gate_step_(
    gate: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None = None,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    first_step: bool = False,
    method: str = "scale",
) -> Tensor:
    """One SGD step on the gate and its projection, in place and in one launch, outside autograd.

    The update is torch.optim.SGD's: ``d = grad + weight_decay * gate``; ``buffer = momentum * buffer +
    (1 - dampening) * d`` (``buffer = d`` with ``first_step``); ``gate -= lr * buffer``, or with ``nesterov``
    ``gate -= lr * (d + momentum * buffer)``; then :func:`project_gate_`.

    Args:
        gate: (C, K), updated in place.
        grad: (C, K), the dtype of ``gate``.
        momentum_buffer: (C, K), updated in place; needed when ``momentum`` is not 0.
        lr: learning rate, >= 0.
        first_step: initialise the buffer with the gradient, as SGD does at its first step.
        method: the projection, see :func:`project_gate`.

    Returns:
        ``gate``.

    Raises:
        ValueError: shapes, options or devices that do not fit, and what :func:`project_gate_` may not update.
        TypeError: dtypes that do not fit.

    Example:
        >>> gate = torch.tensor([[0.5], [0.5]])
        >>> gate_step_(gate, torch.tensor([[-0.5], [1.5]]), lr=0.1)     # 0.55 and 0.35, divided by 0.55
        tensor([[1.0000],
                [0.6364]])
    """
    _check_gate("gate_step_", gate, method)
    check_dense("gate_step_", "grad", grad)
    if momentum_buffer is not None:
        check_dense("gate_step_", "momentum_buffer", momentum_buffer)
        check_writable("gate_step_", "momentum_buffer", momentum_buffer)
    check_writable("gate_step_", "gate", gate)
    lr, momentum = real("gate_step_", "lr", lr), real("gate_step_", "momentum", momentum)
    dampening, weight_decay = (
        real("gate_step_", "dampening", dampening), real("gate_step_", "weight_decay", weight_decay)
    )  # fmt: skip
    for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
        if not value >= 0:
            raise ValueError(f"gate_step_: {name} must be >= 0, got {value}")
    if math.isnan(dampening):
        raise ValueError(f"gate_step_: dampening must be a number, got {dampening}")
    if momentum and momentum_buffer is None:
        raise ValueError(f"gate_step_: momentum = {momentum} needs a momentum_buffer, got None")
    if nesterov and (momentum == 0 or dampening != 0):
        raise ValueError(
            f"gate_step_: nesterov needs momentum > 0 and dampening = 0, got momentum = {momentum} and "
            f"dampening = {dampening}"
        )
    return _step(
        "gate_step_", gate, grad, momentum_buffer, lr, momentum, dampening, weight_decay, nesterov, first_step,
        METHODS[method],
    )  # fmt: skip


def _check_gate(op: str, gate: Tensor, method: str) -> None:
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"{op}: method must be 'scale' or 'euclidean', got {method!r}")
    check_dense(op, "gate", gate)
    if gate.dim() != 2:
        raise ValueError(f"{op}: gate must have the shape (C, K), got {tuple(gate.shape)}")
    if not gate.is_floating_point():
        raise TypeError(f"{op}: gate must be float32, float64, float16 or bfloat16, got {gate.dtype}")


@torch.no_grad()
def _step(op: str, gate: Tensor, grad: Tensor | None, buffer: Tensor | None, *options: float | bool) -> Tensor:
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(gate).tangent is not None:
        raise ValueError(f"{op}: gate is updated outside autograd and must have no forward-mode tangent, got one")
    # A strided gate or buffer, or one that negates its memory, goes through a dense copy: the kernel takes whole ones.
    dense_gate = gate.contiguous().resolve_neg()
    dense_buffer = None if buffer is None else buffer.contiguous().resolve_neg()
    eager = not torch.compiler.is_compiling()
    try:
        with _below_versions() if eager else contextlib.nullcontext():
            _kernel(dense_gate, grad, dense_buffer, *options)
    except (RuntimeError, NotImplementedError) as error:
        raise explained(error, op, gate.device, gate=gate, grad=grad, momentum_buffer=buffer) from None
    for tensor, dense in ((gate, dense_gate), (buffer, dense_buffer)):
        if tensor is None or dense is None:
            continue
        if dense is not tensor:
            tensor.copy_(dense)
        elif eager:
            increment_version(tensor)
    return gate


# A graph that saved the old values must notice. _step tells it without this detour, which takes as long as the kernel
# of a small gate; compiled and exported graphs call the operator itself.
def _increment_versions(keys: Any, gate: Tensor, grad: Tensor | None, buffer: Tensor | None, *options: Any) -> None:
    increment_version(gate if buffer is None else (gate, buffer))
    _kernel.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, gate, grad, buffer, *options)


_kernel = torch.ops.csg_ext.gate_step_.default
_below_versions = torch._C._AutoDispatchBelowADInplaceOrView
_library = torch.library.Library("csg_ext", "IMPL")
_library.impl("gate_step_", _increment_versions, "ADInplaceOrView", with_keyset=True)


# ---- checks and shapes for torch.compile, torch.export and meta tensors: the kernels' own, in their words ------------


def _fake_check_gate(op: str, gate: Tensor) -> None:
    torch._check(gate.dim() == 2, lambda: f"{op}: gate must have the shape (C, K), got {tuple(gate.shape)}")
    fake_check_floating(op, "gate", gate.dtype)


def _fake_check_contiguous(name: str, tensor: Tensor) -> None:
    text = f"gate_step_: {name} must be contiguous, got other strides"
    torch._check(tensor.is_contiguous(), lambda: text)


@torch.library.register_fake("csg_ext::gate_step_")
def _fake_gate_step(gate: Tensor, grad: Tensor | None, momentum_buffer: Tensor | None, *_: object) -> None:
    _fake_check_gate("gate_step_", gate)
    _fake_check_contiguous("gate", gate)
    for name, tensor in (("grad", grad), ("momentum_buffer", momentum_buffer)):
        if tensor is None:
            continue
        fake_check_device("gate_step_", name, tensor, gate)
        types = dtype_name(gate.dtype), dtype_name(tensor.dtype)
        text = f"gate_step_: {name} must have the dtype of gate, {types[0]}, got {types[1]}"
        torch._check(tensor.dtype == gate.dtype, lambda text=text: text)
        text = f"gate_step_: {name} must have the shape of gate, {tuple(gate.shape)}, got {tuple(tensor.shape)}"
        torch._check(tensor.dim() == 2, lambda text=text: text)
        for size, expected in zip(tensor.shape, gate.shape, strict=True):
            torch._check(size == expected, lambda text=text: text)
    if momentum_buffer is not None:
        _fake_check_contiguous("momentum_buffer", momentum_buffer)


@torch.library.register_fake("csg_ext::column_max")
def _fake_column_max(gate: Tensor) -> tuple[Tensor, Tensor]:
    _fake_check_gate("column_max", gate)
    torch._check(gate.shape[0] > 0, lambda: f"column_max: gate must have at least one row, got {tuple(gate.shape)}")
    return gate.new_empty(gate.shape[1]), gate.new_empty(gate.shape[1], dtype=torch.int64)
