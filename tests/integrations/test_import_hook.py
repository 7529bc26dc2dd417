"""`after_import`: in processes of their own, since imports happen once."""

from __future__ import annotations

import subprocess
import sys

import pytest

_START = "import sys; from optimum_arb.integrations.import_hook import after_import as hook; seen = []\n"


def run(code: str, path) -> None:
    """Runs code where the package `guest` (with the module `guest.inner`) can be imported."""
    package = path / "guest"
    package.mkdir()
    (package / "__init__.py").write_text("from . import inner\n")
    (package / "inner.py").write_text("value = 1\n")
    start = f"import sys; sys.path.insert(0, {str(path)!r})\n" + _START
    subprocess.run([sys.executable, "-c", start + code], check=True, timeout=120)


def test_runs_once_after_the_import(tmp_path):
    run(
        "hook('guest.inner', lambda: seen.append(sys.modules['guest.inner'].value))\n"
        "hook('guest.inner', lambda: seen.append('twice'))\n"
        "import importlib.util\n"
        "assert importlib.util.find_spec('guest') and not seen\n"
        "before = len(sys.meta_path)\n"
        "import guest, guest.inner\n"
        "assert seen == [1], seen\n"
        "assert len(sys.meta_path) == before - 1\n"
        "assert type(guest.inner.__loader__) is type(guest.__loader__) is type(guest.inner.__spec__.loader)\n",
        tmp_path,
    )


def test_only_asking_for_the_module_loses_nothing(tmp_path):
    run(
        "hook('guest.inner', lambda: seen.append(1))\n"
        "import importlib.util\n"
        "assert importlib.util.find_spec('guest.inner').loader.get_source('guest.inner') == 'value = 1\\n'\n"
        "del sys.modules['guest'], sys.modules['guest.inner']\n"
        "assert seen == [1]\n",
        tmp_path,
    )


def test_runs_now_where_it_is_imported(tmp_path):
    run("import guest.inner\nhook('guest.inner', lambda: seen.append(1))\nassert seen == [1]\n", tmp_path)


def test_an_error_does_not_break_the_import(tmp_path, capfd):
    run("hook('guest.inner', lambda: 1 / 0)\nimport guest.inner\nassert guest.inner.value == 1\n", tmp_path)
    assert "could not adapt itself to guest.inner: ZeroDivisionError" in capfd.readouterr().err


def test_a_missing_module_stays_missing(tmp_path):
    with pytest.raises(subprocess.CalledProcessError):
        run("hook('guest.nothing', lambda: None)\nimport guest.nothing\n", tmp_path)
