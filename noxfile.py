"""The tests that meet transformers, under every minor version that the package allows.

    pip install nox && nox                          # 5.16 to 5.23, each in an environment of its own
    nox -s "transformers(5.16.1)" -- -k peft       # one version; arguments go to pytest
    nox --no-venv -s installed                      # the same tests with what is installed
    nox -s lowest highest                           # all tests, dependencies at the lower ends of ranges, or the newest
    nox -s docs                                     # the site of docs/, where a broken link is an error
    nox -s audit                                    # known vulnerabilities of the pinned dependencies, by pip-audit

Each environment is pinned by constraints.txt but for transformers and what an old version wants older too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import nox

# the newest patch of each minor version; the first and the last are the ends of the range in pyproject.toml
VERSIONS = ("5.16.1", "5.17.0", "5.18.0", "5.19.0", "5.20.2", "5.21.1", "5.22.2", "5.23.0")
# 5.16 and 5.17 want huggingface_hub 1.x, which wants httpx where 2.x has httpx2
OLDER_HUB = ("5.16.1", "5.17.0")
LOOSE = ("transformers", "huggingface_hub")
TESTS = (
    "tests/test_quantizer.py",
    "tests/loading",
    "tests/transformers_suite",
    "tests/test_modules.py",
    "tests/test_bad_input.py",
    "tests/test_quantizer_experts.py",
    "tests/experts",
    "tests/stored",
    "tests/tensor_parallel",
    "tests/models",
    "tests/calibration",
    "tests/integrations",
    "tests/commands",
)

# optional dependencies that the tests use where they are installed
EXTRAS = ("completion", "gguf", "peft", "plot")

nox.options.sessions = ["transformers"]


@nox.session(python="3.11")
@nox.parametrize("version", VERSIONS, ids=VERSIONS)
def transformers(session: nox.Session, version: str) -> None:
    """Installs this package with one version of transformers, and runs the tests that meet it."""
    pins = [
        line
        for line in Path("constraints.txt").read_text().splitlines()
        if line and not line.startswith("#") and line.split("==")[0] not in LOOSE
    ]
    constraints = Path(session.create_tmp()) / "constraints.txt"
    constraints.write_text("\n".join([*pins, ""]))
    hub = ["huggingface_hub<2"] if version in OLDER_HUB else []
    session.install("-c", str(constraints), "-e", ".[test]", f"transformers=={version}", *hub, "peft")
    _run(session)


@nox.session(python="3.11")
def lowest(session: nox.Session) -> None:
    """All tests with the oldest version of every dependency that pyproject.toml allows, optional ones too.

    Arguments `torch==...` are taken for torch, whose oldest version a machine may not have.
    """
    project = Path("pyproject.toml").read_text()
    floors: dict[str, str] = {}
    for name in ("dependencies", *EXTRAS):
        found = re.search(rf"^{name} = \[(.*?)\]$", project, re.MULTILINE | re.DOTALL)
        assert found is not None
        floors |= dict(re.findall(r'"([\w-]+)>=([\w.]+)', found[1]))
    torch = [argument for argument in session.posargs if argument.startswith("torch==")]
    pins = [f"{name}=={version}" for name, version in floors.items() if name != "torch" or not torch]
    session.install(*pins, *torch, "-e", ".", "pytest", "pytest-timeout", "pytest-xdist", "hypothesis")
    _run(session, [argument for argument in session.posargs if argument not in torch], ["tests"])


@nox.session(python="3.11")
def highest(session: nox.Session) -> None:
    """All tests with the newest version of every dependency that pyproject.toml allows."""
    session.install("--upgrade", "--upgrade-strategy", "eager", "-e", ".[test]")
    _run(session, session.posargs, ["tests"])


@nox.session
def audit(session: nox.Session) -> None:
    """Known vulnerabilities of the pinned dependencies; a package that PyPI does not know is an error too.

    Arguments go to pip-audit: `-s osv` asks osv.dev, `-s osv --osv-url URL` another server with its interface.
    """
    session.install("pip-audit")
    command = ["pip-audit", "--strict", "--disable-pip", "--no-deps", "--requirement", "constraints.txt"]
    session.run(*command, *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """The site of the documentation in site/; every warning is an error. The package is read, not imported."""
    session.install("-c", "constraints.txt", "mkdocs-material>=9.5.32", "mkdocstrings[python]>=1.0")
    session.run("mkdocs", "build", "--strict", *session.posargs, env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session(python=False)
def installed(session: nox.Session) -> None:
    """The same tests with what is installed."""
    _run(session)


def _run(session: nox.Session, arguments: Sequence[str] | None = None, tests: Sequence[str] = TESTS) -> None:
    session.run("python", "-c", "import transformers; print('transformers', transformers.__version__)")
    session.run("python", "-m", "pytest", "-q", *tests, *(session.posargs if arguments is None else arguments))
