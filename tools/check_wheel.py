"""Is a wheel of csg_ext fit to be given away? Its members, size, libraries, paths, bill of materials.

    python tools/check_wheel.py WHEEL [--cuda]

Every finding is printed; the exit status is 1 where there is one. Needs requirements/release.txt and readelf.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import io
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

LARGEST = {False: 10e6, True: 40e6}  # bytes, without and with CUDA kernels
MEMBERS = re.compile(
    r"csg_ext/([a-z_0-9]+/)*[a-z_0-9]+\.py|csg_ext/(_bind\.pyi|py\.typed)|csg_ext/data/fashion_mnist_14k\.(npz|txt)"
    r"|csg_ext/report/(template\.html|style\.css|page\.js)|csg_ext/(_C|_cuda|_bind\.[\w-]+)\.so"
    r"|csg_ext-[\w.]+\.dist-info/(METADATA|WHEEL|RECORD|entry_points\.txt|top_level\.txt|licenses/LICENSE"
    r"|sboms/[\w.-]+\.cdx\.json)"
)
SYSTEM = {"libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1"}
SYSTEM |= {"ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
LINKS = {"_C": {"libtorch_cpu.so"}, "_cuda": {"libtorch_cpu.so", "libtorch_cuda.so"}, "_bind": set()}
PRIVATE = re.compile(rb"/(?:home|root|tmp|work|build|opt|usr/local|Users|github)/[\w./-]{3,}")


def findings(wheel: Path, cuda: bool) -> list[str]:
    """What is wrong with the wheel, a sentence each."""
    found = []
    size = wheel.stat().st_size
    if size > LARGEST[cuda]:
        found.append(f"the wheel must have at most {LARGEST[cuda] / 1e6:.0f} MB, got {size / 1e6:.1f} MB")
    if not re.search(r"-cp3\d+-cp3\d+-(manylinux_\d+_\d+_\w+\.?)+\.whl$", wheel.name):
        found.append(f"the name must carry one Python and manylinux, got {wheel.name}")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        found += [f"{name} does not belong in the wheel" for name in names if not MEMBERS.fullmatch(name)]
        found += _record(archive, names)
        libraries = {Path(name).name.split(".")[0]: name for name in names if name.endswith(".so")}
        expected = {"_C", "_bind"} | ({"_cuda"} if cuda else set())
        if set(libraries) != expected:
            found.append(f"the libraries must be {sorted(expected)}, got {sorted(libraries)}")
        for stem, name in libraries.items():
            found += _library(stem, name, archive.read(name))
        sboms = [name for name in names if name.endswith("/csg-ext.cdx.json")]
        if len(sboms) != 1:
            found.append(f"there must be one csg-ext.cdx.json, got {len(sboms)}")
        found += [sentence for name in sboms for sentence in _sbom(name, archive.read(name).decode())]
    return found


def _sbom(name: str, text: str) -> list[str]:
    """Whether a bill of materials follows its schema."""
    from cyclonedx.schema import SchemaVersion  # the release environment has it
    from cyclonedx.validation.json import JsonStrictValidator

    error = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    return [] if error is None else [f"{name} is no CycloneDX 1.6: {error}"]


def _record(archive: zipfile.ZipFile, names: list[str]) -> list[str]:
    """RECORD names every member, with its hash."""
    (record,) = (name for name in names if name.endswith(".dist-info/RECORD"))
    rows = {row[0]: row[1] for row in csv.reader(io.StringIO(archive.read(record).decode()))}
    found = [f"RECORD and the archive differ in {name}" for name in sorted(set(rows) ^ set(names))]
    for name in set(rows) & set(names) - {record}:
        digest = base64.urlsafe_b64encode(hashlib.sha256(archive.read(name)).digest()).rstrip(b"=").decode()
        if rows[name] != f"sha256={digest}":
            found.append(f"RECORD has another hash for {name}")
    return found


def _library(stem: str, name: str, content: bytes) -> list[str]:
    """What a library links against, where it looks for it, and whether it tells about the machine that built it."""
    with tempfile.NamedTemporaryFile(suffix=".so") as file:
        file.write(content)
        file.flush()
        dynamic = subprocess.run(["readelf", "-dW", file.name], capture_output=True, text=True, check=True).stdout
        sections = subprocess.run(["readelf", "-SW", file.name], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic))
    found = [f"{name} links against {library}" for library in sorted(needed - SYSTEM - LINKS[stem])]
    found += [f"{name} lacks its link to {library}" for library in sorted(LINKS[stem] - needed)]
    found += [f"{name} has a search path: {path}" for path in re.findall(r"\((?:RPATH|RUNPATH)\).*\[(.*)\]", dynamic)]
    if ".symtab" in sections or ".debug_info" in sections:
        found.append(f"{name} is not stripped")
    return found + [f"{name} holds the path {path.decode()}" for path in sorted(set(PRIVATE.findall(content)))]


def check(wheel: Path, cuda: bool) -> None:
    """Ends with the findings where there are any."""
    found = findings(wheel, cuda)
    if found:
        sys.exit("\n".join(f"check_wheel: {sentence}." for sentence in found))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, metavar="WHEEL")
    parser.add_argument("--cuda", action="store_true", help="it should hold the CUDA kernels")
    arguments = parser.parse_args()
    check(arguments.wheel, arguments.cuda)
    print(f"{arguments.wheel.name}: nothing to object")
