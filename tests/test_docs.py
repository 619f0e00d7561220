"""README and docs/: their code runs, their commands and links exist, every public name is on an API page."""

from __future__ import annotations

import argparse
import ast
import doctest
import importlib.util
import inspect
import re
import shlex
from pathlib import Path

import model_zoo  # noqa: F401  (torchvision, for docs/attach.md)
import pytest
from sybil import Sybil
from sybil.document import PythonDocStringDocument
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser
from sybil.parsers.rest import DocTestParser

import csg_ext.data
from csg_ext import cli
from csg_ext.training.config import TrainConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PUBLIC = ["csg_ext", *(f"csg_ext.{name}" for name in "nn optim training data metrics analysis plots report".split())]


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# ---- code


def with_code(pattern: str, pages: list[Path]) -> list[Path]:
    return [page for page in pages if re.search(pattern, page.read_text(), re.MULTILINE)]


@pytest.mark.parametrize("page", with_code("^```python", PAGES), ids=page_id)
def test_python_blocks_run(page, run, digits, tmp_path, monkeypatch, capsys):
    """All blocks of a page, in order, as one program; the comments that repeat what `attach` prints are true."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(run[0])
    monkeypatch.chdir(tmp_path)
    embedded = csg_ext.data.load_images(None)
    # The pages speak of the demo's run; here it is one of seconds, on other images.
    monkeypatch.setattr(csg_ext.data, "load_images", lambda path: csg_ext.data.images.load_images(path or digits))
    assert embedded.classes[0] == "T-shirt/top"
    document = Sybil(parsers=[PythonCodeBlockParser(), SkipParser()]).parse(page)
    examples = list(document.examples())
    assert len(examples) >= page.read_text().count("\n```python")
    for example in examples:
        example.evaluate()
    printed = capsys.readouterr().out
    for said in re.findall(r"^# (attach: .*)|  # (torch\.Size\(.*?\) .*)", page.read_text(), re.MULTILINE):
        assert "".join(said) in printed


MODULES = with_code(r"^ +>>> ", sorted((ROOT / "csg_ext").rglob("*.py")))


@pytest.mark.parametrize("module", MODULES, ids=page_id)
def test_docstring_examples_run(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    parser = Sybil(parsers=[DocTestParser(flags)], document_types={".py": PythonDocStringDocument})
    examples = list(parser.parse(module).examples())
    assert len(examples) == len(re.findall(r"^ +>>> ", module.read_text(), re.MULTILINE))
    for example in examples:
        example.evaluate()


# ---- commands


def subcommands() -> dict[str, argparse.ArgumentParser]:
    action = next(a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


def shell_lines(page: Path) -> list[list[str]]:
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.replace("\\\n", "").splitlines()]
    return [[word for i, word in enumerate(line) if "=" not in word or i] for line in lines if line]


@pytest.mark.parametrize("page", with_code("^```sh", PAGES), ids=page_id)
def test_shell_blocks_name_what_exists(page, capsys):
    targets = re.findall(r"^([a-z_-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in shell_lines(page):
        while line and re.fullmatch(r"[A-Z_]+=.*", line[0]):
            line = line[1:]
        if not line:
            continue
        if line[0] == "csg-ext":
            try:
                cli._parser().parse_args(line[1:])
            except SystemExit:
                pytest.fail(f"{shlex.join(line)}: {capsys.readouterr().err}")
        elif line[0] == "make":
            assert {word for word in line[1:] if "=" not in word} <= set(targets), line
        elif line[0] in ("python", "torchrun") and "-m" in line:
            assert importlib.util.find_spec(line[line.index("-m") + 1]), line
        elif line[0] in ("python", "torchrun"):
            script = next(word for word in line[1:] if word.endswith(".py"))
            assert (ROOT / script).is_file(), line


@pytest.mark.parametrize("page", with_code("`csg-ext ", PAGES), ids=page_id)
def test_inline_commands_have_the_options_named(page):
    known = {name: set(parser._option_string_actions) for name, parser in subcommands().items()}
    for command in re.findall(r"`csg-ext ([^`]*)`", page.read_text()):
        name, *words = command.split()
        name = name.rstrip(":,")
        assert name in known or command == "--version", command
        for option in (word.partition("=")[0] for word in words if word.startswith("--")):
            assert option in known[name], command


def options_in_tables(text: str) -> dict[str, str]:
    """The options in the first column of tables, each with what the second column says."""
    rows = re.findall(r"^\| (`--.*?) \| ([^|]*?) *\|", text, re.MULTILINE)
    return {option: default for names, default in rows for option in re.findall(r"`(--[\w-]+)", names)}


@pytest.mark.parametrize("command", subcommands())
def test_every_option_is_on_the_page_of_commands_with_its_default(command):
    sections = re.split(r"^## csg-ext (\w+)$", (ROOT / "docs" / "commands.md").read_text(), flags=re.MULTILINE)
    said = options_in_tables(dict(zip(sections[1::2], sections[2::2], strict=True))[command])
    actions = {name: a for a in subcommands()[command]._actions for name in a.option_strings if name.startswith("--")}
    del actions["--help"]
    shown = dict.fromkeys(options_in_tables((ROOT / "docs" / "data.md").read_text())) if command == "train" else {}
    assert actions.keys() == (said | shown | ({"--data": ""} if command == "train" else {})).keys()
    settings = TrainConfig.__dataclass_fields__ if command == "train" else {}
    for name, default in said.items():
        value = actions[name].default
        if actions[name].dest in settings:
            value = settings[actions[name].dest].default
        if isinstance(value, list):
            assert default == " ".join(map(str, value)), name
        elif value is not None and not isinstance(value, bool):
            assert default == (f"{value:.4g}" if isinstance(value, float) else str(value)), name


# ---- links


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ +(.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=page_id)
def test_links_and_images_exist(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        place = page.parent / path if path else page
        assert place.is_file(), target
        assert not anchor or anchor in anchors(place), target


# ---- API pages


def documented() -> dict[str, object]:
    """What the directives of docs/api/ name: full name to object."""
    found: dict[str, object] = {}
    for page in sorted((ROOT / "docs" / "api").glob("*.md")):
        module = ""
        for directive, argument in re.findall(r"^\.\. (\w+):: ([\w.]+)", page.read_text(), re.MULTILINE):
            if directive == "currentmodule":
                module = argument
            else:
                found[f"{module}.{argument}"] = getattr(importlib.import_module(module), argument)
    return found


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_on_an_api_page_and_has_a_docstring(module):
    objects = list(documented().values())
    space = importlib.import_module(module)
    assert inspect.getdoc(space)
    lazy = [name for name in ("ImageLoader", "image_loader", "MutualInformationScore") if hasattr(space, name)]
    for name in [*space.__all__, *lazy]:
        public = getattr(space, name)
        assert inspect.ismodule(public) or any(public is known for known in objects), f"{module}.{name} has no page"
        doc = public.__doc__ or ""
        assert doc and not doc.startswith(f"{name}("), f"{module}.{name} has no docstring"  # that of any dataclass


# ---- architecture.md


# From the top: each imports only what stands in its own row or below.
LAYERS = [
    {"__main__", "cli"},
    {"train"},
    {"report"},
    {"evaluate", "localize", "detect", "mis", "info"},
    {"plots"},
    {"analysis", "runs"},
    {"training"},
    {"metrics", "optim"},
    {"nn"},
    {"ops"},
    {"_extension"},
    {"data", "remarks", "reference", "_bind", "_streams"},
    {"_text"},
]


def imports(file: Path) -> set[str]:
    """The parts of csg_ext that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "csg_ext":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.removeprefix("csg_ext.").partition(".")[0] if "csg_ext." in node.module else "")
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("csg_ext.")}
    return found - {"", "__version__"}


def test_imports_point_downwards():
    row = {part: i for i, parts in enumerate(LAYERS) for part in parts}
    files = [f for f in (ROOT / "csg_ext").rglob("*.py") if f != ROOT / "csg_ext" / "__init__.py"]
    for file in files:
        own = file.relative_to(ROOT / "csg_ext").with_suffix("").parts[0]
        upwards = {part for part in imports(file) if row[part] < row[own]}
        assert not upwards, f"{file.name} imports {upwards}"
    assert len(files) > 50
    for part in LAYERS[-2] - {"_bind"} | LAYERS[-1]:
        inside = [f for f in files if f.relative_to(ROOT / "csg_ext").with_suffix("").parts[0] == part]
        assert inside and set().union(*map(imports, inside)) <= {part} | LAYERS[-1]
