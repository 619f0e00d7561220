"""Turns what the dispatcher and the kernels raise into the exceptions that Python users expect."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from csg_ext import _extension

# What the numbers of cudaError mean for a user of a compiled package.
_LAUNCH_FAILURES = {
    "(cudaError 209)": "nothing in this build runs on the GPU: csg-ext info shows what it was built for",
    "(cudaError 222)": "the driver is older than the CUDA that the kernels were built with",
}


FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def dtype_name(dtype: torch.dtype) -> str:
    """As the kernels name it, such as float32."""
    return str(dtype).removeprefix("torch.")


def fake_check_floating(op: str, name: str, dtype: torch.dtype) -> None:
    """For fake kernels: the kernels' own check, in their words."""
    got = dtype_name(dtype)
    torch._check(dtype in FLOATS, lambda: f"{op}: {name} must be float32, float64, float16 or bfloat16, got {got}")


def fake_check_device(op: str, name: str, tensor: Tensor, other: Tensor) -> None:
    """For fake kernels: the kernels' own check, in their words."""
    torch._check(
        tensor.device == other.device,
        lambda: f"{op}: {name} must be on the device of the other tensors, {other.device}, got {tensor.device}",
    )


def check_dense(op: str, name: str, value: Any) -> None:
    """Raises TypeError for what is no dense tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be a dense tensor, got layout {value.layout}")


def check_writable(op: str, name: str, tensor: Tensor) -> None:
    """Raises ValueError for a tensor that may not be updated in place outside autograd.

    Such are expanded or overlapping ones, of whose entries several are one; results that are to be differentiated,
    whose graphs would not know; and, as for PyTorch's operators, inference tensors outside inference mode.
    """
    if tensor.requires_grad and not tensor.is_leaf and torch.is_grad_enabled():
        raise ValueError(
            f"{op}: {name} is updated outside autograd and must be a leaf or torch.no_grad() be on, got a result of "
            "differentiable operators"
        )
    if not torch.compiler.is_compiling() and tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(
            f"{op}: {name} must be a normal tensor outside torch.inference_mode(), got an inference tensor: clone it"
        )
    reached = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if tensor.numel() and size > 1:
            if stride <= reached:
                raise ValueError(
                    f"{op}: {name} is updated in place and must not be expanded or overlap, got strides "
                    f"{tensor.stride()} for shape {tuple(tensor.shape)}"
                )
            reached += stride * (size - 1)


def real(op: str, name: str, value: Any) -> float:
    """value as a float; raises TypeError for what is no number."""
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        return value if isinstance(value, float) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise TypeError(f"{op}: {name} must be a number, got {value!r:.100}") from None


def as_array(op: str, name: str, value: Any) -> NDArray[Any]:
    """numpy.asarray; raises ValueError where rows differ in length."""
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{op}: {name} must be an array, got {type(value).__name__}: {error}") from None


def explained(error: Exception, op: str, device: torch.device, **arguments: Tensor | None) -> Exception:
    """The exception to raise for `error`, which a kernel of `op` raised on `device`, with these arguments.

    The kernels' own sentences about arguments become TypeError or ValueError; a lack of memory is
    torch.OutOfMemoryError (a RuntimeError), a kernel that cannot be launched a RuntimeError; anything else stays as it
    is.
    """
    if isinstance(error, NotImplementedError):  # no kernel for this device or layout
        for name, tensor in arguments.items():
            if tensor is not None:
                try:
                    check_dense(op, name, tensor)
                except TypeError as sparse:
                    return sparse
                if type(tensor) not in (Tensor, torch.nn.Parameter):
                    return TypeError(
                        f"{op}: {name} must be a plain tensor, whole on every rank, got a {type(tensor).__name__}: "
                        "fully_shard leaves a gate out with ignored_params={gate}"
                    )
        if device.type == "cuda":
            return RuntimeError(f"{op}: there are no CUDA kernels: {_extension.CUDA_ERROR}")
        return NotImplementedError(f"{op}: tensors must be on the CPU or a CUDA device, got {device}")
    text = str(error)
    if text.startswith("out of memory: "):
        return torch.OutOfMemoryError(f"{op}: {text}")
    if not text.startswith(("gated_pool: ", "gate_step_: ", "column_max: ", "class_mutual_info: ")):
        return error
    text = f"{op}: {text.split(': ', 1)[1]}"
    if "could not be launched" in text:
        meaning = next((meaning for code, meaning in _LAUNCH_FAILURES.items() if code in text), None)
        return RuntimeError(text if meaning is None else f"{text}: {meaning}")
    about_types = any(word in text for word in ("dtype", "must be float32", "must be int64"))
    return TypeError(text) if about_types else ValueError(text)
