"""Tests of folders of images: parts and classes, sizes, names, what does not decode, what does not belong."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from csg_ext.data import decode, image_loader, load_images

RNG = np.random.default_rng(7)


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
    assert data.test_names == [f"val/{name}/{i}.png" for name in data.classes for i in range(2)]
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
    (tmp_path / "text" / "a.PNG").write_bytes(b"")
    with pytest.raises(ValueError, match="which holds images but no folders: every class needs a folder of its own"):
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
