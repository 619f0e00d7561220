"""Turns what the dispatcher and the kernels raise into the exceptions that Python users expect."""

from __future__ import annotations

import torch

from csg_ext import _extension

# What the numbers of cudaError mean for a user of a compiled package.
_LAUNCH_FAILURES = {
    "(cudaError 209)": "nothing in this build runs on the GPU: csg-ext info shows what it was built for",
    "(cudaError 222)": "the driver is older than the CUDA that the kernels were built with",
}


def explained(error: Exception, op: str, device: torch.device) -> Exception:
    """The exception to raise for `error`, which a kernel of `op` raised on `device`.

    The kernels' own sentences about arguments become TypeError or ValueError; a lack of memory is
    torch.OutOfMemoryError (a RuntimeError), a kernel that cannot be launched a RuntimeError; anything else stays as it
    is.
    """
    if isinstance(error, NotImplementedError):  # no kernel for this device
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
