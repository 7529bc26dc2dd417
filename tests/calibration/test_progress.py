"""What a run says of itself, in a terminal and in a log file."""

from __future__ import annotations

import io
import re

import pytest
import torch
from tiny_models import tiny_model, tokens
from transformers.utils import logging

from optimum_arb import ARBConfig
from optimum_arb.calibration import CalibrationWalk
from optimum_arb.calibration import progress as progress_module
from optimum_arb.calibration.progress import Progress
from optimum_arb.modules import select_modules


class Terminal(io.StringIO):
    def isatty(self):
        return True


def walk(file):
    model = tiny_model("LlamaForCausalLM")
    errors = iter(torch.linspace(0.1, 0.4, 14).tolist())
    names = list(select_modules(model, ARBConfig(dataset=None)).convert)
    CalibrationWalk(model, names, lambda n, m, h, c: (m, next(errors)), [tokens()], progress=Progress(file)).run()


def test_a_log_file_gets_a_line_a_layer():
    file = io.StringIO()
    walk(file)
    lines = file.getvalue().splitlines()
    assert len(lines) == 2
    pattern = r"\[{}/2\] model\.layers\.{}: 7 modules, [0-9.]+ s, output error {}, [0-9.]+ GB.*, [0-9]+ s left"
    assert re.fullmatch(pattern.format(1, 0, "0.1692"), lines[0])
    assert re.fullmatch(pattern.format(2, 1, "0.3308"), lines[1])
    assert "\r" not in file.getvalue()


def test_slow_linears_have_lines_of_their_own(monkeypatch):
    monkeypatch.setattr(progress_module, "SLOW_LINEAR", 0.0)
    file = io.StringIO()
    walk(file)
    assert "  model.layers.0.self_attn.q_proj: 0.0 s, output error 0.1000\n" in file.getvalue()


def test_a_terminal_gets_a_bar_with_the_running_error():
    file = Terminal()
    walk(file)
    text = file.getvalue()
    assert "Binarizing: 100%" in text
    assert "output error=0.2500" in text
    assert "at=model.layers.1.mlp.down_proj" in text
    assert "memory=" in text


def test_silent_where_progress_bars_are_off(monkeypatch):
    monkeypatch.setattr(progress_module, "is_progress_bar_enabled", lambda: False)
    for file in (io.StringIO(), Terminal()):
        walk(file)
        assert file.getvalue() == ""
    assert logging.is_progress_bar_enabled()


def test_time_left_is_by_the_layers_that_ran(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "perf_counter", lambda: now[0])
    progress = Progress(io.StringIO())
    with progress.running(10):
        progress.already_done("a")
        progress.already_done("b")
        assert progress.seconds_left() == 0
        with progress.layer("c", ["c.x"]):
            now[0] += 3
        assert progress.seconds_left() == pytest.approx(21)


def test_layers_that_only_run_again_say_nothing_of_the_time_left(monkeypatch):
    """A resumed run: of 10 layers 5 run again, in a tenth of the time that binarizing one takes."""
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "perf_counter", lambda: now[0])
    progress = Progress(file := io.StringIO())
    with progress.running(10):
        for index in range(5):
            with progress.layer(f"layers.{index}", []):
                now[0] += 1
        assert " left" not in file.getvalue()
        with progress.layer("layers.5", ["layers.5.x"]):
            now[0] += 10
    assert file.getvalue().splitlines()[-1].endswith(" 40 s left")
