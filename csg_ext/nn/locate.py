"""Where a gate goes in a model that we did not write: found from one traced forward pass, by what the tensors do.

The gate of the feature map x (N, K, *spatial) may be applied at any later tensor f(x) of N x K values for which
f(g * x) = g * f(x) for every g >= 0: there it costs N x K products and no mask. That holds when f keeps channels apart
and is positively homogeneous (average and maximum pooling, ReLU, dropout, picking a token: yes; LayerNorm or a linear
layer: no). Both are properties of f's gradient, the second by Euler's theorem: <grad f_k, x> = f_k. What holds for the
traced values and weights need not hold for larger maps (ReLU6), smaller ones (GELU), for the choices without a gradient
that a gate changes (the strongest position), or once branches that begin with zeros are trained. So the equation itself
is tried with random rows g, and all of it again with other weights.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

_OCTAVES = 10  # rows are powers of two, which scale exactly
_TOLERANCE = 0.02  # relative; what does not commute misses by far more, half-precision models by less


# What modules call the number of channels that they give. Linear layers and LayerNorm serve maps of both layouts.
_CHANNELS_FIRST = ("out_channels", "num_features", "num_channels")
_WIDTHS = (*_CHANNELS_FIRST, "out_features", "normalized_shape")


@dataclass(frozen=True)
class Place:
    """The input (its first argument) or the output of the module called `name`; side is "input" or "output"."""

    name: str
    side: str

    def __str__(self) -> str:
        return f"{self.side} of {self.name}"


@dataclass(frozen=True)
class Plan:
    """Where the feature map is, where its gate is applied, and what follows.

    layer: the map (N, K, ...), its K channels along channel_dim, 1 or -1. gate: where the gate's rows multiply; pooled
    says whether these are N x K pooled values rather than the map. batch_norms: the names of modules after the gate
    that may mix the samples of a batch in training. classifier: the name of the final nn.Linear, None without one.
    num_classes is C, num_filters K.
    """

    layer: Place
    channel_dim: int  # of the map: 1 or -1
    gate: Place
    pooled: bool  # the gate is applied to N x K pooled values, not to the map
    batch_norms: tuple[str, ...]  # what may mix the samples of a batch in training, after the gate
    classifier: str | None
    num_classes: int
    num_filters: int


@dataclass
class _Event:
    """One tensor that went into or came out of a module; `key` tells equal tensors.

    given: the copy that the module, or what reads its output, got: the gradient there knows no other reader of tensor.
    """

    place: Place
    module: nn.Module
    tensor: Tensor
    given: Tensor
    key: int


def logits_of(output: Any) -> Tensor:
    """The logits (N, C) in what a model returned: a tensor, an object or dict with `logits`, or a tuple's first."""
    if isinstance(output, dict):
        found = output.get("logits")
    else:
        found = getattr(output, "logits", output)
    if isinstance(found, (tuple, list)) and found:
        found = found[0]
    if not isinstance(found, Tensor) or found.dim() != 2:
        shape = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(output).__name__
        raise ValueError(
            f"attach: the model must return logits (N, C), an object with .logits or a tuple that begins with them, "
            f"got {shape}"
        )
    return found


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, and afterwards in the mode in which it was, without what it cached meanwhile."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            if mode and type(module).train is not nn.Module.train:
                module.train()  # where models that cache in evaluation mode drop it (LeViT's attention biases)
        for module, mode in modes:
            module.training = mode


@contextmanager
def unchanged(model: nn.Module, example: Tensor) -> Iterator[None]:
    """Afterwards the buffers and the random generators as before: passes may count in those and draw from these."""
    kept = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and not is_lazy(buffer) and not buffer.is_inference()
    ]
    try:
        with torch.random.fork_rng([example.device] if example.is_cuda else []):
            yield
    finally:
        with torch.no_grad():
            for module, name, buffer, before in kept:
                module._buffers[name] = buffer.copy_(before)


def guess_example(model: nn.Module) -> Tensor:
    """Two random images, of the size that the model's config or a module states (image_size, img_size), else 224."""
    conv = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if conv is None:
        raise ValueError(
            "attach: example must be given, a batch (N, ...) that the model takes: the model has no Conv2d that would "
            "tell the channels of its images"
        )
    owners = (getattr(model, "config", None), *model.modules())
    sizes = (getattr(owner, name, None) for owner in owners for name in ("image_size", "img_size"))
    size = next((s for s in sizes if isinstance(s, (int, tuple, list))), 224)
    height, width = (size, size) if isinstance(size, int) else (size[-2], size[-1])
    noise = torch.randn(2, conv.in_channels, height, width, generator=torch.Generator().manual_seed(0))
    return noise.to(conv.weight.device, conv.weight.dtype)


class _Trace:
    """One forward pass in evaluation mode, with every tensor between modules and the graph of their gradients.

    Modules get clones of what is recorded: in-place operations then change neither values nor gradients of the record.
    state: parameters and buffers to take instead of the model's own. gate: (the index of an event, rows) to multiply.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Tensor,
        state: dict[str, Tensor] | None = None,
        gate: tuple[int, Tensor] | None = None,
    ) -> None:
        self.model, self.example, self.state, self.gate = model, example, state or {}, gate
        self.events: list[_Event] = []
        self.calls: dict[str, int] = {}
        self._keys: dict[int, tuple[Tensor, int, int]] = {}  # of clones: itself, its version, its key
        self.samples = len(example)
        handles = []
        try:
            for name, module in model.named_modules():
                if name and not isinstance(module, torch.jit.ScriptModule):  # which takes no hooks
                    handles.append(module.register_forward_pre_hook(self._before(name)))
                    handles.append(module.register_forward_hook(self._after(name)))
            with evaluating(model):
                x = example.detach().clone()
                if x.is_floating_point():
                    x = x.requires_grad_().clone()
                try:
                    output = torch.func.functional_call(model, self.state, (x,)) if self.state else model(x)
                except Exception as error:
                    raise ValueError(
                        f"attach: example must be a batch (N, ...) that the model takes, got or guessed one of shape "
                        f"{tuple(example.shape)}, with which it raised {type(error).__name__}: {error}"
                    ) from error
                self.logits = logits_of(output)
        finally:
            for handle in handles:
                handle.remove()
        weights = torch.randn(self.logits.shape, generator=torch.Generator().manual_seed(0))
        self.target = (self.logits * weights.to(self.logits)).sum()

    def _record(self, name: str, side: str, module: nn.Module, tensor: Tensor) -> Tensor:
        _, version, key = self._keys.get(id(tensor), (tensor, -1, id(tensor)))
        if version != tensor._version:
            key = id(tensor)
        gated = self.gate is not None and self.gate[0] == len(self.events)
        given = tensor * self.gate[1] if self.gate is not None and gated else tensor.clone()
        clone = given.clone()  # what is changed in place is this one
        self._keys[id(clone)] = clone, clone._version, key
        self.events.append(_Event(Place(name, side), module, tensor, given, key))
        return clone

    def _before(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
            self.calls[name] = self.calls.get(name, 0) + 1
            if args and isinstance(args[0], Tensor):
                return (self._record(name, "input", module, args[0]), *args[1:])
            return None

        return hook

    def _after(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if not isinstance(output, Tensor):
                return None
            if isinstance(module, nn.Linear) and args and not module.weight.any():
                # A classifier that starts at zero would hide what its input depends on.
                weights = torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(0))
                output = nn.functional.linear(args[0], weights.to(module.weight))
            return self._record(name, "output", module, output)

        return hook

    def gradient(self, of: Tensor, to: Tensor, seed: Tensor | None = None) -> Tensor | None:
        """d of / d to, weighted by seed; None where `of` does not depend on `to`."""
        if not (of.requires_grad and to.requires_grad):
            return None
        return torch.autograd.grad(of, to, seed, retain_graph=True, allow_unused=True)[0]

    def last_linear(self) -> tuple[str, nn.Linear] | None:
        """The last nn.Linear that gives values of the shape of the logits, and its name."""
        for event in reversed(self.events):
            if isinstance(event.module, nn.Linear) and event.tensor.shape == self.logits.shape:
                if event.place.side == "output":
                    return event.place.name, event.module
        return None

    def gate_index(self, index: int, channel_dim: int) -> int | None:
        """The event where the gate of the map events[index] may be applied to N x K values; None where there is none.

        The first that is (N, K), else the first of any shape: a model may reshape (N, K, 1, 1) by its input's N, which
        a pass through both paths doubles.
        """
        x = self.events[index].tensor
        filters = x.shape[channel_dim]
        found, probes = None, None
        for later in range(index + 1, len(self.events)):
            event, out = self.events[later], self.events[later].tensor
            if isinstance(event.module, _BatchNorm) and event.place.side == "output":
                break  # a fresh one looks like the identity, and is none
            fits = out.dim() >= 2 and len(out) == len(x) and out.numel() == len(x) * filters
            if not fits or self.calls[event.place.name] > 1 or (found is not None and out.dim() > 2):
                continue
            if self._is_read(later) and self._commutes(x, event, channel_dim):
                probes = probes or _Probes(self, index, channel_dim)
                if not probes.agree(later):
                    break
                if out.dim() == 2:
                    return later
                found = later
        return found

    def _is_read(self, index: int) -> bool:
        """Whether a module with parameters runs afterwards: else the events[index] are class scores, not features."""
        return any(
            next(e.module.parameters(recurse=False), None) is not None
            for e in self.events[index + 1 :]
            if e.place.side == "output"
        )

    def _commutes(self, x: Tensor, event: _Event, channel_dim: int) -> bool:
        """Whether its tensor is f(x) with f(g * x) = g * f(x) for g >= 0, and x reaches the logits through what the
        event gives alone: others may read the same pooled tensor."""
        out = event.tensor
        direct, to_out = self.gradient(self.target, x), self.gradient(self.target, event.given)
        if direct is None or to_out is None or not direct.any():
            return False
        through = self.gradient(out, x, to_out)
        if through is None or not close(through, direct):
            return False
        out = out.flatten(1)
        for k in out.detach().abs().sum(0).topk(min(3, out.shape[1])).indices.tolist():
            slope = self.gradient(out[:, k].sum(), x)
            assert slope is not None  # `through` exists
            own = torch.zeros_like(slope)
            own.select(channel_dim, k).copy_(slope.select(channel_dim, k))
            if not (close(own, slope) and close((own * x.detach()).flatten(1).sum(1), out[:, k].detach())):
                return False
        return True


class _Probes:
    """Whether f(g * x) = g * f(x) for rows g that are drawn, with the model's weights and with others."""

    def __init__(self, trace: _Trace, index: int, channel_dim: int) -> None:
        x = trace.events[index].tensor
        self.index, self.channel_dim = index, channel_dim
        generator = torch.Generator().manual_seed(0)
        room = torch.finfo(x.dtype).max / 64 / max(float(x.detach().abs().max()), 1e-30)  # of half precision above all
        top = min(_OCTAVES, max(1, int(math.log2(room))))
        octaves = torch.randint(1, top + 1, (len(x), x.shape[channel_dim]), generator=generator)
        large = torch.exp2(octaves.float()).to(x)
        shape = [len(x)] + [1] * (x.dim() - 1)
        shape[channel_dim] = -1
        with torch.no_grad():
            state = _other_state(trace.model, generator)
        self.other = _Trace(trace.model, trace.example, state)
        self.pairs: list[tuple[_Trace, _Trace, Tensor]] = []  # without the rows, with them, the rows
        with torch.no_grad():
            for plain, rows in ((trace, large), (trace, 1 / large), (self.other, large)):
                gated = _Trace(plain.model, plain.example, plain.state, (index, rows.view(shape)))
                self.pairs.append((plain, gated, rows))
        # A model may take another way with other weights or values; then there is nothing to compare.
        ways = [[(e.place, e.tensor.shape) for e in t.events] for pair in self.pairs for t in pair[:2]]
        self.comparable = all(way == ways[0] for way in ways)

    def agree(self, later: int) -> bool:
        """Whether the gate may be applied at events[later]."""
        if not self.comparable:
            return False
        x = self.other.events[self.index].tensor
        if not self.other._commutes(x, self.other.events[later], self.channel_dim):
            return False
        for plain, gated, rows in self.pairs:
            expected = rows * plain.events[later].tensor.detach().flatten(1)
            error = (gated.events[later].tensor.flatten(1) - expected).abs().amax(0)
            size = expected.abs().amax(0)
            if not bool((error <= _TOLERANCE * size.clamp(min=1e-3 * float(size.max()))).all()):
                return False
        return True


def _other_state(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Parameters and buffers of the model times 0.5 to 1.5, those that are nearly zero drawn anew."""

    def changed(tensor: Tensor, zero: Any) -> Tensor:
        if float(tensor.abs().max()) < 1e-3:
            return (0.2 * zero(tensor.shape, generator=generator)).to(tensor)
        return tensor * (0.5 + torch.rand(tensor.shape, generator=generator)).to(tensor)

    state = {n: changed(p, torch.randn) for n, p in model.named_parameters() if _is_real(p)}
    for tensor in state.values():  # an example of integers brings no graph
        tensor.requires_grad_()
    return state | {n: changed(b, torch.rand) for n, b in model.named_buffers() if _is_real(b)}


def _is_real(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.numel() > 0 and tensor.layout == torch.strided


def close(got: Tensor, expected: Tensor) -> bool:
    """Whether two results are the same up to rounding, also in half precision."""
    return bool((got - expected).abs().max() <= _TOLERANCE * expected.abs().max())


def _may_mix(module: nn.Module) -> bool:
    """Whether it may be a BatchNorm, also one of its own making: those keep running statistics in buffers."""
    return isinstance(module, _BatchNorm) or any(b.is_floating_point() for b in module.buffers(recurse=False))


def _is_map(tensor: Tensor, samples: int) -> bool:
    """Whether it can be (N, K, *spatial), (N, *spatial, K) or tokens (N, L, K)."""
    return tensor.dim() in (3, 4, 5) and len(tensor) == samples and tensor.is_floating_point()


@torch.inference_mode(False)
@torch.enable_grad()
def locate(
    model: nn.Module,
    example: Tensor,
    layer: str | None,
    classifier: str | None,
    num_classes: int | None,
    channel_dim: int | None,
) -> tuple[Plan, Tensor]:
    """The plan of a gate on `layer`, or on the last feature map before global pooling when layer is None; the map.

    Raises ValueError, with one sentence, for what does not fit; see `csg_ext.attach`.
    """
    names = [name for name, _ in model.named_modules() if name]
    for argument, name in (("layer", layer), ("classifier", classifier)):
        if name is not None and name not in names:
            raise ValueError(
                f"attach: {argument} must be the name of one of the model's modules, got {name!r}; "
                f"nearest: {', '.join(difflib.get_close_matches(str(name), names, 3, 0.0))}"
            )
    trace = _Trace(model, example)
    linear = trace.last_linear() if classifier is None else _linear(model, classifier)
    classes = trace.logits.shape[1]
    if linear is not None and linear[1].out_features != classes:
        raise ValueError(
            f"attach: classifier must be the nn.Linear that gives the model's {classes} logits, got {linear[0]!r} with "
            f"{linear[1].out_features} outputs"
        )
    if num_classes is not None and num_classes != classes:
        raise ValueError(f"attach: num_classes must be the model's number of logits, {classes}, got {num_classes!r}")
    width = None if linear is None else linear[1].in_features
    if layer is None:
        index, dim, gate = _last_map(trace, width, channel_dim)
    else:
        index, dim, gate = _named_map(trace, layer, channel_dim)
    event = trace.events[index]
    at = trace.events[gate] if gate is not None else event
    after = trace.events[(gate if gate is not None else index) + 1 :]
    norms = dict.fromkeys(e.place.name for e in after if _may_mix(e.module) and e.place.side == "output")
    plan = Plan(
        layer=_name(trace, event) if layer is None else event.place,
        channel_dim=dim,
        gate=at.place,
        pooled=gate is not None,
        batch_norms=tuple(norms),
        classifier=None if linear is None else linear[0],
        num_classes=classes,
        num_filters=event.tensor.shape[dim],
    )
    return plan, event.tensor.detach()


def _linear(model: nn.Module, name: str) -> tuple[str, nn.Linear]:
    module = model.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise ValueError(f"attach: classifier must be an nn.Linear, got {name!r}, a {type(module).__name__}")
    return name, module


def _last_map(trace: _Trace, width: int | None, channel_dim: int | None) -> tuple[int, int, int | None]:
    """The index of the last feature map before global pooling, its channel axis, the index of its gate.

    It is the last one whose gate may be applied after pooling, or tokens that come later and have as many channels as
    the classifier has inputs: they are pooled by attention, or several of them are read, and are gated themselves.
    """
    for index in reversed(range(len(trace.events))):
        event = trace.events[index]
        x = event.tensor
        if not _is_map(x, trace.samples) or trace.calls[event.place.name] > 1:
            continue
        dims = [d for d in ((1, -1) if channel_dim is None else (channel_dim,)) if x.numel() > len(x) * x.shape[d]]
        for dim in dims:
            gate = trace.gate_index(index, dim)
            if gate is not None:
                return index, dim, gate
        tokens = x.dim() == 3 and -1 in dims and x.shape[-1] == width and event.place.side == "output"
        if tokens and trace.gradient(trace.target, x) is not None:
            return index, -1, None
    shape = tuple(trace.example.shape)
    if not trace.logits.isfinite().all():
        raise ValueError(
            f"attach: example must give finite logits, got NaN or infinity among those of one of shape {shape}"
        )
    last = [e.tensor.shape[2:] for e in trace.events if e.tensor.dim() == 4 and e.tensor.shape[1] == width]
    if last and all(size == (1, 1) for size in last):
        raise ValueError(
            f"attach: example must be larger, or layer be given, because with one of shape {shape} the last map has a "
            "single position, which no pooling follows"
        )
    maps = dict.fromkeys(
        e.place.name for e in trace.events if _is_map(e.tensor, trace.samples) and e.place.side == "output"
    )
    names = [name for name in maps if name.count(".") == min(n.count(".") for n in maps)]
    raise ValueError(
        "attach: layer must be given for a model without global pooling of a feature map before its classifier, or "
        "where several modules read what is pooled"
        + (f", one of its modules such as {', '.join(names[-3:])}" if names else ", got a model without feature maps")
    )


def _named_map(trace: _Trace, layer: str, channel_dim: int | None) -> tuple[int, int, int | None]:
    """The index of the map that `layer` gives, its channel axis, the index of its gate."""
    calls = trace.calls.get(layer, 0)
    if calls != 1:
        raise ValueError(f"attach: layer must run once in a forward pass, got {layer!r}, which runs {calls} times")
    place = Place(layer, "output")
    index = next((i for i, e in enumerate(trace.events) if e.place == place), None)
    if index is None:
        raise ValueError(f"attach: layer must return one tensor, got {layer!r}, which returns another type")
    x = trace.events[index].tensor
    if not _is_map(x, trace.samples):
        raise ValueError(
            f"attach: layer must give a feature map (N, K, *spatial) or tokens (N, L, K), got {layer!r}, which gives "
            f"{tuple(x.shape)}"
        )
    dims = (1, -1) if channel_dim is None else (channel_dim,)
    for dim in dims:
        gate = trace.gate_index(index, dim)
        if gate is not None:
            return index, dim, gate
    return index, _channels(trace, index) if channel_dim is None else channel_dim, None


def _channels(trace: _Trace, index: int) -> int:
    """The channel axis of a layer's output, by what its last module, else one that ran before it, says of its own.

    A convolution or a norm of feature maps has its positions where the output has them; the number of its channels may
    be another (concatenation). A linear layer or LayerNorm states the width, which has to be that of one axis.
    """
    event = trace.events[index]
    x = event.tensor
    outputs = {id(e.module): e.tensor for e in trace.events[: index + 1] if e.place.side == "output"}
    modules = (*reversed(list(event.module.modules())), *(e.module for e in reversed(trace.events[:index])))
    for module in modules:
        own = outputs.get(id(module))
        for attribute in _WIDTHS:
            size = getattr(module, attribute, None)
            size = size[-1] if isinstance(size, tuple) else size
            if size is None:
                continue
            fitting = [dim for dim in (1, -1) if x.shape[dim] == size]
            if attribute in _CHANNELS_FIRST and own is not None and own.dim() > 2:
                positions = own.shape[2:]
                if positions == x.shape[2:]:
                    return 1
                behind = positions == x.shape[1:-1] or (x.dim() == 3 and positions.numel() == x.shape[1])
                if -1 in fitting and behind:
                    return -1
                if x.dim() > 3:  # of other positions: no channels of this map
                    continue
            if len(fitting) == 1:
                return fitting[0]
            if fitting and attribute in _CHANNELS_FIRST:
                return 1
            if fitting:
                raise ValueError(
                    f"attach: channel_dim must be given, 1 or -1, for layer {event.place.name!r}: both axes of its "
                    f"output {tuple(x.shape)} have the size of the channels"
                )
    return 1


def _name(trace: _Trace, event: _Event) -> Place:
    """The outermost module that gives the event's tensor, the first of those; the event's own place where none does."""
    same = [
        e.place
        for e in trace.events
        if e.key == event.key and e.place.side == "output" and trace.calls[e.place.name] == 1
    ]
    return min(same, key=lambda place: place.name.count("."), default=event.place)
