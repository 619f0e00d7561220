"""What tools/check_wheel.py finds in a wheel that should not be given away, on small wheels made here."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import subprocess
import zipfile

import check_wheel
import pytest

INFO = "csg_ext-0.1.0.dist-info"
NAME = "csg_ext-0.1.0-cp311-cp311-manylinux_2_34_x86_64.whl"


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Compiles a shared library and returns its bytes."""
    folder = tmp_path_factory.mktemp("library")

    def make(*links, text="", options=("-s",)):
        stubs = []
        for link in links:  # an empty library of that name, to link against
            subprocess.run(
                ["cc", "-shared", f"-Wl,-soname,{link}", "-xc", "/dev/null", "-o", folder / link], check=True
            )
            stubs.append(f"-l:{link}")
        source = folder / "source.c"
        source.write_text(f'const char* const kText = "{text}";\n')
        command = ["cc", "-shared", "-fPIC", source, "-o", folder / "out.so", f"-L{folder}", "-Wl,--no-as-needed"]
        subprocess.run([*command, *stubs, *options], check=True)
        return (folder / "out.so").read_bytes()

    return make


@pytest.fixture
def wheel(tmp_path, library, monkeypatch):
    """Writes a wheel: a good one with changes; {name: None} leaves a member out."""
    monkeypatch.setattr(check_wheel, "_sbom", lambda name, text: [] if text == "good" else [f"{name} is bad"])
    good = {
        "csg_ext/__init__.py": b"",
        "csg_ext/_C.so": library("libtorch_cpu.so"),
        "csg_ext/_bind.cpython-311-x86_64-linux-gnu.so": library(),
        f"{INFO}/METADATA": b"",
        f"{INFO}/sboms/csg-ext.cdx.json": b"good",
    }

    def write(changes=None, name=NAME, record=lambda rows: rows):
        members = {key: value for key, value in {**good, **(changes or {})}.items() if value is not None}
        rows = [[key, f"sha256={_digest(value)}", str(len(value))] for key, value in members.items()]
        text = io.StringIO()
        csv.writer(text).writerows(record([*rows, [f"{INFO}/RECORD", "", ""]]))
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for key, value in members.items():
                archive.writestr(key, value)
            archive.writestr(f"{INFO}/RECORD", text.getvalue())
        return tmp_path / name

    return write


def _digest(content):
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def test_a_good_wheel_passes(wheel):
    assert check_wheel.findings(wheel(), cuda=False) == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"csg_ext/notes.txt": b""}, "csg_ext/notes.txt does not belong in the wheel"),
        ({"tests/test_nn.py": b""}, "tests/test_nn.py does not belong in the wheel"),
        ({"csg_ext/_C.so": None}, "the libraries must be ['_C', '_bind'], got ['_bind']"),
        ({f"{INFO}/sboms/csg-ext.cdx.json": None}, "there must be one csg-ext.cdx.json, got 0"),
        ({f"{INFO}/sboms/csg-ext.cdx.json": b"no"}, f"{INFO}/sboms/csg-ext.cdx.json is bad"),
    ],
)
def test_members(wheel, changes, sentence):
    assert check_wheel.findings(wheel(changes), cuda=False) == [sentence]


@pytest.mark.parametrize(
    ("links", "text", "options", "sentence"),
    [
        (["libtorch_cpu.so", "libprivate.so.3"], "", ["-s"], "csg_ext/_C.so links against libprivate.so.3"),
        ([], "", ["-s"], "csg_ext/_C.so lacks its link to libtorch_cpu.so"),
        (["libtorch_cpu.so"], "", ["-s", "-Wl,-rpath,/lib/x"], "csg_ext/_C.so has a search path: /lib/x"),
        (["libtorch_cpu.so"], "", [], "csg_ext/_C.so is not stripped"),
        (["libtorch_cpu.so"], "/home/me/csrc/a.h", ["-s"], "csg_ext/_C.so holds the path /home/me/csrc/a.h"),
    ],
)
def test_libraries(wheel, library, links, text, options, sentence):
    content = library(*links, text=text, options=options)
    assert check_wheel.findings(wheel({"csg_ext/_C.so": content}), cuda=False) == [sentence]


def test_a_wheel_without_the_cuda_kernels_that_it_should_have(wheel):
    assert "the libraries must be ['_C', '_bind', '_cuda'], got ['_C', '_bind']" in check_wheel.findings(
        wheel(), cuda=True
    )


def test_size_and_tag(wheel, monkeypatch):
    monkeypatch.setitem(check_wheel.LARGEST, False, 100)
    found = check_wheel.findings(wheel(name="csg_ext-0.1.0-cp311-cp311-linux_x86_64.whl"), cuda=False)
    assert [sentence.partition(",")[0] for sentence in found] == [
        "the wheel must have at most 0 MB",
        "the name must carry one Python and manylinux",
    ]


def test_record(wheel):
    def forge(rows):
        rows[0][1] = "sha256=" + _digest(b"other")
        return [row for row in rows if row[0] != f"{INFO}/METADATA"]

    assert sorted(check_wheel.findings(wheel(record=forge), cuda=False)) == [
        f"RECORD and the archive differ in {INFO}/METADATA",
        "RECORD has another hash for csg_ext/__init__.py",
    ]
