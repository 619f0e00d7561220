"""The in-tree PEP 517 backend: setuptools' own, plus a check that torch can be found before anything is downloaded.

torch is no build requirement: an isolated build would fetch a second torch, often another version than the one that
the environment runs. The sources need torch's headers and libraries only, which build_support.toolchain finds on disk.
"""

from __future__ import annotations

import glob
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import setuptools
from setuptools import build_meta
from setuptools.build_meta import build_sdist, get_requires_for_build_sdist

from build_support import toolchain

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


@contextmanager
def _one_sentence() -> Iterator[None]:
    try:
        yield
    except toolchain.BuildError as error:
        raise SystemExit(f"csg-ext: {error}") from None


def _require_torch() -> None:
    with _one_sentence():
        toolchain.find_torch()


def _require_setuptools() -> None:  # the first that reads pyproject.toml's license expression
    if int(setuptools.__version__.partition(".")[0]) < 77:
        raise SystemExit(
            f"csg-ext: setuptools >= 77 is needed, got {setuptools.__version__}: pip install -U setuptools."
        )


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    _require_torch()
    return build_meta.get_requires_for_build_wheel(config_settings)


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    _require_torch()
    return build_meta.get_requires_for_build_editable(config_settings)


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Any = None) -> str:
    _require_setuptools()
    return build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory: str, config_settings: Any = None) -> str:
    _require_setuptools()
    return build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings)


def build_wheel(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    _require_torch()
    with _one_sentence(), toolchain.alone(Path("build")):
        for stale in glob.glob("build/lib*"):  # setuptools would pack files that the sources no longer have
            shutil.rmtree(stale, ignore_errors=True)
        return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    _require_torch()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
