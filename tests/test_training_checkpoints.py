"""Tests of exact resume, of runs that diverge and the checkpoints that they leave, and of averages."""

from __future__ import annotations

import copy
import functools
import math

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_training import OBJECTIVE, assert_same, batches, loader, tiny, trainer

from csg_ext.optim import ProjectedSGD
from csg_ext.training import (
    AtomicCheckpointIO,
    AveragedGatedModel,
    DivergedError,
    GatedTraining,
    GatedWeightAveraging,
    Schedule,
    load_weights,
)

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:::lightning")]


@pytest.mark.parametrize("kind", ["joint", "steps"])
def test_resume_is_exact(tmp_path, kind):
    """Optimizers of the callback (momentum of the gate, the CSG optimizer) and the run's clock come back."""
    options = dict(gate_optimizer=functools.partial(ProjectedSGD, lr=1.0, momentum=0.9))
    if kind != "joint":
        options["csg_optimizer"] = functools.partial(torch.optim.Adam, lr=0.01)
    schedule = Schedule(kind=kind, period=2, csg_share=0.5, lr_warmup=0.2)
    model, data = tiny(norm=True), batches()
    nets = [copy.deepcopy(model) for _ in range(3)]
    trainer(4).fit(GatedTraining(nets[0], schedule, OBJECTIVE, **options), loader(data))
    folder = tmp_path / "new"
    saver = ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}")
    fit = dict(enable_checkpointing=True, callbacks=[saver], plugins=[AtomicCheckpointIO()])
    trainer(4, **fit).fit(GatedTraining(nets[1], schedule, OBJECTIVE, **options), loader(data))
    path = folder / "epoch=1.ckpt"
    trainer(4, plugins=[AtomicCheckpointIO()]).fit(
        GatedTraining(nets[2], schedule, OBJECTIVE, **options), loader(data), ckpt_path=path
    )
    for net in nets[1:]:
        assert_same(net, nets[0], rtol=0, atol=0)
    other = tiny(norm=True)
    load_weights(other, folder / "epoch=3.ckpt")
    assert_same(other, nets[0], rtol=0, atol=0)


class SpoilsStep(GatedTraining):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * math.nan if self.trainer.global_step == 8 else loss


def test_nan_says_the_step_and_keeps_the_last_good_checkpoint(tmp_path):
    model, data = tiny(), batches()
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=1, monitor=None, filename="last")
    module = SpoilsStep(model, Schedule(lr_warmup=0.0), OBJECTIVE)
    with pytest.raises(DivergedError, match="the loss is not finite at step 9 of 12: try a lower learning rate"):
        trainer(enable_checkpointing=True, callbacks=[saver]).fit(module, loader(data))
    (path,) = tmp_path.glob("*.ckpt")
    good = torch.load(path, weights_only=True)
    assert good["global_step"] == 8 and all(v.isfinite().all() for v in good["state_dict"].values())
    assert "training_step" not in module.__dict__ and not model._forward_hooks


class SpoilsGradient(GatedTraining):
    at = 11

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.trainer.global_step == self.at:
            loss = loss + (self.model.gate.sum() * 0).sqrt()  # adds 0, with a gradient of NaN
        return loss


@pytest.mark.parametrize("final_std", [0.0, 0.5])
def test_a_gate_of_nan_that_no_loss_shows_is_said_before_a_checkpoint(tmp_path, final_std):
    """The gate's last step spoils it: the last of the run, or STD steps follow, whose losses stay finite."""
    schedule = Schedule(final_std=final_std, lr_warmup=0.0)
    message = r"the loss is finite, but the parameter csg.gate is NaN or infinite after step {} of 12: try a lower"
    for options in ({}, {"every_n_train_steps": 1}):
        module = SpoilsGradient(tiny(), schedule, OBJECTIVE)
        module.at = 5 if final_std else 11
        saver = ModelCheckpoint(tmp_path / str(len(options)), save_top_k=1, filename="last", **options)
        fit = dict(enable_checkpointing=True, callbacks=[saver]) if options else {}
        step = 12 if not options else module.at + 1
        with pytest.raises(DivergedError, match=message.format(step)):
            trainer(**fit).fit(module, loader(batches()))
    (path,) = tmp_path.glob("*/*.ckpt")
    good = torch.load(path, weights_only=True)
    assert good["global_step"] == module.at and all(v.isfinite().all() for v in good["state_dict"].values())


def test_a_checkpoint_outside_of_fit_is_no_affair_of_the_callback(tmp_path):
    tester = trainer()
    tester.validate(GatedTraining(tiny()), loader(batches()), verbose=False)
    tester.save_checkpoint(tmp_path / "x.ckpt")


# ---- averages


def test_the_average_gate_stays_feasible():
    """The EMA of the weights is torch's; that of the gate is projected, as an average need not lie in V_G."""
    schedule = Schedule(kind="joint", lr_warmup=0.0, lr_decay="constant")
    model, data = tiny(), batches()
    average = AveragedGatedModel(copy.deepcopy(model), avg_fn=torch.optim.swa_utils.get_ema_avg_fn(0.8))
    expected = {k: v.clone() for k, v in model.state_dict().items()}

    class Follow(pl.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            average.update_parameters(module.model)
            for name, value in module.model.state_dict().items():
                first = trainer.global_step == 1
                expected[name] = value.clone() if first else 0.8 * expected[name] + 0.2 * value

    callbacks = [Follow(), GatedWeightAveraging(decay=0.8)]
    trainer(callbacks=callbacks).fit(GatedTraining(model, schedule, OBJECTIVE), loader(data))
    torch.testing.assert_close(average.raw_gate_0, expected["csg.gate"])
    expected["csg.gate"] = expected["csg.gate"] / expected["csg.gate"].amax(0)
    for name, value in average.module.state_dict().items():
        torch.testing.assert_close(value, expected[name], msg=name)
    assert average.module.gate.amax(0).eq(1).all()
    assert_same(model, average.module)  # Lightning's callback leaves its average in the model


def test_an_average_gate_forgets_what_the_gate_has_left():
    """Averages of projections would keep the first class near 1. Stored and loaded, it goes on as it would have."""
    model = tiny().double()
    average = AveragedGatedModel(model, avg_fn=torch.optim.swa_utils.get_ema_avg_fn(0.99))

    def updates(gate, count):
        model.gate.data.copy_(torch.tensor(gate, dtype=torch.float64)[:, None].expand_as(model.gate))
        for _ in range(count):
            average.update_parameters(model)

    updates([1.0, 0.0, 0.0], 100)
    updates([0.0, 1.0, 0.0], 50)
    stored = copy.deepcopy(average.state_dict())
    average = AveragedGatedModel(tiny().double(), avg_fn=torch.optim.swa_utils.get_ema_avg_fn(0.99))
    average.load_state_dict(stored)
    updates([0.0, 1.0, 0.0], 50)
    left = 0.99**100
    expected = torch.tensor([left / (1 - left), 1.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(average.module.gate[:, 0].detach(), expected)


def test_an_average_goes_on_from_a_checkpoint(tmp_path):
    """Lightning's callback stores the average gate as it is beside the projected one."""
    schedule, data = Schedule(kind="joint", lr_warmup=0.0, lr_decay="constant"), loader(batches())
    first, second = GatedWeightAveraging(decay=0.8), GatedWeightAveraging(decay=0.8)
    fitted = trainer(callbacks=[first])
    fitted.fit(GatedTraining(tiny(), schedule, OBJECTIVE), data)
    fitted.save_checkpoint(tmp_path / "x.ckpt")
    stored = torch.load(tmp_path / "x.ckpt", weights_only=True)
    raw = stored["averaging_state"]["raw_gate_0"]
    assert not raw.amax(0).eq(1).all()
    torch.testing.assert_close(stored["state_dict"]["model.csg.gate"], raw / raw.amax(0))
    again = trainer(callbacks=[second])
    again.fit(GatedTraining(tiny(), schedule, OBJECTIVE), data, ckpt_path=tmp_path / "x.ckpt")
    assert_same(first._average_model, second._average_model)


def test_a_second_fit_with_the_same_average_keeps_what_it_learns():
    """A fresh Trainer counts from 0 again; Lightning's counters stay where the first fit has left them."""
    module, data = GatedTraining(tiny(), Schedule(lr_warmup=0.0), OBJECTIVE), batches()
    average = GatedWeightAveraging(decay=0.5)
    trainer(callbacks=[average]).fit(module, loader(data))
    first = copy.deepcopy(module.model)
    trainer(callbacks=[average]).fit(module, loader(data))
    fresh = GatedTraining(first, Schedule(lr_warmup=0.0), OBJECTIVE)
    trainer(callbacks=[GatedWeightAveraging(decay=0.5)]).fit(fresh, loader(data))
    assert int(average._average_model.n_averaged) == 12
    assert_same(module.model, first)
