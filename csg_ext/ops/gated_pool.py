"""gated_pool: the class-specific gate fused with global pooling, in one read of the feature map."""

from __future__ import annotations

import contextlib
import functools
import math
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from csg_ext import reference
from csg_ext.ops._errors import dtype_name, explained, fake_check_device, fake_check_floating

_POOLS = {"avg": 0, "max": 1}
_AVG = 0
_WIDE = torch.float32, torch.float64
_SHARED = 2  # layout of a gradient of x that is (N, K) values, a broadcast view; 0: contiguous, 1: channels last
_forward_kernel = torch.ops.csg_ext._gated_pool.default
_backward_kernel = torch.ops.csg_ext.gated_pool_backward.default


@overload
def gated_pool(
    x: Tensor,
    gate: Tensor,
    labels: Tensor,
    *,
    pool: str = ...,
    return_pooled: Literal[False] = ...,
    project: bool = ...,
    channel_dim: int = ...,
    validate: bool = ...,
) -> Tensor: ...
@overload
def gated_pool(
    x: Tensor,
    gate: Tensor,
    labels: Tensor,
    *,
    pool: str = ...,
    return_pooled: Literal[True],
    project: bool = ...,
    channel_dim: int = ...,
    validate: bool = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def gated_pool(
    x: Tensor,
    gate: Tensor,
    labels: Tensor,
    *,
    pool: str = ...,
    return_pooled: bool,
    project: bool = ...,
    channel_dim: int = ...,
    validate: bool = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
def gated_pool(
    x: Tensor,
    gate: Tensor,
    labels: Tensor,
    *,
    pool: str = "avg",
    return_pooled: bool = False,
    project: bool = False,
    channel_dim: int = 1,
    validate: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Pool a feature map over space and multiply each sample by the gate's row of its own label (the CSG path).

    ``out[n, k] = G[labels[n], k] * pool_s x[n, k, s]``, from one read of ``x``; no mask is built, and backward keeps
    only (N, K) values. Source: Liang et al., ECCV 2020, section 3.2 ("CSG path").

    Args:
        x: feature map (N, K, *spatial) with 0 to 3 spatial axes, contiguous or channels-last (other strides work, some
            by a copy); or tokens (N, L, K) with ``channel_dim=-1``. float32, float64, float16 or bfloat16.
        gate: (C, K), the dtype of ``x``, or float32 with half ``x`` (the result is then float32).
        labels: int64 class indices (N,); or floating-point weights (N, C) for mixup, soft and multi-label targets, for
            which the row is ``labels @ gate``. Weights are differentiable too; one-hot rows are such weights.
        pool: "avg" or "max". For "max" the gate multiplies the maximum, which equals the maximum of the gated map for
            every gate >= 0; the gradient goes to the first maximum; a NaN wins.
        return_pooled: also return the ungated (N, K): both paths of training from one read.
        project: take ``gate`` as an unconstrained parameter and use the row of ``clip(gate / ||column||_inf, 0, 1)``
            (see :func:`project_gate`) with its exact subgradient, so that any optimizer works without a projection
            step. With class indices no projected gate is written.
        channel_dim: the axis of the K channels: 1, or -1 for token layouts.
        validate: on CUDA, check that labels are in [0, C) (a device-to-host copy, which waits for the GPU). Without
            it a sample whose label is outside [0, C) comes out as NaN, never as another class's row. On the CPU labels
            are always checked, but under a ``torch.func`` transform or a dual level inside a compiled function: NaN
            there, too.

    Returns:
        (N, K), and with ``return_pooled`` also the pooled (N, K), both in the dtype of ``gate``. Gradients of any order
        flow to ``x``, ``gate`` and weights, from the pooled to ``x`` alone; the gate's gradient is deterministic. The
        mean's gradient of ``x`` may be a broadcast view, as that of ``torch.sum``: a hook must not write into it.
        Forward-mode derivatives are those of PyTorch's operators, without the fused kernel.

    Raises:
        ValueError: shapes, labels or devices that do not fit.
        TypeError: an argument of the wrong type or dtype.

    Example:
        >>> x = torch.tensor([[[1.0, 3.0], [4.0, 8.0]]])                # one sample, two filters, two positions
        >>> gate = torch.tensor([[1.0, 0.0], [0.5, 1.0]])               # two classes
        >>> gated_pool(x, gate, torch.tensor([1]))
        tensor([[1., 6.]])
        >>> gated, pooled = gated_pool(x, gate, torch.tensor([0]), pool="max", return_pooled=True)
        >>> gated, pooled
        (tensor([[3., 0.]]), tensor([[3., 8.]]))
    """
    mode = _POOLS.get(pool) if isinstance(pool, str) else None
    if mode is None:
        raise ValueError(f"gated_pool: pool must be 'avg' or 'max', got {pool!r}")
    if not (isinstance(x, Tensor) and isinstance(gate, Tensor) and isinstance(labels, Tensor)):
        name, value = next(
            (n, v) for n, v in (("x", x), ("gate", gate), ("labels", labels)) if not isinstance(v, Tensor)
        )
        raise TypeError(f"gated_pool: {name} must be a torch.Tensor, got {type(value).__name__}")
    if channel_dim != 1:
        if x.dim() < 2 or channel_dim not in (-1, x.dim() - 1):
            raise ValueError(
                f"gated_pool: channel_dim must be 1 or -1, got {channel_dim} for x of shape {tuple(x.shape)}"
            )
        x = x.movedim(-1, 1)
    rows: Tensor | None = labels
    if labels.is_floating_point():
        gate, rows, project = _soft_rows(x, gate, labels, project), None, False
    elif validate and labels.is_cuda and labels.numel() and gate.dim() == 2:
        _validate_labels(labels, gate.shape[0])
    top = where = None
    if torch.compiler.is_compiling():
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            return _in_operators(x, gate, rows, project, pool, return_pooled)
        if project:
            top, where = torch.ops.csg_ext.column_max.default(gate.detach())
        out, pooled, _ = torch.ops.csg_ext.gated_pool.default(x, gate, rows, top, where, mode)
        return (out, pooled) if return_pooled else out
    if forward_ad._current_level >= 0:
        return _forward_mode(x, gate, rows, project, pool, return_pooled)
    if torch._C._are_functorch_transforms_active():
        if project:
            gate = _projected(gate)
        out, pooled, _ = _TransformedGatedPool.apply(x, gate, rows, None, None, mode)
        return (out, pooled) if return_pooled else out
    try:
        if project:
            top, where = torch.ops.csg_ext.column_max.default(gate.detach())
        if torch.is_grad_enabled() and (x.requires_grad or gate.requires_grad):
            out, pooled = _apply_gated_pool(x, gate, rows, top, where, mode)
        else:
            out, pooled, _ = _forward_kernel(x, gate, rows, top, where, mode)
    except (RuntimeError, NotImplementedError) as error:
        raise explained(error, "gated_pool", x.device, x=x, gate=gate, labels=rows) from None
    return (out, pooled) if return_pooled else out


def _forward_mode(
    x: Tensor, gate: Tensor, labels: Tensor | None, project: bool, pool: str, return_pooled: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """With the tangents of forward-mode derivatives, which the kernels do not know: in PyTorch's operators.

    labels None: gate is the rows (N, K).
    """
    if not torch._C._are_functorch_transforms_active():
        try:  # for its checks
            _forward_kernel(x.detach(), gate.detach(), labels, None, None, _POOLS[pool])
        except (RuntimeError, NotImplementedError) as error:
            raise explained(error, "gated_pool", x.device, x=x, gate=gate, labels=labels) from None
    elif labels is not None:
        plain = labels
        while torch._C._functorch.is_functorch_wrapped_tensor(plain):
            plain = torch._C._functorch.get_unwrapped(plain)
        _validate_labels(plain.flatten(), gate.shape[0])
    return _in_operators(x, gate, labels, project, pool, return_pooled)


def _in_operators(
    x: Tensor, gate: Tensor, labels: Tensor | None, project: bool, pool: str, return_pooled: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """In PyTorch's operators, which every transform knows. labels None: gate is the rows (N, K)."""
    if project:
        gate = _projected(gate)
    if labels is not None:  # NaN for one outside [0, C), as on CUDA: a compiler does not know their values
        inside = (labels >= 0) & (labels < gate.shape[0])
        gate = torch.where(inside[:, None], gate[torch.where(inside, labels, 0)], torch.nan)
    rows = torch.arange(x.shape[0], device=x.device)
    return reference.gated_pool(x, gate, rows, pool=pool, return_pooled=return_pooled)


def _validate_labels(labels: Tensor, classes: int) -> None:
    wrong = ((labels < 0) | (labels >= classes)).nonzero()
    if len(wrong):
        n = int(wrong[0, 0])
        raise ValueError(f"gated_pool: labels[{n}] = {int(labels[n])} is outside [0, {classes})")


def _is_traced() -> bool:
    """Whether a transform or a mode of PyTorch runs, under which values may not be looked at."""
    return torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack() > 0


def _projected(gate: Tensor) -> Tensor:
    """The projected gate; of half dtypes by way of float32, as 1 / max^2 in the gradient exceeds float16's numbers."""
    return reference.project_gate(gate.to(torch.promote_types(gate.dtype, torch.float32))).to(gate.dtype)


def _soft_rows(x: Tensor, gate: Tensor, weights: Tensor, project: bool) -> Tensor:
    """labels @ gate, (N, K): a matrix product, so the BLAS library's; in the gate's dtype even under autocast."""
    if gate.dim() != 2 or weights.dim() != 2 or x.dim() < 2 or tuple(weights.shape) != (x.shape[0], gate.shape[0]):
        raise ValueError(
            f"gated_pool: floating-point labels must have the shape (N, C) for x (N, K, *spatial) and gate (C, K), "
            f"got labels {tuple(weights.shape)}, x {tuple(x.shape)} and gate {tuple(gate.shape)}"
        )
    if gate.device != weights.device:
        raise ValueError(f"gated_pool: labels must be on the device of gate, {gate.device}, got {weights.device}")
    if weights.device.type == "cpu" and not torch.compiler.is_compiling() and not _is_traced():
        if weights.isnan().any():
            n, c = weights.isnan().nonzero()[0].tolist()
            raise ValueError(f"gated_pool: labels[{n}, {c}] is NaN, expected a weight")
    with contextlib.nullcontext() if gate.is_meta else torch.autocast(gate.device.type, enabled=False):
        return weights.to(gate.dtype) @ (_projected(gate) if project else gate)


# ---- autograd --------------------------------------------------------------------------------------------------------


# Both kernels need no node of their own: without this the dispatcher looks for one in every call.
_below_autograd = torch.library.Library("csg_ext", "IMPL")
for _kernel in (_forward_kernel, _backward_kernel):
    for _key in ("AutogradCPU", "AutogradCUDA"):
        _below_autograd.impl(_kernel, torch.library.fallthrough_kernel, _key)


def _reads_a_view(x: Tensor, layout: int, positions: int) -> bool:
    """Whether PyTorch's operators take a mean's gradient faster as a view of (N, K) values than written out.

    Nearly always, as half of the bytes need not move. Not where their loops go one element at a time: over short rows
    on a CPU (measured), half numbers that are not contiguous on a GPU (by their code; not measured).
    """
    wide = x.dtype in _WIDE
    return positions > 1 and (wide if x.is_cuda else layout == 1 or positions >= (32 if wide else 192))


def _traced_layout(x: Tensor, pool: int) -> int:
    """The layout in a graph, whose sizes may be symbols: those that depend on values cannot be compared."""
    if x.dim() == 2:
        return 0
    if pool == _AVG:
        return _SHARED
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return 1 if guard_or_false(x.shape[1] > 1) and guard_or_false(x.stride(1) == 1) else 0


def _save(ctx: Any, inputs: tuple[Any, ...], pooled: Tensor, index: Tensor, traced: bool = False) -> None:
    x, gate, labels, top, where, pool = inputs
    ctx.save_for_backward(gate, labels, top, where, pooled, index)
    _, k, *spatial = x.shape
    if traced:
        layout = _traced_layout(x, pool)
    else:
        layout = 1 if k > 1 and spatial and x.stride(1) == 1 else 0
        if pool == _AVG and spatial and _reads_a_view(x, layout, math.prod(spatial)):
            layout = _SHARED
    # The kernel's options: a list, because torch.Size takes longer to hand over.
    ctx.options = spatial, layout, x.dtype, pool
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, grad_out: Tensor | None, grad_pooled: Tensor | None, _: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    gate, labels, top, where, pooled, index = ctx.saved_tensors
    need_x, need_gate, *_ = ctx.needs_input_grad
    need_gate = need_gate and grad_out is not None  # pooled is no function of the gate
    if grad_out is None and grad_pooled is None:
        return None, None, None, None, None, None
    if torch.is_grad_enabled():  # create_graph=True
        grad_x, grad_gate = _differentiable_gradients(ctx, grad_out, grad_pooled)
    else:
        grad_x, grad_gate = _backward_kernel(
            grad_out, grad_pooled, pooled, index, gate, labels, top, where, *ctx.options, need_x, need_gate
        )
    return grad_x if need_x else None, grad_gate if need_gate else None, None, None, None, None


def _differentiable_gradients(ctx: Any, grad_out: Tensor | None, grad_pooled: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same gradients in differentiable operators, for gradients of gradients: speed does not matter there.

    ``pooled`` is an output of the node that saved it, so differentiating through it reaches x again.
    """
    gate, labels, top, where, pooled, index = ctx.saved_tensors
    spatial, _, x_dtype, pool = ctx.options
    n, k = pooled.shape
    positions = math.prod(spatial)
    if grad_out is None:
        grad_out = torch.zeros_like(pooled)
    one_hot = largest = projected = None
    if top is not None:
        one_hot = torch.zeros_like(gate).scatter(0, where[None], 1.0)
        largest = torch.where(top > 0, gate.gather(0, where[None])[0], 1.0)
        projected = torch.where(top > 0, reference.clip(gate / largest), one_hot)
        projected = torch.where(top.isnan(), top, projected)
    used = gate if projected is None else projected
    row = used if labels is None else used[labels]
    spread = grad_out * row if grad_pooled is None else grad_out * row + grad_pooled
    if pool == _AVG:
        mean = (spread / positions).reshape(n, k, *[1] * len(spatial))
        grad_x = mean.expand(n, k, *spatial).to(x_dtype)  # in this order: what comes back is summed in the gate's dtype
    else:
        flat = torch.zeros(n, k, positions, dtype=x_dtype, device=gate.device)
        grad_x = flat.scatter(2, index[..., None], spread.to(x_dtype)[..., None]).reshape(n, k, *spatial)
    grad_gate = grad_out * pooled
    if labels is not None:
        # Not index_add, whose sums have no fixed order on CUDA.
        grad_gate = torch.zeros_like(gate).index_put((labels,), grad_gate, accumulate=True)
    if projected is not None:
        along = (grad_gate * projected).sum(0)
        grad_gate = (torch.where(gate >= 0, grad_gate, 0.0) - one_hot * along) / largest
        grad_gate = torch.where(top > 0, grad_gate, torch.where(top.isnan(), top, 0.0))
    return grad_x, grad_gate


class _GatedPool(torch.autograd.Function):
    """The eager path: half the overhead per call of the dispatcher's Python autograd, the same two functions."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        out, pooled, index = _forward_kernel(*inputs)
        _save(ctx, inputs, pooled, index)
        return out, pooled

    backward = staticmethod(_gradients)


# Function.apply without its Python part, a tenth of a small call: that serves torch.func, which has its own path here.
_apply_gated_pool = super(torch.autograd.Function, _GatedPool).apply


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor], traced: bool = False
) -> None:
    _, pooled, index = output
    ctx.mark_non_differentiable(index)
    _save(ctx, inputs, pooled, index, traced)


torch.library.register_autograd(
    "csg_ext::gated_pool", _gradients, setup_context=functools.partial(_setup_context, traced=True)
)


# ---- shapes for torch.compile and torch.export -----------------------------------------------------------------------


def _fake_check(x_dtype: torch.dtype, gate: Tensor, pool: int) -> None:
    """The kernels' own checks, in their words, as those below: sizes may be symbols."""
    op, got = "gated_pool", dtype_name(gate.dtype)
    fake_check_floating(op, "x", x_dtype)
    torch._check(pool in (0, 1), lambda: f"{op}: pool must be 0 (avg) or 1 (max), got {pool}")
    fake_check_floating(op, "gate", gate.dtype)
    mixed = gate.dtype == torch.float32 and x_dtype in (torch.float16, torch.bfloat16)
    torch._check(
        gate.dtype == x_dtype or mixed,
        lambda: f"{op}: gate must have the dtype of x, or be float32 with half x, got {got}",
    )


def _fake_check_rows(
    gate: Tensor, labels: Tensor | None, top: Tensor | None, where: Tensor | None, x: Tensor, n: int, k: int
) -> None:
    op, shape = "gated_pool", tuple(gate.shape)
    fake_check_device(op, "gate", gate, x)
    torch._check(gate.dim() == 2, lambda: f"{op}: gate must have the shape (C, K), got {shape}")
    torch._check(
        shape[1] == k,
        lambda: f"{op}: gate must have a column for each of the K = {k} channels, got the shape {shape}",
    )
    if labels is None:
        torch._check(
            shape[0] == n,
            lambda: f"{op}: without labels gate must have a row for each sample, got {shape} for N = {n}",
        )
    else:
        fake_check_device(op, "labels", labels, x)
        got = dtype_name(labels.dtype), tuple(labels.shape)
        torch._check(
            labels.dtype == torch.int64,
            lambda: f"{op}: labels must be int64 class indices (or floating-point weights), got {got[0]}",
        )
        text = (
            f"{op}: labels must have the shape (N,) = ({n},), or be floating-point rows (N, C), got int64 of {got[1]}"
        )
        torch._check(labels.dim() == 1, lambda: text)
        torch._check(labels.shape[0] == n, lambda: text)
    torch._check((top is None) == (where is None), lambda: f"{op}: col_max and col_arg come together")
    if top is not None and where is not None:
        text = f"{op}: col_max and col_arg must be what column_max(gate) returns"
        for name, tensor, dtype in (("col_max", top, gate.dtype), ("col_arg", where, torch.int64)):
            torch._check(tensor.dim() == 1 and tensor.dtype == dtype and tensor.is_contiguous(), lambda: text)
            torch._check(tensor.shape[0] == k, lambda: text)
            fake_check_device(op, name, tensor, x)


@torch.library.register_fake("csg_ext::gated_pool")
@torch.library.register_fake("csg_ext::_gated_pool")
def _fake_gated_pool(
    x: Tensor, gate: Tensor, labels: Tensor | None, top: Tensor | None, where: Tensor | None, pool: int
) -> tuple[Tensor, Tensor, Tensor]:
    shape = tuple(x.shape)
    torch._check(x.dim() >= 2, lambda: f"gated_pool: x must have the shape (N, K, *spatial), got {shape}")
    _fake_check(x.dtype, gate, pool)
    for size in shape[2:]:
        torch._check(
            size > 0, lambda: f"gated_pool: x must have at least one spatial position to pool, got the shape {shape}"
        )
    n, k = x.shape[:2]
    _fake_check_rows(gate, labels, top, where, x, n, k)
    index_shape = (0,) if pool == _AVG else (n, k)
    return gate.new_empty(n, k), gate.new_empty(n, k), gate.new_empty(index_shape, dtype=torch.int64)


@torch.library.register_fake("csg_ext::gated_pool_backward")
def _fake_gated_pool_backward(
    grad_out: Tensor | None, grad_pooled: Tensor | None, pooled: Tensor, index: Tensor, gate: Tensor,
    labels: Tensor | None, top: Tensor | None, where: Tensor | None, spatial: list[int], layout: int,
    x_dtype: torch.dtype, pool: int, need_x: bool, need_gate: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    op, shape = "gated_pool", tuple(pooled.shape)
    torch._check(pooled.dim() == 2, lambda: f"{op}: pooled must have the shape (N, K), got {shape}")
    _fake_check(x_dtype, gate, pool)
    for size in spatial:
        torch._check(size > 0, lambda: f"{op}: x must have at least one spatial position to pool")
    n, k = pooled.shape
    _fake_check_rows(gate, labels, top, where, pooled, n, k)
    text = f"{op}: gradients, pooled and index must have the shape (N, K) and the dtypes of the forward pass"
    matrices = [("pooled", pooled, gate.dtype), ("grad_out", grad_out, gate.dtype)]
    matrices += [("grad_pooled", grad_pooled, gate.dtype)]
    matrices += [("index", index, torch.int64)] if pool != _AVG else []
    for name, tensor, dtype in matrices:
        if tensor is None:
            continue
        torch._check(tensor.dim() == 2 and tensor.dtype == dtype, lambda: text)
        torch._check(tensor.shape[0] == n, lambda: text)
        torch._check(tensor.shape[1] == k, lambda: text)
        fake_check_device(op, name, tensor, pooled)
    most = 2 if pool == _AVG else 1
    torch._check(
        not need_x or 0 <= layout <= most,
        lambda: (
            f"{op}: layout must be 0 (contiguous), 1 (channels last) or for avg 2 (shared by all positions), "
            f"got {layout}"
        ),
    )
    if not need_x:
        grad_x = gate.new_empty(0, dtype=x_dtype)
    elif layout == _SHARED:
        grad_x = gate.new_empty_strided((n, k, *spatial), (k, 1, *[0] * len(spatial)), dtype=x_dtype)
    elif layout:
        grad_x = gate.new_empty([n, *spatial, k], dtype=x_dtype).movedim(-1, 1)
    else:
        grad_x = gate.new_empty([n, k, *spatial], dtype=x_dtype)
    return grad_x, gate.new_empty(gate.shape if need_gate else 0)


# ---- torch.func: a vmapped call is one call over more samples, or over a taller gate -------------------------------


def _vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    x, gate, labels, _, _, pool = args
    batch = info.batch_size
    x = x.movedim(in_dims[0], 0) if in_dims[0] is not None else x.expand(batch, *x.shape)
    n, k = x.shape[1], x.shape[2]
    if labels is None:
        gate = gate.movedim(in_dims[1], 0) if in_dims[1] is not None else gate.expand(batch, *gate.shape)
        gate = gate.flatten(0, 1)
    else:
        labels = labels.movedim(in_dims[2], 0) if in_dims[2] is not None else labels.expand(batch, *labels.shape)
        if in_dims[1] is not None:
            gate = gate.movedim(in_dims[1], 0)
            # Only labels inside the gate may be shifted: another gate's rows must stay out of reach.
            inside = (labels >= 0) & (labels < gate.shape[1])
            shift = torch.arange(batch, device=labels.device)[:, None] * gate.shape[1]
            labels = torch.where(inside, labels + shift, -1)
            gate = gate.flatten(0, 1)
        labels = labels.flatten(0, 1)
    out, pooled, index = _TransformedGatedPool.apply(x.flatten(0, 1), gate, labels, None, None, pool)
    index_dim = None if pool == _AVG else 0
    index = index if pool == _AVG else index.reshape(batch, n, k)
    return (out.reshape(batch, n, k), pooled.reshape(batch, n, k), index), (0, 0, index_dim)


class _TransformedGatedPool(torch.autograd.Function):
    """The path under torch.func's transforms, which take neither of the other two."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _forward_kernel(*inputs)

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_gradients)
    vmap = staticmethod(_vmap)
