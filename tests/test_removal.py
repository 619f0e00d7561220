"""Tests of class removal: against features zeroed by hand, restoring without trace, copies, bad input, the example."""

from __future__ import annotations

import copy
import io
import json
import math
import runpy

import numpy as np
import pytest
import torch
from torch import nn

from csg_ext import attach, metrics
from csg_ext.analysis import accuracy_per_class, forget, removal_table
from csg_ext.data import ImageData
from csg_ext.data.batches import normalise
from csg_ext.nn import GatedModel, build_backbone
from csg_ext.training.config import TrainConfig

OWNERS = torch.tensor([0, 2, 2, 1, 0, 4, 4, 1])  # of 5 classes, 3 has no filter


def _backbone() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())


class _TwoLayerHead(nn.Module):
    """The gate's place is before a head of two layers, where pooled features enter it."""

    def __init__(self, pool: bool) -> None:
        super().__init__()
        self.backbone, self.pool = _backbone(), pool
        self.mix = nn.Conv2d(8, 8, 1)
        self.head = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5))

    def forward(self, x):
        x = self.backbone(x)
        x = x if self.pool else self.mix(x).relu()
        return self.head(x.mean((2, 3)))


class _Tokens(nn.Module):
    """A map of tokens (N, L, K), its channels last, gated before a LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 8)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x):
        tokens = self.block(self.embed(x).flatten(2).transpose(1, 2))
        return self.head(self.norm(tokens).mean(1))


def _set_gate(model, owners=OWNERS, classes=5):
    with torch.no_grad():
        model.gate.copy_(nn.functional.one_hot(owners, classes).T * 0.9 + 0.1 * torch.rand(model.gate.shape))
    return model.eval()


def _gated():
    return _set_gate(GatedModel(_backbone(), 5, num_filters=8))


def _attached(model, **options):
    return _set_gate(attach(model.eval(), example=torch.randn(2, 3, 12, 12), **options))


def _by_hand(model, x, gone):
    """The logits of a model built from the same modules, features times a mask."""
    keep = 1.0 - torch.isin(OWNERS, torch.tensor(gone)).float()
    if isinstance(model, GatedModel):
        return model.classifier(model.backbone(x).mean((2, 3)) * keep)
    m = model.model
    if isinstance(m, _Tokens):
        return m.head(m.norm(m.block(m.embed(x).flatten(2).transpose(1, 2)) * keep).mean(1))
    if m.pool:
        return m.head(m.backbone(x).mean((2, 3)) * keep)
    return m.head(m.mix(m.backbone(x) * keep[:, None, None]).relu().mean((2, 3)))


MODELS = {
    "GatedModel": _gated,
    "attached, pooled": lambda: _attached(_TwoLayerHead(True)),
    "attached, map": lambda: _attached(_TwoLayerHead(False), layer="backbone"),
    "attached, tokens": lambda: _attached(_Tokens(), layer="block"),
}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


@pytest.mark.parametrize("gone", [[0], [2, 4], [1, 2, 0, 4]])
def test_forgotten_features_are_zero_and_come_back(model, gone):
    x = torch.randn(6, 3, 12, 12)
    before = model(x)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    forgotten = forget(model, gone)
    assert forgotten.classes == sorted(gone)
    assert forgotten.filters == [k for k in range(8) if OWNERS[k] in gone]
    torch.testing.assert_close(model(x), _by_hand_of_copy(model, x, gone), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(model(x), before)
    now = model.state_dict()
    assert now.keys() == state.keys() and all(torch.equal(now[key], state[key]) for key in state)
    forgotten.restore()
    forgotten.restore()
    assert torch.equal(model(x), before)
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks


def _by_hand_of_copy(model, x, gone):
    """By hand, with the hooks of a copy taken away: they must not take part in the reference."""
    bare = copy.deepcopy(model)
    for module in bare.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return _by_hand(bare, x, gone)


def test_gated_path_and_both_paths_forget_too(model):
    x, labels = torch.randn(6, 3, 12, 12), torch.randint(0, 5, (6,))
    std, csg = model(x, labels, path="both")
    with forget(model, [0, 1]):
        std_after, csg_after = model(x, labels, path="both")
        torch.testing.assert_close(std_after, model(x))
        torch.testing.assert_close(csg_after, model(x, labels))
        assert not torch.allclose(std_after, std) and not torch.allclose(csg_after, csg)
    again = model(x, labels, path="both")
    assert torch.equal(again[0], std) and torch.equal(again[1], csg)


def test_copies_and_pickles_go_on_forgetting_whatever_becomes_of_the_model(model):
    x = torch.randn(4, 3, 12, 12)
    with forget(model, [0, 4]):
        want = model(x).clone()
        copied = copy.deepcopy(model)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
    assert torch.equal(copied(x), want) and torch.equal(loaded(x), want) and not torch.equal(model(x), want)
    later = copy.deepcopy(model)
    assert torch.equal(later(x), model(x))
    fresh = MODELS["GatedModel"]() if isinstance(model, GatedModel) else None
    if fresh is not None:  # the state dict of a model that forgets is that of the model
        with forget(model, 1):
            fresh.load_state_dict(model.state_dict())
        assert torch.equal(fresh(x), model(x))


def test_calls_nest_and_end_in_any_order():
    model, x = _gated(), torch.randn(4, 3, 12, 12)
    before = model(x)
    first, second = forget(model, 0), forget(model, 4)
    both = model(x)
    first.restore()
    with forget(model, 0):
        assert torch.equal(model(x), both)
    second.restore()
    assert torch.equal(model(x), before)


def test_the_block_restores_after_an_error():
    model, x = _gated(), torch.randn(4, 3, 12, 12)
    before = model(x)
    with pytest.raises(KeyError), forget(model, 0):
        raise KeyError
    assert torch.equal(model(x), before)


def test_classes_of_filters_may_be_given():
    model, x = (
        _set_gate(GatedModel(_backbone(), 5, num_filters=8), torch.zeros(8, dtype=torch.int64)),
        torch.randn(4, 3, 12, 12),
    )
    mi = np.eye(5)[[3, 1, 3, 1, 0, 0, 0, 0]]
    owners = metrics.best_class(mi)
    owners[7] = -1
    for given in (owners, owners.tolist(), torch.from_numpy(owners)):
        with forget(model, [3, 0], given) as forgotten:
            assert forgotten.filters == [0, 2, 4, 5, 6]
            keep = torch.tensor([0, 1, 0, 1, 0, 0, 0, 1.0])
            want = model.backbone(x).mean((2, 3)) * keep @ model.classifier.weight.T + model.classifier.bias
            torch.testing.assert_close(model(x), want)


def test_values_that_are_not_finite_become_zero_and_gradients_vanish():
    model = _gated().double()
    features = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        features[1, 0], features[2, 4] = math.nan, math.inf
    with forget(model, 0):
        logits = model.classifier(features)
    assert logits.isfinite().all() and logits.dtype == torch.float64
    logits.sum().backward()
    assert (features.grad[:, OWNERS == 0] == 0).all() and (features.grad[:, OWNERS != 0] != 0).all()


def test_a_class_without_a_filter_is_named():
    model, x = _gated(), torch.randn(4, 3, 12, 12)
    before = model(x)
    with pytest.warns(UserWarning, match=r"forget: no filter belongs to the classes \[3\]"), forget(model, 3) as gone:
        assert gone.filters == [] and torch.equal(model(x), before)
    with pytest.warns(UserWarning, match=r"\[3\]"), forget(model, [1, 3]) as gone:
        assert gone.filters == [3, 7] and gone.classes == [1, 3]


def test_a_trained_gate_makes_a_network_forget_one_class():
    """On blobs whose classes have filters of their own, accuracy falls to none on one class alone."""
    model = _gated()
    with torch.no_grad():
        model.classifier.weight.copy_(nn.functional.one_hot(OWNERS, 5).T.float())
        model.classifier.bias.copy_(torch.tensor([0, 0, 0, -9.0, 0]))
    labels = torch.randint(0, 5, (200,))
    labels[labels == 3] = 2
    features = nn.functional.one_hot(labels, 5).float()[:, OWNERS] + 0.1 * torch.rand(200, 8)
    before = model.classifier(features).detach()
    with forget(model, 2):
        after = model.classifier(features).detach()
    table = removal_table(labels, before, after, [2], ["a", "b", "c", "d", "e"])
    assert table["classes"]["c"] == {"samples": int((labels == 2).sum()), "before": 1, "after": 0, "removed": True}
    assert table["classes"]["d"] == {"samples": 0, "before": None, "after": None, "removed": False}
    assert table["means"]["kept"] == {"samples": int((labels != 2).sum()), "before": 1, "after": 1}


def test_table_against_a_loop():
    labels = torch.randint(0, 4, (300,))
    before, after = torch.randn(300, 6), torch.randn(300, 6)
    table = removal_table(labels, before, after, (1, 5))
    for c in range(6):
        of = [i for i in range(300) if labels[i] == c]
        entry = table["classes"][str(c)]
        assert entry["samples"] == len(of) and entry["removed"] == (c in (1, 5))
        for key, logits in (("before", before), ("after", after)):
            right = sum(int(logits[i].argmax()) == c for i in of)
            assert entry[key] == (pytest.approx(right / len(of)) if of else None)
    rest = labels != 1
    assert table["means"]["kept"]["after"] == pytest.approx((after.argmax(1) == labels)[rest].float().mean().item())
    shares, counts = accuracy_per_class(labels, before)
    assert np.isnan(shares[4:]).all() and counts.sum() == 300


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda m: forget(m, []), ValueError, r"classes must be one class or several, got an array of shape \(0,\)"),
        (lambda m: forget(m, 5), ValueError, r"classes must lie in \[0, 5\), got \[5\]"),
        (lambda m: forget(m, [-1, 0]), ValueError, r"classes must lie in \[0, 5\), got \[-1, 0\]"),
        (lambda m: forget(m, 1.5), TypeError, "classes must be an integer or several, got float"),
        (lambda m: forget(m, [True]), TypeError, "classes must be integers, got bool"),
        (lambda m: forget(m, 0, "mi"), ValueError, "filters_of must be 'gate' or the filters' classes, got 'mi'"),
        (lambda m: forget(m, 0, [0, 1]), ValueError, r"filters_of must be \(8,\), a class per filter, got \(2,\)"),
        (lambda m: forget(m, 0, np.zeros(8)), TypeError, "filters_of must hold integers, got float64"),
        (lambda m: forget(m, 0, [5] * 8), ValueError, r"filters_of must lie in \[-1, 5\), got 5 to 5"),
        (lambda m: forget(m.backbone, 0), TypeError, "model must be a GatedModel or what attach returned, got Seq"),
        (lambda m: forget(nn.DataParallel(m), 0), TypeError, "model must be a GatedModel .*, got DataParallel"),
        (
            lambda m: forget(GatedModel(_backbone(), 5, num_filters=8), 0),
            ValueError,
            "the model's gate must be trained, got one that is 0.5 everywhere",
        ),
        (lambda m: accuracy_per_class([0], np.zeros((2, 3))), ValueError, r"got \(1,\) and \(2, 3\)"),
        (lambda m: accuracy_per_class([3], np.zeros((1, 3))), ValueError, r"labels must be integers in \[0, 3\)"),
        (lambda m: accuracy_per_class([0], [[np.nan, 0]]), ValueError, "logits must not hold NaN, got 1"),
        (lambda m: removal_table([0], [[1, 2]], [[1, 2]], [0], ["a"]), ValueError, "as many classes, got 2, 2 and 1"),
        (lambda m: removal_table([0], [[1, 2]], [[1, 2]], [0], "aa"), ValueError, "names must differ"),
        (lambda m: removal_table([0], [[1, 2]], [[1, 2]], [2]), ValueError, r"removed must be integers in \[0, 2\)"),
        (lambda m: removal_table([0], [[1, 2]], [[1, 2]], [True, False]), ValueError, "removed must be integers in"),
    ],
)
def test_refuses(call, error, message):
    model = _gated()
    with pytest.raises(error, match=message):
        call(model)
    assert not model.classifier._forward_pre_hooks


def test_example_forgets_each_class_in_both_arms(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    labels = {"train": np.arange(60) % 3, "test": np.arange(30) % 3}
    data = ImageData(
        "noise",
        rng.integers(0, 256, (60, 1, 8, 8), dtype=np.uint8),
        labels["train"],
        rng.integers(0, 256, (30, 1, 8, 8), dtype=np.uint8),
        labels["test"],
        ["ant", "bee", "cow"],
    )
    data.save(tmp_path / "data.npz")
    source = {"data": str(tmp_path / "data.npz")}
    run = {"config": TrainConfig().as_dict(), "source": source, "sha256": data.fingerprint()}
    (tmp_path / "run.json").write_text(json.dumps(run))
    model = GatedModel(build_backbone("resnet20", 1), 3).eval()
    for arm in ("std", "csg"):
        (tmp_path / arm).mkdir()
        if arm == "csg":
            _set_gate(model, torch.arange(64) % 3, 3)
        torch.save(model.state_dict(), tmp_path / arm / "last.ckpt")
    monkeypatch.setattr("sys.argv", ["example", str(tmp_path)])
    runpy.run_path("examples/class_removal.py", run_name="__main__")
    out = capsys.readouterr().out
    headings = [line.split("/")[-2:] for line in out.splitlines() if "last.ckpt" in line]
    by_mi, by_gate = (f"last.ckpt: filters by {rule}" for rule in ("mutual information", "the gate"))
    assert headings == [["std", by_mi], ["csg", by_mi], ["csg", by_gate]]
    x = normalise(data.test_images, *data.statistics())
    with torch.no_grad():
        right = {False: model(x).argmax(1).numpy() == labels["test"]}
        with forget(model, 1):
            right[True] = model(x).argmax(1).numpy() == labels["test"]
    shares = [right[after][of].mean() for of in (labels["test"] == 1, labels["test"] != 1) for after in (False, True)]
    assert f"{'bee':16}{21:8}" + "".join(f"{share:9.1%}" for share in shares) in out.splitlines()
    monkeypatch.setattr("sys.argv", ["example", str(tmp_path), "dog"])
    with pytest.raises(SystemExit, match="class must be one of ant, bee, cow, got 'dog'"):
        runpy.run_path("examples/class_removal.py", run_name="__main__")
