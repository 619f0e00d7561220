"""Tests of the data readers on files made here in each layout, damaged ones included, and of the augmented batches."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import os
import pickle
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from csg_ext.data import Batches, ImageData, decode, image_loader, load_images
from csg_ext.data.batches import normalise
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


def _tool():
    path = Path(__file__).resolve().parent.parent / "tools" / "make_fashion_subset.py"
    spec = importlib.util.spec_from_file_location("make_fashion_subset", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_subset_tool_writes_the_same_bytes_again():
    """The tool's packing of the embedded arrays gives the embedded file, byte for byte (zlib's version permitting)."""
    tool = _tool()
    with np.load(EMBEDDED) as archive:
        arrays = {key: archive[key] for key in archive.files}
    once, twice = tool.npz_bytes(arrays), tool.npz_bytes(arrays)
    assert once == twice
    content = hashlib.sha256(b"".join(arrays[key].tobytes() for key in tool.FILES)).hexdigest()
    assert content in EMBEDDED.with_suffix(".txt").read_text()


def test_subset_tool_is_balanced_and_refuses_other_files(tmp_path, monkeypatch):
    tool = _tool()
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
    ],
)
def test_damaged_idx(tmp_path, damage, message):
    _write_idx(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: {message}"):
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


# ---- image folders


def _write_folder(root: Path, count: int = 5, mode: str = "RGB", size: tuple[int, int] = (12, 10)) -> None:
    for index, name in enumerate(("cat", "dog", "emu")):
        (root / name).mkdir(parents=True)
        for i in range(count):
            level = 40 * index + i
            Image.new(mode, size, level if mode == "L" else (level, 0, 255 - level)).save(root / name / f"{i}.png")


def test_folder_with_val(tmp_path):
    _write_folder(tmp_path / "train")
    _write_folder(tmp_path / "val", 2)
    data = load_images(tmp_path)
    assert data.classes == ["cat", "dog", "emu"]
    assert data.train_images.shape == (15, 3, 10, 12) and data.test_images.shape == (6, 3, 10, 12)
    assert data.train_images[data.train_labels == 2, 0].min() == 80
    assert data.test_labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_folder_split_is_stratified_and_seeded(tmp_path):
    _write_folder(tmp_path, 10, "L")
    data, again, other = (load_images(tmp_path, seed=s) for s in (0, 0, 1))
    assert data.channels == 1
    assert np.bincount(data.test_labels).tolist() == [2, 2, 2] and len(data.train_labels) == 24
    assert np.array_equal(data.test_images, again.test_images)
    assert not np.array_equal(data.test_images, other.test_images)
    together = np.concatenate([data.train_images, data.test_images])[:, 0, 0, 0]
    assert sorted(together) == sorted(40 * c + i for c in range(3) for i in range(10))


def test_folder_sizes(tmp_path):
    _write_folder(tmp_path / "small", size=(12, 10))
    _write_folder(tmp_path / "large", size=(200, 100))
    assert load_images(tmp_path / "small", image_size=8).train_images.shape[2:] == (8, 8)
    assert load_images(tmp_path / "large").train_images.shape[2:] == (32, 32)
    with pytest.raises(ValueError, match="image_size must be at least 1, got 0"):
        load_images(tmp_path / "small", image_size=0)


def test_corrupt_images_are_named_and_counted(tmp_path):
    _write_folder(tmp_path / "train")
    _write_folder(tmp_path / "val", 2)
    broken = tmp_path / "train" / "dog" / "1.png"
    broken.write_bytes(b"no image")
    short = tmp_path / "val" / "emu" / "0.png"
    noise = Image.fromarray(RNG.integers(0, 256, (10, 12, 3), np.uint8))
    noise.save(short)
    short.write_bytes(short.read_bytes()[:200])  # the header is whole, the pixels are not
    data = load_images(tmp_path)
    assert len(data.skipped) == 2 and len(data.train_labels) == 14 and len(data.test_labels) == 5
    assert any(line.startswith("train/dog/1.png: ") for line in data.skipped)
    assert any(line.startswith("val/emu/0.png: ") for line in data.skipped)
    with pytest.raises(ValueError, match="with strict every image must decode, got train/dog/1.png"):
        load_images(tmp_path, strict=True)


def test_class_without_readable_image(tmp_path):
    _write_folder(tmp_path, 2)
    for path in (tmp_path / "dog").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="no image of class 'dog' in .* decodes"):
        load_images(tmp_path)
    for path in (tmp_path / "dog").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="got none in class 'dog'"):
        load_images(tmp_path)


def test_links_that_lead_nowhere_do_not_decode(tmp_path):
    _write_folder(tmp_path)
    (tmp_path / "dog" / "whole.PNG").symlink_to(tmp_path / "dog" / "1.png")
    (tmp_path / "dog" / "folder.png").symlink_to(tmp_path / "cat")
    assert np.bincount(load_images(tmp_path, strict=True).train_labels).tolist() == [4, 5, 4]
    (tmp_path / "dog" / "dead.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "emu" / "loop.png").symlink_to(tmp_path / "emu" / "loop.png")
    data = load_images(tmp_path)
    assert len(data.train_labels) + len(data.test_labels) == 16
    assert [line.partition(": ")[0] for line in sorted(data.skipped)] == ["dog/dead.png", "emu/loop.png"]
    with pytest.raises(ValueError, match="with strict every image must decode, got (dog/dead|emu/loop).png"):
        load_images(tmp_path, strict=True)


def test_the_names_of_images(tmp_path):
    """Every extension that the documentation lists is read, and no other."""
    text = (Path(__file__).parent.parent / "docs" / "data.md").read_text()
    sentence = text[text.index("An image is a file that is called") : text.index(", in upper or lower case")]
    listed = re.findall(r"`([.][a-z]+)`", sentence)
    assert set(listed) == decode.EXTENSIONS and ".jfif" in listed
    _write_folder(tmp_path)
    for number, suffix in enumerate([*listed, ".JFIF", ".heic", ""]):
        (tmp_path / "cat" / f"x{number}{suffix}").write_bytes((tmp_path / "cat" / "0.png").read_bytes())
    data = load_images(tmp_path, strict=True)
    assert len(data.train_labels) + len(data.test_labels) == 15 + len(listed) + 1


def test_palettes_without_colour_are_grey(tmp_path):
    levels = RNG.integers(0, 256, (10, 12), np.uint8)
    grey = Image.fromarray(levels).convert("RGB").quantize(16)
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.fromarray(levels).save(tmp_path / name / "0.gif")  # with a palette, since not every level occurs
        for suffix in ("gif", "png", "bmp", "tif"):
            grey.save(tmp_path / name / f"1.{suffix}")
    with Image.open(tmp_path / "cat" / "0.gif") as image:
        assert image.mode == "P"
    data = load_images(tmp_path, strict=True)
    assert data.channels == 1
    stored = {np.asarray(grey.convert("L")).tobytes(), levels.tobytes()}
    assert {image.tobytes() for image in np.concatenate([data.train_images, data.test_images])} == stored
    Image.fromarray(RNG.integers(0, 256, (10, 12, 3), np.uint8)).quantize(16).save(tmp_path / "dog" / "1.gif")
    assert load_images(tmp_path).channels == 3


def test_folder_errors(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="nowhere, which does not exist"):
        load_images(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="which holds nothing"):
        load_images(tmp_path / "empty")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="which holds none of them"):
        load_images(tmp_path / "text")
    with pytest.raises(ValueError, match="expected a folder, .tar shards or an .npz file, got the file"):
        load_images(tmp_path / "text" / "a.txt")
    (tmp_path / "bad.npz").write_bytes(b"PK\3\4junk")
    with pytest.raises(ValueError, match="bad.npz: expected a readable .npz"):
        load_images(tmp_path / "bad.npz")
    _write_folder(tmp_path / "lone" / "train")
    with pytest.raises(FileNotFoundError, match="got neither"):
        load_images(tmp_path / "lone")
    _write_folder(tmp_path / "lone" / "val")
    (tmp_path / "lone" / "val" / "yak").mkdir()
    with pytest.raises(ValueError, match="got 'yak' only there"):
        load_images(tmp_path / "lone")

    def deny(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", deny)
    with pytest.raises(OSError, match="the folder .*empty cannot be read: Permission denied"):
        load_images(tmp_path / "empty")


def test_hidden_files_and_folders_hold_no_images(tmp_path):
    _write_folder(tmp_path, 5)
    for place in ("cat/.ipynb_checkpoints/0-checkpoint.png", "dog/deep/.thumbnails/0.png", "__MACOSX/dog/0.png"):
        (tmp_path / place).parent.mkdir(parents=True)
        Image.new("RGB", (12, 10)).save(tmp_path / place)
    for place in ("cat/._0.png", "dog/deep/._1.png", "emu/.0.png"):  # of macOS: no images, whatever their names say
        (tmp_path / place).write_bytes(b"\0\5\x16\7")
    data = load_images(tmp_path, strict=True)
    assert data.classes == ["cat", "dog", "emu"] and len(data.train_labels) + len(data.test_labels) == 15
    loaders = [image_loader(tmp_path, part, batch_size=1, image_size=8, strict=True) for part in ("train", "test")]
    assert [len(loader) for loader in loaders] == [12, 3] and loaders[0].classes == data.classes


@pytest.mark.parametrize(
    "train, test",
    [("Train", "Test"), ("training", "testing"), ("TRAIN", "Validation"), ("train", "Testing"), ("Training", "VALID")],
)
def test_the_folders_of_the_parts_under_their_other_names(tmp_path, train, test):
    _write_folder(tmp_path / train)
    _write_folder(tmp_path / test, 2)
    data = load_images(tmp_path)
    assert data.classes == ["cat", "dog", "emu"]
    assert len(data.train_labels) == 15 and len(data.test_labels) == 6
    loader = image_loader(tmp_path, "test", batch_size=6, image_size=8, num_workers=0)
    assert loader.classes == data.classes and len(loader.dataset) == 6


def test_folders_of_parts_and_of_classes_are_not_mixed(tmp_path):
    _write_folder(tmp_path)
    (tmp_path / "test").mkdir()
    for read in (load_images, lambda path: image_loader(path, batch_size=1)):
        with pytest.raises(
            ValueError, match=r"other names than the parts' \(train, .*\), got cat/, dog/, emu/, test/$"
        ):
            read(tmp_path)
    (tmp_path / "test").rename(tmp_path / "Train")
    with pytest.raises(FileNotFoundError, match="expected .*val or .*test beside .*Train, got neither"):
        load_images(tmp_path)
    _write_folder(tmp_path / "Test")
    _write_folder(tmp_path / "Train" / "deep")
    for name in ("cat", "dog", "emu"):
        (tmp_path / "Train" / "deep" / name).rename(tmp_path / "Train" / name)
    (tmp_path / "Train" / "deep").rmdir()
    with pytest.raises(ValueError, match="the folders of the classes in .*Train alone, got .*cat, too$"):
        load_images(tmp_path)
    _write_folder(tmp_path / "whole" / "training")
    _write_folder(tmp_path / "whole" / "testing")
    _write_folder(tmp_path / "whole" / "archive")  # of any other name
    assert len(load_images(tmp_path / "whole").train_labels) == 15
    (tmp_path / "whole" / "Test").mkdir()
    with pytest.raises(ValueError, match="expected one folder of the test part in .*, got Test/ and testing/$"):
        load_images(tmp_path / "whole")


@pytest.mark.parametrize("output", ["runs/train", "runs"])
@pytest.mark.parametrize("parts", [False, True])
def test_results_in_the_folder_of_the_images_are_no_class(tmp_path, output, parts):
    """csg-ext train --data . writes there by default; a second run, --resume and evaluate see the same images."""
    for part in ("train", "val") if parts else (".",):
        _write_folder(tmp_path / part)
    before = load_images(tmp_path)
    results = tmp_path / ("train" if parts else ".") / output
    (results / "csg").mkdir(parents=True)
    (results / "run.json").write_text("{}")
    Image.new("RGB", (80, 60)).save(results / "gate.png")
    data = load_images(tmp_path, strict=True)
    assert data.classes == ["cat", "dog", "emu"] and data.fingerprint() == before.fingerprint()
    assert data.skipped == [f"{'train/' if parts else ''}runs: results of csg-ext train, no class"]
    with pytest.warns(UserWarning, match="1 left out while indexing, first .*: results of csg-ext train, no class"):
        assert image_loader(tmp_path, batch_size=1, num_workers=0).classes == data.classes
    for path in (tmp_path / "val" if parts else tmp_path).glob("dog/*"):
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match="no image of class 'dog' in .* the first failure is: .*dog/[0-4].png: "):
        load_images(tmp_path)


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


@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_the_memory_limit_and_the_test_share_are_checked_where_they_are_not_used(tmp_path, value):
    _write_folder(tmp_path / "train")
    _write_folder(tmp_path / "val")
    for path in (None, tmp_path):
        with pytest.raises(ValueError, match=rf"^data: memory_limit must be a number above 0 \(GiB\), got {value}$"):
            load_images(path, memory_limit=value)
        for read in (load_images, lambda path, **options: image_loader(path, batch_size=1, **options)):
            with pytest.raises(ValueError, match=rf"^data: test_share must lie in \(0, 1\), got {value}$"):
                read(path, test_share=value)


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


# ---- batches


def _toy_batches(**options) -> tuple[np.ndarray, Batches]:
    images = RNG.integers(0, 256, (50, 2, 9, 7), np.uint8)
    return images, Batches(images, np.arange(50), 8, mean=[0.4, 0.5], std=[0.2, 0.3], **options)


def test_batches_are_a_function_of_seed_and_step():
    _, a = _toy_batches(shift=2, flip=True)
    b = Batches(a.images.numpy(), a.labels.numpy(), 8, mean=[0.4, 0.5], std=[0.2, 0.3], shift=2, flip=True)
    forwards = [a[s] for s in range(14)]
    backwards = [b[s] for s in reversed(range(14))][::-1]
    for (x, y), (u, v) in zip(forwards, backwards, strict=True):
        assert torch.equal(x, u) and torch.equal(y, v)
    other = Batches(a.images.numpy(), a.labels.numpy(), 8, mean=[0.4, 0.5], std=[0.2, 0.3], shift=2, flip=True, seed=1)
    assert not torch.equal(forwards[0][1], other[0][1])


def test_an_epoch_shows_no_image_twice():
    _, batches = _toy_batches()
    assert len(batches) == 6
    epochs = [torch.cat([batches[6 * e + s][1] for s in range(6)]) for e in range(3)]
    for epoch in epochs:
        assert len(set(epoch.tolist())) == 48
    assert not torch.equal(epochs[0], epochs[1])


def test_augmentation_is_a_shift_and_a_flip_of_the_image():
    images, batches = _toy_batches(shift=2, flip=True)
    seen = set()
    for step in range(12):
        x, y = batches[step]
        assert x.is_contiguous(memory_format=torch.channels_last)
        for sample, index in zip(x, y, strict=True):
            image = np.pad(images[index], ((0, 0), (2, 2), (2, 2)))
            matches = []
            for flip in (False, True):
                for dy in range(5):
                    for dx in range(5):
                        # the mirrored image is shifted after mirroring
                        source = np.pad(images[index][:, :, ::-1], ((0, 0), (2, 2), (2, 2))) if flip else image
                        crop = source[:, dy : dy + 9, dx : dx + 7]
                        if torch.allclose(normalise(crop[None].copy(), [0.4, 0.5], [0.2, 0.3])[0], sample, atol=1e-5):
                            matches.append((flip, dy, dx))
            assert len(matches) == 1
            seen.add(matches[0])
    assert len({m[0] for m in seen}) == 2 and len({m[1] for m in seen}) == 5 and len({m[2] for m in seen}) == 5


def test_batches_without_augmentation_and_with_smaller_sizes():
    images, plain = _toy_batches()
    x, y = plain[0]
    assert torch.equal(x, normalise(images[y], [0.4, 0.5], [0.2, 0.3]))
    square = RNG.integers(0, 256, (16, 1, 8, 8), np.uint8)
    sized = Batches(square, np.zeros(16), 8, mean=[0], std=[1], sizes=[4, 8])
    x, _ = sized[0]
    assert x.shape == (8, 1, 4, 4) and sized[2][0].shape == (8, 1, 8, 8) and sized[9][0].shape == (8, 1, 8, 8)
    full = Batches(square, np.zeros(16), 8, mean=[0], std=[1])[0][0]
    assert torch.allclose(x, full.unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5)), atol=1e-6)


@pytest.mark.parametrize(
    "side, size, scaled",
    [
        ((24, 12), 16, (16, 8)),
        ((12, 24), 8, (8, 16)),
        ((24, 5), 16, (16, 4)),
        ((24, 3), 16, (16, 3)),  # narrower than that already
        ((8, 16), 12, (12, 24)),
        ((8, 8), 2, (2, 2)),
    ],
)
def test_smaller_sizes_keep_the_proportions(side, size, scaled):
    images = RNG.integers(0, 256, (8, 1, *side), np.uint8)
    low, full = (Batches(images, np.arange(8), 8, mean=[0], std=[1], sizes=s)[0][0] for s in ([size], None))
    assert low.shape[2:] == scaled
    if side == (24, 12):
        assert torch.equal(low, torch.nn.functional.interpolate(full, size=scaled, mode="area"))


def test_batch_size_is_checked():
    with pytest.raises(ValueError, match=r"batch_size must lie in \[1, 3\], the number of images, got 4"):
        Batches(np.zeros((3, 1, 2, 2), np.uint8), np.zeros(3), 4, mean=[0], std=[1])
