"""Tests of the small parts of training: objective, mixup and cutmix, weights on disk, the gate's image."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import csg_ext
from csg_ext.nn import GatedModel
from csg_ext.training import Mix, Objective, load_checkpoint, load_weights
from csg_ext.training.arm import uses_bf16
from csg_ext.training.config import TrainConfig
from csg_ext.training.logs import gate_image


def tiny(classes: int = 3) -> GatedModel:
    return GatedModel(nn.Sequential(nn.Conv2d(1, 8, 3), nn.Tanh()), classes, num_filters=8).double()


# ---- objective


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("path", ["std", "csg", "gate", "joint"])
def test_losses_of_a_path(path, soft):
    model, objective = tiny(), Objective(0.7, 0.3, budget=5.0, penalty="l2", label_smoothing=0.1)
    x, labels = torch.randn(6, 1, 5, 5).double(), torch.randint(0, 3, (6,))
    rows = torch.rand(6, 3).double().softmax(1) if soft else F.one_hot(labels, 3).double()
    losses = objective(model, x, rows if soft else labels, path, (0.5, 2.0))
    features = model.backbone(x).mean((2, 3))
    std, csg = (
        -((0.9 * rows + 0.1 / 3) * model.classifier(f).log_softmax(1)).sum(1).mean()
        for f in (features, features * (rows @ model.gate))
    )
    penalty = (model.gate.sum() - 5).square()
    second = 0.7 * 0.5 * csg + 0.3 * 2.0 * penalty
    expected = {"std": std, "joint": std + second}.get(path, second)
    torch.testing.assert_close(losses.total, expected)
    for got, want, taken in ((losses.std, std, path in ("std", "joint")), (losses.csg, csg, path != "std")):
        assert (got is not None) == taken
        if taken:
            torch.testing.assert_close(got, want)
    if path != "std":
        torch.testing.assert_close(losses.penalty, penalty)
    else:
        assert torch.equal(losses.std_logits, model(x)) and losses.penalty is None


def test_unknown_path():
    with pytest.raises(ValueError, match="path must be one of std, csg, gate, joint, got 'both'"):
        Objective()(tiny(), torch.zeros(1, 1, 5, 5).double(), torch.zeros(1, dtype=torch.int64), "both")


# ---- mixup and cutmix


def test_mixup_is_a_convex_combination():
    x, labels = torch.randn(5, 1, 4, 4), torch.arange(5)
    mixed, rows = Mix(5, mixup=1.0)(x, labels)
    torch.testing.assert_close(rows.sum(1), torch.ones(5))
    torch.testing.assert_close(mixed.flatten(1), rows @ x.flatten(1))  # every label names one image


def test_cutmix_pastes_a_rectangle_whose_area_is_the_label():
    areas = []
    for _ in range(50):
        x = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 2, 8, 9).contiguous()
        mixed, rows = Mix(6, cutmix=1.0)(x, torch.arange(6))
        assert mixed.data_ptr() != x.data_ptr()
        for sample, row in zip(mixed, rows, strict=True):
            share = torch.stack([(sample == c).float().mean() for c in range(6)])
            torch.testing.assert_close(share, row)
        own = mixed[:, 0] == torch.arange(6.0).view(6, 1, 1)
        pasted = ~own[(~own).flatten(1).any(1)]
        for inside in pasted[:1]:
            lines, columns = inside.any(1), inside.any(0)
            assert torch.equal(inside, lines[:, None] & columns)  # a rectangle
            for edge in (lines, columns):
                assert edge.int().diff().abs().sum() <= 2  # of adjacent lines
            areas.append(inside.float().mean().item())
    assert len(areas) > 30 and 0.1 < sum(areas) / len(areas) < 0.6


def test_mix_takes_both_and_soft_labels():
    mix, x = Mix(3, mixup=0.5, cutmix=0.5), torch.randn(4, 1, 6, 6)
    rows = torch.rand(4, 3).softmax(1)
    kinds = set()
    for _ in range(30):
        mixed, soft = mix(x, rows)
        torch.testing.assert_close(soft.sum(1), torch.ones(4))
        kept = mixed.eq(x).flatten(1).float().mean(1)
        kinds.add("cutmix" if ((kept > 0) & (kept < 1)).any() else "mixup")
    assert kinds == {"mixup", "cutmix"}
    with pytest.raises(ValueError, match="mixup and cutmix must be >= 0 and not both 0, got 0.0 and 0.0"):
        Mix(3)
    with pytest.raises(ValueError, match="mixup and cutmix must be finite, got inf and 0.0"):
        Mix(3, mixup=float("inf"))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64])
def test_mix_takes_any_integers_as_classes(dtype):
    _, rows = Mix(5, mixup=1.0)(torch.randn(5, 2), torch.arange(5, dtype=dtype))
    torch.testing.assert_close(rows.sum(1), torch.ones(5))


@pytest.mark.parametrize(
    "shape, labels, message",
    [
        ((2, 1, 4, 4), torch.tensor([True, False]), r"labels must be .* got torch.bool of shape \(2,\)"),
        ((2, 1, 4, 4), torch.tensor([1, 2]), r"labels must be in \[0, 2\), got 1 to 2"),
        ((2, 1, 4, 4), torch.tensor([-1, 0]), r"labels must be in \[0, 2\), got -1 to 0"),
        ((2, 1, 4, 4), torch.tensor([[1, 0], [0, 1]]), r"labels must be .* got torch.int64 of shape \(2, 2\)"),
        (
            (2, 1, 4, 4, 4),
            torch.tensor([0, 1]),
            r"cutmix expects x of shape \(N, channels, H, W\), got \(2, 1, 4, 4, 4\)",
        ),
    ],
)
def test_mix_says_what_it_takes(shape, labels, message):
    with pytest.raises(ValueError, match=f"Mix: {message}"):
        Mix(2, cutmix=1.0)(torch.randn(shape), labels)


# ---- weights on disk


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt", "last.ckpt"])
def test_weights_of_this_model_another_and_damaged_ones(tmp_path, name):
    def write(state):
        if name.endswith(".safetensors"):
            save_file(state, path)
        elif name.endswith(".ckpt"):
            torch.save({"state_dict": {f"model.{k}": v for k, v in state.items()}, "epoch": 3}, path)
        else:
            torch.save(state, path)

    path, source, model = tmp_path / name, tiny(), tiny()
    write(source.state_dict())
    load_weights(model, path)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in before.items())
    diverged = {k: v.clone() for k, v in before.items()}
    diverged["csg.gate"][0, :2] = torch.tensor([torch.nan, torch.inf])
    diverged["classifier.bias"][1] = -torch.inf
    for state, message in (
        (tiny(4).state_dict(), r"got csg.gate with shape \(4, 8\) instead of \(3, 8\), and 2 more"),
        (diverged, r"expected finite weights, got 3 values of NaN or infinity \(classifier.bias, csg.gate\)"),
        ({"head.weight": torch.zeros(1)}, r"got others: 5 are missing \(.*, \.\.\.\), 1 are unknown \(head.weight\)"),
    ):
        write(state)
        with pytest.raises(ValueError, match=message) as caught:
            load_weights(model, path)
        assert str(caught.value).startswith(str(path))
    write(source.state_dict())
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(ValueError, match=f"{name}: expected a .* got one that fails with") as caught:
        load_weights(model, path)
    assert ". " not in str(caught.value)  # one sentence, without torch's advice
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(FileNotFoundError):
        load_weights(model, tmp_path / f"no-{name}")


def test_weights_of_a_part_of_what_was_saved(tmp_path):
    """Whatever the attribute of the module that was saved, and for a model whose own names begin with "model."."""

    def attached():
        net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
        return csg_ext.attach(net, example=torch.randn(2, 1, 6, 6))

    path, other = tmp_path / "x.ckpt", {"metric": torch.zeros(1), "teacher.csg.gate": torch.ones(3, 8)}
    for make in (tiny, attached):
        for prefix in ("", "model.", "net.", "module.model."):
            source, model = make(), make()
            source.gate.data.uniform_()
            state = {prefix + k: v for k, v in source.state_dict().items()}
            torch.save({"state_dict": state | (other if prefix else {}), "epoch": 3}, path)
            load_weights(model, path)
            assert all(torch.equal(v, source.state_dict()[k]) for k, v in model.state_dict().items())
    twice = {prefix + k: v for k, v in source.state_dict().items() for prefix in ("a.", "b.")}
    torch.save(twice, path)
    with pytest.raises(ValueError, match=r"x.ckpt: expected one such model, got 2: a\., b\.$"):
        load_weights(model, path)
    torch.save(twice | {f"model.{k}": v for k, v in source.state_dict().items()}, path)
    load_weights(model, path)


@pytest.mark.filterwarnings("ignore")  # of torch, about kinds of tensors that are going away
@pytest.mark.parametrize(
    "make",
    [
        lambda w: w.to_sparse(),
        lambda w: w.to_sparse_csr(),
        lambda w: torch.quantize_per_tensor(w.float(), 0.1, 0, torch.qint8),
        lambda w: w.to(torch.complex128),
        lambda w: w.to(torch.int32),
        lambda w: w.to("meta"),
        lambda w: torch.nested.nested_tensor(list(w)),
        lambda w: w.tolist(),
    ],
    ids=["sparse", "csr", "quantised", "complex", "integer", "meta", "nested", "list"],
)
def test_weights_of_another_kind(request, tmp_path, make):
    model = tiny()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    torch.save(before | {"classifier.weight": make(torch.ones(3, 8).double())}, tmp_path / "x.pt")
    told = r"expected dense real .* got .* for 1 of them \(classifier.weight\)"
    if request.node.callspec.id == "nested" and torch.__version__ >= (2, 15):  # torch itself reads none any more
        told = "expected a checkpoint of csg-ext, got one that holds more than tensors"
    with pytest.raises(ValueError, match=f"x.pt: {told}"):
        load_weights(model, tmp_path / "x.pt")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"state_dict": Evil()}, tmp_path / "x.pt")
    for read in (load_checkpoint, lambda path: load_weights(tiny(), path)):
        with pytest.raises(ValueError, match="x.pt: expected a checkpoint of csg-ext"):
            read(tmp_path / "x.pt")
    assert not (tmp_path / "ran").exists()
    torch.save(torch.zeros(3), tmp_path / "x.pt")
    with pytest.raises(ValueError, match="x.pt: expected a state dict, got Tensor"):
        load_weights(tiny(), tmp_path / "x.pt")


def test_gate_image():
    gate = torch.tensor([[0.0, 1.0, 0.5], [1.0, 0.2, 1.0]])
    assert gate_image(gate).tolist() == [[[255, 0, 128], [51, 255, 255]]]


# ---- precision


@pytest.mark.parametrize(
    "vendor, instructions, tiles, expected",
    [
        ("AuthenticAMD", True, False, True),
        ("AuthenticAMD", False, False, False),
        ("GenuineIntel", True, False, False),
        ("GenuineIntel", True, True, True),
        (None, True, False, True),  # no /proc
    ],
)
def test_precision_is_bf16_where_convolutions_are_faster_in_it(monkeypatch, vendor, instructions, tiles, expected):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)

    def read_text(path):
        assert path == Path("/proc/cpuinfo")
        if vendor is None:
            raise FileNotFoundError(path)
        return f"processor\t: 0\nvendor_id\t: {vendor}\n"

    monkeypatch.setattr(Path, "read_text", read_text)
    device = torch.device("cpu")
    assert uses_bf16(TrainConfig(), device) is expected
    assert uses_bf16(TrainConfig(precision="bf16"), device) and not uses_bf16(TrainConfig(precision="fp32"), device)
