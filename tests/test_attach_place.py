"""Where attach puts the gate: at no place where it would be another one for other images or other weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model_zoo import hf, timm, tv
from torch import Tensor, nn

import csg_ext
from csg_ext.nn.locate import logits_of


def at_the_layer(model: nn.Module, layer: str, gate: Tensor, x: Tensor, labels: Tensor) -> Tensor:
    """The logits with the layer's output (N, K, H, W) times the gate's rows: the definition."""

    def times_rows(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * gate[labels][:, :, None, None]

    handle = model.get_submodule(layer).register_forward_hook(times_rows)
    try:
        return logits_of(model(x))
    finally:
        handle.remove()


class Net(nn.Module):
    """A convolution `c` to 16 filters, what a subclass makes of its map, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(3, 16, 3)
        self.d = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.query = nn.Parameter(torch.zeros(16))
        self.scale = nn.Parameter(torch.full((16, 1, 1), 1e-6))
        self.alpha = nn.Parameter(torch.zeros(()))
        self.norm = nn.GroupNorm(4, 16)
        nn.init.zeros_(self.norm.weight)
        self.fc = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.c(x)))


class Saturated(Net):
    def pool(self, z):
        return F.relu6(z).mean((2, 3))


class Smooth(Net):
    """For the large values of the example GELU is ReLU."""

    def pool(self, z):
        return F.gelu(z).mean((2, 3))


class Attention(Net):
    """A query of zeros pools like an average."""

    def pool(self, z):
        z = z.flatten(2)
        return torch.einsum("nkl,nl->nk", z, torch.einsum("nkl,k->nl", z, self.query).softmax(1))


class Residual(Net):
    """A layer scale of nearly zero, as in ConvNeXt."""

    def pool(self, z):
        return (z.relu() + self.scale * z.tanh().flip(1)).mean((2, 3))


class Normalised(Net):
    """A residual branch that ends in a norm whose weight begins with zeros."""

    def pool(self, z):
        return (z.relu() + self.norm(z)).mean((2, 3))


class TwoHeads(Net):
    """The map reaches the logits beside the pooling once alpha is no longer zero."""

    def forward(self, x):
        z = self.c(x)
        return self.fc(z.mean((2, 3))) + self.alpha * self.fc(z.square().mean((2, 3)))


class Strongest(Net):
    """Which position is read depends on the gate, without a gradient."""

    def pool(self, z):
        z = z.flatten(2)
        return z[torch.arange(len(z)), :, z.square().sum(1).argmax(1)]


class Masked(Net):
    def pool(self, z):
        energy = z.relu().mean(1, keepdim=True)
        return (z.relu() * (energy > energy.mean((2, 3), keepdim=True))).mean((2, 3))


class Half(Net):
    """Half of the channels are mixed, the other half passes."""

    def pool(self, z):
        a, b = z.relu().chunk(2, 1)
        return torch.cat((a, self.d(b).relu()), 1).mean((2, 3))


class Readers(Net):
    """The pooled values are read by a module, and beside it."""

    def __init__(self):
        super().__init__()
        self.more = nn.Linear(16, 16)

    def pool(self, z):
        z = z.relu().mean((2, 3))
        return z + self.more(z)


class Dropouts(Net):
    """Several modules read the pooled values, one classifier what they give."""

    def __init__(self):
        super().__init__()
        self.drops = nn.ModuleList(nn.Dropout(0.0) for _ in range(3))

    def forward(self, x):
        z = self.c(x).relu().mean((2, 3))
        return sum(self.fc(drop(z)) for drop in self.drops)


@pytest.mark.parametrize(
    "kind",
    [Saturated, Smooth, Attention, Residual, Normalised, TwoHeads, Strongest, Masked, Half, Readers, Dropouts],
)
def test_the_gate_is_that_of_the_layer_for_other_images_and_weights(kind):
    torch.manual_seed(0)
    model = kind().double()
    x, labels = torch.randn(6, 3, 12, 12, dtype=torch.float64), torch.arange(6) % 3
    g = csg_ext.attach(model, "c", example=255 * x.abs() if kind is Smooth else x / 4)
    g.gate.data.uniform_(0.05, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter).abs()
    for images in (x, 40 * x, x / 100):
        expected = at_the_layer(model, "c", g.gate, images, labels)
        torch.testing.assert_close(g(images, labels), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("saturating", [nn.ReLU6(), nn.ReLU6(inplace=True), nn.Hardtanh(-1e3, 20.0)])
def test_a_layer_before_an_activation_that_saturates(saturating):
    """The traced map does not reach the bound, the map of real images does: the gate must stay on the map."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), saturating, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).double()
    x, y = 50 * torch.randn(6, 3, 9, 9, dtype=torch.float64), torch.arange(6) % 5
    g = csg_ext.attach(net, layer="0", example=x / 500)
    g.gate.data.uniform_()
    expected = net[4](saturating(g.gate[y][..., None, None] * net[0](x)).mean((2, 3)))
    torch.testing.assert_close(g(x, y), expected, rtol=1e-12, atol=1e-12)
    csg_ext.detach(g)
    g = csg_ext.attach(net, example=x / 500)
    assert g.plan.pooled and g.plan.layer.name == "1"  # what comes out of the activation may be gated after pooling


def test_average_pooling_is_found_behind_every_width():
    """With many channels LayerNorm's Jacobian is nearly diagonal: it is still none to put the gate after."""
    x, labels = torch.randn(2, 3, 64, 64), torch.tensor([1, 4])
    model = tv.convnext_tiny(num_classes=10).eval()
    g = csg_ext.attach(model, example=x)
    assert (str(g.plan.layer), str(g.plan.gate)) == ("output of features", "output of avgpool")
    g.gate.data.uniform_(0.05, 1)
    with torch.no_grad():
        torch.testing.assert_close(
            g(x, labels), at_the_layer(model, "features", g.gate, x, labels), rtol=1e-4, atol=1e-5
        )


class Joined(nn.Module):
    """96 channels, which no module states; the last convolution has as many as the map is wide."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(16, 64, 1), nn.Conv2d(16, 32, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.a(x), self.b(x)), 1)


class Patches(nn.Module):
    """Tokens (N, L, K) that a convolution makes."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(16, 24, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(x).flatten(2).transpose(1, 2)


class Swapped(nn.Module):
    """A map (N, H, W, K) that a convolution makes."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(16, 24, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(x).permute(0, 2, 3, 1)


@pytest.mark.parametrize(
    "block, channels, dim",
    [
        (Joined(), 96, 1),
        (nn.Sequential(nn.Conv2d(16, 32, 2, 2), nn.PixelShuffle(2)), 8, 1),
        (Patches(), 24, -1),
        (Swapped(), 24, -1),
    ],
    ids=["joined", "shuffled", "tokens", "channels last"],
)
def test_the_axis_of_channels_that_no_module_states(block, channels, dim):
    class Tail(nn.Module):
        """No pooling that attach knows: the gate has to be on the map."""

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.LazyLinear(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.tanh().flatten(1))

    model, x = nn.Sequential(nn.Conv2d(3, 16, 1), block, Tail()), torch.randn(2, 3, 32, 32)
    model(x)
    g = csg_ext.attach(model, "1", example=x)
    assert g.gate.shape == (3, channels) and g.plan.channel_dim == dim


class OwnBatchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("variance", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.variance, None, None, self.training)


def test_no_batch_norm_of_one_s_own_sees_both_paths():
    layers = [
        nn.Conv2d(3, 8, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 8),
        OwnBatchNorm(),
        nn.Linear(8, 3),
    ]
    model = nn.Sequential(*layers).double()
    x, labels = torch.randn(6, 3, 12, 12, dtype=torch.float64), torch.arange(6) % 3
    g = csg_ext.attach(model, example=x).train()
    g.gate.data.uniform_(0.05, 1)
    std, csg = g(x, labels, path="both")
    torch.testing.assert_close(std, g(x))
    torch.testing.assert_close(csg, g(x, labels))


def test_two_heads_that_read_one_pooled_tensor():
    torch.manual_seed(0)
    model = timm.create_model("levit_128s", num_classes=3).eval()
    g = csg_ext.attach(model)
    g.gate.data.zero_()
    with torch.no_grad():
        logits = g(torch.randn(4, 3, 224, 224), torch.arange(4) % 3)
    torch.testing.assert_close(logits, logits[:1].expand(4, 3))


def test_a_failed_attachment_leaves_no_hook():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), torch.jit.script(nn.ReLU()), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match="attach: "):
        csg_ext.attach(model.append(nn.Identity()), example=torch.randn(2, 3, 8, 8))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    g = csg_ext.attach(model.append(nn.Linear(4, 3)), "0", example=torch.randn(2, 3, 8, 8))
    assert g.gate.shape == (3, 4) and g(torch.randn(2, 3, 8, 8), torch.tensor([0, 1])).shape == (2, 3)


def test_nothing_that_a_model_caches_in_evaluation_mode_is_left_behind():
    config = hf.LevitConfig(
        image_size=64, hidden_sizes=[16, 32, 32], num_attention_heads=[2, 2, 2], depths=[1, 1, 1], key_dim=[4, 4, 4]
    )
    torch.manual_seed(0)
    model, x = hf.LevitForImageClassification(config), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        csg_ext.attach(model, example=x)
        for name, parameter in model.named_parameters():
            if "attention_biases" in name:
                parameter.normal_(0, 2)
        after = model.eval()(x).logits
        fresh = hf.LevitForImageClassification(config).eval()
        fresh.load_state_dict(model.state_dict())
        torch.testing.assert_close(after, fresh(x).logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1, 2000])
def test_pooling_is_found_in_half_precision_near_its_largest_values(dtype, scale):
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5))
    model[0].weight.data.mul_(scale)
    model[4].weight.data.div_(scale)
    g = csg_ext.attach(model.to(dtype), example=torch.randn(2, 3, 12, 12, dtype=dtype))
    assert g.plan.pooled and str(g.plan.gate) == "output of 3"


class Capricious(nn.Module):
    """Which modules run depends on the values."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.extra, self.fc = nn.Conv2d(3, 8, 3), nn.Identity(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.c(x)
        if z.abs().max() > 20:
            z = self.extra(z).clamp(max=1)
        return self.fc(z.mean((2, 3)))


def test_a_model_that_takes_another_way_for_other_values():
    model, x, labels = Capricious().double(), torch.randn(2, 3, 9, 9, dtype=torch.float64), torch.tensor([0, 2])
    g = csg_ext.attach(model, "c", example=x)
    g.gate.data.uniform_(0.05, 1)
    for images in (x, 100 * x):
        torch.testing.assert_close(g(images, labels), at_the_layer(model, "c", g.gate, images, labels))
