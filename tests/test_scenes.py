"""Tests of csg_ext.analysis.scenes: items cut out and pasted on photographs, with their masks."""

from __future__ import annotations

import numpy as np
import pytest

from csg_ext.analysis import scenes
from csg_ext.data import load_images


def _shirts(count):
    """Grey items: a frame whose hole is filled, a cut-off one and a bar, by turns."""
    items = np.zeros((count, 28, 28), np.uint8)
    items[0::3, 4:24, 6:22], items[0::3, 10:18, 10:18] = 200, 0
    items[1::3] = 90
    items[2::3, 2:26, 11:17] = 120
    return items


def test_item_masks_are_filled_and_cut_off_items_refused():
    items = _shirts(6)
    items[0, 0, 0] = 8  # no brighter than what counts as background
    masks, usable = scenes.item_masks(items)
    frame = np.zeros((28, 28), bool)
    frame[4:24, 6:22] = True
    assert (masks[0] == frame).all() and (masks[3] == frame).all()
    assert usable.tolist() == [True, False, True, True, False, True]


@pytest.mark.parametrize("objects", [1, 2])
def test_scenes_are_seeded_and_their_masks_exact(objects):
    items, labels = _shirts(30), np.arange(30) % 3 // 2  # class 0: frames and unusable ones; class 1: bars
    photos = [np.random.default_rng(1).integers(0, 256, (3, 60, 70), np.uint8), np.full((3, 40, 41), 7, np.uint8)]
    found = scenes.make_scenes(items, labels, photos, 20, objects, seed=3)
    again = scenes.make_scenes(items, labels, photos, 8, objects, seed=3)
    for one, two in zip(found, again, strict=True):
        assert (one[:8] == two).all()
    assert (found.images != scenes.make_scenes(items, labels, photos, 20, objects, seed=4).images).any()
    assert found.labels[:, 0].tolist() == [0, 1] * 10
    area = found.masks.sum((2, 3))
    assert area.min() > 0
    if objects == 2:
        assert (found.labels[:, 0] != found.labels[:, 1]).all()
        assert not (found.masks[:, 0] & found.masks[:, 1]).any()
    # Over a background of one colour, that colour is outside the masks and the tinted item inside.
    plain = scenes.make_scenes(items, labels, [np.full((3, 50, 50), 7, np.uint8)], 20, objects, seed=3)
    outside = ~plain.masks.any(1)
    assert (np.moveaxis(plain.images, 1, -1)[outside] == 7).all()
    inside = np.moveaxis(plain.images, 1, -1)[~outside].max(1)
    assert (inside > 7).mean() > 0.8


def test_sizes_of_an_item():
    items, photos = (_shirts(30), np.arange(30) % 3 // 2), [np.full((3, 50, 50), 7, np.uint8)]
    found = scenes.make_scenes(*items, photos, 30, 1, 0, (10, 12))
    extents = [np.ptp(np.argwhere(mask), axis=0).max() + 1 for mask in found.masks[:, 0]]
    assert 7 <= min(extents) and 8 < max(extents) <= 12  # an item fills 20 or 24 of its 28 rows
    for objects, sizes, limit in ((1, (0, 4), 40), (1, (20, 10), 40), (2, (16, 21), 20)):
        with pytest.raises(ValueError, match=rf"sizes must rise within \[1, {limit}\], got {sizes[0]} and {sizes[1]}"):
            scenes.make_scenes(*items, photos, 1, objects, 0, sizes)


def test_photographs_and_items_of_both_parts_are_disjoint():
    assert not set(scenes.PHOTOS["train"]) & set(scenes.PHOTOS["test"])
    for part in ("train", "test"):
        for photo in scenes.photographs(part):
            assert photo.dtype == np.uint8 and photo.ndim == 3 and len(photo) == 3 and min(photo.shape[1:]) >= 160


def test_the_benchmark_file_is_a_training_set_with_masks(tmp_path, capsys):
    file = tmp_path / "scenes.npz"
    assert scenes.main([str(file), "--seed", "5", "--train", "20", "--test", "10", "--pairs", "4"]) == 0
    assert "20 train, 10 test and 4 pair scenes" in capsys.readouterr().out
    data = load_images(file)
    assert data.test_images.shape == (10, 3, 40, 40) and data.classes == load_images().classes
    with np.load(file) as arrays:
        assert arrays["test_masks"].shape == (10, 40, 40) and arrays["train_masks"].dtype == bool
        assert arrays["pair_masks"].shape == (4, 2, 40, 40) and arrays["pair_labels"].shape == (4, 2)
