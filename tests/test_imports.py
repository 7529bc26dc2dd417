"""Which way the packages import: what lies below knows nothing of what is built on it."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "optimum_arb"
# A package -> all that its files may import of the others, and of the files beside them.
BELOW = {
    "format": set(),
    "ops": {"format"},
    "config": {"format", "custom_data", "patterns", "version"},
    "algorithms": {"format", "config", "spare_threads"},
    "nn": {"format", "ops", "experts"},
    "export": {"format", "nn", "output_files", "result", "version"},
    "stored": {"format", "config", "experts", "modules", "conversion", "report", "layer_warnings", "version"},
}


def imported(file: Path) -> set[str]:
    """The modules of the package that a file imports anywhere in it, by their names without the package's."""
    found = set()
    parts = ("optimum_arb", *file.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = parts[: len(parts) - node.level + 1] if node.level else ()
            name = ".".join([*base, *filter(None, [node.module])])
            found |= {f"{name}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name.removeprefix("optimum_arb.") for name in found if name.startswith("optimum_arb.")}


@cache
def units() -> dict[str, set[str]]:
    """A package or a file of the top level -> those of the others that it imports."""
    found = {}
    for path in ROOT.iterdir():
        files = [*path.rglob("*.py")] if path.is_dir() else [path] if path.suffix == ".py" else []
        if files:
            names = {name.partition(".")[0] for file in files for name in imported(file)}
            found[path.stem] = names - {path.stem}
    return found


def test_the_imports_are_found():
    assert {*BELOW, "quantizer", "loading", "commands"} <= set(units())
    assert "format.packing" in imported(ROOT / "nn/linear.py")
    assert "format.packing.unpack" in imported(ROOT / "ops/backends/packed.py")
    assert "nn.ARBLinear" in imported(ROOT / "tensor_parallel/layers.py")


@pytest.mark.parametrize("name", BELOW)
def test_imports_what_lies_below(name):
    assert units()[name] <= BELOW[name]


@pytest.mark.parametrize("name", ["format", "stored"])
def test_nothing_that_it_is_built_on_leads_back_to_it(name):
    found, reached, queue = units(), set(), [name]
    while queue:
        for other in found.get(queue.pop(), set()) - reached:
            reached.add(other)
            queue.append(other)
    assert name not in reached
    assert not reached & {"quantizer", "loading", "saving", "hub", "inspection", "integrations", "commands"}
