"""What the repository promises beside its code: the set-up commands, the pins, the contents of a wheel."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).resolve().parents[1]


def blocks(language: str) -> list[str]:
    """The code blocks of the README in this language."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_readme_has_one_command_for_the_demo_and_one_for_the_tests():
    (demo,), (tests,) = blocks("sh"), blocks("bash")
    for command in (demo, tests):
        assert command.count("\n") == 1
        assert command.startswith("python3.11 -m venv ")
        assert "-c constraints.txt" in command
        for script in re.findall(r"\S+\.(?:py|txt)\b", command):
            assert (ROOT / script).is_file(), script
    assert "examples/quickstart.py" in demo
    assert tests.rstrip().endswith("&& pytest -n 2")


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_ci_runs_the_test_command_of_the_readme():
    """`.ci/run` cuts the command out of the README; here it is only printed."""
    script = (ROOT / ".ci/run").read_text()
    extract = re.search(r'^command="\$\((.*)\)"$', script, re.MULTILINE)
    assert extract is not None
    found = subprocess.run(
        ["bash", "-c", f"root='{ROOT}'; {extract.group(1)}"], capture_output=True, text=True, check=True
    )
    assert found.stdout == blocks("bash")[0]


def test_every_dependency_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = {
        re.split(r"[<>=!~\[ ]", requirement)[0].lower()
        for requirement in [*project["dependencies"], *extras["test"], *extras["demo"]]
    }
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    pinned = {pin.split("==")[0].lower().replace("_", "-") for pin in pins}
    assert wanted <= pinned
    assert "torch==2.13.0" in pins


def test_links_of_the_documentation_lead_somewhere():
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.slow
def test_wheel_holds_data_and_the_command_of_optimum(tmp_path):
    # A copy, since setuptools leaves a build folder behind, whose old files would come into later wheels.
    source = tmp_path / "source"
    skipped = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__", "*.so")
    shutil.copytree(ROOT, source, ignore=skipped)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(command, check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "optimum_arb/py.typed",
        "optimum_arb/data/wikitext-2/README.md",
        "optimum_arb/data/wikitext-2/wiki.test.tokens.txt",
        "optimum_arb/data/wikitext-2/wiki.valid.tokens.txt",
        "optimum/commands/register/register_arb.py",
        "optimum_arb_autoload.py",
        "optimum_arb_cli.py",
    } <= names
    (points,) = [name for name in names if name.endswith("/entry_points.txt")]
    declared = zipfile.ZipFile(wheel).read(points).decode()
    assert "[torch.backends]\noptimum_arb = optimum_arb_autoload:activate" in declared
    # optimum's own namespaces must stay namespaces, and tests are no part of the package
    assert not {"optimum/__init__.py", "optimum/commands/__init__.py", "optimum/commands/register/__init__.py"} & names
    assert not any(name.startswith("tests") for name in names)
