"""attach: a class-specific gate inside a model that we did not write, by hooks; detach: the model as it was."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from csg_ext.nn.gate import ClassSpecificGate, TwoPaths, resolve_path
from csg_ext.nn.locate import Plan, close, evaluating, guess_example, locate, logits_of, unchanged
from csg_ext.ops import gated_pool


class _Call(threading.local):
    """The gated pass that a thread is in: other threads may run the model on other paths meanwhile."""

    def __init__(self) -> None:
        # The instance's, as torch.compile guards on what its dictionary holds.
        self.labels: Tensor | None = None
        self.path = "std"
        self.runs = 0
        self.recorded = False


class _GateHook:
    """Multiplies a module's input or output by the gate's rows of the labels, on the path that is set; else does
    nothing.

    It belongs to the module that runs it, so copies and pickles of the model take it along, with the gate and with the
    AttachedModel that sets it.
    """

    def __init__(self, csg: ClassSpecificGate, plan: Plan) -> None:
        self.csg = csg
        self.pooled = plan.pooled
        self.channel_dim = plan.channel_dim
        self.unrecorded = False  # whether gradients were wanted and the gate ran where none are recorded
        self.call = _Call()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "call"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.call = _Call()

    def set(self, labels: Tensor | None, path: str) -> None:
        """From now on multiply by the rows of `labels`, or do nothing; on path "both", append the result to the
        batch."""
        self.call.labels, self.call.path, self.call.runs = labels, path, 0

    def __call__(self, module: nn.Module, args: tuple[Any, ...], *output: Tensor) -> Any:
        """A forward pre-hook (without output) and a forward hook."""
        call = self.call
        if call.labels is None:
            if self.unrecorded and torch._C._current_graph_task_id() != -1:  # in backward
                raise RuntimeError(
                    "AttachedModel: the gate must lie outside reentrant activation checkpointing, which runs it again "
                    "in backward, when the labels are gone: checkpoint other modules, or use a GatedModel"
                )
            return None
        x = output[0] if output else args[0]
        call.runs += 1
        call.recorded = torch.is_grad_enabled()
        gated = self.gated(x, call.labels)
        if call.path == "both":
            gated = torch.cat((x, gated))
        return gated if output else (gated, *args[1:])

    def gated(self, x: Tensor, labels: Tensor) -> Tensor:
        """G[labels] * x."""
        gate = self.csg.gate
        if self.pooled:  # (N, K), (N, K, 1, 1)
            return gated_pool(x.flatten(1), gate, labels).to(x.dtype).view(x.shape)
        ones = x.new_ones(len(x), gate.shape[1])
        rows = gated_pool(ones, gate, labels).to(x.dtype)
        shape = [len(x)] + [1] * (x.dim() - 1)
        shape[self.channel_dim] = -1
        return x * rows.view(shape)


class _Keep:
    """A hook that keeps what goes into or comes out of a module."""

    def __init__(self, copy: bool) -> None:
        self.copy = copy
        self.kept: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], *output: Tensor) -> None:
        x = output[0] if output else args[0]
        self.kept = x.clone() if self.copy else x


def _hook_onto(model: nn.Module, name: str, side: str, hook: Any) -> Any:
    module = model.get_submodule(name)
    return module.register_forward_pre_hook(hook) if side == "input" else module.register_forward_hook(hook)


_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel, torch.jit.ScriptModule)


class AttachedModel(TwoPaths):
    """A model with a class-specific gate inside it: what `csg_ext.attach` returns.

    - ``g(x)``: STD path, the model's own logits (N, C), bit for bit;
    - ``g(x, labels)``: CSG path, logits (N, C) with the features multiplied by G[labels];
    - ``g(x, labels, path="both")``: (STD logits, CSG logits), from one pass through what lies before the gate where
      possible.

    `g.model` is the model; calling it gives whatever it returns, on the STD path. `g.csg` is the gate. As a context
    manager, g detaches itself at the end. The state dict holds the model's entries under "model." and "csg.gate".
    """

    def __init__(self, model: nn.Module, plan: Plan, init: float) -> None:
        super().__init__()
        self.training = model.training
        self.model = model
        self.plan = plan
        self.csg = ClassSpecificGate(plan.num_classes, plan.num_filters, init)
        self.one_pass = False
        self._hook = _GateHook(self.csg, plan)
        self._handle = _hook_onto(model, plan.gate.name, plan.gate.side, self._hook)

    @property
    def classifier(self) -> nn.Linear | None:
        """The final linear layer, None for a model that has none."""
        return None if self.plan.classifier is None else self.model.get_submodule(self.plan.classifier)  # type: ignore[return-value]

    def forward(
        self, x: Tensor, labels: Tensor | None = None, path: str | None = None, **kwargs: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (N, C) of one path, or of both: (STD logits, CSG logits).

        labels: int64 (N,), or float rows (N, C) (mixup, cutmix). path: "std", "csg" or "both"; None means "std"
        without labels and "csg" with labels. Further keyword arguments go to the model.
        """
        path = resolve_path("AttachedModel", labels, path)
        if path == "std" or labels is None:
            return logits_of(self.model(x, **kwargs))
        if path == "csg":
            return self._gated(x, labels, path, kwargs)
        alike = any(isinstance(v, Tensor) and v.dim() and len(v) == len(x) for v in kwargs.values())
        if self.one_pass and not self._mixes() and not alike:  # what a keyword has for every sample is not doubled
            both = self._gated(x, labels, path, kwargs)
            return both[: len(both) // 2], both[len(both) // 2 :]
        return logits_of(self.model(x, **kwargs)), self._gated(x, labels, "csg", kwargs)

    def _mixes(self) -> bool:
        """Whether a BatchNorm after the gate would see both paths in one batch."""
        return any(self.model.get_submodule(name).training for name in self.plan.batch_norms)

    def _gated(self, x: Tensor, labels: Tensor, path: str, kwargs: dict[str, Any]) -> Tensor:
        self._hook.set(labels, path)
        try:
            logits = logits_of(self.model(x, **kwargs))
            runs = self._hook.call.runs
            self._hook.unrecorded = torch.is_grad_enabled() and runs == 1 and not self._hook.call.recorded
        finally:
            self._hook.set(None, "std")
        if runs != 1:
            raise RuntimeError(
                f"AttachedModel: {self.plan.gate.name!r}, where the gate is, must run once in a forward pass, it ran "
                f"{runs} times: was the model changed or detached after attach?"
            )
        return logits

    def forward_features(self, x: Tensor, **kwargs: Any) -> Tensor:
        """The gated layer's feature map, (N, K, *spatial), or tokens (N, L, K); ungated."""
        place = self.plan.layer
        # A gate that waits for the pooling belongs to the map that is pooled, in-place operations on it included.
        features, _ = self._run(place.name, place.side, not self.plan.pooled, x, kwargs)
        return features.movedim(self.plan.channel_dim, 1) if features.dim() > 3 else features

    def pooled_features(self, x: Tensor, **kwargs: Any) -> Tensor:
        """The ungated features (N, K) that the gate multiplies; of a gated map, the means over its positions."""
        return self.features_and_logits(x, **kwargs)[0]

    def features_and_logits(self, x: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """(pooled_features (N, K), STD logits (N, C)), from one pass."""
        place = self.plan.gate
        features, output = self._run(place.name, place.side, True, x, kwargs)
        if self.plan.pooled:
            return features.flatten(1), logits_of(output)
        return features.movedim(self.plan.channel_dim, 1).flatten(2).mean(2), logits_of(output)

    def _run(self, name: str, side: str, copy: bool, x: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Any]:
        """What goes into or comes out of a module, and what the model returns."""
        keep = _Keep(copy)
        handle = _hook_onto(self.model, name, side, keep)
        try:
            output = self.model(x, **kwargs)
        finally:
            handle.remove()
        if keep.kept is None:
            raise RuntimeError(f"AttachedModel: {name!r} did not run: was the model changed after attach?")
        return keep.kept, output

    def __enter__(self) -> AttachedModel:
        return self

    def __exit__(self, *error: object) -> None:
        detach(self)

    def extra_repr(self) -> str:
        """What repr() shows."""
        return f"layer={str(self.plan.layer)!r}, gate at {str(self.plan.gate)!r}, one_pass={self.one_pass}"


def attach(
    model: nn.Module,
    layer: str | None = None,
    classifier: str | None = None,
    num_classes: int | None = None,
    *,
    example: Tensor | None = None,
    channel_dim: int | None = None,
    init: float = 0.5,
) -> AttachedModel:
    """Put a class-specific gate on a layer of any model, without changing its code, weights or results.

    The feature map is found from one forward pass in evaluation mode, and what was found is printed; so is the place
    where multiplying by the gate's row costs least, usually the pooled (N, K). See docs/attach.md.
    Source: Liang et al., ECCV 2020, figure 2.

    Args:
        model: maps a batch (N, ...) to logits (N, C), to an object with ``.logits`` or to a tuple that begins with
            them. Wrap it (torch.compile, DistributedDataParallel) after attach.
        layer: the name of the module whose output is gated, (N, K, *spatial) or tokens (N, L, K); None for the last
            feature map before global pooling.
        classifier: the name of the final nn.Linear; None for the last one that gives values of the logits' shape.
        num_classes: C; checked against the model's logits.
        example: a batch that the model takes, on its device; None for two random images of the size that the model
            states, else 224 x 224.
        channel_dim: the axis of the map's K channels, 1 or -1; None to find it.
        init: the gate's first value.

    Returns:
        A module g, ``g(x)`` the model's logits, ``g(x, labels)`` the gated ones, ``g(x, labels, path="both")`` both.

    Raises:
        ValueError: a name that does not exist, a layer without a feature map, a model without global pooling, a class
            count that does not fit, an example that the model does not take.
        TypeError: a model that is wrapped already, or an argument of the wrong type.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"attach: model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, (*_WRAPPERS, AttachedModel)) or hasattr(model, "_orig_mod"):
        raise TypeError(
            f"attach: model must be the model itself, to be wrapped after attach, got {type(model).__name__}"
        )
    if example is None:
        example = guess_example(model)
    if not isinstance(example, Tensor):
        raise TypeError(f"attach: example must be a torch.Tensor, got {type(example).__name__}")
    if not len(example):
        raise ValueError(f"attach: example must have at least one sample, got the shape {tuple(example.shape)}")
    if channel_dim not in (1, -1, None):
        raise ValueError(f"attach: channel_dim must be 1, -1 or None, got {channel_dim}")
    if example.is_meta or any(p.is_meta for p in model.parameters()):
        raise ValueError("attach: model and example must hold values, got ones on the device meta")
    with unchanged(model, example), torch.inference_mode(False):
        plan, x = locate(model, example, layer, classifier, num_classes, channel_dim)
        g = AttachedModel(model, plan, init)
        g.csg.to(x.device, torch.promote_types(x.dtype, torch.float32))
        try:
            g.one_pass = _goes_in_one_pass(g, example)
        except BaseException:
            detach(g)
            raise
    if layer is None:
        size = " x ".join(str(n) for n in x.movedim(plan.channel_dim, 1).shape[2:])
        print(
            f"attach: gate ({plan.num_classes} classes x {plan.num_filters} filters) on the {plan.layer}, map {size}, "
            f"applied at the {plan.gate}"
        )
    return g


@torch.no_grad()
def _goes_in_one_pass(g: AttachedModel, example: Tensor) -> bool:
    """Whether what follows the gate takes a batch of twice the size: tried with labels whose rows are zero."""
    x = example if len(example) > 1 else torch.cat((example, example))
    rows = torch.zeros(len(x), g.csg.num_classes, dtype=g.gate.dtype, device=g.gate.device)
    with evaluating(g.model):
        std, csg = logits_of(g.model(x)), g._gated(x, rows, "csg", {})
        try:
            both = g._gated(x, rows, "both", {})
        except Exception:  # whatever a model raises that reshapes by its input's N, or adds a shortcut around the layer
            return False
    return both.shape == (2 * len(x), std.shape[1]) and close(both, torch.cat((std, csg)))


def detach(g: AttachedModel) -> nn.Module:
    """Take the gate out again: returns the model as it was before `csg_ext.attach`, with the weights that it has now.

    g: what attach returned; TypeError for anything else. What was hooked onto the model by others stays.
    """
    if not isinstance(g, AttachedModel):
        raise TypeError(f"detach: g must be what attach returned, got {type(g).__name__}")
    g._handle.remove()
    return g.model
