"""Optimizers that keep a class-specific gate inside V_G: the projected gradient method."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from csg_ext.ops._errors import real
from csg_ext.ops.gate_step import METHODS, gate_step_, project_gate_

__all__ = ["ProjectedOptimizer", "ProjectedSGD"]


class ProjectedSGD(Optimizer):
    """SGD for gates: update, column inf-norm and clip fused in one launch per gate (:func:`csg_ext.gate_step_`).

    Without the projection the update equals torch.optim.SGD's with the same options.
    Source: Liang et al., ECCV 2020, section 3.3 (approximate projected gradient).

    Args:
        params: gates, each (C, K), or parameter groups of gates.
        lr: learning rate, >= 0. A tensor is read at every step, which waits for a GPU. A compiled step is compiled anew
            for every new value, and a tensor breaks its graph: leave it out of torch.compile where a schedule runs.
        momentum, dampening, weight_decay, nesterov: as in torch.optim.SGD.
        method: the projection, "scale" or "euclidean"; see :func:`csg_ext.project_gate`.

    Raises:
        ValueError: a parameter that is not a matrix, or an option outside its range.

    Example:
        >>> gate = torch.full((3, 4), 0.5, requires_grad=True)
        >>> optimizer = ProjectedSGD([gate], lr=0.5)
        >>> (gate * torch.arange(3.0)[:, None]).sum().backward()
        >>> optimizer.step()
        >>> gate.detach()[:, 0]                                         # 0.5, 0 and -0.5 before the projection
        tensor([1., 0., 0.])
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 0.1,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        method: str = "scale",
    ) -> None:
        options = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "method": method,
        }
        super().__init__(params, options)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("method", "scale")  # torch.optim.SGD's state has none

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds gates with options of their own; ValueError as for the optimizer's."""
        options = self.defaults | param_group
        if options.get("maximize"):
            raise ValueError("ProjectedSGD: maximize must be left out, as the gate's loss is minimised, got True")
        for name in ("lr", "momentum", "weight_decay"):
            if not real("ProjectedSGD", name, options[name]) >= 0:
                raise ValueError(f"ProjectedSGD: {name} must be >= 0, got {options[name]}")
        if options["nesterov"] and (options["momentum"] == 0 or options["dampening"] != 0):
            raise ValueError(
                f"ProjectedSGD: nesterov needs momentum > 0 and dampening = 0, got momentum = {options['momentum']} "
                f"and dampening = {options['dampening']}"
            )
        if options["method"] not in METHODS:
            raise ValueError(f"ProjectedSGD: method must be 'scale' or 'euclidean', got {options['method']!r}")
        super().add_param_group(param_group)
        for gate in self.param_groups[-1]["params"]:
            if gate.dim() != 2:
                self.param_groups.pop()
                raise ValueError(f"ProjectedSGD: every parameter must be a gate (C, K), got {tuple(gate.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update and project every gate that has a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            options = {k: group[k] for k in ("lr", "momentum", "dampening", "weight_decay", "nesterov", "method")}
            for gate in group["params"]:
                if gate.grad is None:
                    continue
                buffer, first = None, False
                if group["momentum"] != 0:
                    state = self.state[gate]
                    first = state.get("momentum_buffer") is None
                    if first:
                        state["momentum_buffer"] = torch.empty_like(gate, memory_format=torch.contiguous_format)
                    buffer = state["momentum_buffer"]
                gate_step_(gate, gate.grad, buffer, first_step=first, **options)
        return loss


class ProjectedOptimizer(Optimizer):
    """Projects gates onto V_G after every step of any torch optimizer, such as Adam.

    It shares the wrapped optimizer's parameter groups and state, so schedulers, checkpoints, hooks and AMP work as with
    the optimizer itself: with a GradScaler, weights and gate in one optimizer are skipped together. A gate without a
    gradient, as on steps of the STD path, stays as it is.

    Args:
        optimizer: the optimizer that updates the gates (and perhaps other parameters).
        gates: the gates to project, each (C, K); they must be among the optimizer's parameters.
        method: the projection, "scale" or "euclidean"; see :func:`csg_ext.project_gate`.

    Raises:
        ValueError: a gate that the optimizer does not update, or that is not a matrix.
    """

    _wraps = False  # until torch's __init__ is done

    def __init__(self, optimizer: Optimizer, gates: Iterable[Tensor], method: str = "scale") -> None:
        if method not in METHODS:
            raise ValueError(f"ProjectedOptimizer: method must be 'scale' or 'euclidean', got {method!r}")
        self.optimizer = optimizer
        self.method = method
        self.gates = [gates] if isinstance(gates, Tensor) else list(gates)
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for i, gate in enumerate(self.gates):
            if id(gate) not in known:
                raise ValueError(
                    f"ProjectedOptimizer: gates[{i}] must be a parameter of the optimizer, got another tensor"
                )
            if gate.dim() != 2:
                raise ValueError(f"ProjectedOptimizer: gates[{i}] must have the shape (C, K), got {tuple(gate.shape)}")
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self._wraps = True

    # One set of groups and one state for both objects, also after the wrapped one has replaced its own, as its
    # load_state_dict does. What torch's __init__ sets or adds is left out: the wrapped optimizer has it already.
    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's parameter groups."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        if self._wraps:
            self.optimizer.param_groups = groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The wrapped optimizer's state."""
        return self.optimizer.state

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        if self._wraps:
            self.optimizer.state = state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of the wrapped optimizer, then the projection of the gates with a gradient; the closure's loss."""
        loss = self.optimizer.step(closure)
        for gate in self.gates:
            if gate.grad is not None:
                project_gate_(gate, self.method)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the wrapped optimizer's parameters."""
        self.optimizer.zero_grad(set_to_none)

    def __getstate__(self) -> dict[str, Any]:  # torch's own leaves out what it does not know
        return {"optimizer": self.optimizer, "gates": self.gates, "method": self.method}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["optimizer"], state["gates"], state["method"])  # type: ignore[misc]

    # Forwarding leaves out the hooks of this object, which torch calls in the methods that these two replace.
    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state_dict = self.optimizer.state_dict()
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the wrapped optimizer's state."""
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        self.optimizer.load_state_dict(state_dict)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters to the wrapped optimizer."""
        if self._wraps:
            self.optimizer.add_param_group(param_group)
