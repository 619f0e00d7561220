"""Tests of the reader of WebDataset shards: against the webdataset library, and on damaged and hostile archives."""

from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from csg_ext.data import image_loader, load_images
from csg_ext.data.images import find_images

RNG = np.random.default_rng()


def _png(mode: str = "RGB") -> bytes:
    shape = (9, 11) if mode == "L" else (9, 11, 3)
    buffer = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, shape, np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def _write(path: Path, count: int, first: int = 0, classes: int = 3) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as writer:
        for number in range(first, first + count):
            writer.write({"__key__": f"a/{number:05d}", "png": _png(), "cls": number % classes})


def _tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def _library(shards: list[Path]) -> dict[str, tuple[np.ndarray, int]]:
    samples = webdataset.WebDataset([str(s) for s in shards], shardshuffle=False).decode("rgb8")
    return {s["__key__"]: (s["png"].transpose(2, 0, 1), s["cls"]) for s in samples}


@pytest.mark.parametrize(
    "pattern",
    [
        "train/{}.tar|val/{}.tar",
        "set-train-{}.tar|set-test-{}.tar",
        "Training/{}.tar|Testing/{}.tar",
        "Train-{}.tar|testing-{}.tar",
    ],
)
def test_shards_hold_what_the_library_reads(tmp_path, pattern):
    train, test = pattern.split("|")
    for number in range(3):
        _write(tmp_path / train.format(number), 7, 7 * number)
    _write(tmp_path / test.format(0), 6, 100)
    data = load_images(tmp_path)
    expected = _library(sorted(tmp_path.glob(train.format("*"))))
    assert len(data.train_labels) == len(expected) == 21 and not data.skipped
    for image, label, (pixels, number) in zip(data.train_images, data.train_labels, expected.values(), strict=True):
        assert np.array_equal(image, pixels) and label == number
    expected = _library([tmp_path / test.format(0)])
    assert all(np.array_equal(a, b) for a, (b, _) in zip(data.test_images, expected.values(), strict=True))
    assert data.classes == ["0", "1", "2"]


def test_one_shard_and_braces_are_split_alike_however_the_samples_are_sharded(tmp_path):
    members = [
        (f"{i:03d}.{suffix}", b) for i in range(30) for suffix, b in (("png", _png("L")), ("cls", b"%d" % (i % 2)))
    ]
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    one = _tar(tmp_path / "one" / "x.tar", members)
    for number in range(3):
        _tar(tmp_path / "many" / f"x-{number}.tar", members[20 * number : 20 * number + 20])
    a, b, c = (load_images(p) for p in (one, f"{tmp_path}/many/x-{{0..2}}.tar", tmp_path / "many"))
    assert a.fingerprint() == b.fingerprint() == c.fingerprint() and a.channels == 1
    assert np.bincount(a.test_labels).tolist() == [3, 3]
    with pytest.raises(ValueError, match=r"a brace for every other one in the names of shards, got '.*x-\{0..2.tar'"):
        load_images(f"{tmp_path}/many/x-{{0..2.tar")
    part = load_images(f"{tmp_path}/many/x-{{0..1}}.tar")
    assert len(part.train_labels) + len(part.test_labels) == 20


@pytest.mark.parametrize(
    "labels, listed, classes",
    [
        ([("cls", b"7"), ("cls", b"5\n")], None, ["5", "7"]),
        ([("cls", b"dog"), ("cls", b"cat")], None, ["cat", "dog"]),
        ([("json", b"1"), ("json", b'{"label": 0, "other": [1]}')], ["cat", "dog"], ["cat", "dog"]),
        ([("json", b'"dog"'), ("json", b'{"label": "cat"}')], {"dog": 1, "cat": 0}, ["cat", "dog"]),
        ([("cls", b"1"), ("cls", b"cat")], ["cat", "dog"], ["cat", "dog"]),
        ([("cls", b"\xef\xbb\xbfdog"), ("json", b'\xef\xbb\xbf"cat"')], None, ["cat", "dog"]),
        ([("cls", b"\xef\xbb\xbf1"), ("cls", b"0")], None, ["0", "1"]),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_labels_and_class_names(tmp_path, labels, listed, classes, encoding):
    """The first sample is of the later class in every case."""
    for part in ("train", "val"):
        _tar(
            tmp_path / f"{part}.tar",
            [m for i, x in enumerate(labels) for m in ((f"{i}.png", _png()), (f"{i}.{x[0]}", x[1]))],
        )
    if listed is not None:
        (tmp_path / "classes.json").write_text(json.dumps(listed), encoding=encoding)
    data = load_images(tmp_path)
    assert data.classes == classes and data.train_labels.tolist() == [1, 0]


@pytest.mark.parametrize("text", [b"3", b"003"])
def test_digits_that_are_a_number_and_the_name_of_another_class_are_refused(tmp_path, text):
    """The names of two classes, in the other order than their numbers."""
    names = ["4", text.decode(), "2", "1", "0"]
    for part in ("train", "val"):
        _tar(tmp_path / f"{part}.tar", [("a.png", _png()), ("a.cls", b"2"), ("b.png", _png()), ("b.cls", text)])
    (tmp_path / "classes.json").write_text(json.dumps(names))
    got = f"got '{text.decode()}', which is the number of class '1' and the name of class number 1 in classes.json"
    for read in (load_images, lambda path: image_loader(path, batch_size=1)):
        with pytest.raises(ValueError, match=f"^data: train.tar: b: expected a label that means one class.*{got}$"):
            read(tmp_path)


@pytest.mark.parametrize(
    "listed, text, content, agree",
    [
        (None, b"1", b'{"label": 1}', True),
        (None, b"1", b'{"width": 11}', True),  # no label
        (None, b"1", b'"dog"', True),  # nothing says what the number of "dog" is
        (["cat", "dog"], b"1", b'"dog"', True),
        (["cat", "dog"], b"1", b'"cat"', False),
        (["cat", "dog"], b"dog", b"0", False),
        (["cat", "dog"], b"dog", b'{"label": "cat"}', False),
    ],
)
def test_two_labels_of_a_sample_must_agree(tmp_path, listed, text, content, agree):
    other = [("b.png", _png()), ("b.cls", b"0")]
    for part in ("train", "val"):
        _tar(tmp_path / f"{part}.tar", [("a.png", _png()), ("a.json", content), ("a.cls", text), *other])
    if listed is not None:
        (tmp_path / "classes.json").write_text(json.dumps(listed))
    if agree:
        assert load_images(tmp_path, strict=True).train_labels.tolist() == [1, 0]
    else:
        with pytest.raises(ValueError, match="^data: train.tar: a: expected one label in .cls and .json, got .* and "):
            load_images(tmp_path)


def test_keys_of_two_shards_are_two_images(tmp_path):
    for name in ("train-0", "train-1", "val-0"):
        _write(tmp_path / f"{name}.tar", 6)
    assert len(load_images(tmp_path, strict=True).train_labels) == 12


def test_digits_that_mean_one_class_are_read(tmp_path):
    """A number that is its own name, and in .json numbers and names, which differ in their type."""
    labels = [("cls", b"2"), ("json", b"1"), ("json", b'"3"'), ("json", b'{"label": 3}'), ("json", b"0"), ("cls", b"5")]
    for part in ("train", "val"):
        files = [m for i, x in enumerate(labels) for m in ((f"{i}.png", _png()), (f"{i}.{x[0]}", x[1]))]
        _tar(tmp_path / f"{part}.tar", files)
    (tmp_path / "classes.json").write_text('["0", "3", "2", "1", "40", "6"]')
    index = find_images(tmp_path)
    assert index.parts["train"].labels.tolist() == [2, 1, 1, 3, 0, 5] and not index.skipped


@pytest.mark.parametrize("listed", ["{", "[1, 2]", '["a", "a"]', '{"a": 0, "b": 2}'])
def test_class_names_that_are_none(tmp_path, listed):
    _write(tmp_path / "x.tar", 6, classes=2)
    (tmp_path / "classes.json").write_text(listed)
    with pytest.raises(ValueError, match=r"classes.json: expected "):
        load_images(tmp_path)


def test_an_empty_class_is_named(tmp_path):
    _write(tmp_path / "train.tar", 9, classes=3)
    _write(tmp_path / "val.tar", 9, classes=2)
    with pytest.raises(ValueError, match="every class in the val part of .*, got none in class '2'"):
        load_images(tmp_path)
    (tmp_path / "classes.json").write_text('["ant", "bee", "cat", "dog"]')
    with pytest.raises(ValueError, match="every class in the train part of .*, got none in class 'dog'"):
        load_images(tmp_path)
    with pytest.raises(ValueError, match="every class in the train part of .*, got none in class 'dog'"):
        image_loader(tmp_path, batch_size=2)
    assert load_images(tmp_path, classes=["bee", "ant"]).classes == ["bee", "ant"]


# ---- damage


@pytest.mark.parametrize("place", ["pixels", "header", "boundary", "label", "end marker"])
def test_a_truncated_shard_is_named_and_its_whole_samples_are_used(tmp_path, place):
    _write(tmp_path / "train-0.tar", 12)
    _write(tmp_path / "train-1.tar", 12, 12)
    _write(tmp_path / "val-0.tar", 6)
    victim = tmp_path / "train-1.tar"
    with tarfile.open(victim) as archive:
        names = {m.name: m for m in archive.getmembers()}
        image, label, last = names["a/00018.png"], names["a/00018.cls"], names["a/00023.png"]
    end = max(m.offset_data + -(-m.size // 512) * 512 for m in names.values())
    cut = {
        "pixels": image.offset_data + image.size // 2,
        "header": image.offset + 100,
        "boundary": image.offset,
        "label": label.offset_data,
        "end marker": end,
    }[place]
    victim.write_bytes(victim.read_bytes()[:cut])
    data = load_images(tmp_path)
    assert last.offset > image.offset
    assert len(data.train_labels) == (24 if place == "end marker" else 18)
    assert data.skipped[0].startswith("train-1.tar: truncated")
    with pytest.raises(ValueError, match="with strict every shard and image must be whole, got train-1.tar: truncated"):
        load_images(tmp_path, strict=True)


def test_a_damaged_header_and_a_file_that_is_no_tar_are_named(tmp_path):
    for number in range(3):
        _write(tmp_path / f"train-{number}.tar", 6, 6 * number)
    _write(tmp_path / "val.tar", 6)
    with tarfile.open(tmp_path / "train-1.tar") as archive:
        offset = [m.offset for m in archive.getmembers() if m.name == "a/00009.cls"][0]
    raw = bytearray((tmp_path / "train-1.tar").read_bytes())
    raw[offset : offset + 512] = bytes(RNG.integers(1, 256, 512, np.uint8))
    (tmp_path / "train-1.tar").write_bytes(raw)
    (tmp_path / "train-2.tar").write_bytes(b"\x1f\x8b" + bytes(2000))
    index = find_images(tmp_path)
    assert len(index.parts["train"]) == 9
    assert any("train-1.tar: truncated or damaged after 'a/00008.png'" in line for line in index.skipped)
    assert any(line.startswith("train-2.tar: no tar file") for line in index.skipped)


@pytest.mark.parametrize(
    "members, reason",
    [
        ([("1.png", None)], "expected a .cls or .json with the label beside the image, got neither"),
        ([("1.png", None), ("1.json", b"{")], "expected JSON in '1.json', got '{'"),
        ([("1.png", None), ("1.json", b'{"label": -1}')], "expected a class number or name in '1.json'"),
        ([("1.png", None), ("1.json", b"true")], "expected a class number or name in '1.json'"),
        ([("1.png", None), ("1.json", b"[" * 99999)], "expected JSON in '1.json'"),
        ([("1.png", None), ("1.cls", b"")], "expected a class number or name in '1.cls', got ''"),
        ([("1.cls", b"1")], "a label without an image"),
    ],
)
def test_samples_that_cannot_be_used_are_named(tmp_path, members, reason):
    good = [("8.png", _png()), ("8.cls", b"0"), ("9.png", _png()), ("9.cls", b"1")]
    _tar(tmp_path / "train.tar", [(n, _png() if c is None else c) for n, c in members] + good)
    _tar(tmp_path / "val.tar", good)
    data = load_images(tmp_path)
    assert len(data.train_labels) == 2 and len(data.skipped) == 1
    assert data.skipped[0].startswith("train.tar: 1") and reason in data.skipped[0]
    with pytest.raises(ValueError, match=f"must be whole, got train.tar: 1.*{re.escape(reason)}"):
        load_images(tmp_path, strict=True)


@pytest.mark.parametrize(
    "members, message",
    [
        (
            [("a.b.png", None), ("a.c.png", None)],
            "expected one image per key, which ends at the first dot, got b.png, c.png",
        ),
        (
            [("a.png", None), ("a.PNG", None)],
            "^data: x.tar: expected one member per key and extension, got a second 'a.PNG'$",
        ),
        (
            [("a.png", None), ("a.cls", b"0"), ("b.png", None), ("b.cls", b"1"), ("a.jpg", None), ("a.cls", b"0")],
            "^data: x.tar: a: expected one image per key, got a second one in 'a.jpg'$",
        ),
        (
            [("a.png", None), ("a.cls", b"0"), ("a.json", b'{"label": 1}')],
            "^data: x.tar: a: expected one label in .cls and .json, got 0 and 1$",
        ),
        (
            [("a.png", None), ("a.cls", b"0"), ("b.png", None), ("b.cls", b"x")],
            "must be all numbers or all names, got both",
        ),
        ([("README", b"x")], "expected labelled images in the train shards of .*, got none$"),
        ([("a.png", None)], "got none; the first failure is: x.tar: a.png: expected a .cls"),
    ],
)
def test_shards_that_cannot_be_used(tmp_path, members, message):
    _tar(tmp_path / "x.tar", [(n, _png() if c is None else c) for n, c in members])
    with pytest.raises(ValueError, match=message):
        load_images(tmp_path)


def test_labels_outside_the_classes(tmp_path):
    _write(tmp_path / "train.tar", 6, classes=2)
    _write(tmp_path / "val.tar", 6, classes=3)
    with pytest.raises(ValueError, match="val.tar: a/00002.png: expected a label among 0, 1, got 2"):
        load_images(tmp_path)


# ---- hostile archives


def _member(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, link: str = "") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, link
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    "member, message",
    [
        (_member("../../evil.png"), r"must lie below the shard, got the path '../../evil.png'"),
        (_member("/etc/evil.png"), r"must lie below the shard, got the path '/etc/evil.png'"),
        (_member("a/../../evil.png"), r"must lie below the shard"),
        (_member("a.png", tarfile.SYMTYPE, link="/etc/passwd"), "got 'a.png', which is a symbolic link"),
        (_member("a.png", tarfile.LNKTYPE, link="x"), "which is a hard link"),
        (_member("a.png", tarfile.FIFOTYPE), "which is a pipe"),
        (_member("a.png", tarfile.CHRTYPE), "which is a device"),
        (_member("a.png", b"Z"), "which is of the type b'Z'"),
        (_member("a.png", size=-512), "must have a size of at least 0, got -512 for 'a.png'"),
        (
            _member("a.cls", size=2**21) + bytes(2**21),
            "a label must take at most 1048576 bytes, got 2097152 in 'a.cls'",
        ),
    ],
)
def test_hostile_members_are_refused_with_the_shards_name(tmp_path, member, message):
    _write(tmp_path / "x.tar", 6)
    whole = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(member + whole)
    with pytest.raises(ValueError, match=f"^data: {re.escape(str(tmp_path / 'x.tar'))}: .*{message}"):
        load_images(tmp_path)


def test_a_huge_member_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("csg_ext.data.shards._IMAGE_BYTES", 1000)
    noise = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (40, 40, 3), np.uint8)).save(noise, "png")
    _write(tmp_path / "val.tar", 6)
    small = [(f"{i}.{s}", b) for i in range(3) for s, b in (("png", _png()), ("cls", b"%d" % i))]
    _tar(tmp_path / "train.tar", [*small, ("8.png", noise.getvalue()), ("8.cls", b"0")])
    data = load_images(tmp_path)
    assert len(data.train_labels) == 3 and "exceed the 1000 that an image may take" in data.skipped[0]


# ---- paths


def test_paths_that_name_no_shards(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected the shard .*x-1.tar, which does not exist"):
        _write(tmp_path / "x-0.tar", 4)
        load_images(f"{tmp_path}/x-{{0..1}}.tar")
    with pytest.raises(ValueError, match="^data: shards must differ, got .*x-0.tar twice in '.*0,0}.tar'$"):
        load_images(f"{tmp_path}/x-{{0,0}}.tar")
    for path in ("pipe:cat x.tar", "https://example.org/x.tar"):
        with pytest.raises(ValueError, match="expected shards in the file system, got"):
            load_images(path)
    _write(tmp_path / "b" / "x-0.tar", 4)
    with pytest.raises(ValueError, match="shards must lie in one folder"):
        load_images(f"{tmp_path}/{{b/x-0,x-0}}.tar")
    _write(tmp_path / "c" / "train-0.tar", 4)
    _write(tmp_path / "c" / "more.tar", 4)
    with pytest.raises(ValueError, match="of every shard or of none, got more.tar beside train-0.tar"):
        load_images(tmp_path / "c")
    _write(tmp_path / "d" / "val-0.tar", 4)
    with pytest.raises(ValueError, match="expected shards of the train part in .*, got val alone"):
        load_images(tmp_path / "d")
    (tmp_path / "e" / "cat").mkdir(parents=True)
    (tmp_path / "e" / "cat" / "1.png").write_bytes(_png())
    _write(tmp_path / "e" / "x.tar", 4)
    with pytest.raises(ValueError, match="expected shards or folders of images, got .*x.tar and .*1.png"):
        load_images(tmp_path / "e")


def test_hidden_files_and_results_beside_shards_are_neither_shards_nor_images(tmp_path):
    _write(tmp_path / "x-0.tar", 12)
    (tmp_path / "._x-0.tar").write_bytes(b"\0\5\x16\7")
    for name in (".thumbnails/1.png", "__MACOSX/1.png", "notes/._1.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(_png())
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "run.json").write_text("{}")
    (tmp_path / "results" / "gate.png").write_bytes(_png())
    data = load_images(tmp_path, strict=True)
    assert len(data.train_labels) + len(data.test_labels) == 12


def test_without_the_library(tmp_path, monkeypatch, capsys):
    from csg_ext import cli

    _write(tmp_path / "x.tar", 6)
    monkeypatch.setitem(__import__("sys").modules, "webdataset.tariterators", None)
    assert cli.main(["train", "--data", str(tmp_path), "--output", str(tmp_path / "o")]) == 1
    assert "it needs webdataset" in capsys.readouterr().err
