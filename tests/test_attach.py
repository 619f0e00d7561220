"""Tests of what attach returns, on small models: both paths, gradients, copies, compiled, in several processes."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import threading

import attach_ddp
import pytest
import torch
import torch.nn.functional as F
from model_zoo import Known, timm
from small_attached import EXAMPLE, Small, attach_small, batch, gated_by_hand, hook_count
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import csg_ext


def test_a_layer_before_a_shortcut_and_in_place_operations():
    g = attach_small("inner").double().eval()
    model, (x, labels) = g.model, batch()
    x = x.double()
    shortcut = model.bn(model.conv(x)).relu()
    inner = model.inner(shortcut)
    expected = model.head((inner * g.gate[labels][:, :, None, None] + shortcut).relu().mean((2, 3)))
    torch.testing.assert_close(g(x, labels), expected)
    torch.testing.assert_close(g.forward_features(x), inner)  # not what became of it in place
    torch.testing.assert_close(g.pooled_features(x), inner.mean((2, 3)))
    assert not g.one_pass  # twice the samples do not fit the shortcut
    for got, wanted in zip(g(x, labels, path="both"), (model(x), expected), strict=True):
        torch.testing.assert_close(got, wanted)


def test_a_layer_followed_by_an_in_place_relu():
    g = attach_small("bn").double().eval()
    model, (x, labels) = g.model, batch()
    x = x.double()
    bn = model.bn(model.conv(x))
    torch.testing.assert_close(g.forward_features(x), bn)
    shortcut = (bn * g.gate[labels][:, :, None, None]).relu()
    torch.testing.assert_close(g(x, labels), model.head((model.inner(shortcut) + shortcut).relu().mean((2, 3))))


def test_gradients_are_those_of_the_definition():
    g = attach_small(model=Small()).double()
    nn.init.uniform_(g.gate)
    known = Known(Small, 6, "pool", "input", 1, 6, "input of pool")
    x, labels = batch()
    x = x.double().requires_grad_()
    parameters = [x, *g.parameters()]
    wanted = torch.autograd.grad(F.cross_entropy(gated_by_hand(g.model, known, g.gate[labels], x), labels), parameters)
    for got in (g(x, labels), g(x, labels, path="both")[1]):
        for a, b in zip(torch.autograd.grad(F.cross_entropy(got, labels), parameters), wanted, strict=True):
            torch.testing.assert_close(a, b)


class Checkpointed(Small):
    """Its inner convolution runs again in backward, with a gate on it."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.relu(self.bn(self.conv(x)))
        inner = checkpoint(self.inner, shortcut, use_reentrant=self.reentrant)
        return self.head(self.pool(F.relu(inner + shortcut)).flatten(1))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # attach records no gradients
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_gate_inside_activation_checkpointing_ends_backward(reentrant):
    g = attach_small("inner", model=Checkpointed(reentrant))
    x, labels = batch()
    loss = F.cross_entropy(g(x, labels), labels)
    message = "must lie outside reentrant activation checkpointing" if reentrant else "checkpoint"
    with pytest.raises(RuntimeError, match=message):
        loss.backward()
    outside = attach_small(model=Checkpointed(reentrant))  # at the pooling: nothing of the gate runs again
    got = torch.autograd.grad(F.cross_entropy(outside(x, labels), labels), outside.gate)[0]
    plain = attach_small(model=Small())
    plain.load_state_dict(outside.state_dict())
    wanted = torch.autograd.grad(F.cross_entropy(plain(x, labels), labels), plain.gate)[0]
    torch.testing.assert_close(got, wanted)


def test_std_steps_give_the_gate_no_gradient():
    g = attach_small()
    x, labels = batch()
    F.cross_entropy(g(x), labels).backward()
    assert g.gate.grad is None and all(p.grad is not None for p in g.weights())
    assert len(g.weights()) == len(list(g.model.parameters()))


def test_path_chooses_whatever_labels_say():
    g = attach_small().eval()
    x, labels = batch()
    assert torch.equal(g(x, labels, path="std"), g(x)) and torch.equal(g(x, labels, path="csg"), g(x, labels))
    with pytest.raises(ValueError, match="AttachedModel: labels must be given for path='both', got None"):
        g(x, path="both")


def test_batch_norm_after_the_gate_never_sees_both_paths_in_training():
    head = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 4))
    g = attach_small(model=Small(head)).double()
    x, labels = batch()
    x = x.double()
    twin = copy.deepcopy(g)
    std, csg = twin(x), twin(x, labels)
    for got, wanted in zip(g(x, labels, path="both"), (std, csg), strict=True):
        torch.testing.assert_close(got, wanted)
    g.eval()
    expected = g(x), g(x, labels)
    for got, wanted in zip(g(x, labels, path="both"), expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_a_batch_of_one_with_batch_norm():
    """attach itself does not train; a training step raises torch's own error and leaves no labels behind."""
    model = Small(nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 4))).train()
    g = csg_ext.attach(model, example=EXAMPLE[:1])
    x, labels = batch(1)
    for path in ("std", "csg", "both"):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
            g(x, labels, path=path)
    assert torch.equal(g.eval()(x), model(x)) and g(x, labels).shape == (1, 4)


def test_an_error_inside_forward_leaves_no_labels_behind():
    g = attach_small().eval()
    x, labels = batch()
    before = g(x)
    with pytest.raises(ValueError, match=r"gated_pool: labels\[0\] = 9 is outside \[0, 4\)"):
        g(x, torch.full_like(labels, 9))
    assert torch.equal(g.model(x), before) and torch.equal(g(x), before)


def test_threads_do_not_see_each_others_labels():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    x = torch.randn(4, 3, 10, 10)
    g = csg_ext.attach(model, example=x)
    with torch.no_grad():
        g.gate.uniform_()
        labels = [None, *(torch.full((4,), c) for c in range(3))]
        want = [g(x, y) for y in labels]
        wrong = []

        def work(y, right):
            with torch.no_grad():
                wrong.extend(not torch.equal(g(x, y), right) for _ in range(100))

        threads = [threading.Thread(target=work, args=pair) for pair in zip(labels, want, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(wrong) == 400 and not any(wrong)


def test_attach_changes_nothing_in_the_model():
    model = Small()
    model.bn.eval()  # a frozen BatchNorm in a model that trains
    model.inner.requires_grad_(False)
    state = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    random = torch.get_rng_state()
    g = csg_ext.attach(model, example=EXAMPLE)
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in model.modules()] == modes and g.training
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True))
    assert all(p.grad is None for p in model.parameters()) and not model.inner.weight.requires_grad
    assert hook_count(model) == 1
    assert csg_ext.detach(g) is model and csg_ext.detach(g) is model
    assert hook_count(model) == 0 and [m.training for m in model.modules()] == modes


class Counting(nn.Module):
    """Counts its passes, in place or in a new buffer, and draws random numbers."""

    def __init__(self):
        super().__init__()
        self.inner = Small()
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, x, scale=None):
        self.passes += 1
        self.seen = self.seen + x.mean()
        logits = self.inner(x + 1e-6 * torch.rand_like(x))
        return logits if scale is None else logits * scale


def test_attach_leaves_buffers_and_random_numbers():
    model, state = Counting(), torch.get_rng_state()
    buffers = dict(model.named_buffers())
    g = csg_ext.attach(model, "inner.bn", example=EXAMPLE)
    assert torch.equal(torch.get_rng_state(), state) and model.passes == 0 and not model.seen.any()
    assert all(buffers[name] is buffer for name, buffer in model.named_buffers())
    x, labels = batch()
    scale = torch.rand(5, 1)  # one for every sample, used after the gate
    assert g(x, labels, path="both", scale=scale)[1].shape == (5, 4)
    with pytest.raises(ValueError, match="attach: model and example must hold values, got ones on the device meta"):
        csg_ext.attach(Small().to("meta"), example=EXAMPLE.to("meta"))


def test_inference_mode_and_examples_of_integers():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.e, self.c, self.fc = nn.Embedding(50, 8), nn.Conv1d(8, 16, 3), nn.Linear(16, 4)

        def forward(self, x):
            return self.fc(self.c(self.e(x).transpose(1, 2)).relu().amax(2))

    model, example = Words(), torch.randint(0, 50, (2, 12))
    with torch.inference_mode():
        g = csg_ext.attach(model, example=example)
    assert str(g.plan.gate) == "input of fc" and g.gate.shape == (4, 16) and not g.gate.is_inference()


def test_with_form_detaches_after_an_error_too():
    model = Small().eval()
    x, labels = batch()
    before = model(x)
    with contextlib.suppress(KeyError), csg_ext.attach(model, example=EXAMPLE) as g:
        assert not torch.equal(g(x, labels), before)
        raise KeyError
    assert hook_count(model) == 0 and torch.equal(model(x), before)
    with pytest.raises(RuntimeError, match="'head', where the gate is, must run once .* ran 0 times: was the model"):
        g(x, labels)


def test_a_replaced_module_is_noticed():
    g = attach_small()
    g.model.head = nn.Linear(6, 4)
    x, labels = batch()
    with pytest.raises(RuntimeError, match="ran 0 times"):
        g(x, labels)


def test_a_thousand_attachments_leak_nothing():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))

    def loop(times: int) -> int:
        for _ in range(times):
            csg_ext.detach(csg_ext.attach(model, "0", example=EXAMPLE))
        gc.collect()
        return len(gc.get_objects())

    before = loop(5)
    assert loop(1000) < before + 100
    assert hook_count(model) == 0


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda g: pickle.loads(pickle.dumps(g))], ids=["copy", "pickle"])
@pytest.mark.parametrize("layer", [None, "inner"])
def test_copies_follow_their_own_gate(duplicate, layer):
    g = attach_small(layer).eval()
    x, labels = batch()
    std, csg = g(x), g(x, labels)
    other = duplicate(g)
    assert torch.equal(other(x), std) and torch.equal(other(x, labels), csg)
    nn.init.zeros_(other.gate)
    assert torch.equal(g(x, labels), csg) and not torch.equal(other(x, labels), csg)
    csg_ext.detach(other)
    assert hook_count(other.model) == 0 and hook_count(g.model) == 1 and torch.equal(g(x, labels), csg)


def test_ema_copies():
    g = attach_small().eval()
    x, labels = batch()
    before = copy.deepcopy(g)
    averages = torch.optim.swa_utils.AveragedModel(g, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    ema = timm.utils.ModelEmaV3(g, decay=0.5)
    averages.update_parameters(g)
    with torch.no_grad():
        for p in g.parameters():
            p.add_(torch.rand_like(p))
        mean = copy.deepcopy(g)
        for p, old in zip(mean.parameters(), before.parameters(), strict=True):
            p.lerp_(old, 0.5)
    averages.update_parameters(g)
    ema.update(g)
    for average in (averages, ema):
        torch.testing.assert_close(average(x, labels), mean(x, labels))
        for got, wanted in zip(average(x, labels, path="both"), mean(x, labels, path="both"), strict=True):
            torch.testing.assert_close(got, wanted)


def test_state_dict_round_trip():
    g, other = attach_small().eval(), attach_small().eval()
    x, labels = batch()
    assert not torch.equal(other(x, labels), g(x, labels))
    other.load_state_dict(g.state_dict())
    assert torch.equal(other(x, labels), g(x, labels)) and torch.equal(other(x), g(x))
    plain = Small().eval()
    plain.load_state_dict({k.removeprefix("model."): v for k, v in g.state_dict().items() if k != "csg.gate"})
    assert torch.equal(plain(x), g(x))
    other.load_state_dict({k: v.clone() for k, v in g.state_dict().items()}, assign=True)
    assert torch.equal(other(x, labels), g(x, labels))


@pytest.mark.parametrize("case", ["one pass", "before a shortcut", "before BatchNorm"])
def test_compiled(case):
    torch.compiler.reset()
    head = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 4)) if case == "before BatchNorm" else None
    g = attach_small("inner" if case == "before a shortcut" else None, model=Small(head))
    plain = copy.deepcopy(g)
    compiled = torch.compile(g, fullgraph=True, backend="aot_eager")
    x, labels = batch()
    for path in ("std", "csg", "both"):
        found, wanted = compiled(x, labels, path=path), plain(x, labels, path=path)
        torch.testing.assert_close(found, wanted)
        for out in (found, wanted):
            sum(F.cross_entropy(part, labels) for part in (out if path == "both" else (out,))).backward()
    for p, q in zip(g.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_half_types_and_autocast():
    for dtype in (torch.bfloat16, torch.float16):
        g = csg_ext.attach(Small().to(dtype).eval(), example=EXAMPLE.to(dtype))
        nn.init.uniform_(g.gate)
        x, labels = batch()
        assert g.one_pass and g.gate.dtype == torch.float32 and g(x.to(dtype), labels).dtype == dtype
        exact = copy.deepcopy(g).double()
        wanted = exact(x.to(dtype).double(), labels)
        tolerance = 32 * torch.finfo(dtype).eps
        torch.testing.assert_close(g(x.to(dtype), labels).double(), wanted, rtol=tolerance, atol=tolerance)
    g = attach_small().eval()
    x, labels = batch()
    with torch.autocast("cpu", torch.bfloat16):
        std, csg = g(x, labels, path="both")
        assert torch.equal(g(x), g.model(x)) and std.dtype == csg.dtype == g(x).dtype
    torch.testing.assert_close(csg.float(), g(x, labels), rtol=0.05, atol=0.05)


def test_tuples_and_extra_arguments():
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small = Small()

        def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
            return self.small(x * scale), x

    g = attach_small(model=Wrapped()).eval()
    x, labels = batch()
    torch.testing.assert_close(g(x, labels, scale=2.0), g(2 * x, labels))
    assert torch.equal(g(x, scale=2.0), g.model.small(2 * x)) and g.plan.layer.name == "small.pool"


def test_empty_batch():
    g = attach_small().eval()
    std, csg = g(torch.zeros(0, 2, 6, 6), torch.zeros(0, dtype=torch.int64), path="both")
    assert std.shape == csg.shape == (0, 4)


def test_distributed_data_parallel(tmp_path):
    """Two processes with half of the batch each have the gradients of one process, on every path, and none hangs."""
    context = torch.multiprocessing.start_processes(
        attach_ddp.run, (str(tmp_path),), nprocs=2, join=False, start_method="spawn"
    )
    try:
        for _ in range(170):
            if context.join(timeout=1):
                break
        else:
            pytest.fail("two processes did not end within 170 s")
    finally:
        for process in context.processes:
            process.kill()
    found = torch.load(tmp_path / "gradients.pt")
    for name, paths in (("turns", attach_ddp.PATHS), ("joint", ["both"] * 3)):
        g = attach_ddp.gated_model()
        for got, path in zip(found[name], paths, strict=True):
            wanted = attach_ddp.gradients(g, *attach_ddp.data(), path)
            assert (got[-1] is None) == (wanted[-1] is None) == (path == "std")
            for a, b in zip(got, wanted, strict=True):
                torch.testing.assert_close(a, b)
