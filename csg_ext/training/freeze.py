"""Frozen stages: parameters without gradient, and BatchNorm layers that use and keep their running statistics."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def _batch_norms(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, _BatchNorm)]


class _KeepStatistics:
    """A pre-forward hook: it outlives train() and the conversion to SyncBatchNorm, and can be copied."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: nn.Module, _: Any) -> None:
        try:
            stage = module.get_submodule(self.name)
        except AttributeError:  # taken out since
            return
        for norm in _batch_norms(stage):
            if norm.training:
                norm.eval()


def freeze(model: nn.Module, stages: Iterable[str]) -> None:
    """Freezes the submodules of `model` that `stages` names, such as ["backbone.conv", "backbone.bn"].

    Their parameters need no gradient any more, and their BatchNorm layers normalise with the running statistics, which
    they keep, whatever train() says. Do it before the optimizers and DistributedDataParallel are made.
    Raises ValueError for a name that the model does not have.
    """
    known = [name for name, _ in model.named_modules() if name]
    names = list(stages)
    for name in names:
        if name not in known:
            near = ", ".join(difflib.get_close_matches(name, known)) or ", ".join(known[:5])
            raise ValueError(f"freeze: stages must be submodules of the model, got {name!r}; nearest: {near}")
    for name in names:
        stage, parts = model.get_submodule(name), name.split(".")
        stage.requires_grad_(False)
        # Whichever module is called: one that holds the stage (LightningModules call theirs), or one inside.
        for depth in range(len(parts)):
            outer = model.get_submodule(".".join(parts[:depth]))
            outer.register_forward_pre_hook(_KeepStatistics(".".join(parts[depth:])))
        for inner in stage.modules():
            if _batch_norms(inner):
                inner.register_forward_pre_hook(_KeepStatistics(""))


@contextlib.contextmanager
def fixed_statistics(model: nn.Module) -> Iterator[None]:
    """The BatchNorm layers of `model` use and keep their running statistics inside the block."""
    training = [norm for norm in _batch_norms(model) if norm.training]
    for norm in training:
        norm.eval()
    try:
        yield
    finally:
        for norm in training:
            norm.train()
