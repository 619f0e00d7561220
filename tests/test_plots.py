"""Tests of the pictures: what is drawn is the data, in the order that the text names."""

from __future__ import annotations

import io

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from csg_ext import metrics, plots

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


def test_names_that_the_font_lacks_are_drawn_from_another_one(monkeypatch, recwarn):
    names = ["\u210a", "dog", "emu"]  # matplotlib brings STIXGeneral, which has it, beside DejaVu Sans, which has not
    gate, share = np.random.default_rng(0).random((3, 8)), np.eye(3)
    _png(plots.plot_gate(gate, names)[0])
    assert "missing from font" in str(recwarn.pop(UserWarning).message)
    recwarn.clear()
    monkeypatch.setattr(plots.common, "SCRIPTS", ("Never Installed", "STIXGeneral"))
    for draw in (lambda: plots.plot_gate(gate, names), lambda: plots.plot_confusion(share, names)):
        before = matplotlib.rcParams["font.family"]
        figure, axes = draw()
        _png(figure)
        assert axes.get_yticklabels()[0].get_fontfamily() == ["sans-serif", "STIXGeneral"]
        assert matplotlib.rcParams["font.family"] == before
    assert not recwarn.list


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
    assert not axes[0].patches  # which path an epoch took is not in these rows
    assert [len(ax.lines) for ax in axes] == [2, 2, 2]  # the last panel: CSG's density and the floor
    assert axes[1].lines[0].get_xdata().tolist() == [1, 3]  # an epoch without STD steps has no accuracy
    assert axes[2].lines[0].get_ydata().tolist() == pytest.approx([0.5, 0.25, 0.5 / 3])
    first, second = axes[0].lines
    assert first.get_color() != second.get_color() and first.get_linestyle() != second.get_linestyle()
    assert _png(figure).startswith(b"\x89PNG")


def test_many_classes_stay_readable():
    figure, axes = plots.plot_gate(np.random.default_rng(0).random((100, 64)), [str(i) for i in range(100)])
    assert figure.get_size_inches()[1] < 15 and _png(figure).startswith(b"\x89PNG")


def test_long_names_are_not_cut_off():
    """The first column of pixels stays white, though names and a square matrix leave no room to spare."""
    from PIL import Image

    names = [f"n{i:08d} class name {i}" for i in range(300)]
    figure, _ = plots.plot_filter_similarity(np.eye(300), np.arange(300), names)
    pixels = np.asarray(Image.open(io.BytesIO(_png(figure))).convert("L"))
    assert pixels[:, 0].min() == 255 and pixels.min() < 50


def test_long_names_of_one_beginning_differ():
    names = [f"a very long class name number {i}" for i in range(3)]
    _, axes = plots.plot_gate(np.eye(3), names)
    assert [t.get_text() for t in axes.get_yticklabels()] == [f"a very lon…e number {i}" for i in range(3)]
    _, axes = plots.plot_gate(np.eye(2), [names[0], "another class name of this length"])
    assert [t.get_text() for t in axes.get_yticklabels()] == ["a very long class na…", "another class name o…"]


def test_zeros_have_the_lowest_colour():
    pictures = [
        plots.plot_filter_similarity(np.eye(2), [0, 1], CLASSES)[1],
        plots.plot_filter_similarity(np.eye(1), [0], CLASSES, 0.0)[1],
        *plots.plot_mutual_information(np.zeros((2, 3)), np.zeros((2, 3)), CLASSES)[1],
        plots.plot_class_mutual_information(np.zeros((2, 3)), CLASSES, 0.0, filter_classes=[0, 1])[1],
    ]
    for axes in pictures:
        assert axes.images[0].norm(0.0) == 0 and axes.images[0].get_clim() == (0, 1)


def test_two_classes_are_told_apart_by_the_classes_that_are_given():
    mi = np.repeat([[0.3], [0.2], [0.0], [0.4]], 2, axis=1)  # the same with both
    owner = np.array([1, 0, 0, -1])
    for filter_classes, lines, grey in ((owner, [1.5], "1 dead"), (None, [2.5], "1 without a class")):
        _, one = plots.plot_class_mutual_information(mi, CLASSES[:2], 0.7, filter_classes=filter_classes)
        assert [line.get_xdata()[0] for line in one.lines] == lines and grey in one.get_xlabel()
        _, both = plots.plot_mutual_information(mi, mi, CLASSES[:2], filter_classes=(filter_classes, None))
        assert [line.get_xdata()[0] for line in both[0].lines] == lines
    with pytest.raises(ValueError, match=r"plot_class_mutual_information: filter_classes must be \(4,\), got \(3,\)"):
        plots.plot_class_mutual_information(mi, CLASSES[:2], filter_classes=owner[:3])


def test_dollars_in_a_name_are_no_formula():
    figure, axes = plots.plot_gate(np.eye(3), ["US$_to_$EUR", "$x^2$", "$"])
    assert _png(figure).startswith(b"\x89PNG")
    assert [label.get_text() for label in axes.get_yticklabels()] == [r"US\$_to_\$EUR", r"\$x^2\$", r"\$"]


# ---- dead filters, many classes, axes


def test_dead_filters_stand_apart():
    gate = np.eye(3)[:, [2, 0, 1, 0, 2, 1]]
    dead = np.array([False, False, True, False, True, False])
    figure, axes = plots.plot_gate(gate, CLASSES, dead=dead)
    shown = axes.images[0].get_array()
    assert np.array_equal(shown[:, :4], np.eye(3)[:, [0, 0, 1, 2]])
    assert np.ma.getmaskarray(shown)[:, 4:].all() and not np.ma.getmaskarray(shown)[:, :4].any()
    assert "6 filters, sorted by class; 2 dead" in axes.get_xlabel()
    assert _png(figure).startswith(b"\x89PNG")


def test_a_filter_without_mutual_information_has_no_class_and_counts_as_zero():
    rng = np.random.default_rng(0)
    std, csg = rng.random((6, 3)), rng.random((6, 3))
    std[2] = 0  # no class at all
    dead = np.arange(6) == 4  # the estimate of a constant feature is noise, not zero
    figure, axes = plots.plot_mutual_information(std, csg, CLASSES, dead=(None, dead))
    assert axes[0].get_xlabel().endswith("; 1 without a class (grey)") and "1 dead" in axes[1].get_xlabel()
    assert axes[0].get_title(loc="left") == f"STD: MIS {std.max(axis=1).mean():.3g} nats"
    assert "1 dead" in plots.plot_class_mutual_information(csg, CLASSES, dead=dead)[1].get_xlabel()
    assert axes[1].get_title(loc="left") == f"CSG: MIS {np.delete(csg, 4, 0).max(axis=1).sum() / 6:.3g} nats"
    every = plots.plot_gate(np.eye(3), CLASSES, dead=np.ones(3, bool))
    assert np.ma.getmaskarray(every[1].images[0].get_array()).all() and every[1].get_ylim() == (2.5, -0.5)
    none, _ = plots.plot_class_mutual_information(np.zeros((5, 50)), [str(i) for i in range(50)], bound=1)
    assert _png(none).startswith(b"\x89PNG")
    assert _png(figure).startswith(b"\x89PNG") and _png(every[0]).startswith(b"\x89PNG")


def test_large_matrices_show_the_largest_entry_of_a_cell():
    rng = np.random.default_rng(0)
    gate = rng.random((1000, 2048)) / 2
    gate[rng.integers(0, 1000, 2048), np.arange(2048)] = 1
    figure, axes = plots.plot_gate(gate, [f"class {i}" for i in range(1000)])
    shown = np.asarray(axes.images[0].get_array())
    ordered = gate[:, plots.class_order(gate)]
    assert shown.shape == (250, 410)
    for row, column in rng.integers(0, (250, 410), (50, 2)):
        assert shown[row, column] == ordered[4 * row : 4 * row + 4, 5 * column : 5 * column + 5].max()
    assert "a cell: the largest of 4 classes × 5 filters" in axes.get_xlabel()
    assert "a cell: the largest of 2 filters" in plots.plot_gate(rng.random((3, 600)), CLASSES)[1].get_xlabel()
    names = [t.get_text() for t in axes.get_yticklabels()]
    assert len(names) == 20 and names[0] == "class 0" and names[-1] == "class 999"
    for tick, text in zip(axes.get_yticks(), names, strict=True):
        assert int(tick + 0.5) == int(text.split()[1]) // 4
    assert figure.get_size_inches().max() < 10


def test_pictures_draw_into_given_axes():
    from matplotlib.figure import Figure

    rng = np.random.default_rng(0)
    gate, mi, owner = rng.random((3, 8)), rng.random((8, 3)), rng.integers(0, 3, 8)
    histories = {"csg": [{"epoch": 1, "loss_std": 1.0, "loss_csg": 1.0, "train_accuracy": 0.5, "l1_density": 0.5}]}
    images, maps = rng.random((3, 1, 6, 6)), rng.random((3, 8, 2, 2))
    for count, draw in (
        (1, lambda axes: plots.plot_gate(gate, CLASSES, axes=axes)),
        (2, lambda axes: plots.plot_mutual_information(mi, mi, CLASSES, axes=axes)),
        (1, lambda axes: plots.plot_class_mutual_information(mi, CLASSES, axes=axes)),
        (1, lambda axes: plots.plot_confusion(np.eye(3, dtype=int), CLASSES, axes=axes)),
        (1, lambda axes: plots.plot_class_agreement(gate, mi, CLASSES, axes=axes)),
        (1, lambda axes: plots.plot_filters_per_class(owner, CLASSES, axes=axes)),
        (1, lambda axes: plots.plot_filter_similarity(rng.random((8, 8)), owner, CLASSES, axes=axes)),
        (3, lambda axes: plots.plot_training(histories, 3, axes=axes)),
        (3, lambda axes: plots.plot_top_images(images, maps, 0, axes=axes)),
        (3, lambda axes: plots.plot_image_filters(images[0], rng.random(8), owner, CLASSES, axes=axes)),
    ):
        figure = Figure()
        axes = [figure.add_subplot(1, count, i + 1) for i in range(count)]
        drawn, got = draw(axes[0] if count == 1 else axes)
        assert drawn is figure and list(np.ravel(got)) == axes
        assert all(a.has_data() for a in axes)
        with pytest.raises(ValueError, match=f"axes must be {count} of matplotlib's Axes, got {count + 1}"):
            draw([*axes, axes[0]])
    with pytest.raises(ValueError, match=r"plot_gate: axes must be 1 of matplotlib's Axes, got 1 \(str\)"):
        plots.plot_gate(gate, CLASSES, axes="axes")


# ---- filters and their classes


def test_agreement_shows_both_classes_of_every_filter():
    gate = np.eye(3)[:, [0, 1, 2, 2, 1, 0]]
    mi = np.eye(3)[:, [0, 2, 2, 1, 1, 1]].T * 0.3
    dead = np.arange(6) == 4
    figure, axes = plots.plot_class_agreement(gate, mi, CLASSES, dead=dead)
    lines = {line.get_label().split(":")[0]: line.get_xydata().tolist() for line in axes.lines}
    assert lines["gate and MI"] == [[0, 0], [3, 2]]  # filters 0 and 2: the first of their classes
    assert lines["gate alone"] == [[1, 0], [2, 1], [4, 2]] and lines["MI alone"] == [[1, 1], [2, 2], [4, 1]]
    assert "40.0%" in axes.get_title(loc="left") and "1 dead left out" in axes.get_xlabel()
    assert len({line.get_marker() for line in axes.lines}) == 3
    assert _png(figure).startswith(b"\x89PNG")


def test_agreement_is_the_measure():
    rng = np.random.default_rng(0)
    gate, mi = rng.random((50, 200)), rng.random((200, 50))
    _, axes = plots.plot_class_agreement(gate, mi, [str(i) for i in range(50)])
    assert f"{metrics.class_agreement(gate, mi):.1%}" in axes.get_title(loc="left")


def test_filters_per_class_names_classes_without_one():
    figure, axes = plots.plot_filters_per_class({"STD": [0, 0, 2, -1], "CSG": [0, 1, 2, 2]}, CLASSES)
    assert [[bar.get_width() for bar in bars] for bars in axes.containers] == [[2, 0, 1], [1, 1, 2]]
    assert [t.get_text() for t in axes.get_yticklabels()] == CLASSES
    texts = [t.get_text() for t in axes.get_legend().get_texts()]
    assert texts[0] == "STD: 4 filters, 1 dead; 1 of 3 classes without a filter"
    assert len({bars[0].get_hatch() for bars in axes.containers}) == 2
    assert _png(figure).startswith(b"\x89PNG")


def test_filters_per_class_of_many_classes_are_ranked():
    owner = np.concatenate([np.full(5, 700), np.full(3, 2), np.arange(10, 20)])
    figure, axes = plots.plot_filters_per_class(owner, [f"c{i}" for i in range(1000)])
    assert axes.lines[0].get_ydata().tolist() == [5, 3] + [1] * 10 + [0] * 988
    assert "988 of 1000 classes without a filter\nmost: c700 5, c2 3" in axes.get_legend().get_texts()[0].get_text()
    assert _png(figure).startswith(b"\x89PNG")


def test_similarity_of_many_filters_shows_means():
    rng = np.random.default_rng(0)
    owner = rng.integers(-1, 200, 600)
    s = metrics.filter_similarity(rng.standard_normal((600, 5)))
    figure, axes = plots.plot_filter_similarity(s, owner, [str(i) for i in range(200)])
    shown = axes.images[0].get_array()
    order = np.argsort(np.where(owner < 0, 200, owner), kind="stable")
    blank = s[order][:, order]
    np.fill_diagonal(blank, np.nan)
    assert shown.shape == (200, 200)
    assert shown[4, 4] == pytest.approx(np.nanmean(blank[12:15, 12:15]))
    assert shown[4, 90] == pytest.approx(blank[12:15, 270:273].mean())
    score = metrics.block_score(s[owner >= 0][:, owner >= 0], owner[owner >= 0], permutations=1)
    assert f"{score.within:.3g} within, {score.between:.3g} between" in axes.get_title(loc="left")
    assert len(axes.get_yticks()) == 20 and axes.get_yticklabels()[-1].get_text() == "dead"
    assert _png(figure).startswith(b"\x89PNG")


def test_training_shades_the_epochs_of_each_path():
    taken = [(1, None), (1, None), (None, 1), (1, None), (1, 1)]
    rows = [
        {"epoch": e, "loss_std": s, "loss_csg": c, "train_accuracy": s, "l1_density": 0.5}
        for e, (s, c) in enumerate(taken, 1)
    ]
    _, axes = plots.plot_training({"csg": rows}, 3)
    for ax in axes:
        spans = [(p.get_x(), p.get_x() + p.get_width(), p.get_hatch()) for p in ax.patches]
        assert [s[:2] for s in spans] == [(0.5, 2.5), (2.5, 3.5), (3.5, 4.5), (4.5, 5.5)]
        assert spans[0][2] == spans[2][2] and len({s[2] for s in spans}) == 3
    texts = [t.get_text() for t in axes[0].get_legend().get_texts()]
    assert [t for t in texts if "epochs" in t] == [f"CSG's epochs: {p}" for p in ("STD path", "CSG path", "both paths")]


# ---- images


def test_top_images_of_a_filter():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 3, 8, 8), dtype=np.uint8)
    maps = torch.from_numpy(rng.random((6, 4, 2, 2)))
    labels = [0, 1, 2, 0, 1, 2]
    figure, axes = plots.plot_top_images(images, maps, 2, labels=labels, classes=CLASSES, filter_class=1, count=5)
    best = np.argsort(-maps[:, 2].mean((1, 2)).numpy())[:5]
    top = maps[best, 2].max()
    assert len(axes) == len(figure.axes) == 5 and figure.get_suptitle().startswith("Filter 2, class dog: highest")
    assert figure.get_suptitle().endswith("half of the map's maximum over these images")
    for ax, i in zip(axes, best, strict=True):
        assert np.array_equal(ax.images[0].get_array(), np.moveaxis(images[i] / 255, 0, -1))
        large = F.interpolate(maps[i : i + 1, 2:3], size=(8, 8), mode="bilinear", align_corners=False)[0, 0]
        assert np.asarray(ax.images[1].get_array())[..., 3] == pytest.approx(0.75 * (large / top).numpy())
        assert ax.get_title() == f"{CLASSES[labels[i]]} {maps[i, 2].mean():.3g}"
    assert _png(figure).startswith(b"\x89PNG")


def test_the_title_of_one_image_fits():
    figure, _ = plots.plot_top_images(np.zeros((1, 1, 8, 8), np.uint8), np.eye(2)[None, None], 0, filter_class=1)
    _png(figure)  # lays it out
    title = figure.texts[0].get_window_extent()
    assert title.x0 >= 0 and title.x1 <= figure.bbox.x1


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_top_images_of_a_dead_filter_have_no_map(value):
    images, maps = np.zeros((2, 1, 8, 8), np.uint8), np.full((2, 1, 2, 2), value)
    figure, axes = plots.plot_top_images(images, maps, 0)
    assert [len(ax.images) for ax in axes] == [1, 1] and [ax.get_title() for ax in axes] == ["dead", "dead"]
    assert "dead, one activation everywhere" in figure.get_suptitle()
    assert _png(figure).startswith(b"\x89PNG")


def test_a_live_filter_at_its_limit_in_the_strongest_images_is_not_called_dead():
    images, maps = np.zeros((2, 1, 8, 8), np.uint8), np.full((2, 1, 2, 2), 6.0)
    for owner, dead in ((1, False), (-1, True)):
        figure, axes = plots.plot_top_images(images, maps, 0, filter_class=owner, chosen_from=50)
        assert ("dead" in figure.get_suptitle()) is dead and axes[0].get_title() == ("dead" if dead else "6")
        assert len(axes[0].images) == (1 if dead else 2)


def test_image_filters_name_filters_and_classes():
    rng = np.random.default_rng(0)
    classes = [f"c{i}" for i in range(30)]
    activations, owner = rng.standard_normal(60), rng.integers(-1, 30, 60)
    figure, axes = plots.plot_image_filters(rng.random((3, 5, 5)), activations, owner, classes, label=3, count=9)
    said = np.where(owner >= 0, np.maximum(activations, 0), 0)
    strongest = np.argsort(-said)[:9]
    assert [t.get_text() for t in axes[1].get_yticklabels()] == [f"c{owner[k]} · {k}" for k in strongest]
    assert [p.get_width() for p in axes[1].patches] == said[strongest].tolist()
    sums = np.array([said[owner == c].sum() for c in range(30)])
    order = np.argsort(-sums)[:9]
    assert [t.get_text() for t in axes[2].get_yticklabels()] == [f"c{c}" for c in order]
    assert [p.get_width() for p in axes[2].patches] == pytest.approx(sums[order].tolist())
    colours = [p.get_facecolor() for p in axes[2].patches]  # 7 of their own, then grey
    assert len(set(colours)) == 8 and colours[7] == colours[8]
    by_class = dict(zip(order.tolist(), colours, strict=True))
    for patch, k in zip(axes[1].patches, strongest, strict=True):
        assert patch.get_facecolor() == by_class.get(int(owner[k]), colours[8])
    assert axes[0].get_title(loc="left") == "true: c3" and f"{(said > 0).sum()} filters" in axes[1].get_title(
        loc="left"
    )
    assert _png(figure).startswith(b"\x89PNG")


def test_names_beside_a_wide_image_do_not_overlap():
    names = [f"class {i}" for i in range(10)]
    figure, axes = plots.plot_image_filters(np.zeros((1, 8, 48)), np.arange(1.0, 21), np.arange(20) % 10, names)
    _png(figure)  # lays it out
    boxes = [label.get_window_extent() for label in axes[1].get_yticklabels()]
    assert all(above.y0 >= below.y1 for above, below in zip(boxes, boxes[1:], strict=False))


def test_image_for_which_no_filter_speaks():
    figure, axes = plots.plot_image_filters(np.zeros((1, 4, 4)), [0, -1.0, 2], [0, 1, -1], CLASSES)
    assert [t.get_text() for t in axes[1].texts] == ["no filter spoke"] and not axes[2].patches
    assert _png(figure).startswith(b"\x89PNG")


# ---- bad input


GATE, MI, IMAGES = np.eye(3), np.eye(3), np.zeros((2, 1, 4, 4))


@pytest.mark.parametrize(
    "draw, message",
    [
        (lambda: plots.plot_gate(None, CLASSES), "plot_gate: gate must be a matrix .* the checkpoint holds no gate"),
        (lambda: plots.plot_gate(GATE * 0 + 0.5, CLASSES), "gate must be trained, got one that is 0.5 everywhere"),
        (lambda: plots.plot_gate(GATE * np.nan, CLASSES), "plot_gate: expected finite values, got 9 that are not"),
        (lambda: plots.plot_gate(GATE, CLASSES, dead=[True]), r"plot_gate: dead must be bool \(3,\), got bool \(1,\)"),
        (lambda: plots.plot_gate(GATE, "abc"), "plot_gate: classes must be the classes' names"),
        (lambda: plots.plot_class_agreement(None, MI, CLASSES), "plot_class_agreement: gate must be a matrix"),
        (lambda: plots.plot_class_agreement(GATE[:2], MI[:, :2], CLASSES[:2]), "classes must be at least 3, .* got 2"),
        (lambda: plots.plot_class_agreement(GATE, MI[:2], CLASSES), r"must be .*, got \(3, 3\) and \(2, 3\)"),
        (lambda: plots.plot_filters_per_class([0, 3], CLASSES), r"must lie in \[-1, 3\), got 0 to 3"),
        (lambda: plots.plot_filters_per_class([0.5], CLASSES), r"must be integers \(K,\), got float64"),
        (lambda: plots.plot_filters_per_class({}, CLASSES), "must be 1 to 4 arrays, got 0"),
        (lambda: plots.plot_filter_similarity(MI * np.nan, [0, 1, 2], CLASSES), "similarity must be finite"),
        (lambda: plots.plot_top_images(IMAGES, np.zeros((2, 3, 2, 2)), 3), r"filter must lie in \[0, 3\), got 3"),
        (lambda: plots.plot_top_images(IMAGES, np.zeros((1, 3, 2, 2)), 0), r"maps must be \(2, K, h, w\), got \(1, 3"),
        (lambda: plots.plot_top_images(IMAGES, np.full((2, 1, 2, 2), np.nan), 0), "maps must be finite"),
        (lambda: plots.plot_top_images(IMAGES - 1, np.zeros((2, 1, 2, 2)), 0), "images must be uint8, or floats in"),
        (lambda: plots.plot_top_images(IMAGES, np.zeros((2, 1, 2, 2)), 0, count=0), "count must be at least 1, got 0"),
        (
            lambda: plots.plot_top_images(IMAGES, np.zeros((2, 1, 2, 2)), 0, labels=[0], classes=CLASSES),
            r"labels must be integers \(2,\), got int64 \(1,\)",
        ),
        (lambda: plots.plot_image_filters(IMAGES[0], [1], [0, 1], CLASSES), r"finite and \(2,\), got \(1,\)"),
        (lambda: plots.plot_image_filters(IMAGES, [1], [0], CLASSES), r"images must be \(N, 1 or 3, H, W\)"),
    ],
)
def test_pictures_refuse(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()
