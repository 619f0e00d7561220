"""Tests of csg_ext.analysis.evaluate_model: the measures of gated modules that csg-ext train did not make."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

import csg_ext
from csg_ext import evaluate, plots
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
    rows = np.random.default_rng(0).permutation(len(data.train_labels))[: len(data.test_labels)]  # the command's draw

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
    g.model.head.eval()
    before = {name: value.clone() for name, value in g.state_dict().items()}
    first = evaluate_model(g, batches(60))
    assert g.training and g.model.dropout.training and g.model.body[1].training and not g.model.head.training
    assert all(torch.equal(value, before[name]) for name, value in g.state_dict().items())
    same(first, evaluate_model(g, batches(60)))  # dropout is off
    g(batches(4)[0][0], torch.tensor([0, 1, 2, 0])).sum().backward()
    assert g.gate.grad is not None


def test_without_training_samples_no_measure_uses_classes_by_mutual_information():
    found = evaluate_model(attached(), batches(60))
    assert not [name for name in found.numbers if name.endswith("_mi")]
    assert "complement_accuracy_gate" in found.numbers and set(found.owners) == {"gate"}
    assert found.filter_classes is found.owners["gate"]


def test_a_dead_filter_has_no_class_and_no_information():
    g = attached()
    with torch.no_grad():
        g.model.head[0].weight[5], g.model.head[0].bias[5] = 0, 2
    found = evaluate_model(g, batches(60), batches(60, seed=1))
    assert found.dead.tolist() == [k == 5 for k in range(8)] and found.numbers["dead_filters"] == 1
    assert not found.mi[5].any() and found.mi[[0, 1, 2, 3, 4, 6, 7]].any(1).all()
    assert found.owners["gate"][5] == found.owners["mi"][5] == -1
    assert found.numbers["mis"] == pytest.approx(found.mi.max(1).sum() / 8)
    assert "1 of 8 filters is dead (one activation on all images) and has no class: 5." in found.remarks


def test_a_gate_as_before_training_counts_as_none():
    g = attached()
    with torch.no_grad():
        g.gate.fill_(0.5)
    found = evaluate_model(g, batches(60))
    assert found.filter_classes is None and "l1_density" not in found.numbers
    assert "one_hot_accuracy" not in found.numbers and "weight_own_accuracy" in found.numbers
    found = evaluate_model(g, batches(60), batches(60, seed=1))
    assert "complement_accuracy_mi" in found.numbers and found.filter_classes is not None


def test_all_training_samples_count_in_any_order():
    g = attached()
    train = batches(90, size=25, seed=1)
    x, y = torch.cat([x for x, _ in train]), torch.cat([y for _, y in train])
    order = torch.randperm(90)
    found = evaluate_model(g, batches(60), train)
    same(found, evaluate_model(g, batches(60), [(x[order], y[order])]))
    mi = csg_ext.class_mutual_info(g.eval().pooled_features(x).detach(), y)
    assert np.array_equal(found.owners["mi"], mi.argmax(1)) and found.remarks == []


def test_classes_without_training_samples_are_named():
    train = [(x[y < 2], y[y < 2]) for x, y in batches(90, seed=1)]
    found = evaluate_model(attached(), batches(60), train, classes=CLASSES)
    assert "No filter gets these classes by mutual information, as no training sample has them: fox." in found.remarks
    assert found.numbers["classes_without_filter_mi"] == 1


def test_what_pictures_take():
    found = evaluate_model(attached(), batches(60), batches(60, seed=1), classes=CLASSES)
    drawn = (
        plots.plot_confusion(found.confusion, CLASSES),
        plots.plot_gate(found.gate, CLASSES, dead=found.dead),
        plots.plot_class_agreement(found.gate, found.mi, CLASSES, dead=found.dead),
        plots.plot_filters_per_class({"gate": found.owners["gate"], "MI": found.owners["mi"]}, CLASSES),
        plots.plot_filter_similarity(found.similarity, found.filter_classes, CLASSES),
        plots.plot_mutual_information(found.mi, found.mi, CLASSES, titles=("before", "after")),
    )
    titles = [axes.get_title(loc="left") for axes in drawn[-1][1]]
    mis = f"{found.numbers['mis']:.3g}"
    assert titles == [f"before: MIS {mis} nats", f"after: MIS {mis} nats"]


@pytest.mark.parametrize(
    ("layer", "conv"), [(None, "head.0"), ("head.0", "head.0"), ("body.4", "body.3"), ("body", "body.3")]
)
def test_similarity_is_that_of_the_convolution_that_makes_the_map(layer, conv):
    """There are as many filters in a later one."""
    g = attached(layer)
    kernels = g.model.get_submodule(conv).weight.detach()
    expected = csg_ext.metrics.filter_similarity(kernels)
    assert np.array_equal(evaluate_model(g, batches(60)).similarity, expected)


def test_tokens_have_no_kernels():
    class Tokens(Network):
        def forward(self, x):
            return self.fc(self.norm(self.head(self.body(x)).flatten(2).mT).mean(1))

    network = Tokens()
    network.norm = nn.LayerNorm(8)
    g = csg_ext.attach(network, "norm", example=batches(4)[0][0], channel_dim=-1)
    found = evaluate_model(g, batches(60), batches(60, seed=1))
    assert found.similarity is None and not [name for name in found.numbers if "block" in name]


@pytest.mark.parametrize("bias", [True, False])
def test_an_earlier_layer_has_no_accuracies_of_single_filters(bias):
    """Its features are not what the classifier reads, though there are as many."""
    found = evaluate_model(attached("body", bias), batches(60), batches(60, seed=1))
    assert not [n for n in found.numbers if "cluster" in n or "own" in n or "one_hot" in n or "weight" in n]
    assert found.remarks[0].startswith("No accuracy of single filters")
    assert "class_agreement" in found.numbers and "block_score_gate" in found.numbers
    if bias:  # nor where a large bias makes all logits alike
        g = attached("body")
        with torch.no_grad():
            g.model.fc.bias.add_(50)
        assert "cluster_accuracy_gate" not in evaluate_model(g, batches(60)).numbers
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


X, Y = torch.ones(4, 2, 9, 9), torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize(
    ("test", "arguments", "error", "message"),
    [
        (None, {}, TypeError, r"test must give batches \(x, labels\), got NoneType"),
        ([], {}, ValueError, "test must give at least 4 samples, got 0"),
        ([(X[:3], Y[:3])], {}, ValueError, "test must give at least 4 samples, got 3"),
        ([(X[:0], Y[:0]), (X, Y * 0 + 1)], {}, ValueError, "test must give two classes or more, got class 1 only"),
        ([torch.ones(3)], {}, TypeError, r"test must give batches \(x, labels\) of tensors, got Tensor$"),
        ([{"x": 1}], {}, TypeError, r"test must give batches \(x, labels\) of tensors, got dict$"),
        ([({"x": X}, Y)], {}, TypeError, r"\(x, labels\) of tensors, got tuple of dict, Tensor"),
        ([[X, Y.numpy()]], {}, TypeError, r"\(x, labels\) of tensors, got list of Tensor, ndarray"),
        (batches(12), {"train": [(X,)]}, TypeError, "train must give batches .* got tuple of Tensor"),
        ([(X, torch.ones(4, 3))], {}, ValueError, r"labels of integers, one for .* got torch.float32 \(4, 3\)"),
        ([(X, Y[:3])], {}, ValueError, r"labels of integers, .* of x \(4, 2, 9, 9\), got torch.int64 \(3,\)"),
        ([(X, Y + 1)], {}, ValueError, r"labels in \[0, 3\), got 1 to 3"),
        ([(X * math.nan, Y)], {}, ValueError, "finite features and logits, got 44 others on test"),
        (batches(12), {"classes": ["a"]}, ValueError, "classes must be the names of 3 classes, got 1"),
        (batches(12), {"classes": "abc"}, TypeError, "classes must be the classes' names or None, got 'abc'"),
        (
            batches(12),
            {"classes": [1, 2, 3]},
            TypeError,
            r"classes must be the classes' names or None, got \[1, 2, 3\]",
        ),
        (batches(12), {"seed": -1}, ValueError, "seed must be at least 0, got -1"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(test, arguments, error, message):
    with pytest.raises(error, match=message) as caught:
        evaluate_model(attached(), test, **arguments)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("evaluate_model: ")


def test_bad_networks_are_refused():
    g = attached()
    with pytest.raises(TypeError, match=r"evaluate_model: model must be .* \(.*\.module.*\), got DataParallel"):
        evaluate_model(nn.DataParallel(g), batches(12))
    with torch.no_grad():
        g.gate[0, 0] = math.nan
    with pytest.raises(ValueError, match="evaluate_model: model must have a finite gate, got 1 others"):
        evaluate_model(g, batches(12))
    one = GatedModel(Network().body, 1, 8)
    with pytest.raises(ValueError, match="evaluate_model: model must give two logits or more, got one"):
        evaluate_model(one, batches(12))


def test_bad_evaluations_are_refused():
    found = evaluate_model(attached(), batches(12))
    for wrong, kinds in (({}, "none"), ({"a": found.numbers}, "dict")):
        with pytest.raises(TypeError, match=f"evaluation_table: evaluations must be .* got {kinds}"):
            evaluation_table(wrong)
    with pytest.raises(TypeError, match="evaluation_table: evaluations must be a mapping .* got Evaluation"):
        evaluation_table(found)
    with pytest.raises(ValueError, match="evaluation_table: difference must be that of two evaluations, got 1"):
        evaluation_table({"a": found}, {})
    with pytest.raises(TypeError, match="evaluation_differences: .* got dict and Evaluation"):
        evaluation_differences(found.numbers, found)
    other = dataclasses.replace(found, logits=np.hstack([found.logits, found.logits]))
    with pytest.raises(ValueError, match="evaluation_differences: .* as many classes, got 3 and 6"):
        evaluation_differences(found, other)


def test_a_module_without_a_gate_is_refused():
    with pytest.raises(TypeError, match="evaluate_model: model must be a GatedModel or what .* got Network"):
        evaluate_model(Network(), batches(12))
