"""Tests of class subsets, splits and long tails: exact sizes, and independence of everything but seed and names."""

from __future__ import annotations

import hashlib
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from csg_ext.data import ImageData, image_loader, load_images, select
from csg_ext.training import compare

RNG = np.random.default_rng()


def _names(count: int) -> list[bytes]:
    return [f"c/{i}.png".encode() for i in range(count)]


def test_hashes_are_blake2b_of_the_name_in_nfc():
    """The same on every platform: spelt out here, byte for byte."""
    name = "Zürich/é.png"
    expected = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8, key=b"5").digest(), "big")
    forms = [unicodedata.normalize(form, name).encode() for form in ("NFC", "NFD")]
    assert forms[0] != forms[1] and select.hashes(forms, 5).tolist() == [expected, expected]
    assert select.hashes([b"\xff.png"], 0).shape == (1,)  # a name that is not UTF-8
    assert select.hashes([b"x"], 0) != select.hashes([b"x"], 1)


def test_held_out_is_balanced_and_depends_on_names_and_seed_alone():
    labels = RNG.permutation(np.repeat(np.arange(5), [40, 10, 3, 1, 7]))
    names = np.array(_names(len(labels)))
    mask = select.held_out(labels, select.hashes(names, 3), 0.2)
    assert np.bincount(labels[mask], minlength=5).tolist() == [8, 2, 1, 0, 1]
    order = RNG.permutation(len(labels))
    assert np.array_equal(select.held_out(labels[order], select.hashes(names[order], 3), 0.2), mask[order])
    without = labels != 0  # another class changes nothing
    assert np.array_equal(select.held_out(labels[without], select.hashes(names[without], 3), 0.2), mask[without])
    assert not np.array_equal(select.held_out(labels, select.hashes(names, 4), 0.2), mask)


@pytest.mark.parametrize(
    "ratio, sizes",
    [
        # CIFAR-10-LT as published: 12,406 images at 100, 20,431 at 10
        (100, [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]),
        (10, [5000, 3871, 2997, 2320, 1796, 1391, 1077, 834, 645, 500]),
        (1, [5000] * 10),
    ],
)
def test_long_tail_has_the_published_sizes(ratio, sizes):
    labels = RNG.permutation(np.repeat(np.arange(10), 5000))
    names = np.array(_names(50000))
    kept = select.long_tail(labels, list("abcdefghij"), ratio, select.hashes(names, 0))
    assert np.bincount(labels[kept]).tolist() == sizes
    assert sum(sizes) in (12406, 20431, 50000)
    order = RNG.permutation(50000)
    again = select.long_tail(labels[order], list("abcdefghij"), ratio, select.hashes(names[order], 0))
    assert set(names[order][again]) == set(names[kept])


def test_long_tail_of_classes_that_differ_in_size_keeps_the_ratio():
    counts = [30, 80, 100]
    labels = np.repeat(np.arange(3), counts)
    kept = select.long_tail(labels, list("abc"), 4, select.hashes(_names(len(labels)), 0))
    assert np.bincount(labels[kept]).tolist() == [30, 15, 7]  # the first class limits: 30, 30 / 2, floor(30 / 4)
    labels = np.repeat(np.arange(3), [100, 8, 50])
    kept = select.long_tail(labels, list("abc"), 4, select.hashes(_names(len(labels)), 0))
    assert np.bincount(labels[kept]).tolist() == [16, 8, 4]  # the second class limits


@pytest.mark.parametrize("ratio", [0.5, 0, -3, float("nan"), float("inf")])
def test_long_tail_ratios_that_are_none(ratio):
    with pytest.raises(ValueError, match="imbalance must be a number of at least 1"):
        select.long_tail(np.arange(2), ["a", "b"], ratio, select.hashes(_names(2), 0))


def test_long_tail_that_empties_a_class_names_it():
    labels = np.repeat(np.arange(2), 50)
    with pytest.raises(ValueError, match="imbalance 51 leaves class 'b' no image: the largest class would hold 50"):
        select.long_tail(labels, ["a", "b"], 51, select.hashes(_names(100), 0))


def test_class_subset_labels_in_the_order_asked_for():
    labels = RNG.integers(0, 4, 60)
    kept, mapped = select.class_subset(labels, list("abcd"), ["d", "b"])
    assert np.array_equal(kept, np.flatnonzero((labels == 3) | (labels == 1)))
    assert np.array_equal(mapped, (labels[kept] == 1).astype(int))


@pytest.mark.parametrize(
    "wanted, message",
    [
        (["a", "x"], r"classes must be among the set's own \(a, b, c\), got 'x'"),
        (["a", "b", "a"], "classes must differ, got 'a' twice"),
        (["a"], "classes must name at least 2 classes, got 1"),
        ([], "classes must name at least 2 classes, got 0"),
    ],
)
def test_class_subsets_that_are_none(wanted, message):
    with pytest.raises(ValueError, match=message):
        select.class_subset(np.arange(3), list("abc"), wanted)


# ---- through the readers


def _folder(root: Path, count: int = 20) -> None:
    for index, name in enumerate(("cat", "dog", "emu")):
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(np.full((4, 4), 60 * index + i, np.uint8)).save(root / name / f"{i}.png")


def _levels(images: np.ndarray) -> set[int]:
    return set(images[:, 0, 0, 0].tolist())


def test_a_damaged_file_moves_no_other_between_the_parts(tmp_path):
    _folder(tmp_path)
    before = load_images(tmp_path, seed=4)
    assert np.bincount(before.train_labels).tolist() == [16] * 3 and np.bincount(before.test_labels).tolist() == [4] * 3
    assert load_images(tmp_path, seed=4, test_share=0.5).test_labels.tolist() == [0] * 10 + [1] * 10 + [2] * 10
    (tmp_path / "cat" / "3.png").write_bytes(b"")
    after = load_images(tmp_path, seed=4)
    assert _levels(after.train_images) == _levels(before.train_images) - {3}
    assert _levels(after.test_images) == _levels(before.test_images) - {3}
    with pytest.raises(ValueError, match=r"test_share must lie in \(0, 1\), got 1"):
        load_images(tmp_path, test_share=1)


def test_a_class_too_small_to_split_is_named(tmp_path):
    _folder(tmp_path)
    (tmp_path / "yak").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "yak" / "0.png")
    with pytest.raises(ValueError, match="in the test part of .*, got none in class 'yak'"):
        load_images(tmp_path)
    assert len(load_images(tmp_path, classes=["cat", "emu"]).train_labels) == 32


def test_memory_and_the_loader_choose_the_same_images(tmp_path):
    """Subset, split and imbalance agree between load_images and image_loader, for folders and for packed sets."""
    _folder(tmp_path / "folder")
    images = RNG.integers(0, 256, (90, 1, 4, 4), np.uint8)
    labels = np.arange(90) % 3
    ImageData("toy", images, labels, images[:30], labels[:30], ["cat", "dog", "emu"]).save(tmp_path / "toy.npz")
    for path in (tmp_path / "folder", tmp_path / "toy.npz"):
        data = load_images(path, classes=["emu", "cat"], imbalance=3, seed=7)
        counts = np.bincount(data.train_labels)
        assert counts[0] == 3 * counts[1] + counts[0] % 3 and data.classes == ["emu", "cat"]
        for split, pixels, y in (
            ("train", data.train_images, data.train_labels),
            ("test", data.test_images, data.test_labels),
        ):
            loader = image_loader(
                path, split, batch_size=100, classes=["emu", "cat"], imbalance=3, split_seed=7, channels=1,
                num_workers=0, image_size=4, mean=[0], std=[1 / 255], augment=False, shuffle=False, drop_last=False,
            )  # fmt: skip
            x, labels_streamed = next(iter(loader))
            assert np.array_equal(x.numpy(), pixels) and np.array_equal(labels_streamed, y)


def test_train_val_and_test_are_disjoint_and_whole(tmp_path):
    _folder(tmp_path)
    levels = {}
    for split in ("train", "val", "test"):
        loader = image_loader(
            tmp_path, split, batch_size=60, val_share=0.25, image_size=4, channels=1, mean=[0], std=[1 / 255],
            augment=False, drop_last=False, num_workers=0,
        )  # fmt: skip
        x, y = next(iter(loader))
        assert np.bincount(y).tolist() == [{"train": 12, "val": 4, "test": 4}[split]] * 3
        levels[split] = _levels(x.numpy().round().astype(int))
    assert set.union(*levels.values()) == {60 * c + i for c in range(3) for i in range(20)}
    assert sum(map(len, levels.values())) == 60
    with pytest.raises(ValueError, match="has no val part: give val_share"):
        image_loader(tmp_path, "val", batch_size=2)


def test_a_held_out_part_leaves_the_sets_own_val_part_as_the_test_part(tmp_path):
    _folder(tmp_path / "train")
    _folder(tmp_path / "val", 5)
    sizes = {}
    for share in (None, 0.25):
        for split in ("train", "val", "test"):
            loader = image_loader(tmp_path, split, batch_size=1, val_share=share, num_workers=0)
            sizes[share, split] = len(loader)
    assert sizes == {(None, "train"): 60, (None, "val"): 15, (None, "test"): 15} | {
        (0.25, "train"): 45, (0.25, "val"): 15, (0.25, "test"): 15,
    }  # fmt: skip
    own = [y.item() for _, y in image_loader(tmp_path, "test", batch_size=1, val_share=0.25, num_workers=0)]
    assert own == [0] * 5 + [1] * 5 + [2] * 5


def test_an_empty_class_of_a_packed_set_is_named():
    images = np.zeros((6, 1, 2, 2), np.uint8)
    with pytest.raises(
        ValueError, match="toy: the test part must hold at least one image of every class, got none of class 'b'"
    ):
        ImageData("toy", images, np.arange(6) % 2, images, np.zeros(6, np.int64), ["a", "b"])


def test_command_line_options_reach_the_data(tmp_path, monkeypatch, capsys):
    from csg_ext import cli

    seen = []

    def stop(config, data, *args, **kwargs):
        seen.append(data)
        raise ValueError("stop here")

    monkeypatch.setattr(compare, "run_arms", stop)
    _folder(tmp_path / "images")
    arguments = ["train", "--data", str(tmp_path / "images"), "--output", str(tmp_path / "o"), "--overwrite"]
    options = [
        "--classes",
        'emu, "cat"',
        "--imbalance",
        "4",
        "--channels",
        "3",
        "--test-share",
        "0.5",
        "--split-seed",
        "9",
    ]
    for seed in ("0", "1"):  # the run's own seed changes no split
        assert cli.main([*arguments, *options, "--seed", seed]) == 2
    assert "stop here" in capsys.readouterr().err
    data = seen[0]
    assert data.classes == ["emu", "cat"] and data.channels == 3
    assert np.bincount(data.train_labels).tolist() == [10, 2] and np.bincount(data.test_labels).tolist() == [10, 10]
    assert data.fingerprint() == seen[1].fingerprint()
    data.save(tmp_path / "packed.npz")
    assert (
        cli.main(
            [
                "train",
                "--data",
                str(tmp_path / "packed.npz"),
                "--output",
                str(tmp_path / "o"),
                "--overwrite",
                "--test-share",
                "0.5",
            ]
        )
        == 2
    )
    assert (
        "--test-share applies to images without a test part of their own, got 0.5 for packed" in capsys.readouterr().err
    )
    direct = load_images(tmp_path / "images", classes=["emu", "cat"], imbalance=4, channels=3, test_share=0.5, seed=9)
    assert direct.fingerprint() == data.fingerprint()
    for bad, message in (
        (["--classes", "cat"], "classes must name at least 2 classes, got 1"),
        (["--classes", ""], "classes must name at least 2 classes, got 0"),
        (["--classes", "cat,cow"], "got 'cow'"),
        (["--imbalance", "99"], "leaves class 'emu' no image"),
        (["--memory-limit", "1e-9"], "more than the memory_limit of 1e-09 GiB"),
    ):
        assert cli.main([*arguments, *bad]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and message in lines[0]
