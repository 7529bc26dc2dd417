"""The processes in which benchmarks compile before they time."""

from __future__ import annotations

import os
import time


def test_every_task_runs_and_failures_are_left_to_the_timing(script, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    tasks = [(tmp_path / name,) for name in ("there", "a", "b/missing", "c")]
    script("compile_first").compile_first(os.mkdir, tasks, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "c", "there"]
    assert capsys.readouterr().out.startswith("compiled 4 in ")


def test_ends_after_its_time(script, capsys):
    start = time.monotonic()
    script("compile_first").compile_first(time.sleep, [(600,)], 1, 0.1)
    assert time.monotonic() - start < 60
    assert capsys.readouterr().out == "not everything was compiled after 0 s\n"
