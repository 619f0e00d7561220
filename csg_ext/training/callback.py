"""A Lightning callback that makes a module around a gated network train both paths, alternately or jointly."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from csg_ext.nn.gate import ClassSpecificGate, l1_density
from csg_ext.optim import ProjectedSGD
from csg_ext.training.distributed import average_gradient
from csg_ext.training.freeze import fixed_statistics
from csg_ext.training.logs import gate_image
from csg_ext.training.monitor import DensityWatch, FiniteLoss
from csg_ext.training.objective import Objective, explain_small_batches
from csg_ext.training.schedule import CSG, GATE, JOINT, STD, Schedule

_GATE_SGD = functools.partial(ProjectedSGD, lr=2.0)


def find_gated(module: nn.Module, name: str | None = None) -> Any:
    """The gated module inside `module` (the one called `name`, or the only one)."""
    found = {
        n: m
        for n, m in module.named_modules()
        if isinstance(getattr(m, "csg", None), ClassSpecificGate) and n.rpartition(".")[2] != "_orig_mod"
    }  # of a compiled one torch.compile's wrapper, which is what gets called
    if name is not None:
        if name not in found:
            raise ValueError(f"model must name a gated module, one of {', '.join(found) or 'none'}, got {name!r}")
        return found[name]
    if len(found) != 1:
        raise ValueError(
            f"expected one gated module (GatedModel, csg_ext.attach) in {type(module).__name__}, got "
            f"{', '.join(found) or 'none'}"
        )
    return next(iter(found.values()))


def total_steps(trainer: pl.Trainer) -> int:
    """The optimizer steps of the whole run; raises ValueError where that is not known."""
    total = trainer.estimated_stepping_batches
    if math.isfinite(total) and total >= 0:
        return int(total)
    if math.isfinite(trainer.num_training_batches) or trainer.max_epochs == -1:
        raise ValueError("ClassSpecificGateCallback: max_epochs or max_steps must be given, got a run without end")
    raise ValueError(
        "ClassSpecificGateCallback: max_steps must be given for a data loader without a length, "
        f"got max_epochs={trainer.max_epochs} alone"
    )


def _replace(module: nn.Module, name: str, method: Callable[..., Any]) -> Callable[[], None]:
    """Gives the module a method of its own; returns what puts back the one before, be it the class's or its own."""
    own = module.__dict__.get(name)
    module.__dict__[name] = method

    def undo() -> None:
        module.__dict__.pop(name, None)
        if own is not None:
            module.__dict__[name] = own

    return undo


def _second(batch: Any) -> Tensor:
    if isinstance(batch, Mapping | Tensor) or not hasattr(batch, "__getitem__"):
        keys = f" with {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else ""
        raise TypeError(
            "ClassSpecificGateCallback: batches must be (x, labels), else labels=, a function of the batch, must say "
            f"where the labels are, got {type(batch).__name__}{keys}"
        )
    return batch[1]


class ClassSpecificGateCallback(Callback):
    """Trains the gated network of any LightningModule with the class-specific gate.

    The module stays an ordinary one: automatic optimization, one optimizer, and a training_step that calls the gated
    network once, with x alone, and returns the loss of its logits. On every optimizer step the callback

    - takes the path that the schedule names, for all micro-batches of an accumulation: it hands the labels to the
      network, so that the loss is the CSG path's, or computes the second path's loss beside it ("joint"),
    - weighs the losses with the lambdas and adds the gate's penalty,
    - steps and projects the gate when, and only when, the module's optimizer has stepped (fp16: the GradScaler may skip
      it), with a learning rate that follows the run's own clock, and a gradient clipped apart from the weights',
    - logs loss_std, loss_csg (each of the last step that took its path), gate_penalty and l1_density, and at the end
      of an epoch the gate as an image to TensorBoard,
    - stops at a loss that is no number, and at a parameter that is none when a checkpoint is due or the run ends
      (DivergedError, before a checkpoint is written), and warns when the density stalls (DensityWarning).

    Under DDP no parameter stays unused. Under FSDP the gate must stay whole (fully_shard(..., ignored_params={gate}) or
    FSDPStrategy(ignored_states=[gate])); the callback averages its gradient.

    Args:
        schedule: which path a step takes; its total_steps and steps_per_epoch come from the trainer.
        objective: lambdas, budget, penalty; the second loss of "joint" is its cross-entropy (label_smoothing serves
            that alone), all others are the module's own loss.
        gate_optimizer: makes the gate's optimizer from [gate]; it must project, as ProjectedSGD does, which is checked
            after its first step.
        csg_optimizer: makes an optimizer of its own for the weights on CSG steps, with a state of its own and the rate
            of schedule.csg_lr_factor; None: the module's optimizer takes them too. Not with a joint schedule, whose
            steps take both paths at once.
        labels: gives the labels of a batch: int64 (N,) or float (N, C); default: its second entry.
        mix: makes a batch (x, labels) into (x, soft labels), such as csg_ext.training.Mix.
        gate_clip_norm: largest norm of the gate's gradient.
        model: the gated module's name inside the LightningModule; needed when there are several.

    Raises ValueError for a csg_optimizer in a joint schedule, for its rate's settings without it, and when fitting
    begins: manual optimization or several optimizers, no gated module, a sharded gate, a run of unknown length or
    without a CSG step, an optimizer that unscales gradients by itself under fp16; in its first step of the gate, a
    gate_optimizer that does not project. Raises TypeError for batches that are no (x, labels) without labels=.
    Source: Liang et al., ECCV 2020, algorithm 1.
    """

    def __init__(
        self,
        schedule: Schedule | None = None,
        objective: Objective | None = None,
        *,
        gate_optimizer: Callable[[list[nn.Parameter]], Optimizer] = _GATE_SGD,
        csg_optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
        labels: Callable[[Any], Tensor] = _second,
        mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        gate_clip_norm: float | None = None,
        model: str | None = None,
    ) -> None:
        self.schedule, self.objective = schedule or Schedule(), objective or Objective()
        if csg_optimizer is not None and self.schedule.kind == "joint":
            raise ValueError(
                "ClassSpecificGateCallback: csg_optimizer must be None in a joint schedule, which has no CSG steps, "
                "got one: take Schedule(kind='steps') or 'epochs'"
            )
        if csg_optimizer is None and (self.schedule.csg_lr_warmup, self.schedule.csg_lr_decay) != (None, None):
            raise ValueError(
                "ClassSpecificGateCallback: csg_lr_warmup and csg_lr_decay of the schedule need a csg_optimizer, whose "
                "rate they are, got None"
            )
        self.make_gate_optimizer, self.make_csg_optimizer = gate_optimizer, csg_optimizer
        self.labels, self.mix, self.gate_clip_norm, self.model = labels, mix, gate_clip_norm, model
        self.gate_optimizer: Optimizer | None = None
        self.csg_optimizer: Optimizer | None = None
        self.finite = FiniteLoss("the loss", "try a lower learning rate of the weights or the gate")
        self.gated: Any = None  # until fit begins
        self._path = STD
        self._pass: _Pass | None = None  # the training step in progress
        self._held: dict[str, dict[nn.Parameter, Tensor]] = {}  # gradients kept for the gate's and the CSG optimizer
        self._undo: list[Callable[[], None]] = []
        self._restored: dict[str, Any] = {}
        self._watch: DensityWatch | None = None  # until fit begins
        self._moved = self._projects = False  # whether the gate has stepped; that its optimizer projects is seen

    # ---- beginning and end

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Finds the gated module and puts the callback around it and around training_step."""
        if stage != "fit":
            return
        self.finite.reset()
        if not pl_module.automatic_optimization:
            raise ValueError("ClassSpecificGateCallback: expected automatic optimization, got a module with manual one")
        self.gated = find_gated(pl_module, self.model)
        self._watch, self._moved = DensityWatch(self.gated.csg, self.objective.budget), False
        self._projects = False
        original = pl_module.training_step

        @functools.wraps(original)
        def training_step(batch: Any, *args: Any) -> Any:
            return self._training_step(trainer, pl_module, original, batch, args)

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return None if self._pass is None else self._pass.inputs(args, kwargs)

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            return output if self._pass is None else self._pass.output(output)

        clip = pl_module.clip_gradients

        @functools.wraps(clip)
        def clip_gradients(optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
            # by value, torch fails without any gradient, as where the gate or the CSG optimizer alone steps
            if any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
                clip(optimizer, *args, **kwargs)

        self._undo = [
            _replace(pl_module, "training_step", training_step),
            _replace(pl_module, "clip_gradients", clip_gradients),
            self.gated.register_forward_pre_hook(before, with_kwargs=True).remove,
            self.gated.register_forward_hook(after).remove,
        ]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Makes the optimizers, or restores them, and measures the run."""
        gate = self.gated.gate
        if isinstance(gate, DTensor) or gate.dim() != 2:
            raise ValueError(
                "ClassSpecificGateCallback: the gate must stay whole on every rank, because the projection needs whole "
                "columns, got a sharded one: leave it out with ignored_params or ignored_states"
            )
        if len(trainer.optimizers) != 1:
            raise ValueError(f"ClassSpecificGateCallback: expected one optimizer, got {len(trainer.optimizers)}")
        optimizer = trainer.optimizers[0]
        if self._scaler(trainer) is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            raise ValueError(
                "ClassSpecificGateCallback: under fp16 the optimizer must not unscale gradients by itself, "
                f"got {type(optimizer).__name__} with fused=True"
            )
        self.schedule = self._measured(trainer)
        self.gate_optimizer = self._make(self.make_gate_optimizer, [gate], "gate_optimizer")
        if self.make_csg_optimizer is not None:
            weights = [p for p in self.gated.weights() if p.requires_grad]
            self.csg_optimizer = self._make(self.make_csg_optimizer, weights, "csg_optimizer")
        hook = optimizer.register_step_post_hook(lambda *_: self._after_step(trainer))
        self._undo.append(hook.remove)

    def _measured(self, trainer: pl.Trainer) -> Schedule:
        """The schedule for the run's own length; ValueError where the run would never train the gate."""
        total, batches = total_steps(trainer), trainer.num_training_batches
        if math.isfinite(batches):
            steps_per_epoch = math.ceil(batches / trainer.accumulate_grad_batches)
        elif self.schedule.kind == "epochs":
            raise ValueError(
                "ClassSpecificGateCallback: a schedule by epochs needs a data loader with a length, got one without"
            )
        else:
            steps_per_epoch = total
        schedule = self.schedule.for_run(total, steps_per_epoch)
        tries = getattr(trainer, "fast_dev_run", False)  # a few steps that try the code, not the schedule
        if total and not tries:
            try:
                schedule.check_takes_csg()
            except ValueError as error:
                raise ValueError(f"ClassSpecificGateCallback: {error}") from None
        return schedule

    def _make(
        self, make: Callable[[list[nn.Parameter]], Optimizer], parameters: list[nn.Parameter], name: str
    ) -> Optimizer:
        optimizer = make(parameters)
        if name in self._restored:
            optimizer.load_state_dict(self._restored.pop(name))
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        return optimizer

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leaves the module as it was."""
        while self._undo:
            self._undo.pop()()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leaves the module as it was."""
        self.teardown(trainer, pl_module, "fit")

    # ---- one step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Chooses the path."""
        self._path = self.schedule.path(trainer.global_step)

    def _training_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, original: Any, batch: Any, args: tuple[Any, ...]
    ) -> Any:
        path, gate, step = self._path, self.gated.gate, trainer.global_step
        if self.mix is not None:
            if not isinstance(batch, Sequence) or len(batch) != 2:
                raise TypeError(
                    f"ClassSpecificGateCallback: mix needs batches (x, labels), got {type(batch).__name__}"
                    + (f" of {len(batch)}" if isinstance(batch, Sequence) else "")
                )
            batch = self.mix(*batch)
        labels = self.labels(batch)
        self._pass = _Pass(path, labels)
        try:
            with (
                explain_small_batches(len(labels)),
                fixed_statistics(self.gated) if path == GATE else contextlib.nullcontext(),
            ):
                output = original(batch, *args)
            if output is None:  # the module skips this batch, with or without a call of the network
                return None
            second = self._pass.second()
        finally:
            self._pass = None
        loss = output["loss"] if isinstance(output, Mapping) else output
        std, csg = (loss, None) if path in (STD, JOINT) else (None, loss)
        if second is not None:
            csg = self.objective.cross_entropy(second, labels)
        factors = self.schedule.lambda_factors(step)
        total, penalty = self.objective.total(std, csg, gate, factors, touch_gate=trainer.world_size > 1)
        self.finite.observe(total, step, self.schedule.total_steps)
        logs = {"loss_std": std, "loss_csg": csg, "gate_penalty": penalty, "l1_density": l1_density(gate)}
        pl_module.log_dict(
            {name: value.detach() for name, value in logs.items() if value is not None}, batch_size=len(labels)
        )
        return {**output, "loss": total} if isinstance(output, Mapping) else total

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Takes away the gradients that are not the module's optimizer's; clipping comes after it."""
        gate, weights = self.gated.gate, [p for p in self.gated.weights() if p.grad is not None]
        self._held = {"gate": {gate: gate.grad} if self._path != STD and gate.grad is not None else {}, "csg": {}}
        if self._path == CSG and self.csg_optimizer is not None:
            self._held["csg"] = {p: cast(Tensor, p.grad) for p in weights}
        gate.grad = None
        scaler = self._scaler(trainer)
        managed = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for parameter in weights:  # of those that the module's optimizer lacks nobody else clears the gradient
            if self._path == GATE or self._held["csg"] or id(parameter) not in managed:
                parameter.grad = None
        if scaler is None:
            return
        for name, held in self._held.items():
            gradients = [g for p, g in held.items() if id(p) not in managed]  # nobody else has unscaled them
            for gradient in gradients:
                gradient.div_(scaler.get_scale())
            if not all(bool(torch.isfinite(g).all()) for g in gradients):
                self._held[name] = {}

    def _after_step(self, trainer: pl.Trainer) -> None:
        """The module's optimizer has stepped: now the gate, and the weights if CSG steps have their own optimizer."""
        step = trainer.global_step
        if self._held["gate"]:
            gate = self.gated.gate
            gradient = self._held["gate"][gate]
            if isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy)) and trainer.world_size > 1:
                average_gradient(gradient)
            gate.grad = gradient
            if self.gate_clip_norm is not None:
                clip_grad_norm_([gate], self.gate_clip_norm)
            self._step(self.gate_optimizer, self.schedule.gate_lr_factor(step))
            self._moved = True
            if not self._projects:
                self._projects = self._check_projection(gate)
        if self._held["csg"]:
            for parameter, gradient in self._held["csg"].items():
                parameter.grad = gradient
            trainer.lightning_module.clip_gradients(cast(Optimizer, self.csg_optimizer))
            self._step(self.csg_optimizer, self.schedule.csg_lr_factor(step))
        self._held = {}

    def _check_projection(self, gate: Tensor) -> bool:
        """ValueError where the gate's optimizer has left V_G; the columns' largest entries are 1 in it."""
        low, top = gate.detach().amin().item(), gate.detach().amax(0)
        if low < 0 or bool((top - 1).abs().gt(1e-3).any()):
            raise ValueError(
                "ClassSpecificGateCallback: gate_optimizer must project, as ProjectedSGD does, or "
                f"ProjectedOptimizer(optimizer, [gate]), got {type(self.gate_optimizer).__name__}, which left a gate "
                f"from {low:.3g} on whose columns have a largest entry of {top.min():.3g} to {top.max():.3g}, not 1"
            )
        return True

    @staticmethod
    def _step(optimizer: Optimizer | None, factor: float) -> None:
        assert optimizer is not None
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        optimizer.step()
        optimizer.zero_grad()

    @staticmethod
    def _scaler(trainer: pl.Trainer) -> Any:
        return getattr(trainer.precision_plugin, "scaler", None)

    # ---- what a run must notice, logs, checkpoints

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Looks at the density now and then."""
        assert self._watch is not None
        self._watch.observe(trainer.global_step, self.schedule.total_steps, self._moved)
        self._moved = False

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checks the losses and draws the gate."""
        self.finite.check()
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                logger.experiment.add_image("gate", gate_image(self.gated.gate), trainer.global_step)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keeps the last good checkpoint: a run whose loss or parameters are no numbers writes no other."""
        self._check_parameters(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checks what the last steps have left, which no loss shows any more."""
        self._check_parameters(trainer)

    def _check_parameters(self, trainer: pl.Trainer) -> None:
        if self.gated is not None:
            self.finite.check_parameters(self.gated, trainer.global_step, self.schedule.total_steps)

    def state_dict(self) -> dict[str, Any]:
        """The optimizers that the callback owns, and what it has seen of the density."""
        optimizers = {"gate_optimizer": self.gate_optimizer, "csg_optimizer": self.csg_optimizer}
        states = {name: o.state_dict() for name, o in optimizers.items() if o is not None}
        return states | ({} if self._watch is None else {"watch": self._watch.state_dict()})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores state_dict()'s; the optimizers when training starts, as their parameters may still move."""
        if self._watch is not None and "watch" in state_dict:
            self._watch.load_state_dict(state_dict["watch"])
        self._restored = {k: v for k, v in state_dict.items() if k.endswith("optimizer")}


class _Pass:
    """What the gated module gets and gives during one training_step."""

    def __init__(self, path: str, labels: Tensor) -> None:
        self.path, self.labels = path, labels
        self.calls = 0
        self.csg_logits: Tensor | None = None

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """x, and the labels where the path needs them."""
        if len(args) + len(kwargs) != 1:
            raise ValueError(
                "training_step must call the gated module with x alone, as ClassSpecificGateCallback adds the labels, "
                f"got {len(args) + len(kwargs)} arguments"
            )
        self.calls += 1
        if self.path == STD:
            return args, kwargs
        return args, {**kwargs, "labels": self.labels, "path": "both" if self.path == JOINT else "csg"}

    def output(self, output: Any) -> Any:
        """The logits that training_step is to see."""
        if self.path != JOINT:
            return output
        std_logits, self.csg_logits = output
        return std_logits

    def second(self) -> Tensor | None:
        """The logits of the second path, when there are two."""
        if self.calls != 1:
            raise ValueError(f"training_step must call the gated module once, got {self.calls} calls")
        return self.csg_logits
