"""Tests of ClassSpecificGateCallback and GatedTraining against plain loops; frozen stages, logs, refusals."""

from __future__ import annotations

import copy
import functools
import math
import warnings

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from example_scripts import load_script
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_training import CLASSES, OBJECTIVE, SIZE, STEPS, Own, assert_same, batches, loader, tiny, trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import csg_ext
from csg_ext.nn import GatedModel
from csg_ext.optim import ProjectedOptimizer, ProjectedSGD
from csg_ext.training import (
    ClassSpecificGateCallback,
    DensityWarning,
    GatedTraining,
    Mix,
    Objective,
    Schedule,
    freeze,
)

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:::lightning")]


def by_hand(model: GatedModel, data, epochs: int, paths, *, clip=None, gate_clip=None, factors=None, csg_sgd=False):
    """The method in plain autograd: SGD with momentum on the weights, projected SGD on the gate, given the paths."""
    total = epochs * len(data)
    weights = torch.optim.SGD(model.weights(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    other = torch.optim.SGD(model.weights(), lr=0.03, momentum=0.5) if csg_sgd else None
    for step in range(total):
        x, y = data[step % len(data)]
        features = model.backbone(x).mean((2, 3))
        first, second = factors(step) if factors else (1.0, 1.0)
        std = F.cross_entropy(model.classifier(features), y)
        csg = F.cross_entropy(model.classifier(features * model.gate[y]), y)
        loss = 0.7 * first * csg + 0.02 * second * F.relu(model.gate.sum() - 8)
        loss = {"std": std, "joint": std + loss}.get(paths[step], loss)
        model.zero_grad()
        loss.backward()
        optimizer = other if csg_sgd and paths[step] == "csg" else weights
        if clip:
            nn.utils.clip_grad_norm_(model.weights(), clip)
        decay = (1 + math.cos(math.pi * step / total)) / 2
        optimizer.param_groups[0]["lr"] = (0.1 if optimizer is weights else 0.03) * decay
        if paths[step] != "gate":
            optimizer.step()
        if paths[step] != "std":
            gradient = model.gate.grad
            if gate_clip:
                gradient = gradient * min(1.0, gate_clip / (gradient.norm().item() + 1e-6))
            with torch.no_grad():
                moved = model.gate - 2.0 * decay * gradient
                top = moved.max(0).values
                assert (top > 0).all()
                model.gate.copy_((moved / top).clamp(0, 1))


CASES = {
    "joint": (dict(kind="joint"), ["joint"] * 10 + ["std"] * 2),
    "steps": (dict(kind="steps", period=3), ["std", "std", "csg"] * 3 + ["std"] * 3),
    "epochs": (dict(kind="epochs", period=2, csg_at=(0,)), ["csg"] * 6 + ["std"] * 6),
    "gate first": (
        dict(kind="steps", period=2, csg_share=0.5, warmup=0.1, gate_warmup=0.25),
        ["std"] * 2 + ["gate"] * 3 + ["csg", "std", "csg", "std", "csg", "std", "std"],
    ),
}


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("case", CASES)
def test_gated_training_takes_the_methods_steps(case, clip):
    options, paths = CASES[case]
    schedule = Schedule(**options, final_std=0.17, lr_warmup=0.0, lambda_2_ramp=0.5)
    model, data = tiny(), batches()
    expected = copy.deepcopy(model)
    module = GatedTraining(model, schedule, OBJECTIVE, gate_clip_norm=clip)
    trainer(gradient_clip_val=clip).fit(module, loader(data))
    start = schedule.warmup * 12
    by_hand(
        expected,
        data,
        2,
        paths,
        clip=clip,
        gate_clip=clip,
        factors=lambda step: (1.0, min(1.0, max(0.0, (step + 1 - start) / 6))),
    )
    assert_same(model, expected)
    assert [module.gate_callback.schedule.path(s) for s in range(12)] == paths


def attached_twin(model: GatedModel) -> nn.Module:
    """The same network as an ordinary module that csg_ext.attach has put a gate into."""
    plain = nn.Sequential(model.backbone, nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.classifier)
    return csg_ext.attach(copy.deepcopy(plain), num_classes=CLASSES, example=torch.randn(2, 1, 6, 6).double())


@pytest.mark.parametrize("case", CASES)
def test_an_attached_model_trains_as_a_gated_model_does(case):
    options, _ = CASES[case]
    model, data = tiny(), batches()
    twin = attached_twin(model)
    for net in (model, twin):
        module = GatedTraining(net, Schedule(**options, final_std=0.17, lr_warmup=0.0), OBJECTIVE)
        trainer().fit(module, loader(data))
    torch.testing.assert_close(twin.gate, model.gate)
    ours, theirs = (dict(net.named_parameters()) for net in (twin.model, model))
    for name, own in {"0.0": "backbone.0", "3": "classifier"}.items():
        for part in ("weight", "bias"):
            torch.testing.assert_close(ours[f"{name}.{part}"], theirs[f"{own}.{part}"])
    x = data[0][0]
    torch.testing.assert_close(csg_ext.detach(twin)(x), model(x))


def test_an_optimizer_of_its_own_for_csg_steps():
    options, paths = CASES["steps"]
    model, data = tiny(), batches()
    expected = copy.deepcopy(model)
    module = GatedTraining(
        model,
        Schedule(**options, final_std=0.17, lr_warmup=0.0),
        OBJECTIVE,
        csg_optimizer=functools.partial(torch.optim.SGD, lr=0.03, momentum=0.5),
    )
    trainer(gradient_clip_val=0.1).fit(module, loader(data))
    by_hand(expected, data, 2, paths, clip=0.1, csg_sgd=True)
    assert_same(model, expected)


def test_an_optimizer_for_csg_steps_is_refused_where_there_are_none():
    for make in (lambda **o: GatedTraining(tiny(), **o), ClassSpecificGateCallback):
        with pytest.raises(ValueError, match="csg_optimizer must be None in a joint schedule, .* got one: take"):
            make(csg_optimizer=functools.partial(torch.optim.SGD, lr=0.03))


@pytest.mark.parametrize("case", CASES)
def test_a_users_module_trains_as_gated_training_does(case):
    schedule = Schedule(**CASES[case][0], lr_warmup=0.0, lr_decay="constant")
    objective = Objective(label_smoothing=0.1)
    model, data = tiny(norm=True), batches()
    net = copy.deepcopy(model)
    trainer().fit(GatedTraining(model, schedule, objective), loader(data))
    own = Own(net, smoothing=0.1)
    trainer(callbacks=[ClassSpecificGateCallback(schedule, objective)]).fit(own, loader(data))
    assert_same(net, model, rtol=0, atol=0)
    assert net.gate.amax(0).eq(1).all()
    assert "training_step" not in own.__dict__ and not net._forward_hooks and not net._forward_pre_hooks


def test_accumulation_steps_once_and_keeps_the_path():
    """Three micro-batches a step equal one batch of their size: a path per optimizer step, one step of the gate."""
    model, data = tiny(), batches(count=9)
    expected, big = copy.deepcopy(model), loader(data).dataset.tensors
    schedule = Schedule(kind="steps", period=2, csg_share=0.5, lr_warmup=0.0)
    trainer(accumulate_grad_batches=3).fit(GatedTraining(model, schedule, OBJECTIVE), loader(data))
    trainer().fit(GatedTraining(expected, schedule, OBJECTIVE), DataLoader(TensorDataset(*big), 3 * SIZE))
    assert_same(model, expected)


def test_a_trainer_that_fits_on_keeps_the_runs_clock():
    """Two epochs, then four with the same Trainer: the weights' learning rate goes on where the run stands."""
    rates = []

    class Records(pl.Callback):
        def on_train_batch_start(self, trainer, *_):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    module, fits = GatedTraining(tiny(), Schedule(), OBJECTIVE), trainer(callbacks=[Records()])
    fits.fit(module, loader(batches()))
    fits.fit_loop.max_epochs = 4
    fits.fit(module, loader(batches()))
    short, long = (Schedule().for_run(total, STEPS) for total in (12, 24))
    expected = [0.1 * short.lr_factor(s) for s in range(12)] + [0.1 * long.lr_factor(s) for s in range(12, 24)]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("size", [CLASSES, SIZE])
def test_soft_labels_in_validation(size):
    """Accuracy against the class of the largest entry; as many rows as classes would compare without an error."""
    model, (x, y) = tiny(), batches(count=1)[0]
    x, y = x[:size], y[:size]
    rows = F.one_hot(y, CLASSES).double()
    (numbers,) = trainer().validate(GatedTraining(model), DataLoader(TensorDataset(x, rows), size), verbose=False)
    assert numbers["val_accuracy"] == pytest.approx((model(x).argmax(1) == y).double().mean().item())
    assert numbers["val_loss"] == pytest.approx(F.cross_entropy(model(x), y).item())


def test_plain_example_takes_the_same_steps(monkeypatch):
    example = load_script("train_plain_pytorch", monkeypatch)
    model, data = tiny(norm=True, dtype=torch.float32), batches(torch.float32)
    expected = copy.deepcopy(model)
    example.train(expected, data * 2, 2 * STEPS)
    module = GatedTraining(
        model,
        Schedule(kind="steps", period=3, csg_at=(2,), lr_warmup=0.0),
        Objective(),
        optimizer=functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=5e-4),
        gate_optimizer=functools.partial(ProjectedSGD, lr=2.0),
    )
    trainer().fit(module, loader(data))
    assert_same(model, expected)
    assert not model.gate.eq(0.5).any()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(kind="steps", period=60), "never takes the CSG path in 12 steps, .* got kind 'steps', period 60"),
        (dict(kind="epochs", period=3), "never takes the CSG path in 12 steps, .* got kind 'epochs', period 3"),
        (dict(warmup=0.6, final_std=0.6), "never takes the CSG path in 12 steps, .* warmup 0.6 and final_std 0.6"),
    ],
)
def test_a_schedule_without_a_csg_step_is_refused(options, message):
    with pytest.raises(ValueError, match=f"ClassSpecificGateCallback: the schedule {message}"):
        trainer().fit(GatedTraining(tiny(), Schedule(**options)), loader(batches()))
    trainer(fast_dev_run=True).fit(GatedTraining(tiny(), Schedule(**options)), loader(batches()))


def test_gradients_that_only_the_csg_optimizer_uses_do_not_pile_up():
    """The module's optimizer has the classifier alone: STD steps leave nothing to the CSG optimizer's step."""
    model, (batch,) = tiny(), batches(count=1)
    expected, seen = copy.deepcopy(model), []

    def csg_optimizer(parameters):
        optimizer = torch.optim.SGD(parameters, lr=0.01)
        optimizer.register_step_pre_hook(lambda *_: seen.append(model.backbone[0].weight.grad.clone()))
        return optimizer

    own = Own(model)
    own.configure_optimizers = lambda: torch.optim.SGD(model.classifier.parameters(), lr=0.1)
    schedule = Schedule(kind="steps", period=4, csg_share=0.25, final_std=0.0)
    callback = ClassSpecificGateCallback(schedule, csg_optimizer=csg_optimizer)
    trainer(4, callbacks=[callback]).fit(own, loader([batch]))
    optimizer = torch.optim.SGD(expected.classifier.parameters(), lr=0.1)
    for labels in (None, None, None, batch[1]):
        expected.zero_grad()
        F.cross_entropy(expected(batch[0]) if labels is None else expected(batch[0], labels), batch[1]).backward()
        if labels is None:
            optimizer.step()
    (gradient,) = seen
    torch.testing.assert_close(gradient, expected.backbone[0].weight.grad)


@pytest.mark.parametrize(
    "options, csg_optimizer",
    [
        (dict(gate_warmup=0.5), None),
        (dict(kind="steps", period=2), functools.partial(torch.optim.SGD, lr=0.1)),
    ],
)
def test_clipping_by_value_with_steps_that_leave_the_weights_without_a_gradient(options, csg_optimizer):
    model, data = tiny(), batches(count=2)
    before = copy.deepcopy(model)
    own = Own(model)
    own.configure_optimizers = lambda: torch.optim.SGD(own.parameters(), lr=1.0)
    schedule = Schedule(**options, lr_warmup=0.0, final_std=0.0, lr_decay="constant")
    callback = ClassSpecificGateCallback(schedule, OBJECTIVE, csg_optimizer=csg_optimizer)
    clip = dict(gradient_clip_val=1e-6, gradient_clip_algorithm="value")
    trainer(1, callbacks=[callback], **clip).fit(own, loader(data))
    moved = max((a - b).abs().max() for a, b in zip(model.weights(), before.weights(), strict=True))
    assert 0 < moved <= 1.2e-6
    assert "clip_gradients" not in own.__dict__


def test_a_training_step_of_the_instance_is_put_back():
    own, calls = Own(tiny()), []
    plain = own.training_step

    def mine(batch, batch_idx):
        calls.append(batch_idx)
        return plain(batch, batch_idx)

    own.training_step = mine
    trainer(1, callbacks=[ClassSpecificGateCallback()]).fit(own, loader(batches()))
    assert own.training_step is mine and len(calls) == STEPS


@pytest.mark.parametrize("called", [False, True])
def test_a_batch_that_the_module_skips(called):
    class Skips(Own):
        def training_step(self, batch, batch_idx):
            if batch_idx == 1 and not called:
                return None
            output = super().training_step(batch, batch_idx)
            return None if batch_idx == 1 else output

    model, data = tiny(), batches(count=3)
    states = []

    class Records(pl.Callback):
        def on_train_batch_end(self, *_):
            states.append(copy.deepcopy(model.state_dict()))

    trainer(1, callbacks=[ClassSpecificGateCallback(Schedule(final_std=0.0)), Records()]).fit(
        Skips(model), loader(data)
    )
    same = [all(torch.equal(a[k], b[k]) for k in a) for a, b in zip(states, states[1:], strict=False)]
    assert same == [True, False]


# ---- frozen stages, soft labels


def test_the_csg_optimizers_rate_has_its_own_course():
    rates = []

    class Records(pl.Callback):
        def on_before_zero_grad(self, trainer, module, _):
            callback = module.gate_callback
            if callback.csg_optimizer is not None:
                rates.append(callback.csg_optimizer.param_groups[0]["lr"])

    schedule = Schedule("steps", period=2, csg_share=0.5, csg_lr_warmup=0.0, csg_lr_decay="multistep", final_std=0.0)
    make = functools.partial(torch.optim.SGD, lr=0.03)
    trainer(callbacks=[Records()]).fit(
        GatedTraining(tiny(), schedule, OBJECTIVE, csg_optimizer=make), loader(batches())
    )
    # 12 steps, of which 1, 3, ... are CSG steps; each begins with what the last one has left
    assert rates[2::2] == pytest.approx([0.03 * f for f in (1, 1, 0.1, 0.1, 0.01)])
    with pytest.raises(ValueError, match="csg_lr_warmup and csg_lr_decay of the schedule need a csg_optimizer"):
        ClassSpecificGateCallback(schedule)


def test_a_gate_optimizer_that_does_not_project_is_refused():
    adam = functools.partial(torch.optim.Adam, lr=0.1)
    message = "gate_optimizer must project, as .* got Adam, which left a gate from 0.4 on whose columns .* not 1$"
    with pytest.raises(ValueError, match=message):
        trainer().fit(GatedTraining(tiny(), Schedule(), OBJECTIVE, gate_optimizer=adam), loader(batches()))
    projected = lambda gate: ProjectedOptimizer(adam(gate), gate)  # noqa: E731
    trainer().fit(GatedTraining(tiny(), Schedule(), OBJECTIVE, gate_optimizer=projected), loader(batches()))


def test_batches_that_are_no_pairs():
    class Named(Own):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch["x"]), batch["labels"])

    data = DataLoader([{"x": x, "labels": y} for x, y in batches()], batch_size=None)
    for options, message in (
        ({}, "batches must be .x, labels., else labels=, .* got dict with x, labels$"),
        ({"mix": Mix(CLASSES, mixup=1.0)}, "mix needs batches .x, labels., got dict$"),
    ):
        with pytest.raises(TypeError, match=message):
            trainer(callbacks=[ClassSpecificGateCallback(**options)]).fit(Named(tiny()), data)
    callback = ClassSpecificGateCallback(labels=lambda batch: batch["labels"])
    trainer(callbacks=[callback]).fit(Named(tiny()), data)


def test_frozen_stages_do_not_move():
    model, data = tiny(norm=True), batches()
    freeze(model, ["backbone"])
    before = copy.deepcopy(model.state_dict())
    expected = copy.deepcopy(model)
    trainer().fit(GatedTraining(model, Schedule(lr_warmup=0.0), OBJECTIVE), loader(data))
    after = model.state_dict()
    moved = {k for k in after if not torch.equal(after[k], before[k])}
    assert moved == {"csg.gate", "classifier.weight", "classifier.bias"}
    expected.train()
    x = data[0][0]
    want = F.batch_norm(expected.backbone[0](x), torch.zeros(8).double(), torch.ones(8).double())
    torch.testing.assert_close(expected(x), expected.classifier(want.tanh().mean((2, 3))))
    assert not expected.backbone[1].training and expected.classifier.training
    with pytest.raises(ValueError, match="stages must be submodules of the model, got 'bakbone'; nearest: backbone"):
        freeze(model, ["bakbone"])


@pytest.mark.parametrize("stages", [["backbone"], ["backbone.1"]], ids=["backbone", "norm alone"])
def test_frozen_statistics_stay_whoever_is_called(stages):
    """The module that freeze() got, one that holds it, one inside, a LightningModule that is never called itself."""
    model, data = tiny(norm=True), batches()
    x = data[0][0]
    module = GatedTraining(model, Schedule(lr_warmup=0.0), OBJECTIVE)
    freeze(module, [f"model.{stage}" for stage in stages])
    before = {k: v.clone() for k, v in model.state_dict().items() if "running" in k or "batches" in k}
    trainer().fit(module, loader(data))
    copied = copy.deepcopy(model).train()
    for call in (module.train(), model, model.features_and_logits, model.backbone, copied, copied.backbone):
        call(x)
    for net in (model, copied):
        assert len(before) == 3 and all(torch.equal(net.state_dict()[k], v) for k, v in before.items())
    assert model.training and not model.backbone[1].training
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(copied).train()
    synced.backbone(x)
    assert isinstance(synced.backbone[1], nn.SyncBatchNorm) and not synced.backbone[1].training
    copied.backbone = nn.Conv2d(1, 8, 3).double()  # what was frozen is no more
    copied(x)


def test_a_compiled_copy_of_an_attached_model_trains_as_the_model_does():
    nets, data = [attached_twin(tiny())], loader(batches())
    nets.append(copy.deepcopy(nets[0]))
    torch.compiler.reset()
    modules = [Own(nets[0]), Own(torch.compile(nets[1], backend="eager"))]
    for module in modules:
        callback = ClassSpecificGateCallback(Schedule(lr_warmup=0.0), OBJECTIVE)
        trainer(callbacks=[callback]).fit(module, data)
    assert_same(*nets)


def test_gate_warm_up_leaves_the_network_and_its_statistics_alone():
    model, data = tiny(norm=True), batches()
    before = copy.deepcopy(model.state_dict())
    trainer(1).fit(GatedTraining(model, Schedule(gate_warmup=1.0, final_std=0.0), OBJECTIVE), loader(data))
    after = model.state_dict()
    assert {k for k in after if not torch.equal(after[k], before[k])} == {"csg.gate"}
    assert model.backbone[1].training


def test_mixed_batches_reach_the_gate_as_soft_rows():
    model, data = tiny(), batches(count=2)
    expected = copy.deepcopy(model)
    schedule = Schedule(kind="joint", lr_warmup=0.0, final_std=0.0, lr_decay="constant")
    objective = Objective(lambda_1=0.7, lambda_2=0.02, label_smoothing=0.2)
    mix = Mix(CLASSES, mixup=0.4, cutmix=0.4)
    seen = []

    def recorded(x, y):
        seen.append(tuple(t.to(x.dtype) for t in mix(x, y)))
        return seen[-1]

    module = GatedTraining(model, schedule, objective, mix=recorded)
    trainer(3).fit(module, loader(data))
    weights = torch.optim.SGD(expected.weights(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    gate = ProjectedSGD([expected.gate], lr=2.0)
    for x, rows in seen:
        assert rows.shape == (SIZE, CLASSES)
        features = expected.backbone(x).mean((2, 3))
        smooth = 0.8 * rows + 0.2 / CLASSES
        std, csg = (
            -(smooth * expected.classifier(f).log_softmax(1)).sum(1).mean()
            for f in (features, features * (rows @ expected.gate))
        )
        expected.zero_grad()
        (std + 0.7 * csg + 0.02 * F.relu(expected.gate.sum() - 8)).backward()
        weights.step()
        gate.step()
    assert len(seen) == 6
    assert_same(model, expected)


# ---- logs and what must be noticed


def test_tensorboard_gets_losses_density_penalty_and_the_gate(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    model, data = tiny(), batches()
    schedule = Schedule(kind="steps", period=2, csg_share=0.5, lr_warmup=0.0)
    trainer(logger=logger, log_every_n_steps=1).fit(GatedTraining(model, schedule, OBJECTIVE), loader(data))
    events = EventAccumulator(str(tmp_path)).Reload()
    scalars = {tag: [e.step for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert scalars["l1_density"] == list(range(12))
    paths = [schedule.for_run(12, 6).path(s) for s in range(12)]
    first = [paths[:6].index("csg"), 6 + paths[6:].index("csg")]  # in each epoch; then the last CSG step's value stays
    assert scalars["loss_csg"] == scalars["gate_penalty"] == [*range(first[0], 6), *range(first[1], 12)]
    values = [e.value for e in events.Scalars("loss_csg")]
    assert len(set(values)) == paths.count("csg")
    images = events.Images("gate")
    assert [(i.step, i.height, i.width) for i in images] == [(6, CLASSES, 8), (12, CLASSES, 8)]


@pytest.mark.parametrize("rate, warns, classes", [(1e-6, 1, 4), (2.0, 0, 4), (1e-6, 1, 2), (2.0, 0, 2)])
def test_a_density_that_stalls_is_said_early_and_once(rate, warns, classes):
    model = GatedModel(nn.Sequential(nn.Conv2d(1, 8, 3), nn.Tanh()), classes, num_filters=8).double()
    objective = Objective(lambda_2=0.5)
    gate = functools.partial(ProjectedSGD, lr=rate)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = GatedTraining(model, Schedule(kind="steps", period=2, csg_share=0.5), objective, gate_optimizer=gate)
        trainer(4).fit(module, loader([(x, y % classes) for x, y in batches()]))
    texts = [str(w.message) for w in caught if issubclass(w.category, DensityWarning)]
    assert len(texts) == warns
    if warns:
        assert texts[0].startswith(
            f"the gate's L1-density stalls at 1.00 after 6 of 24 steps (its floor is {1 / classes:.2f})"
        )


def test_a_batch_of_one_sample():
    """BatchNorm on 1 x 1 maps cannot learn from one sample: said in one sentence; frozen, it need not."""
    net = nn.Sequential(nn.Conv2d(1, 8, 6), nn.BatchNorm2d(8))
    model = GatedModel(net, CLASSES, num_filters=8)
    data = [(torch.randn(1, 1, 6, 6), torch.tensor([1]))]
    message = "more than one value per channel, got a batch of 1: use larger batches"
    with pytest.raises(ValueError, match=message):
        trainer(1).fit(GatedTraining(model, Schedule(lr_warmup=0.0)), loader(data))
    with pytest.raises(ValueError, match=message):
        Objective()(model.train(), *data[0], "std")
    freeze(model, ["backbone"])
    trainer(1).fit(GatedTraining(model, Schedule(lr_warmup=0.0)), loader(data))


class Twice(Own):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]) + self.net(batch[0]), batch[1])


class Labels(Own):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0], batch[1]), batch[1])


class Manual(Own):
    def __init__(self, net):
        super().__init__(net)
        self.automatic_optimization = False


class Two(Own):
    def __init__(self, net):
        super().__init__(net)
        self.other = tiny()


@pytest.mark.parametrize(
    "cls, options, message",
    [
        (Twice, {}, "must call the gated module once, got 2 calls"),
        (Labels, {}, "must call the gated module with x alone, .* got 2 arguments"),
        (Manual, {}, "expected automatic optimization, got a module with manual one"),
        (Two, {}, r"expected one gated module \(GatedModel, csg_ext.attach\) in Two, got net, other"),
        (Own, {"model": "body"}, "model must name a gated module, one of net, got 'body'"),
    ],
)
def test_modules_that_the_callback_cannot_train(cls, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(callbacks=[ClassSpecificGateCallback(**options)]).fit(cls(tiny()), loader(batches()))
