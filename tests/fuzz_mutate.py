"""Damaged and hostile variants of files: bytes changed anywhere, or inside their archive, which stays whole."""

from __future__ import annotations

import io
import json
import lzma
import random
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from typing import Any

NUMBERS = [0, 1, -1, 2, 7, 127, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, -(2**63), 2**64 - 1]
VALUES: list[Any] = [
    None, True, "", "0", "nan", "../../x", [], {}, [[]], {"a": 1}, 0, -1, 0.5, 1e400, -1e400, float("nan"), 2**70,
    "x" * 99,
]  # fmt: skip
TOKENS = [
    b"NaN", b"-Infinity", b"null", b"[" * 3000, b"{}", b"1" * 5000, b"1e999", b"\xff\xfe", b"\0" * 16, b"../../../x",
    b"\x93NUMPY", b"PK\x03\x04", b"'|O'", b"'descr': '<f8'", b"(999999999999,)", b"F64", b"I64", b"cos\nsystem\n",
]  # fmt: skip


def flip(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """One to four changes of bytes."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        place = rng.randrange(len(changed) + 1)
        if rng.random() < 0.5:  # headers are where it matters
            place = min(place, rng.randrange(1, 129))
        size = rng.choice([1, 1, 2, 4, 8, 64])
        match rng.randrange(8):
            case 0 if changed:
                changed[place % len(changed)] ^= 1 << rng.randrange(8)
            case 1:
                changed[place : place + 1] = bytes([rng.choice([0, 1, 32, 48, 127, 128, 255, rng.randrange(256)])])
            case 2:
                width, order = rng.choice([1, 2, 4, 8]), rng.choice(["little", "big"])
                number = rng.choice(NUMBERS) % 2 ** (8 * width)
                changed[place : place + width] = number.to_bytes(width, order)  # type: ignore[arg-type]
            case 3:
                del changed[place : place + size]
            case 4:
                changed[place:place] = changed[rng.randrange(len(changed) + 1) :][:size]
            case 5:
                changed[place : place + rng.choice([0, size])] = rng.choice(TOKENS)
            case 6:
                del changed[place:]
            case _:
                other = rng.choice(others) if others else data
                changed[place:] = other[rng.randrange(len(other) + 1) :]
    return bytes(changed)


def change_value(value: Any, rng: random.Random) -> Any:
    """A value of JSON with one of its parts replaced, left out or repeated."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value, key=str))
        match rng.randrange(8):
            case 0:
                return {k: v for k, v in value.items() if k != key}
            case 1:
                return value | {rng.choice(["x", "", "__class__", "epochs"]): rng.choice(VALUES)}
            case _:
                return value | {key: change_value(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        place = rng.randrange(len(value))
        match rng.randrange(4):
            case 0:
                return value[:place] + value[place + 1 :]
            case 1:
                return value + value[place:]
            case _:
                return [*value[:place], change_value(value[place], rng), *value[place + 1 :]]
    if isinstance(value, int | float) and not isinstance(value, bool) and rng.random() < 0.5:
        return rng.choice([*NUMBERS, value + 0.5, -value, str(value), [value]])
    return rng.choice(VALUES)


def change_json(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """Other values in a JSON document."""
    return json.dumps(change_value(json.loads(data), rng)).encode()


def change_zip(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """A zip archive with one member changed: its content (the sum is right), its name, or left out or doubled."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(info.filename, archive.read(info), info.compress_type) for info in archive.infolist()]
    place, changed = rng.randrange(len(members)), io.BytesIO()
    name, content, packed = members[place]
    match rng.randrange(10):
        case 0:
            members.pop(place)
        case 1:
            members.append(members[place])
        case 2:
            members[place] = (rng.choice(["../../x.npy", "/x.npy", "x", name + "/", name.upper()]), content, packed)
        case 3:
            members[place] = (name, content, zipfile.ZIP_DEFLATED + zipfile.ZIP_STORED - packed)
        case _:
            members[place] = (name, flip(content, rng, [m[1] for m in members]), packed)
    with zipfile.ZipFile(changed, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of two members with one name
        for name, content, packed in members:
            archive.writestr(name, content, packed)
    return changed.getvalue()


def change_tar(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """A tar archive with one member changed, or with one header whose sum is right."""
    if rng.random() < 0.5:
        blocks = [i for i in range(0, len(data), 512) if data[i + 257 : i + 262] == b"ustar"]
        at = rng.choice(blocks)
        header = bytearray(flip(data[at : at + 512], rng, []).ljust(512, b"\0")[:512])
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        return data[:at] + bytes(header) + data[at + 512 :]
    changed = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(data)) as archive, tarfile.open(fileobj=changed, mode="w") as out:
        members = archive.getmembers()
        place = rng.randrange(len(members))
        for i, member in enumerate(members):
            stored = archive.extractfile(member)
            content = stored.read() if stored is not None else b""
            if i == place:
                match rng.randrange(6):
                    case 0:
                        continue
                    case 1:
                        member.name = rng.choice(["../../x.png", "/x.png", "x" * 200 + ".png", "a.b.c", "\udcff.png"])
                    case 2:
                        member.type = rng.choice([tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
                        member.linkname = "../../x"
                    case _:
                        content = flip(content, rng, [])
            member.size = len(content)
            out.addfile(member, io.BytesIO(content))
    return changed.getvalue()


def change_safetensors(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """A .safetensors file with another header, whose length is right."""
    size = int.from_bytes(data[:8], "little")
    header = change_json(data[8 : 8 + size], rng, others)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def mutate(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """A variant of a file; others: more of its kind, to take parts of."""
    change = flip
    if rng.random() < 0.6:
        if data[:4] == b"PK\x03\x04":
            change = change_zip
        elif data[257:262] == b"ustar":
            change = change_tar
        elif data[:1] in (b"{", b"["):
            change = change_json
        elif data[8:9] == b"{":
            change = change_safetensors
    try:
        return change(data, rng, others)
    except (ValueError, OSError, KeyError, IndexError, EOFError, RuntimeError, zlib.error, lzma.LZMAError,
            zipfile.BadZipFile, tarfile.TarError):  # fmt: skip
        return flip(data, rng, others)  # it is damaged already
