"""Tests of csg_ext.analysis.evaluate_model: the measures of gated modules that csg-ext train did not make."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

import csg_ext
from csg_ext import evaluate
from csg_ext.analysis import Evaluation, evaluate_model, evaluation_differences, evaluation_table
from csg_ext.data import load_images
from csg_ext.data.batches import normalise
from csg_ext.nn import GatedModel
from csg_ext.runs import read_checkpoint, restore

CLASSES = ["cat", "dog", "fox"]


class Network(nn.Module):
    """Three convolutions, average pooling and a linear classifier."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU())
        self.head = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU())
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(8, 3, bias)

    def forward(self, x):
        return self.fc(self.dropout(self.head(self.body(x)).mean((2, 3))))


def batches(samples: int, size: int = 16, seed: int = 0):
    """Samples whose class shows in their means, in batches."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % 3
    x = torch.randn((samples, 2, 9, 9), generator=rng) + labels.view(-1, 1, 1, 1)
    return list(zip(x.split(size), labels.split(size), strict=True))


def attached(layer: str | None = None, bias: bool = True) -> csg_ext.nn.AttachedModel:
    torch.manual_seed(1)
    g = csg_ext.attach(Network(bias), layer, example=batches(4)[0][0])
    with torch.no_grad():
        g.gate.copy_(torch.rand(g.gate.shape))
        g.csg.project_()
    return g


def same(a: Evaluation, b: Evaluation) -> None:
    for field in dataclasses.fields(Evaluation):
        one, other = getattr(a, field.name), getattr(b, field.name)
        if field.name == "numbers":
            assert one == pytest.approx(other, abs=1e-6, nan_ok=True)
        elif field.name in ("features", "logits"):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
        elif field.name == "hits":
            assert one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)
        else:
            np.testing.assert_equal(one, other)


def test_a_loader_gives_what_the_command_gives(run, digits):
    """The same network, once as the command reads it, once from batches of normalised images."""
    data = load_images(digits)
    model = restore(read_checkpoint(run[0] / "csg" / "model.safetensors"), data)
    expected = evaluate.evaluate_images(model, data, data.statistics())
    rows = np.random.default_rng(0).permutation(len(data.train_labels))  # the command's draw

    def loader(images, labels):
        x = normalise(images, *data.statistics())
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.from_numpy(labels)), batch_size=33)

    test = loader(data.test_images, data.test_labels)
    train = loader(data.train_images[rows], data.train_labels[rows])
    found = evaluate_model(model, test, train, classes=data.classes)
    same(found, expected)
    assert {"one_hot_accuracy", "complement_accuracy_mi", "block_score_gate"} <= found.numbers.keys()
    assert evaluation_table({"a": found}) == evaluation_table({"a": expected})


def test_an_attached_model_is_measured_as_the_gated_model_with_its_weights():
    g = attached()
    network = g.model
    backbone = nn.Sequential(network.body, network.head)
    twin = GatedModel(backbone, 3, 8)
    twin.classifier, twin.csg = network.fc, g.csg
    same(evaluate_model(g, batches(60), batches(90, seed=1)), evaluate_model(twin, batches(60), batches(90, seed=1)))


def test_modes_and_gradients_stay_and_statistics_are_not_updated():
    g = attached()
    g.train()
    g.model.body[1].eval()
    before = {name: value.clone() for name, value in g.state_dict().items()}
    first = evaluate_model(g, batches(60))
    assert g.training and g.model.dropout.training and not g.model.body[1].training
    assert all(torch.equal(value, before[name]) for name, value in g.state_dict().items())
    g(batches(4)[0][0], torch.tensor([0, 1, 2, 0])).sum().backward()
    assert g.gate.grad is not None
    same(first, evaluate_model(g, batches(60)))  # dropout is off


def test_without_training_samples_no_measure_uses_classes_by_mutual_information():
    found = evaluate_model(attached(), batches(60))
    assert not [name for name in found.numbers if name.endswith("_mi")]
    assert "complement_accuracy_gate" in found.numbers and (found.filter_classes >= -1).all()


def test_a_gate_as_before_training_counts_as_none():
    g = attached()
    with torch.no_grad():
        g.gate.fill_(0.5)
    found = evaluate_model(g, batches(60))
    assert found.filter_classes is None and "l1_density" not in found.numbers
    assert "one_hot_accuracy" not in found.numbers and "weight_own_accuracy" in found.numbers
    found = evaluate_model(g, batches(60), batches(60, seed=1))
    assert "complement_accuracy_mi" in found.numbers and found.filter_classes is not None


def test_as_many_training_samples_as_test_samples_count():
    g = attached()
    train = batches(90, size=25, seed=1)
    read = []

    def counted():
        for batch in train:
            read.append(len(batch[0]))
            yield batch

    found = evaluate_model(g, batches(60), counted())
    assert sum(read) == 75
    first = [(torch.cat([x for x, _ in train])[:60], torch.cat([y for _, y in train])[:60])]
    same(found, evaluate_model(g, batches(60), first))


@pytest.mark.parametrize("bias", [True, False])
def test_an_earlier_layer_has_no_accuracies_of_single_filters(bias):
    """Its features are not what the classifier reads, though there are as many."""
    found = evaluate_model(attached("body", bias), batches(60), batches(60, seed=1))
    assert not [n for n in found.numbers if "cluster" in n or "own" in n or "one_hot" in n or "weight" in n]
    assert found.remarks[0].startswith("No accuracy of single filters")
    assert "class_agreement" in found.numbers and "block_score_gate" in found.numbers
    last = evaluate_model(attached(None, bias), batches(60), batches(60, seed=1))
    assert "cluster_accuracy_gate" in last.numbers and "weight_agreement" in last.numbers


def test_two_networks_side_by_side():
    g = attached()
    first = evaluate_model(g, batches(60), classes=CLASSES)
    with torch.no_grad():
        g.model.fc.weight.neg_()
    second = evaluate_model(g, batches(60), classes=CLASSES)
    change = evaluation_differences(first, second)
    assert change["accuracy"]["difference"] == second.numbers["accuracy"] - first.numbers["accuracy"]
    assert change["mis"]["difference"] == 0 and change["mis"]["method"] == "split halves"
    lines = evaluation_table({"one": first, "other": second}, change).splitlines()
    assert lines[0].split()[:2] == ["one", "other"] and "other - one [95% interval]" in lines[0]
    other = evaluate_model(g, batches(63))
    with pytest.raises(ValueError, match="evaluation_differences: first and second must be .* got 60 and 63 samples"):
        evaluation_differences(first, other)


def test_the_model_may_be_on_another_device_than_the_batches(device):
    expected = evaluate_model(attached(), batches(60), batches(60, seed=1))
    found = evaluate_model(attached().to(device), batches(60), batches(60, seed=1))
    assert found.numbers.keys() == expected.numbers.keys()
    np.testing.assert_allclose(found.logits, expected.logits, rtol=1e-3, atol=1e-3)  # TF32 on a GPU
    assert found.numbers["mis"] == pytest.approx(expected.numbers["mis"], abs=0.05)


def test_half_precision_is_measured_in_fp32():
    g = attached().to(torch.bfloat16)
    found = evaluate_model(g, [(x.bfloat16(), y) for x, y in batches(60)])
    assert found.features.dtype == found.logits.dtype == np.float32 and "cluster_accuracy_gate" in found.numbers
    assert all(math.isfinite(found.numbers[name]) for name in ("mis", "accuracy", "calibration_error"))


@pytest.mark.parametrize(
    ("test", "arguments", "error", "message"),
    [
        ([], {}, ValueError, "test must give at least one batch, got none"),
        ([torch.ones(3)], {}, TypeError, r"test must give batches \(x, labels\), got Tensor"),
        ([{"x": 1}], {}, TypeError, r"test must give batches \(x, labels\), got dict"),
        (batches(12), {"train": [(torch.ones(4, 2, 9, 9),)]}, TypeError, "train must give batches"),
        (
            [(torch.ones(4, 2, 9, 9), torch.ones(4, 3))],
            {},
            ValueError,
            r"labels of integers, \(4,\) .* torch.float32 \(4, 3\)",
        ),
        ([(torch.ones(4, 2, 9, 9), torch.ones(3).long())], {}, ValueError, r"labels of integers, \(4,\) .* \(3,\)"),
        ([(torch.ones(4, 2, 9, 9), torch.tensor([0, 1, 2, 3]))], {}, ValueError, r"labels in \[0, 3\), got 0 to 3"),
        (batches(12), {"classes": ["a"]}, ValueError, "classes must be the names of 3 classes, got 1"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(test, arguments, error, message):
    with pytest.raises(error, match=message) as caught:
        evaluate_model(attached(), test, **arguments)
    assert "\n" not in str(caught.value)


def test_a_module_without_a_gate_is_refused():
    with pytest.raises(TypeError, match="evaluate_model: model must be a GatedModel or what .* got Network"):
        evaluate_model(Network(), batches(12))
