"""What the pages of the documentation say, as far as a program can check it: commands, files, the origin of tables."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

from optimum_arb.commands.main import COMMANDS, build_parser

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = {command.__name__.rpartition(".")[2] for command in COMMANDS}
FOLDERS = "benchmarks|examples|scripts|tests|optimum_arb"
FILE = re.compile(rf"(?<![\w/.-])(?:{FOLDERS})/[\w./-]*\w\.(?:py|sh|ipynb|toml|jsonl)\b")
PROGRAM = re.compile(r"(?:optimum-cli arb|optimum-arb|python -m optimum_arb|-m optimum_arb) ([a-z]+)\b([^\n`]*)")
OPTION = re.compile(r"(?<!\S)\[?(--[a-z][a-z0-9-]+)")
NUMBER = re.compile(r"[~*]?\.?\d[\d,.]*")
# Tables of figures that no program of this repository prints, and what they are.
OTHER_SOURCES = {
    ("peers.md", "What their own figures say"): "of the literature, and says so",
    ("method.md", "Objective"): "default values of options",
}


class Section(NamedTuple):
    """The text below a heading, up to the next heading of any level."""

    heading: str
    level: int
    text: str


def sections(page: Path) -> list[Section]:
    """A page's sections; a line that begins with # inside of a block of code is no heading."""
    found = [Section(page.name, 0, "")]
    code = False
    for line in page.read_text(encoding="utf-8").splitlines(keepends=True):
        code ^= line.startswith("```")
        heading = None if code else re.match(r"(#+) (.*)", line)
        if heading:
            found.append(Section(heading[2], len(heading[1]), ""))
        else:
            found[-1] = found[-1]._replace(text=found[-1].text + line)
    return found


def tables(text: str) -> Iterator[list[list[str]]]:
    """The cells of each table, without its first column, its head and the line below that."""
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        yield [[cell.strip() for cell in row.strip().strip("|").split("|")[1:]] for row in table.splitlines()[2:]]


def has_figures(table: list[list[str]]) -> bool:
    """Whether at least a third of the cells are numbers."""
    cells = [cell for row in table for cell in row]
    numbers = [cell for cell in cells if NUMBER.match(cell)]
    return len(numbers) >= max(3, len(cells) / 3)


def names_a_program(text: str) -> bool:
    return bool(FILE.search(text)) or any(match[1] in NAMES for match in PROGRAM.finditer(text)) or "nox -s" in text


def tables_of_figures() -> Iterator[tuple[str, str, str]]:
    """Page, heading, and the text of the section and of those that it lies in."""
    for page in PAGES:
        above: list[Section] = []
        for section in sections(page):
            above = [one for one in above if one.level < section.level]
            above.append(section)
            if any(has_figures(table) for table in tables(section.text)):
                yield page.name, section.heading, "".join(one.text for one in above)


@pytest.mark.parametrize(("page", "heading", "text"), [pytest.param(*row, id=row[1]) for row in tables_of_figures()])
def test_a_table_of_figures_names_the_program_that_printed_it(page, heading, text):
    assert names_a_program(text) != ((page, heading) in OTHER_SOURCES), f"{page}, section {heading!r}"


def test_other_sources_are_still_there():
    assert set(OTHER_SOURCES) <= {(page, heading) for page, heading, _ in tables_of_figures()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_that_a_page_names_exist(page):
    missing = [name for name in FILE.findall(page.read_text(encoding="utf-8")) if not (ROOT / name).is_file()]
    assert not missing


def exists(name: str) -> bool:
    """Whether a dotted name of this package is a module or what a module has; without importing what is not there."""
    path, *rest = ROOT, *name.split(".")
    while rest and ((path / rest[0]).is_dir() or (path / f"{rest[0]}.py").is_file()):
        path = path / rest.pop(0)
    try:
        found = importlib.import_module(".".join(path.relative_to(ROOT).parts))
    except ModuleNotFoundError as error:
        if str(error.name).startswith("optimum_arb"):
            raise
        return True  # it needs a package that is not installed here, Triton say
    for attribute in rest:
        if not hasattr(found, attribute):
            return False
        found = getattr(found, attribute)
    return True


SOURCES = [*PAGES, *sorted((ROOT / "optimum_arb").rglob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py"))]


def test_names_of_the_package_exist():
    """Those that pages, docstrings and comments give with their module: moved modules leave old names behind."""
    named = {
        (name, str(source.relative_to(ROOT)))
        for source in SOURCES
        for name in re.findall(r"(?<![\w/.-])optimum_arb(?:\.[A-Za-z]\w*)+", source.read_text(encoding="utf-8"))
    }
    assert len(named) > 50
    assert not [(name, where) for name, where in sorted(named) if not exists(name)]
    assert not exists("optimum_arb.packing")
    assert not exists("optimum_arb.format.packing.no_such_name")


def test_every_command_has_a_row():
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([a-z]+)[ `]", page.split("## ")[0], re.MULTILINE)) == NAMES


def commands(text: str) -> Iterator[str]:
    """Lines of code blocks and code spans, continued lines joined."""
    text = text.replace("\\\n", " ")
    for block in re.findall(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield from block.splitlines()
    text = re.sub(r"^```\w*\n.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    yield from re.findall(r"^    (\S.*)$", text, re.MULTILINE)
    yield from re.findall(r"`([^`\n]+)`", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_options_that_a_page_names_exist(page):
    """Those of the commands of this package and of its scripts."""
    (subparsers,) = [action for action in build_parser()._actions if action.choices]
    for line in commands(page.read_text(encoding="utf-8")):
        for name, rest in PROGRAM.findall(line):
            if name not in NAMES:
                continue
            known = subparsers.choices[name]._option_string_actions
            for option in OPTION.findall(rest):
                assert option in known, f"{page.name}: {line}"
        for script, rest in re.findall(r"python ((?:benchmarks|examples)/\w+\.py)(.*)", line):
            source = (ROOT / script).read_text(encoding="utf-8")
            for option in OPTION.findall(rest):
                positive = option.replace("--no-", "--", 1)
                assert f'"{option}"' in source or f'"{positive}"' in source, f"{page.name}: {line}"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script of benchmarks/ as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module(name)
    monkeypatch.delitem(sys.modules, name)
    return module


def test_rows_of_fit_study_exist(monkeypatch):
    """Of the tables in method.md that it fills: every row has a name that it knows."""
    study = load("fit_study", monkeypatch)
    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    marked = re.findall(r"<!-- table:begin benchmarks/fit_study.py -->\n(.*?)<!-- table:end -->", text, re.DOTALL)
    rows = [row for table in marked for row in table.splitlines()[2:]]
    named = study.names(text)
    assert {re.search(r"`([^`]+)` \|[^`]*$", row)[1] for row in rows} == set(named)
    assert named
    assert set(named) <= set(study.rows())


def test_the_tutorial_is_what_the_commands_take(monkeypatch):
    """Its shell blocks, without running them: every command of this package parses, and every file is made before."""
    walk = load("tutorial", monkeypatch)
    blocks = list(walk.blocks(walk.PAGE.read_text(encoding="utf-8")))
    assert [block.step.split(".")[0] for block in blocks] == sorted(block.step.split(".")[0] for block in blocks)
    written = {block.file for block in blocks if block.file}
    seen = []
    for block in blocks:
        for line in block.code.replace("\\\n", " ").splitlines() if block.language == "sh" else ():
            words = shlex.split(line) if line.count("'") % 2 == 0 else [""]
            if words[:1] == ["optimum-arb"]:
                args = build_parser().parse_args(words[1:])
                seen.append(words[1])
                if "thresholds" in args:
                    assert args.thresholds in written
            elif words[:1] == ["python"] and words[1].endswith(".py"):
                assert (ROOT / words[1]).is_file()
    assert seen == ["estimate", "quantize", "inspect", "evaluate", "verify"]


def test_the_seconds_of_the_tutorial_go_into_its_page(monkeypatch):
    walk = load("tutorial", monkeypatch)
    page = walk.PAGE.read_text(encoding="utf-8")
    filled = walk.written(page, walk.table({"1. Install": [60.4, 30.0, 1.25], "2. Get the model": [9.0, 8.0, 0.5]}))
    assert "| 1. Install | 60 | 30 | 1.2 |" in filled
    assert "| all | 69 | 38 | |" in filled
    assert walk.written(filled, "") == walk.written(page, "")
    with pytest.raises(ValueError, match="table:begin"):
        walk.written("no marks", "")
