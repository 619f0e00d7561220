"""docs/faq.md quotes what the package prints: each situation is made, and its text must stand there."""

from __future__ import annotations

import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch

import csg_ext
from build_support import backend, native, toolchain
from csg_ext import _extension, cli, info
from csg_ext.ops._errors import explained

FAQ = (Path(__file__).parents[1] / "docs" / "faq.md").read_text()
QUOTED = [line for block in re.findall(r"^```text\n(.*?)^```", FAQ, re.M | re.S) for line in block.splitlines()]
CUDA = torch.device("cuda", 0)


def quoted(text: str) -> str | None:
    """The line of the page that says `text`, where "..." stands for names and versions."""
    for line in sorted(QUOTED, key=len, reverse=True):  # the most particular first
        if re.fullmatch(".+".join(re.escape(part) for part in line.split("...")), text.strip()):
            return line
    return None


@pytest.fixture
def said(tmp_path, monkeypatch, capsys) -> list[str]:
    """What the package says in each situation that can be made here."""
    texts: list[str] = []

    def error(kind, function, *arguments):
        with pytest.raises(kind) as caught:
            function(*arguments)
        texts.append(str(caught.value).removeprefix("csg-ext: "))

    def extension(reason: str = "cannot import name '_bind'"):
        """Imports a copy of the module that loads the libraries, in a folder of its own."""
        shutil.copy(_extension.__file__, tmp_path / "_extension.py")
        with monkeypatch.context() as patch:
            patch.delattr(csg_ext, "_bind")
            patch.setattr(sys, "meta_path", [Refusing(reason), *sys.meta_path])
            patch.delitem(sys.modules, "csg_ext._bind")
            runpy.run_path(str(tmp_path / "_extension.py"))

    # import
    error(ImportError, extension)
    (tmp_path / "_bind.cpython-312-x86_64-linux-gnu.so").touch()
    error(ImportError, extension)
    error(ImportError, extension, "/lib/libstdc++.so.6: version `GLIBCXX_3.4.32' not found (required by /x/_bind.so)")
    monkeypatch.setattr(_extension, "_load", lambda name: f"/x/{name}: undefined symbol: aoti_torch_x")
    error(ImportError, _extension._load_cpu)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "2.9.1")
        error(ImportError, _extension._load_cpu)

    # CUDA is not used
    with monkeypatch.context() as patch:
        patch.setattr(torch.version, "cuda", None)
        texts.append(_extension._load_cuda())
        patch.setattr(torch.version, "cuda", "13.0")
        cuda13 = toolchain.Torch(Path("torch"), "2.13.0", "13.0")
        toolkit = toolchain.CudaToolkit(Path("/cuda"), "12.4", ("9.0",))
        for found, environ in ((None, {}), (toolkit, {}), (None, {"CSG_EXT_CUDA": "0"})):
            patch.setattr(toolchain, "find_cuda", lambda environ, found=found: found)
            reason = toolchain.choose_cuda(cuda13, environ)[1]
            patch.setattr(_extension, "BUILD", {**_extension.BUILD, "cuda": "", "cuda_left_out": reason})
            texts.append(_extension._load_cuda())
        error(
            toolchain.BuildError,
            toolchain.choose_cuda,
            toolchain.Torch(Path("torch"), "2.13.0", None),
            {"CSG_EXT_CUDA": "1"},
        )
        for version in ("12.8", "13.0"):
            patch.setattr(_extension, "BUILD", {**_extension.BUILD, "cuda": version})
            texts.append(_extension._load_cuda())
    with monkeypatch.context() as patch:
        patch.setattr(_extension, "CUDA_ERROR", None)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        texts.append(info.report().splitlines()[-1])
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla V100")
        patch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 0))
        texts.append(info.report().splitlines()[-1])

    # an operator on the GPU
    texts.append(str(explained(NotImplementedError("no kernel"), "gated_pool", CUDA)))
    for code in (209, 222):
        failure = RuntimeError(f"gated_pool: the CUDA kernel could not be launched (cudaError {code})")
        assert isinstance(explained(failure, "gated_pool", CUDA), RuntimeError)
        texts.append(str(explained(failure, "gated_pool", CUDA)))

    # the build
    error(toolchain.BuildError, toolchain.find_torch, [])
    (tmp_path / "torch" / "include").mkdir(parents=True)
    (tmp_path / "torch" / "version.py").write_text("__version__ = '2.9.1'\n")
    error(toolchain.BuildError, toolchain.find_torch, [tmp_path / "torch"])
    error(toolchain.BuildError, toolchain.find_compiler, {"PATH": "/nowhere"})
    monkeypatch.undo()
    error(toolchain.BuildError, toolchain.find_cuda, {"CUDA_HOME": "/nowhere"})
    error(toolchain.BuildError, toolchain.cuda_architectures, "Hopper++", ())
    error(toolchain.BuildError, native.run, ["false"], {}, "compiling csrc/ext.cpp")
    monkeypatch.setattr(backend.setuptools, "__version__", "65.5.0")
    error(SystemExit, backend._require_setuptools)

    # a command
    def lacking() -> int:
        raise ModuleNotFoundError("No module named 'lightning'", name="lightning")

    capsys.readouterr()
    assert cli._guarded("train", lacking, lambda: "", "train") == 1
    texts.append(capsys.readouterr().err)
    return texts


class Refusing:
    """An importer that fails to load the libraries for a given reason."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def find_spec(self, name, path=None, target=None):
        if name == "csg_ext._bind":
            raise ImportError(self.reason)


def test_the_page_quotes_every_situation_and_nothing_else(said):
    lines = [quoted(text) for text in said]
    assert None not in lines, [text for text, line in zip(said, lines, strict=True) if line is None]
    assert set(lines) == set(QUOTED)
