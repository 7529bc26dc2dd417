"""One task at a time in a thread, whose error is raised at the next one."""

from __future__ import annotations

import threading

import pytest

from optimum_arb.checkpoint.behind import Behind


def fail() -> None:
    raise OSError(28, "No space left on device")


def test_one_task_at_a_time_in_their_order():
    behind, done, begin = Behind(), [], threading.Event()

    def first() -> None:
        begin.wait()
        done.append(1)

    behind.do(first)
    assert done == []
    begin.set()
    behind.do(lambda: done.append(2))  # waits for the first one
    assert done[0] == 1
    behind.settle()
    assert done == [1, 2]


def test_an_error_is_raised_once_and_nothing_is_begun():
    behind, done = Behind(), []
    behind.do(fail)
    behind.wait()  # and raises nothing
    with pytest.raises(OSError, match="No space left on device"):
        behind.do(lambda: done.append(1))
    behind.settle()
    behind.do(lambda: done.append(2))
    behind.settle()
    assert done == [2]


def test_an_error_that_nobody_asked_for_is_told(caplog):
    behind = Behind()
    behind.do(fail)
    behind.close()
    assert "What was finished last could not be kept: [Errno 28] No space left on device" in caplog.text
    caplog.clear()
    behind.close()
    assert caplog.text == ""


def test_a_thread_that_cannot_be_started(monkeypatch):
    def refuse(self) -> None:
        raise RuntimeError("can't start new thread")

    behind, done = Behind(), []
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            behind.do(lambda: done.append(1))
    behind.settle()
    behind.do(lambda: done.append(2))
    behind.settle()
    assert done == [2]


def test_a_thread_that_ends_before_its_task(monkeypatch):
    """Out of memory, before Python comes to what it was to run."""
    behind = Behind()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "run", lambda self: None)
        behind.do(lambda: None)
        with pytest.raises(MemoryError, match="ended before its task did"):
            behind.settle()


def test_an_interruption_ends_the_waiting_and_not_the_task(monkeypatch):
    behind, done, begin = Behind(), [], threading.Event()

    def task() -> None:
        begin.wait()
        done.append(1)

    behind.do(task)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "join", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            behind.settle()
    begin.set()
    behind.settle()
    assert done == [1]
