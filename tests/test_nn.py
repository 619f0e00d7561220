"""Tests of the gate module, the penalty, the two paths of a gated model, and ResNet-20."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from csg_ext import reference
from csg_ext.nn import CifarResNet, ClassSpecificGate, GatedModel, build_backbone, gate_penalty, l1_density


def test_gate_forward_is_the_reference():
    gate = ClassSpecificGate(5, 7).double()
    gate.gate.data.uniform_()
    x, y = torch.randn(4, 7, 3, 2, dtype=torch.float64), torch.tensor([0, 4, 4, 2])
    torch.testing.assert_close(gate(x, y), reference.gated_pool(x, gate.gate, y))
    weights = torch.rand(4, 5, dtype=torch.float64)
    torch.testing.assert_close(gate(x, weights), reference.gated_pool(x, gate.gate, weights))


def test_gate_starts_at_init_and_projects():
    gate = ClassSpecificGate(3, 4)
    assert torch.equal(gate.gate.detach(), torch.full((3, 4), 0.5)) and gate.density() == 0.5
    with torch.no_grad():
        gate.gate.copy_(torch.randn(3, 4))
    expected = reference.project_gate(gate.gate.detach())
    assert gate.project_() is gate
    torch.testing.assert_close(gate.gate.detach(), expected)
    assert gate.gate.max(0).values.eq(1).all() and gate.gate.min() >= 0
    assert "num_classes=3, num_filters=4" in repr(gate)
    with pytest.raises(ValueError, match="must be at least 1, got 0 and 4"):
        ClassSpecificGate(0, 4)
    with pytest.raises(ValueError, match="init must be a finite number, got nan"):
        ClassSpecificGate(3, 4, init=float("nan"))
    with pytest.raises(TypeError, match="init must be a number, got 'half'"):
        ClassSpecificGate(3, 4, init="half")


def test_gates_are_made_on_the_device_and_in_the_dtype_that_are_asked_for():
    gate = ClassSpecificGate(3, 4, 0.25, device="meta", dtype=torch.bfloat16)
    assert gate.gate.is_meta and gate.gate.dtype == torch.bfloat16 and "num_classes=3" in repr(gate)
    gate.to_empty(device="cpu").gate.data.fill_(7)
    gate.reset_parameters()
    assert torch.equal(gate.gate, torch.full((3, 4), 0.25, dtype=torch.bfloat16)) and gate.gate.requires_grad
    with torch.device("meta"):
        assert ClassSpecificGate(3, 4).gate.is_meta
    model = GatedModel(nn.Identity(), 3, 4, device="meta", dtype=torch.float64)
    model.to_empty(device="cpu")
    for module in (model.csg, model.classifier):
        module.reset_parameters()
    logits = model(torch.randn(5, 4, 2, 2, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1]))
    assert logits.dtype == torch.float64 and logits.isfinite().all()
    meta = GatedModel(nn.Identity(), 3, 4)
    copied = GatedModel(nn.Identity(), 3, 4, device="meta")
    copied.load_state_dict(meta.state_dict(), assign=True)
    assert torch.equal(copied.gate, meta.gate) and copied.gate is copied.csg.gate
    with pytest.raises(TypeError, match="ClassSpecificGate: dtype must be a floating dtype, got torch.int64"):
        ClassSpecificGate(3, 4, dtype=torch.int64)


@pytest.mark.parametrize("norm", ["l1", "l2", "smooth_l1"])
@pytest.mark.parametrize("excess", [-1.0, 0.4, 3.0])
def test_penalty(norm, excess):
    gate = torch.rand(4, 6, dtype=torch.float64, requires_grad=True)
    budget = float(gate.detach().sum()) - excess
    expected = {
        "l1": max(excess, 0),
        "l2": max(excess, 0) ** 2,
        "smooth_l1": 0 if excess < 0 else 0.5 * excess**2 if excess < 1 else excess - 0.5,
    }[norm]
    value = gate_penalty(gate, budget, norm)
    assert value.item() == pytest.approx(expected)
    (slope,) = torch.autograd.grad(value, gate)
    factor = {"l1": 1, "l2": 2 * excess, "smooth_l1": min(excess, 1)}[norm] if excess > 0 else 0
    torch.testing.assert_close(slope, torch.full_like(slope, factor))


def test_penalty_budget_defaults_to_the_smallest_feasible_norm():
    one_hot = F.one_hot(torch.tensor([0, 2, 1, 0]), 3).T.double()
    assert gate_penalty(one_hot).item() == 0 and l1_density(one_hot).item() == pytest.approx(1 / 3)
    assert gate_penalty(one_hot + 0.25).item() == pytest.approx(12 * 0.25)
    assert ClassSpecificGate(3, 4).penalty().item() == pytest.approx(6 - 4)
    with pytest.raises(ValueError, match="norm must be 'l1', 'l2' or 'smooth_l1', got 'l0'"):
        gate_penalty(one_hot, norm="l0")
    with pytest.raises(ValueError, match=r"gate must be \(C, K\), got shape \(3,\)"):
        gate_penalty(torch.ones(3))
    with pytest.raises(ValueError, match=r"gate must be \(C, K\), got shape \(3,\)"):
        l1_density(torch.ones(3))


class _Conv(nn.Module):
    """A backbone without num_filters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)

    def forward(self, x):
        return self.conv(x).relu()


def test_gated_model_paths():
    model = GatedModel(_Conv(), 3, num_filters=6).double()
    model.csg.gate.data.uniform_()
    x, y = torch.randn(5, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    features = model.forward_features(x)
    pooled = features.mean((2, 3))
    std = pooled @ model.classifier.weight.T + model.classifier.bias
    csg = (pooled * model.gate[y]) @ model.classifier.weight.T + model.classifier.bias
    torch.testing.assert_close(model.pooled_features(x), pooled)
    torch.testing.assert_close(model(x), std)
    torch.testing.assert_close(model(x, y), csg)
    torch.testing.assert_close(model(x, y, path="std"), std)
    torch.testing.assert_close(model(x, y, path="csg"), csg)
    for got, expected in zip(model(x, y, path="both"), (std, csg), strict=True):
        torch.testing.assert_close(got, expected)
    rows = F.one_hot(y, 3).double()
    for got, expected in zip(model(x, rows, path="both"), (std, csg), strict=True):
        torch.testing.assert_close(got, expected)


def test_gated_model_refuses_a_path_that_it_cannot_take():
    model = GatedModel(_Conv(), 3, num_filters=6)
    x = torch.randn(2, 1, 8, 8)
    with pytest.raises(ValueError, match="path must be 'std', 'csg', 'both' or None, got 'gated'"):
        model(x, path="gated")
    for path in ("csg", "both"):
        with pytest.raises(ValueError, match=f"labels must be given for path='{path}', got None"):
            model(x, path=path)


def test_std_path_gives_the_gate_no_gradient_and_the_csg_path_does():
    model = GatedModel(_Conv(), 3, num_filters=6)
    x, y = torch.randn(5, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1])
    F.cross_entropy(model(x), y).backward()
    assert model.gate.grad is None and model.classifier.weight.grad.abs().sum() > 0
    F.cross_entropy(model(x, y), y).backward()
    assert model.gate.grad.abs().sum() > 0


def test_gated_model_state_and_parameters():
    model = GatedModel(_Conv(), 3, num_filters=6)
    model.csg.gate.data.uniform_()
    assert "csg.gate" in model.state_dict()
    other = GatedModel(_Conv(), 3, num_filters=6)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.gate, model.gate)
    assert len(model.weights()) == len(list(model.parameters())) - 1
    assert all(p is not model.gate for p in model.weights())
    with pytest.raises(ValueError, match="num_filters must be given .* got _Conv"):
        GatedModel(_Conv(), 3)


def test_resnet20_is_the_published_one():
    model = GatedModel(build_backbone("resnet20"), 10)
    assert sum(p.numel() for p in model.weights()) == 269_722  # He et al.: 0.27 M
    assert sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules()) == 20
    assert model.gate.shape == (10, 64)


@pytest.mark.parametrize("size, out", [(32, 8), (28, 7), (20, 5), (9, 3)])
def test_resnet_feature_maps(size, out):
    net = CifarResNet(1, in_channels=2).eval()
    assert net(torch.randn(3, 2, size, size)).shape == (3, 64, out, out)


def test_resnet_layouts_agree():
    net = CifarResNet(1, in_channels=2).double()
    x = torch.randn(4, 2, 12, 12, dtype=torch.float64)
    plain = net(x)
    plain.square().sum().backward()
    slopes = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    last = net.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    last.square().sum().backward()
    torch.testing.assert_close(last, plain)
    for p, slope in zip(net.parameters(), slopes, strict=True):
        torch.testing.assert_close(p.grad, slope)


def test_unknown_backbone():
    with pytest.raises(ValueError, match="name must be one of resnet20, .* got 'vgg'"):
        build_backbone("vgg")
