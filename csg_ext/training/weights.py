"""Checkpoints and weights on disk: written atomically, read without running code, refused when they do not fit."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from csg_ext._text import reason
from csg_ext.nn.backbones import TimmBackbone
from csg_ext.training.files import atomic_file


def save_checkpoint(checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """torch.save of a checkpoint to `path`, atomically: when the writing fails, the old file stays.

    Raises OSError with one sentence.
    """
    with atomic_file(path) as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # torch's zip writer hides the OSError of a full disk
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            raise (cause if isinstance(cause, OSError) else error) from None


def load_checkpoint(path: str | Path, map_location: Any = "cpu", what: str = "a checkpoint of csg-ext") -> Any:
    """torch.load with weights_only=True: what the file holds, its tensors on map_location, without running code in it.

    what: how the errors name it. Raises FileNotFoundError, and ValueError with one sentence when the file is damaged or
    hostile.
    """
    expected = f"{path}: expected {what}"
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError:
        raise
    except pickle.UnpicklingError:  # torch's own message recommends to execute what the file holds
        raise ValueError(f"{expected}, got one that holds more than tensors and plain values, or is damaged") from None
    except Exception as error:  # a damaged zip or pickle can raise almost anything
        said = reason(error).partition(". This is an internal miniz error")[0]  # of a truncated file, then advice
        raise ValueError(f"{expected}, got one that fails with: {said}") from None


def check_state(module: nn.Module, state: Mapping[str, Any], what: str = "") -> None:
    """Raises ValueError, with one sentence, when a state dict is not of this module: names, shapes or kinds differ.
    what: how the sentence names the module, by default by its class."""
    own = module.state_dict()
    wanted = f"the weights of {what or f'this {type(module).__name__}'}"
    missing, unknown = [k for k in own if k not in state], [k for k in state if k not in own]
    odd = [k for k in own if k in state and not _fits(state[k], own[k])]
    shapes = [k for k in own if k in state and k not in odd and own[k].shape != state[k].shape]
    if missing or unknown:
        raise ValueError(
            f"expected {wanted}, got others: {len(missing)} are missing {_some(missing)}, {len(unknown)} are unknown "
            f"{_some(unknown)}"
        )
    if odd:
        raise ValueError(
            f"expected dense real tensors, floating where the model's are, got another kind for {len(odd)} of them "
            f"{_some(odd)}"
        )
    if shapes:
        name = shapes[0]
        raise ValueError(
            f"expected {wanted}, got {name} with shape {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
            + (f", and {len(shapes) - 1} more" if len(shapes) > 1 else "")
        )


def _fits(value: Any, own: torch.Tensor) -> bool:
    # Whether load_state_dict can take it without an error of its own, or losing what it holds (imaginary parts).
    if not isinstance(value, torch.Tensor) or value.is_nested or value.is_meta or value.is_quantized:
        return False
    return value.layout == torch.strided and value.is_floating_point() == own.is_floating_point()


def check_finite(state: Mapping[str, torch.Tensor]) -> None:
    """Raises ValueError, with one sentence that names them, when weights hold NaN or infinity."""
    # As double: isfinite knows no 8-bit floats.
    counts = {k: int((~v.double().isfinite()).sum()) for k, v in sorted(state.items()) if v.is_floating_point()}
    bad = [k for k, count in counts.items() if count]
    if bad:
        raise ValueError(f"expected finite weights, got {sum(counts.values())} values of NaN or infinity {_some(bad)}")


def _some(names: list[str]) -> str:
    return f"({', '.join(map(str, names[:3]))}{', ...' if len(names) > 3 else ''})"


def _read_state(path: str | Path, what: str = "a checkpoint of csg-ext") -> Mapping[str, Any]:
    """The state dict in a file of safetensors or torch, a Lightning checkpoint's as it is."""
    state: Any
    if Path(path).suffix == ".safetensors":
        from safetensors.torch import load_file

        try:
            state = load_file(path)
        except FileNotFoundError:
            raise
        except Exception as error:
            raise ValueError(f"{path}: expected a safetensors file, got one that fails with: {reason(error)}") from None
    else:
        state = load_checkpoint(path, what=what)
        if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
            state = state["state_dict"]
    if not isinstance(state, Mapping):
        raise ValueError(f"{path}: expected a state dict, got {type(state).__name__}")
    return state


def _below(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {k.removeprefix(prefix): v for k, v in state.items() if str(k).startswith(prefix)}


def _part(state: Mapping[str, Any], own: Iterable[str]) -> Mapping[str, Any]:
    """The part of a whole module's state dict that has all of the names `own`, without what they begin with there.

    The state dict as it is where it has them itself, or where no part has; what begins with "model." before others.
    Raises ValueError for several others.
    """
    names = set(own)
    if not names or names <= state.keys():
        return state
    first = min(names)
    prefixes = sorted({str(k).removesuffix(first) for k in state if str(k).endswith(f".{first}")})
    parts = {prefix: part for prefix in prefixes if names <= (part := _below(state, prefix)).keys()}
    if "model." not in parts and len(parts) > 1:
        raise ValueError(f"expected one such model, got {len(parts)}: {', '.join(parts)}")
    return parts.get("model.") or next(iter(parts.values()), None) or _below(state, "model.") or state


def load_backbone(backbone: nn.Module, path: str | Path, name: str) -> None:
    """Loads the first weights of a backbone that `name` built: those of another run's, or of timm's whole network.

    Nothing in the file is executed. Raises OSError, or ValueError with one sentence, as load_weights does.
    """
    state, own = _read_state(path, "a state dict"), backbone.state_dict()
    state = _below(state, "model.") or state
    if of_run := _below(state, "backbone."):
        state = of_run
    elif isinstance(backbone, TimmBackbone):
        state = backbone.own_weights(state)
    counters = {k: v for k, v in own.items() if k.endswith("num_batches_tracked")}  # which old files lack
    _load(backbone, counters | dict(state), path, name)


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Loads the weights of `model` from model.safetensors, or from a checkpoint of torch or Lightning.

    Where the model is a part of what was saved, as in a Lightning checkpoint, the other parts are left out: it is what
    begins with "model.", else with the one attribute that fits. Nothing in the file is executed.
    Raises ValueError, with one sentence, for a damaged file, the weights of another model or of several, or NaN and
    infinity among them (of a run that diverged); the model stays as it was.
    """
    _load(model, _read_state(path), path)


def _load(model: nn.Module, state: Mapping[str, Any], path: str | Path, what: str = "") -> None:
    try:
        state = _part(state, model.state_dict())
        check_state(model, state, what)
        check_finite(state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    model.load_state_dict(state)
