"""Tests of what `csg-ext evaluate` measures and draws: against scipy, references written out here, and simulations."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn

from csg_ext import metrics, plots
from csg_ext.nn import build_backbone

# ---- cluster tests ---------------------------------------------------------------------------------------------------


def _linear(rng, n=60, k=12, c=4):
    return rng.random((n, k)), rng.standard_normal((c, k)), rng.standard_normal(c), rng.integers(0, c, k)


@pytest.mark.parametrize("complement", [False, True])
def test_cluster_predictions_are_those_of_a_masked_classifier(complement):
    rng = np.random.default_rng(int(torch.randint(2**31, ())))
    a, w, b, owner = _linear(rng)
    kept = rng.integers(0, 4, 60)
    got = metrics.cluster_predictions(a, w, b, owner, kept, complement=complement)
    for n in range(60):
        scores = b.copy()
        for k in range(12):
            if (owner[k] == kept[n]) != complement:
                scores += a[n, k] * w[:, k]
        assert got[n] == scores.argmax()
    accuracy = metrics.complement_accuracy if complement else metrics.cluster_accuracy
    assert accuracy(a, w, b, owner, kept) == np.mean(got == kept)


def test_predicted_class_alone():
    rng = np.random.default_rng(int(torch.randint(2**31, ())))
    a, w, b, owner = _linear(rng)
    labels = rng.integers(0, 4, 60)
    std = (a @ w.T + b).argmax(1)
    got = metrics.predicted_class_accuracy(a, w, b, owner, labels)
    assert got == np.mean(metrics.cluster_predictions(a, w, b, owner, std) == labels)
    assert metrics.predicted_class_accuracy(a, w, b, owner, std) == metrics.cluster_accuracy(a, w, b, owner, std)


def test_an_ideally_class_specific_network():
    """Every filter fires for its class and speaks for it alone: they suffice, and without them nothing is left."""
    rng = np.random.default_rng(0)
    labels, owner = np.repeat(np.arange(4), 25), np.arange(12) % 4
    features = (owner == labels[:, None]) * (1 + rng.random((100, 12)))
    weight, bias = (owner == np.arange(4)[:, None]).astype(float), np.zeros(4)
    assert metrics.cluster_accuracy(features, weight, bias, owner, labels) == 1
    assert metrics.predicted_class_accuracy(features, weight, bias, owner, labels) == 1
    assert metrics.complement_accuracy(features, weight, bias, owner, labels) == 0.25  # ties: always class 0


def test_cluster_predictions_refuse_other_shapes():
    a, w, b, owner = _linear(np.random.default_rng(0))
    with pytest.raises(
        ValueError, match=r"cluster_predictions: .* got \(60, 12\), \(12, 4\), \(4,\), \(12,\), \(60,\)"
    ):
        metrics.cluster_predictions(a, w.T, b, owner, np.zeros(60, int))
    with pytest.raises(ValueError, match=r"got .*, \(59,\)$"):
        metrics.cluster_predictions(a, w, b, owner, np.zeros(59, int))


# ---- similarity of filters -------------------------------------------------------------------------------------------


def test_filter_similarity_is_the_absolute_cosine():
    kernels = torch.randn(7, 3, 3, 3, dtype=torch.float64)
    kernels[2] = -2 * kernels[5]
    kernels[4] = 0
    want = F.cosine_similarity(kernels.flatten(1)[:, None], kernels.flatten(1)[None], dim=2).abs().numpy()
    got = metrics.filter_similarity(kernels.numpy())
    assert np.abs(got - want).max() < 1e-12 and got[2, 5] == pytest.approx(1) and (got[4] == 0).all()
    with pytest.raises(
        ValueError, match=r"filter_similarity: kernels must be \(K, ...\) with values, got shape \(3,\)"
    ):
        metrics.filter_similarity(np.zeros(3))


def test_block_score_and_its_p_value_are_the_enumerations():
    rng = np.random.default_rng(int(torch.randint(2**31, ())))
    s = metrics.filter_similarity(rng.standard_normal((7, 4)))
    owner = np.array([5, 0, 5, 0, 0, 2, 5])

    def means(classes):
        pairs = list(itertools.combinations(range(7), 2))
        same = [s[i, j] for i, j in pairs if classes[i] == classes[j]]
        other = [s[i, j] for i, j in pairs if classes[i] != classes[j]]
        return np.mean(same), np.mean(other)

    got = metrics.block_score(s, owner, permutations=20000)
    within, between = means(owner)
    assert got[:3] == pytest.approx((within - between, within, between), rel=1e-12)
    everything = [np.subtract(*means(owner[list(p)])) for p in itertools.permutations(range(7))]
    exact = np.mean(np.array(everything) >= within - between - 1e-12)
    assert abs(got.p_value - exact) < 0.02  # 5 standard errors


def test_block_score_sees_blocks_and_has_no_value_without_pairs():
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(4), 8)
    kernels = rng.standard_normal((4, 20))[owner] + 0.5 * rng.standard_normal((32, 20))
    got = metrics.block_score(metrics.filter_similarity(kernels), owner)
    assert got.score > 0.4 and got.p_value == 1 / 2001
    for classes in (np.arange(32), np.zeros(32, int)):
        assert np.isnan(metrics.block_score(np.eye(32), classes)).all()
    with pytest.raises(ValueError, match=r"block_score: .* got \(32, 32\) and \(31,\)"):
        metrics.block_score(np.eye(32), owner[1:])
    with pytest.raises(ValueError, match="block_score: permutations must be at least 1, got 0"):
        metrics.block_score(np.eye(32), owner, permutations=0)


def test_last_convolution_is_the_gated_layers():
    backbone = build_backbone("resnet20", 1)
    assert metrics.last_convolution(backbone, 64) is backbone.stages[-1].conv2
    with pytest.raises(
        ValueError, match="last_convolution: model must hold a convolution with 63 filters, got CifarRes"
    ):
        metrics.last_convolution(backbone, 63)


@pytest.mark.parametrize("beside", ["downsample", "shortcut", "se"])
def test_last_convolution_is_none_beside_it(beside):
    conv, other = nn.Conv2d(2, 4, 3), nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4))
    block = nn.Sequential(nn.ModuleDict({"conv": conv, beside: other}))
    assert metrics.last_convolution(block, 4) is conv
    assert metrics.last_convolution(nn.ModuleDict({beside: other}), 4) is other[0]


# ---- intervals -------------------------------------------------------------------------------------------------------


def test_paired_bootstrap_is_scipys():
    rng = np.random.default_rng(int(torch.randint(2**31, ())))
    a = rng.random(300) < 0.7
    b = np.where(rng.random(300) < 0.8, a, rng.random(300) < 0.9)
    got = metrics.paired_bootstrap(a, b, resamples=20000)
    want = stats.bootstrap(
        (a.astype(float), b.astype(float)),
        lambda x, y, axis: y.mean(axis) - x.mean(axis),
        paired=True,
        n_resamples=20000,
        method="percentile",
        random_state=rng,
    )
    assert got.difference == pytest.approx(b.mean() - a.mean(), abs=1e-12)
    assert got.low == pytest.approx(want.confidence_interval.low, abs=0.005)
    assert got.high == pytest.approx(want.confidence_interval.high, abs=0.005)
    assert got == metrics.paired_bootstrap(a, b, resamples=20000)  # seeded
    wide = metrics.paired_bootstrap(a, b, confidence=0.99)
    assert wide.low < got.low and wide.high > got.high
    assert metrics.paired_bootstrap(a, a) == (0, 0, 0)


def test_paired_bootstrap_covers_the_true_difference():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):  # accuracies 0.8 and 0.84 that mostly err together
        u, v = rng.random(200), rng.random(200)
        a, b = u < 0.8, np.where(v < 0.3, rng.random(200) < 0.84, u < 0.84)
        interval = metrics.paired_bootstrap(a, b, resamples=400, seed=seed)
        covered += interval.low <= 0.04 <= interval.high
    assert 0.9 <= covered / 200 <= 0.99


def test_split_halves_give_the_standard_error_of_a_mean():
    values = np.random.default_rng(0).standard_normal((500, 2)) * [1, 3]
    got = metrics.split_half_interval(lambda rows: values[rows].mean(0), 500, splits=2000)
    for i, interval in enumerate(got):
        assert interval.difference == pytest.approx(values[:, i].mean(), abs=1e-12)
        reach = 1.959964 * values[:, i].std(ddof=1) / np.sqrt(500)
        assert interval.high - interval.difference == pytest.approx(reach, rel=0.08)
        assert interval.high + interval.low == pytest.approx(2 * interval.difference)


def _two_networks(n: int, rng, filters: int = 4, classes: int = 4):
    """Features of two networks that see the same noise in part, the second more class-specific; and labels."""
    labels = rng.integers(0, classes, n)
    own = np.arange(filters) % classes == labels[:, None]
    noise, other = rng.standard_normal((2, n, filters))
    return 1.5 * own + noise, 2 * own + 0.7 * noise + np.sqrt(0.51) * other, labels


def _gain(first, second, labels, rows=slice(None)) -> float:
    """The difference of the two MIS on some rows."""
    return float(
        np.subtract(
            *(
                metrics.mutual_information_score(metrics.class_mutual_info(x[rows], labels[rows], num_classes=4))
                for x in (second, first)
            )
        )
    )


def test_split_halves_cover_the_true_difference_of_mis():
    rng = np.random.default_rng(1)
    truth = _gain(*_two_networks(100_000, rng))
    found = []
    for seed in range(60):
        first, second, labels = _two_networks(200, rng)
        found += metrics.split_half_interval(
            lambda rows, a=first, b=second, y=labels: _gain(a, b, y, rows), 200, splits=8, seed=seed
        )
    gains, low, high = np.array(found).T
    assert np.mean((low <= truth) & (truth <= high)) >= 0.87
    assert np.mean(high - gains) / 1.959964 == pytest.approx(gains.std(), rel=0.25)


def test_a_bootstrap_would_bias_mis():
    """Why there are split halves: samples drawn twice are neighbours at no distance."""
    rng = np.random.default_rng(0)
    first, second, labels = _two_networks(400, rng)
    interval = metrics.split_half_interval(lambda rows: _gain(first, second, labels, rows), 400)[0]
    resampled = [_gain(first, second, labels, rng.integers(0, 400, 400)) for _ in range(30)]
    assert interval.difference - np.mean(resampled) > 2 * np.std(resampled) / np.sqrt(30) + 0.01


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: metrics.paired_bootstrap([1, 0], [1]),
            r"first and second must be \(N,\) alike, got \(2,\) and \(1,\)",
        ),
        (lambda: metrics.paired_bootstrap([1], [1], resamples=0), "resamples must be at least 1, got 0"),
        (lambda: metrics.paired_bootstrap([1], [1], confidence=1), r"confidence must lie in \(0, 1\), got 1"),
        (lambda: metrics.split_half_interval(len, 1), "n and splits must be at least 2 and 1, got 1 and 100"),
        (lambda: metrics.split_half_interval(len, 4, confidence=0), r"confidence must lie in \(0, 1\), got 0"),
    ],
)
def test_intervals_refuse(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- pictures --------------------------------------------------------------------------------------------------------


def test_confusion_picture_shows_shares_of_the_true_class():
    counts = np.array([[3, 1, 0], [0, 5, 0], [0, 0, 0]])
    figure, axes = plots.plot_confusion(counts, ["a", "b", "c"])
    assert axes.images[0].get_array().tolist() == [[0.75, 0.25, 0], [0, 1, 0], [0, 0, 0]]
    assert {t.get_position(): t.get_text() for t in axes.texts} == {(0, 0): "75", (1, 0): "25", (1, 1): "100"}
    assert [t.get_text() for t in axes.get_yticklabels()] == ["a", "b", "c"]
    assert axes.get_title(loc="left") == "Accuracy 88.89%" and axes.get_ylabel() == "true class"
    figure.draw_without_rendering()
    scale = figure.axes[1]  # in percent, as the numbers in the cells
    assert scale.get_ylabel() == "% of the true class" and scale.get_yticklabels()[-1].get_text() == "100"
    many, axes = plots.plot_confusion(np.eye(100, dtype=int), [str(i) for i in range(100)])
    assert many.get_size_inches().max() < 20 and not axes.texts
    with pytest.raises(ValueError, match=r"plot_confusion: .* got shape \(3, 2\)"):
        plots.plot_confusion(counts[:, :2], ["a", "b", "c"])


def test_similarity_picture_is_sorted_by_class():
    s = metrics.filter_similarity(np.random.default_rng(0).standard_normal((5, 4)))
    figure, axes = plots.plot_filter_similarity(s, [2, 0, 2, 0, 0], ["a", "b", "c"])
    shown = np.ma.filled(axes.images[0].get_array(), np.nan)
    want = s[np.ix_([1, 3, 4, 0, 2], [1, 3, 4, 0, 2])]
    np.fill_diagonal(want, np.nan)
    assert np.array_equal(shown, want, equal_nan=True)
    assert axes.images[0].get_clim() == (0, np.nanmax(want))
    assert axes.get_yticks().tolist() == [1, 3.5] and [t.get_text() for t in axes.get_yticklabels()] == ["a", "c"]
    assert plots.plot_filter_similarity(s, [0] * 5, ["a"], top=2)[1].images[0].get_clim() == (0, 2)
    with pytest.raises(ValueError, match=r"plot_filter_similarity: .* got \(5, 5\) and \(4,\)"):
        plots.plot_filter_similarity(s, [0] * 4, ["a"])
