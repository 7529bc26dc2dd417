"""Commands and Python that pages, scripts and the commands' own help show: they parse, and their names exist."""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import io
import re
import shlex

import pytest
from test_documentation import NAMES, OPTION, PAGES, PROGRAM, ROOT
from test_documentation import commands as shown

from optimum_arb import ARBConfig
from optimum_arb.commands.main import COMMANDS, build_parser

FILES = [*PAGES, *(file for folder in ("benchmarks", "examples") for file in sorted((ROOT / folder).glob("*.py")))]
OURS = ("optimum_arb", "optimum", "transformers")


def refused(name: str, rest: str) -> str:
    """What the parser has against a command with these arguments; empty if nothing.

    Brackets around what may be left out, a comment two blanks behind, and what a shell does with the output are no part
    of it.
    """
    arguments = re.split(r"(?<=\S) {2,}(?=[a-z(#])|\s[>|]\s|;", re.sub(r"[][]", "", rest).strip())[0]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            build_parser().parse_args([name, *shlex.split(arguments)])
    except SystemExit as stop:
        return said.getvalue() if stop.code else ""
    return ""


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_commands_that_a_file_shows_parse(file):
    for line in shown(file.read_text(encoding="utf-8")):
        for name, rest in PROGRAM.findall(line):
            if name in NAMES and rest.strip():  # a command's name alone is only spoken of
                assert not refused(name, rest), f"{file.name}: {line}"
        for script, rest in re.findall(r"python ((?:benchmarks|examples)/\w+\.py)(.*)", line):
            source = (ROOT / script).read_text(encoding="utf-8")
            for option in OPTION.findall(rest):
                names = f'"{option}"', f'"{option.replace("--no-", "--", 1)}"'
                assert any(name in source for name in names), f"{file.name}: {line}"


@pytest.mark.parametrize("module", COMMANDS, ids=lambda module: module.__name__.rpartition(".")[2])
def test_examples_of_the_help_parse(module):
    name = module.__name__.rpartition(".")[2]
    lines = re.findall(r"^ +%\(prog\)s(.*)$", getattr(module, "EXAMPLES", ""), re.MULTILINE)
    for line in lines:
        assert not refused(name, line), line


def blocks() -> list[tuple[str, ast.Module]]:
    """The Python of the pages, but for lines that leave something out."""
    found = []
    for page in PAGES:
        for block in re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            code = block.replace(", ...}", "}")
            found.append((page.name, ast.parse(code)))
    return found


def test_python_of_the_pages_names_what_there_is():
    choices = set(inspect.signature(ARBConfig.__init__).parameters)
    seen = 0
    for page, tree in blocks():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OURS:
                module = importlib.import_module(node.module)
                missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                assert not missing, f"{page}: from {node.module} import {', '.join(missing)}"
                seen += 1
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "ARBConfig":
                unknown = {keyword.arg for keyword in node.keywords if keyword.arg} - choices
                assert not unknown, f"{page}: ARBConfig({', '.join(unknown)})"
    assert seen
