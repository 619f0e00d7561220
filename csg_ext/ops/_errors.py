"""Turns what the dispatcher and the kernels raise into the exceptions that Python users expect."""

from __future__ import annotations

import torch

from csg_ext import _extension


def explained(error: Exception, op: str, device: torch.device) -> Exception:
    """The exception to raise for `error`, which a kernel of `op` raised on `device`.

    The kernels' own sentences become TypeError or ValueError; anything else (out of memory, ...) stays as it is.
    """
    if isinstance(error, NotImplementedError):  # no kernel for this device
        if device.type == "cuda":
            return RuntimeError(f"{op}: there are no CUDA kernels: {_extension.CUDA_ERROR}")
        return NotImplementedError(f"{op}: tensors must be on the CPU or a CUDA device, got {device}")
    text = str(error)
    if not text.startswith(("gated_pool: ", "gate_step_: ", "column_max: ", "class_mutual_info: ")):
        return error
    text = f"{op}: {text.split(': ', 1)[1]}"
    about_types = any(word in text for word in ("dtype", "must be float32", "must be int64"))
    return TypeError(text) if about_types else ValueError(text)
