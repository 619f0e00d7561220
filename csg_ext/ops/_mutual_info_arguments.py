"""What the estimators of mutual information accept: features and labels of many kinds, checked, never copied whole."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from csg_ext.ops._errors import as_array, check_dense

CPU = torch.device("cpu")
CHUNK_VALUES = 2**22  # a tenth of a second on a few cores; Ctrl-C acts between chunks
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_MAX_SAMPLES = 2**30
_MAX_CLASSES = 2**24  # beyond, a label is an identifier: there is a column of results for every class


class Features:
    """The features (n, k), which are never copied as a whole: columns() gives some of them to the kernel.

    device: where to compute. home: where a tensor of results belongs.
    """

    def __init__(self, op: str, name: str, features: Any, device: torch.device | str | None) -> None:
        self.op, self.name = op, name
        self.array: NDArray[Any] | None = None  # what torch cannot see in place
        self.tensor: Tensor | None = None
        if isinstance(features, Tensor):
            check_tensor(op, name, features)
            if features.is_floating_point() and features.dtype not in _FLOATS or features.is_complex():
                raise TypeError(
                    f"{op}: {name} must be float32, float64, float16, bfloat16 or integers, got {_name(features.dtype)}"
                )
            self.tensor = features.detach()
            shape: tuple[int, ...] = tuple(features.shape)
        else:
            array = as_array(op, name, features)
            if array.dtype == object:  # a DataFrame of several types of numbers
                try:
                    array = array.astype(np.float64)
                except (TypeError, ValueError):
                    pass
            if array.dtype.kind not in "fiub":
                raise TypeError(f"{op}: {name} must be numbers, got {array.dtype}")
            shape = array.shape
            self.tensor = _in_place(array)
            self.array = array if self.tensor is None else None
        if len(shape) != 2:
            raise ValueError(f"{op}: {name} must be (N, K), got shape {shape}")
        self.n, self.k = shape
        if self.n == 0 or self.k == 0:
            raise ValueError(f"{op}: {name} must have at least one sample and one column, got shape {shape}")
        if self.n >= _MAX_SAMPLES:
            raise ValueError(f"{op}: {name} must have fewer than 2^30 samples, got {self.n}")
        self.home = self.tensor.device if isinstance(features, Tensor) and self.tensor is not None else CPU
        try:
            self.device = self.home if device is None else torch.device(device)
        except (RuntimeError, TypeError):
            raise ValueError(f"{op}: device must be the name of a torch device, got {device!r}") from None
        if self.device.type not in ("cpu", "cuda"):
            raise ValueError(f"{op}: device must be the CPU or a CUDA device, got {str(self.device)!r}")
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"{op}: device {device!r} needs a GPU that this torch can use, got none")
        if self.device.type == "cuda" and self.device.index is None:  # what is kept for a device must be found by it
            self.device = torch.device("cuda", torch.cuda.current_device())

    def columns(self, begin: int, end: int) -> Tensor:
        """Columns [begin, end) in floating point on the device of the computation."""
        if self.tensor is None:
            assert self.array is not None
            return torch.from_numpy(np.array(self.array[:, begin:end], np.float64)).to(self.device)
        part = self.tensor[:, begin:end].to(self.device)
        return part if part.is_floating_point() else part.double()

    def check_finite(self) -> None:
        """Raises ValueError, with the number of values that are not finite and the first column that holds one."""
        if self.tensor is not None and (not self.tensor.is_floating_point() or self.tensor.sum().isfinite()):
            return  # the sum is cheap; one that overflows proves nothing
        wrong, first = 0, -1
        step = max(1, CHUNK_VALUES // self.n)
        for begin in range(0, self.k, step):
            part = self.columns(begin, begin + step)
            found = (~part.isfinite()).sum(0)
            if found.any() and first < 0:
                first = begin + int((found > 0).int().argmax())
            wrong += int(found.sum())
        if wrong:
            raise ValueError(
                f"{self.op}: {self.name} must be finite, got {wrong} values that are not, first in column {first}"
            )


class _Writable:
    """Lends an array's memory without its read-only flag, of which torch.from_numpy warns; nothing here writes."""

    def __init__(self, array: NDArray[Any]) -> None:
        self.array = array
        self.__array_interface__ = array.__array_interface__ | {"data": (array.__array_interface__["data"][0], False)}


def _in_place(array: NDArray[Any]) -> Tensor | None:
    """The array's memory as a tensor; None where torch cannot describe it (byte order, negative strides, ...)."""
    try:
        return torch.from_numpy(array if array.flags.writeable else np.asarray(_Writable(array)))
    except (TypeError, ValueError):
        return None


def class_indices(op: str, labels: Any, n: int | None, num_classes: int | None) -> tuple[Tensor, Tensor]:
    """labels as int64 (N,), and the number of samples of each class, (C,) on the CPU."""
    if isinstance(labels, Tensor):
        check_tensor(op, "labels", labels)
        codes, integers = labels.detach(), not (labels.is_floating_point() or labels.is_complex())
        dtype: Any = labels.dtype
    else:
        array = as_array(op, "labels", labels)
        dtype, integers = array.dtype, array.dtype.kind in "iub"
        codes = torch.from_numpy(np.array(array, np.int64)) if integers else torch.empty(array.shape, device="meta")
    if n is not None and tuple(codes.shape) != (n,):
        raise ValueError(f"{op}: labels must be ({n},) like the features' first axis, got shape {tuple(codes.shape)}")
    if codes.dim() != 1 or len(codes) == 0:
        raise ValueError(f"{op}: labels must be (N,) with at least one sample, got shape {tuple(codes.shape)}")
    if not integers:
        raise ValueError(f"{op}: labels must be integers, got {_name(dtype)}")
    codes = codes.to(torch.int64)
    lowest, highest = (int(v) for v in codes.aminmax())
    if lowest < 0:
        raise ValueError(f"{op}: labels must be non-negative, got {lowest}")
    classes = highest + 1 if num_classes is None else positive(op, "num_classes", num_classes)
    if classes > _MAX_CLASSES:
        raise ValueError(
            f"{op}: labels must be class indices and num_classes at most 2^24, got {classes} classes: number "
            "the classes that occur"
        )
    if highest >= classes:
        raise ValueError(f"{op}: labels must lie in [0, {classes}), got {highest}")
    return codes, torch.bincount(codes, minlength=classes).cpu()


def label_codes(op: str, y: Any, n: int) -> tuple[Tensor, int]:
    """Labels of any type as class indices (N,), and the number of classes."""
    if isinstance(y, Tensor):
        check_tensor(op, "y", y)
    array = as_array(op, "y", y.detach().cpu() if isinstance(y, Tensor) else y)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.shape != (n,):
        raise ValueError(f"{op}: y must be ({n},) like X's first axis, got shape {array.shape}")
    if array.dtype.kind in "fc" and not (np.isfinite(array).all() and np.all(array == np.trunc(array.real))):
        raise ValueError(f"{op}: y must be class labels, got {array.dtype} values that are no whole numbers")
    try:
        if array.dtype == object and np.any(array != array):
            raise TypeError("it holds NaN")
        names, codes = np.unique(array, return_inverse=True)
    except TypeError as error:
        raise ValueError(f"{op}: y must be labels that sort, got {array.dtype} values: {error}") from None
    return torch.from_numpy(codes.astype(np.int64)), len(names)


def check_tensor(op: str, name: str, tensor: Tensor) -> None:
    """Raises for a tensor that is not dense or holds no values."""
    check_dense(op, name, tensor)
    if tensor.is_meta:
        raise ValueError(f"{op}: {name} must hold values, got a tensor on the meta device")


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def check_choice(op: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError for a value that is none of the choices."""
    if value not in choices:
        raise ValueError(f"{op}: {name} must be {' or '.join(map(repr, choices))}, got {value!r}")


def integer(op: str, name: str, value: Any) -> int:
    """The value as an int; TypeError for what is no integer."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be an integer, got {value!r}")
    return int(value)


def positive(op: str, name: str, value: Any) -> int:
    """The value as an int; ValueError below 1."""
    if integer(op, name, value) < 1:
        raise ValueError(f"{op}: {name} must be at least 1, got {value}")
    return int(value)


def seed(op: str, value: Any) -> int:
    """random_state as NumPy's generators take it; ValueError outside [0, 2^32)."""
    if not 0 <= integer(op, "random_state", value) < 2**32:
        raise ValueError(f"{op}: random_state must be in [0, 2^32), got {value}")
    return int(value)
