"""Tests of the data readers on files made here: the embedded set, IDX, CIFAR and .npz, damaged ones included."""

from __future__ import annotations

import gzip
import hashlib
import os
import pickle
import re
import struct
from pathlib import Path

import make_fashion_subset as tool
import numpy as np
import pytest

from csg_ext.data import ImageData, load_images
from csg_ext.data.images import EMBEDDED

RNG = np.random.default_rng(7)


# ---- the embedded default


def test_embedded_subset_is_what_its_note_says():
    data = load_images()
    assert data.train_images.shape == (12000, 1, 28, 28) and data.test_images.shape == (2000, 1, 28, 28)
    assert len(data.classes) == 10 and data.classes[1] == "Trouser"
    assert np.bincount(data.train_labels).tolist() == [1200] * 10
    assert np.bincount(data.test_labels).tolist() == [200] * 10
    assert np.bincount(data.train_labels[-2000:]).tolist() == [200] * 10  # a balanced validation part
    note = EMBEDDED.with_suffix(".txt").read_text()
    assert hashlib.sha256(EMBEDDED.read_bytes()).hexdigest() in note
    assert "MIT" in note and "Zalando" in note


def test_embedded_images_match_their_labels():
    """A nearest-class-mean rule on the raw pixels is right far more often than chance: labels are not shuffled."""
    data = load_images()
    train, test = (x.reshape(len(x), -1).astype(np.float32) for x in (data.train_images, data.test_images))
    means = np.stack([train[data.train_labels == c].mean(0) for c in range(10)])
    nearest = ((test[:, None] - means) ** 2).sum(2).argmin(1)
    assert np.mean(nearest == data.test_labels) > 0.6


def test_subset_tool_writes_the_same_bytes_again():
    """The tool's packing of the embedded arrays gives the embedded file, byte for byte (zlib's version permitting)."""
    with np.load(EMBEDDED) as archive:
        arrays = {key: archive[key] for key in archive.files}
    once, twice = tool.npz_bytes(arrays), tool.npz_bytes(arrays)
    assert once == twice
    content = hashlib.sha256(b"".join(arrays[key].tobytes() for key in tool.FILES)).hexdigest()
    assert content in EMBEDDED.with_suffix(".txt").read_text()


def test_subset_tool_is_balanced_and_refuses_other_files(tmp_path, monkeypatch):
    labels = RNG.integers(0, 10, 2000)
    chosen = tool.balanced(labels, 20, np.random.default_rng(0))
    assert len(set(chosen)) == 200
    assert (np.sort(labels[chosen].reshape(20, 10), axis=1) == np.arange(10)).all()
    for name in tool.FILES.values():
        (tmp_path / name).write_bytes(b"\0\0\x08\x01\0\0\0\0")
    monkeypatch.setattr("sys.argv", ["x", "--idx", str(tmp_path), "--output", str(tmp_path / "out.npz")])
    with pytest.raises(SystemExit, match="not the IDX files of Fashion-MNIST"):
        tool.main()
    assert not (tmp_path / "out.npz").exists()


# ---- IDX


def _idx(array: np.ndarray) -> bytes:
    return struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def _write_idx(folder: Path, packed: bool = False) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {
        "train-images-idx3-ubyte": RNG.integers(0, 256, (30, 6, 5), np.uint8),
        "train-labels-idx1-ubyte": np.arange(30, dtype=np.uint8) % 3 + 1,
        "t10k-images-idx3-ubyte": RNG.integers(0, 256, (9, 6, 5), np.uint8),
        "t10k-labels-idx1-ubyte": np.arange(9, dtype=np.uint8) % 3 + 1,
    }
    for name, array in arrays.items():
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(_idx(array)))
        else:
            (folder / name).write_bytes(_idx(array))
    return arrays


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("place", [".", "raw", "FashionMNIST/raw"])
def test_idx_folders(tmp_path, packed, place):
    arrays = _write_idx(tmp_path / place, packed)
    data = load_images(tmp_path)
    assert np.array_equal(data.train_images[:, 0], arrays["train-images-idx3-ubyte"])
    assert np.array_equal(data.test_images[:, 0], arrays["t10k-images-idx3-ubyte"])
    assert data.classes == ["1", "2", "3"]  # labels that begin at 1 become positions
    assert np.array_equal(data.train_labels, arrays["train-labels-idx1-ubyte"] - 1)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda raw: raw[:-3], "expected 30x6x5 bytes after the header, got 897"),
        (lambda raw: b"\x89PNG" + raw[4:], "expected an IDX header of unsigned bytes, got 89504e47"),
        (lambda raw: b"", "expected an IDX header of unsigned bytes, got an empty file"),
        (lambda raw: raw[:4] + bytes(4) + b"\xff" * 8, "expected fewer than 2^63 bytes, got the sizes 0x4294967295x"),
    ],
)
def test_damaged_idx(tmp_path, damage, message):
    _write_idx(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=re.escape(f"{path}: {message}")):
        load_images(tmp_path)


def test_damaged_gzip(tmp_path):
    _write_idx(tmp_path, packed=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match="train-images-idx3-ubyte.gz: expected a readable IDX file"):
        load_images(tmp_path)


def test_missing_idx_part_and_several_sets(tmp_path):
    _write_idx(tmp_path / "MNIST" / "raw")
    (tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="expected t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte.gz"):
        load_images(tmp_path)
    _write_idx(tmp_path / "KMNIST" / "raw")
    with pytest.raises(ValueError, match="got several in .*: KMNIST, MNIST"):
        load_images(tmp_path)


def test_counts_that_differ(tmp_path):
    _write_idx(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(_idx(np.ones(8, np.uint8)))
    with pytest.raises(ValueError, match=r"test_labels must be \(9,\) like its images, got \(8,\)"):
        load_images(tmp_path)


# ---- CIFAR


def _write_cifar10(folder: Path) -> np.ndarray:
    folder.mkdir(parents=True)
    images = RNG.integers(0, 256, (60, 3072), np.uint8)
    for i, name in enumerate([*(f"data_batch_{j}" for j in range(1, 6)), "test_batch"]):
        batch = {"data": images[10 * i : 10 * i + 10], "labels": list(range(10)), "filenames": ["x"] * 10}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    meta = {"label_names": [f"class {i}" for i in range(10)], "num_cases_per_batch": 10}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol=2))
    return images


@pytest.mark.parametrize("place", [".", "cifar-10-batches-py"])
def test_cifar10(tmp_path, place):
    folder = tmp_path / "root" / place
    images = _write_cifar10(folder)
    data = load_images(tmp_path / "root")
    assert data.name == "CIFAR-10" and data.classes[3] == "class 3"
    assert np.array_equal(data.train_images, images[:50].reshape(-1, 3, 32, 32))
    assert np.array_equal(data.test_images, images[50:].reshape(-1, 3, 32, 32))
    assert np.array_equal(data.train_labels, np.tile(np.arange(10), 5))


def test_cifar100(tmp_path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name, count in (("train", 100), ("test", 100)):
        batch = {"data": RNG.integers(0, 256, (count, 3072), np.uint8), "fine_labels": list(range(count))}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"c{i}" for i in range(100)]}, protocol=2))
    data = load_images(tmp_path)
    assert data.name == "CIFAR-100" and len(data.classes) == 100 and data.train_labels.tolist() == list(range(100))


def test_cifar_pickle_runs_no_code(tmp_path):
    _write_cifar10(tmp_path / "c")
    victim = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {victim}",)

    (tmp_path / "c" / "data_batch_3").write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(ValueError, match=r"data_batch_3: expected a pickled CIFAR batch.*asks for \w+\.system"):
        load_images(tmp_path / "c")
    assert not victim.exists()


@pytest.mark.parametrize("content", [b"", b"junk", pickle.dumps([1]), pickle.dumps({"data": [1], "labels": [1]})])
def test_damaged_cifar(tmp_path, content):
    _write_cifar10(tmp_path / "c")
    (tmp_path / "c" / "test_batch").write_bytes(content)
    with pytest.raises(ValueError, match="test_batch: expected"):
        load_images(tmp_path / "c")


@pytest.mark.parametrize("name", ["data_batch_1", "data_batch_4", "test_batch"])
def test_incomplete_cifar(tmp_path, name):
    _write_cifar10(tmp_path / "c")
    (tmp_path / "c" / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"expected the file {name} of CIFAR-10"):
        load_images(tmp_path / "c")


# ---- .npz and ImageData


def test_npz_round_trip_and_hold_out(tmp_path):
    images, labels = RNG.integers(0, 256, (20, 3, 4, 4), np.uint8), np.arange(20) % 2
    data = ImageData("toy", images[:14], labels[:14], images[14:], labels[14:], ["a", "b"])
    data.save(tmp_path / "toy.npz")
    back = load_images(tmp_path / "toy.npz")
    assert back.fingerprint() == data.fingerprint() and back.classes == ["a", "b"]
    part = data.hold_out(4)
    assert np.array_equal(part.test_images, images[10:14]) and np.array_equal(part.train_images, images[:10])
    order = np.argsort(labels[:14], kind="stable")  # sorted by class, as a folder is: both classes are held out
    part = ImageData("toy", images[:14][order], labels[:14][order], images[14:], labels[14:], ["a", "b"]).hold_out(4)
    assert part.test_labels.tolist() == [0, 0, 1, 1] and len(part.train_labels) == 10
    with pytest.raises(ValueError, match=r"count must lie in \[1, 13\], got 14"):
        data.hold_out(14)


def test_npz_with_class_names_in_bytes(tmp_path):
    images, labels = RNG.integers(0, 256, (6, 1, 4, 4), np.uint8), np.arange(6) % 2
    arrays = dict(train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    np.savez(tmp_path / "x.npz", classes=np.array([b"a", "Öl".encode()]), **arrays)
    assert load_images(tmp_path / "x.npz").classes == ["a", "Öl"]
    np.savez(tmp_path / "x.npz", classes=np.array([b"a", "Öl".encode("latin1")]), **arrays)
    with pytest.raises(ValueError, match="x.npz: classes must be names, got others: 'utf-8' codec can't decode"):
        load_images(tmp_path / "x.npz")


@pytest.mark.parametrize("shape", [(1, 0, 4), (1, 4, 0), (0, 4, 4)])
def test_images_without_a_pixel_are_refused(shape):
    images, labels = np.zeros((6, *shape), np.uint8), np.arange(6) % 2
    with pytest.raises(ValueError, match=r"^toy: train_images must have a channel and sides of at least 1, got \(6, "):
        ImageData("toy", images, labels, images, labels, ["a", "b"])


@pytest.mark.parametrize("shape", [(28, 28, 3), (28, 20, 1), (8, 8, 4), (9, 7, 2)])
@pytest.mark.parametrize("part", ["train", "test"])
def test_npz_with_the_channels_last_is_refused(tmp_path, shape, part):
    images, labels = RNG.integers(0, 256, (6, *shape), np.uint8), np.arange(6) % 2
    arrays = {f"{p}_{kind}": a for p in ("train", "test") for kind, a in (("images", images), ("labels", labels))}
    arrays["train_images" if part == "test" else "test_images"] = images.transpose(0, 3, 1, 2)
    np.savez(tmp_path / "x.npz", **arrays)
    got = re.escape(f"(N, channels, H, W), got (6, {shape[0]}, {shape[1]}, {shape[2]}), which has the channels last")
    with pytest.raises(ValueError, match=f"x.npz: {part}_images must be {got}$"):
        load_images(tmp_path / "x.npz")


@pytest.mark.parametrize("shape", [(1, 28, 1), (3, 28, 3), (3, 4, 4), (4, 3, 3), (2, 4, 4), (4, 4, 3)])
def test_npz_with_narrow_images_is_read(tmp_path, shape):
    images, labels = RNG.integers(0, 256, (6, *shape), np.uint8), np.arange(6) % 2
    np.savez(tmp_path / "x.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    assert load_images(tmp_path / "x.npz").train_images.shape == (6, *shape)


def test_class_names_that_are_not_different_are_refused(tmp_path):
    images, labels = RNG.integers(0, 256, (8, 1, 4, 4), np.uint8), np.arange(8) % 4
    data = ImageData("toy", images, labels, images, labels, ["a", "b", "A", "c"])
    data.classes[2] = "a"
    data.save(tmp_path / "toy.npz")
    with pytest.raises(ValueError, match="^toy: the names of the classes must differ, got 'a' twice$"):
        load_images(tmp_path / "toy.npz", classes=["a", "c"])


def test_statistics():
    images = RNG.integers(0, 256, (20, 3, 4, 4), np.uint8)
    data = ImageData("toy", images, np.arange(20) % 2, images, np.arange(20) % 2, ["a", "b"])
    mean, std = data.statistics()
    assert np.allclose(mean, images.mean((0, 2, 3)) / 255) and np.allclose(std, images.std((0, 2, 3)) / 255)
