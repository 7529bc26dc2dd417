"""Completion scripts, as the shells read them."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest


def test_without_shtab(fail, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert "pip install 'optimum-arb[completion]'" in fail("completion", "bash")


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes_commands_and_options(call, tmp_path):
    pytest.importorskip("shtab")
    script = tmp_path / "completion.bash"
    script.write_text(call("completion", "bash"))
    ask = (
        f"source {script}; COMP_WORDS=({{words}}); COMP_CWORD={{at}}; "
        "$(complete -p optimum-arb | sed 's/.*-F \\([^ ]*\\).*/\\1/') optimum-arb; echo ${{COMPREPLY[@]}}"
    )

    def complete(*words: str) -> list[str]:
        command = ask.format(words=" ".join(words), at=len(words) - 1)
        run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
        return run.stdout.split()

    assert complete("optimum-arb", "qua") == ["quantize"]
    assert "--max-windows" in complete("optimum-arb", "evaluate", "--max")
    assert call("completion", "zsh", "--json")["script"].startswith("#compdef optimum-arb")
