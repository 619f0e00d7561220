"""Builds the compiled libraries of csg_ext; everything else about the package stands in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from build_support import native, toolchain  # noqa: E402


class BuildLibraries(build_ext):
    """build_ext that compiles csrc/ with build_support.native and puts the libraries into the package."""

    def run(self) -> None:
        build_dir = Path("build") / f"native-{sys.implementation.cache_tag}"
        try:
            self.built = native.build(ROOT, build_dir, self.distribution.get_version())
        except toolchain.BuildError as error:
            raise SystemExit(f"csg-ext: {error}") from None
        in_place = self.inplace or self.editable_mode
        native.install(self.built, ROOT / "csg_ext" if in_place else Path(self.build_lib) / "csg_ext")

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib) / "csg_ext" / name) for name in getattr(self, "built", ())]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return []  # MANIFEST.in lists csrc/


# The extension's name only tells setuptools that the wheel belongs to one Python version and platform.
setup(ext_modules=[Extension("csg_ext._bind", [])], cmdclass={"build_ext": BuildLibraries})
