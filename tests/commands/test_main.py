"""The entry points, the exit codes, the help."""

from __future__ import annotations

import subprocess
import sys

import pytest

from optimum_arb.commands import main as entry
from optimum_arb.commands.printing import fields, ratio, size, table


def test_bad_usage_exits_with_2(capsys):
    with pytest.raises(SystemExit) as stop:
        entry.main(["quantize"])
    assert stop.value.code == 2
    assert "the following arguments are required: MODEL, OUT" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        entry.main([])
    assert stop.value.code == 2


def test_debug_shows_the_traceback(float_model):
    with pytest.raises(ValueError, match="is not binarized"):
        entry.main(["inspect", str(float_model), "--debug"])


def test_interruption(monkeypatch, capsys, float_model):
    def interrupt(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("optimum_arb.inspection.inspect_model", interrupt)
    assert entry.main(["inspect", str(float_model)]) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("message", ["", "cannot allocate 8 GB"])
def test_too_little_memory_is_no_defect(monkeypatch, capsys, float_model, message):
    def allocate(name: str) -> None:
        raise MemoryError(message)

    monkeypatch.setattr("optimum_arb.inspection.inspect_model", allocate)
    assert entry.main(["inspect", str(float_model)]) == 2
    assert capsys.readouterr().err == f"optimum-arb: error: {message or 'out of memory'}\n"


@pytest.mark.parametrize("seconds", [0.02, 0.5, 1.5])
def test_interrupted_while_torch_is_imported(seconds):
    """A line and the code 130: no traceback of an import, no abort in C++."""
    code = (
        "from optimum_arb_cli import main; import os, signal, threading;"
        f"threading.Timer({seconds}, os.kill, (os.getpid(), signal.SIGINT)).start(); main(['inspect', '--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    if "usage" not in done.stdout:  # a machine that imports torch in less
        assert (done.returncode, done.stderr) == (130, "optimum-arb: interrupted\n")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_nobody_reads_stdout(float_model, monkeypatch, unbuffered):
    """`| head -1`: quiet, as other programs are."""
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    command = [sys.executable, "-m", "optimum_arb", "estimate", str(float_model), "--no-probe"]
    for more, code, message in (([], 141, ""), (["--memory-limit", "lots"], 2, "is no size")):
        with subprocess.Popen([*command, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            process.stdout.close()
            said = process.stderr.read()
            assert process.wait(timeout=120) == code
            assert said == message or (message and message in said)


def test_a_defect_keeps_its_traceback(monkeypatch, float_model):
    def defect(name: str) -> None:
        raise AssertionError("ours")

    monkeypatch.setattr("optimum_arb.inspection.inspect_model", defect)
    with pytest.raises(AssertionError, match="ours"):
        entry.main(["inspect", str(float_model)])


@pytest.mark.parametrize("command", [module.__name__.rpartition(".")[2] for module in entry.COMMANDS])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        entry.main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--json" in text
    assert "\nexamples:\n  optimum-arb " + command in text
    assert "exit codes:" in text


def test_a_command_may_fail_a_check(monkeypatch, float_model):
    monkeypatch.setattr("optimum_arb.commands.inspect.run", lambda args: 1)
    assert entry.main(["inspect", str(float_model)]) == 1


def test_optimum_cli(float_model):
    """optimum's own command line finds ours, hands its arguments on and does not load torch before it is called."""
    code = "import sys; from optimum.commands.optimum_cli import main; sys.argv[1:] = {}; {}main()"

    def optimum_cli(*arguments: str, before: str = "") -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-c", code.format(list(arguments), before)], capture_output=True, text=True, timeout=120
        )

    run = optimum_cli("arb", "inspect", str(float_model))
    assert run.returncode == 2
    assert run.stderr.strip().splitlines()[-1].startswith("optimum-cli arb: error: ")
    assert "is not binarized" in run.stderr
    assert "usage: optimum-cli arb quantize" in optimum_cli("arb", "quantize", "--help").stdout
    assert "quantize" in optimum_cli("arb", "--help").stdout
    light = optimum_cli("--help", before="import atexit; atexit.register(lambda: print('torch' in sys.modules)); ")
    assert light.stdout.splitlines()[-1] == "False"


def test_python_m(float_model):
    command = [sys.executable, "-m", "optimum_arb", "inspect", str(float_model)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2
    assert run.stderr.strip().splitlines()[-1].startswith("python -m optimum_arb: error: ")


def test_printing():
    assert table(["name", "n", "why"], [["a", "10", "so"], ["long name", "-", "for a reason"]]).splitlines() == [
        "name        n  why",
        "---------  --  ------------",
        "a          10  so",
        "long name   -  for a reason",
    ]
    assert fields([("a", "1"), ("bc", "2")]) == "a   1\nbc  2"
    assert [size(n) for n in (999, 1000, 1_250_000, 3 * 10**9, 10**13)] == [
        "999 B",
        "1.0 kB",
        "1.2 MB",
        "3.0 GB",
        "10.0 TB",
    ]
    assert ratio(None) == "-"
    assert ratio(0.12345) == "0.1235"
