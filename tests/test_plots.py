"""Tests of the pictures: what is drawn is the data, in the order that the text names."""

from __future__ import annotations

import io

import numpy as np
import pytest

from csg_ext import plots

CLASSES = ["cat", "dog", "emu"]


def _png(figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def test_filters_are_sorted_by_class_then_by_score():
    scores = np.array([[0.1, 0.9, 0.0, 0.5], [0.8, 0.1, 0.9, 0.2], [0.0, 0.0, 0.1, 0.1]])
    assert plots.class_order(scores).tolist() == [1, 3, 2, 0]


def test_gate_picture_shows_the_sorted_gate():
    gate = np.random.default_rng(0).random((3, 8))
    figure, axes = plots.plot_gate(gate, CLASSES)
    image = axes.images[0]
    shown = image.get_array()
    assert np.array_equal(shown, gate[:, plots.class_order(gate)])
    assert (np.diff(shown.argmax(axis=0)) >= 0).all()
    assert image.get_clim() == (0, 1) and image.get_cmap().name == "cividis"
    assert [t.get_text() for t in axes.get_yticklabels()] == CLASSES
    assert f"{gate.mean():.3f}" in axes.get_title(loc="left")
    assert _png(figure).startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"plot_gate: expected a matrix with 3 rows, .* got shape \(8, 3\)"):
        plots.plot_gate(gate.T, CLASSES)


def test_mutual_information_shares_one_scale():
    rng = np.random.default_rng(0)
    std, csg = rng.random((8, 3)) / 5, rng.random((8, 3)) / 3
    figure, axes = plots.plot_mutual_information(std, csg, CLASSES)
    left, right = (ax.images[0] for ax in axes)
    assert left.get_clim() == right.get_clim() == (0, csg.max())
    assert np.array_equal(left.get_array(), std.T[:, plots.class_order(std.T)])
    assert axes[0].get_title(loc="left").startswith("STD") and axes[1].get_title(loc="left").startswith("CSG")
    assert plots.plot_mutual_information(std, csg, CLASSES, bound=0.5)[1][0].images[0].get_clim() == (0, 0.5)
    assert _png(figure).startswith(b"\x89PNG")


def test_one_matrix_of_mutual_information():
    mi = np.random.default_rng(0).random((8, 3)) / 5
    figure, axes = plots.plot_class_mutual_information(mi, CLASSES, bound=0.4)
    assert axes.images[0].get_clim() == (0, 0.4)
    assert np.array_equal(axes.images[0].get_array(), mi.T[:, plots.class_order(mi.T)])
    assert f"MIS {mi.max(axis=1).mean():.3g} nats, bound 0.4" in axes.get_title(loc="left")
    assert plots.plot_class_mutual_information(mi, CLASSES)[1].images[0].get_clim() == (0, 1)
    assert _png(figure).startswith(b"\x89PNG")


def test_many_classes_show_those_with_most_filters():
    rng = np.random.default_rng(0)
    mi = rng.random((300, 1000)) / 10
    best = np.where(np.arange(300) < 200, 7 * (np.arange(300) % 40), 300 + np.arange(300))  # 40 classes with 5 each
    mi[np.arange(300), best] = 0.5
    figure, axes = plots.plot_class_mutual_information(mi, [f"c{i}" for i in range(1000)], bound=1)
    shown = mi[:200, ::7][:, :40].T
    assert np.array_equal(axes.images[0].get_array(), shown[:, plots.class_order(shown)])
    assert [t.get_text() for t in axes.get_yticklabels()] == [f"c{7 * i}" for i in range(40)]
    assert axes.get_title(loc="left").endswith("40 of 1000 classes, 200 of 300 filters")


def test_training_curves():
    def rows(dense):
        return [
            {"epoch": e, "loss_std": 1 / e, "train_accuracy": None if e == 2 else 0.5, "l1_density": dense and 0.5 / e}
            for e in (1, 2, 3)
        ]

    figure, axes = plots.plot_training({"std": rows(None), "csg": rows(1)}, 3)
    assert [len(ax.lines) for ax in axes] == [2, 2, 2]  # the last panel: CSG's density and the floor
    assert axes[1].lines[0].get_xdata().tolist() == [1, 3]  # an epoch without STD steps has no accuracy
    assert axes[2].lines[0].get_ydata().tolist() == pytest.approx([0.5, 0.25, 0.5 / 3])
    first, second = axes[0].lines
    assert first.get_color() != second.get_color() and first.get_linestyle() != second.get_linestyle()
    assert _png(figure).startswith(b"\x89PNG")


def test_many_classes_stay_readable():
    figure, axes = plots.plot_gate(np.random.default_rng(0).random((100, 64)), [str(i) for i in range(100)])
    assert figure.get_size_inches()[1] < 15 and _png(figure).startswith(b"\x89PNG")
