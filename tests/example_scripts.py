"""Loads the scripts of examples/, which no package holds."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def load_script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """examples/NAME.py as a module that finds what lies beside it, as when it is run."""
    path = EXAMPLES / f"{name}.py"
    monkeypatch.syspath_prepend(path.parent)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def load_study(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script of examples/reproduction that writes its results and its page into `folder`."""
    module = load_script(f"reproduction/{name}", monkeypatch)
    monkeypatch.setattr(module, "RESULTS", folder / "results")
    monkeypatch.setattr(module, "PAGE", folder / "page.md")
    return module
