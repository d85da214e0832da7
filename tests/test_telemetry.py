"""Hooks: told everything, in order, from one thread; and nothing that they do harms who emits."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from pybustcall.telemetry import AttemptMade, BreakerMoved, Event, Hooks
from tests.conftest import PATIENCE


@pytest.fixture
def hooks() -> Iterator[Hooks]:
    """Make hooks whose thread is gone when the test ends."""
    made = Hooks()
    yield made
    made.close()
    if made._thread is not None:
        made._thread.join(PATIENCE)
        assert not made._thread.is_alive()


def event(number: int = 0) -> Event:
    """Make a record that can be told from others."""
    return AttemptMade(daemon=f"http://d{number}", stage=12, elapsed=0.1)


@pytest.mark.requirement("REL-03")
def test_every_hook_is_told_everything_in_order(hooks: Hooks) -> None:
    """From one thread that is not the caller's."""
    first: list[Event] = []
    second: list[Event] = []
    threads: set[str] = set()

    def listen(one: Event) -> None:
        first.append(one)
        threads.add(threading.current_thread().name)

    hooks.add(listen)
    hooks.add(second.append)
    told = [event(number) for number in range(100)]
    for one in told:
        hooks.emit(one)
    assert hooks.flush(PATIENCE)
    assert first == second == told
    assert threads == {"pybustcall-hooks"}


def test_without_a_hook_there_is_no_thread(hooks: Hooks) -> None:
    """What nobody wants to hear costs nothing; it is not kept for a hook that comes later."""
    hooks.emit(event())
    assert hooks._thread is None
    assert hooks.flush(PATIENCE)
    heard: list[Event] = []
    hooks.add(heard.append)
    hooks.emit(event(1))
    assert hooks.flush(PATIENCE)
    assert heard == [event(1)]


def test_a_hook_that_was_taken_away_hears_no_more(hooks: Hooks) -> None:
    """The others still do; taking it away twice is no mistake."""
    gone: list[Event] = []
    stays: list[Event] = []
    remove = hooks.add(gone.append)
    hooks.add(stays.append)
    hooks.emit(event())
    assert hooks.flush(PATIENCE)
    remove()
    remove()
    hooks.emit(event(1))
    assert hooks.flush(PATIENCE)
    assert (gone, stays) == ([event()], [event(), event(1)])


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
def test_a_hook_that_raises_is_logged_and_harms_no_other(
    hooks: Hooks, error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    """Not even one that wants to end the process: the thread goes on."""

    def broken(_: Event) -> None:
        raise error("oh")

    heard: list[Event] = []
    hooks.add(broken)
    hooks.add(heard.append)
    with caplog.at_level(logging.ERROR, "pybustcall"):
        hooks.emit(BreakerMoved(daemon="http://d", old="closed", new="open"))
        hooks.emit(event(1))
        assert hooks.flush(PATIENCE)
    assert len(heard) == 2
    assert [record.getMessage() for record in caplog.records] == [
        "a hook failed at BreakerMoved",
        "a hook failed at AttemptMade",
    ]


def test_a_hook_that_blocks_holds_up_no_caller_and_costs_bounded_memory(hooks: Hooks) -> None:
    """Records that find the queue full are dropped and counted; flush says that it is not done."""
    begun, go_on = threading.Event(), threading.Event()

    def slow(_: Event) -> None:
        begun.set()
        go_on.wait(PATIENCE)

    hooks.add(slow)
    hooks.emit(event())
    assert begun.wait(PATIENCE)
    for number in range(10_003):
        hooks.emit(event(number))
    assert hooks.dropped == 3
    assert not hooks.flush(0.0)
    go_on.set()
    assert hooks.flush(PATIENCE)


def test_closed_hooks_tell_what_waits_and_take_no_more() -> None:
    """And their thread ends."""
    hooks, heard = Hooks(), list[Event]()
    hooks.add(heard.append)
    for number in range(50):
        hooks.emit(event(number))
    hooks.close()
    hooks.emit(event(99))
    assert hooks._thread is not None
    hooks._thread.join(PATIENCE)
    assert not hooks._thread.is_alive()
    assert heard == [event(number) for number in range(50)]
    hooks.close()


def test_no_thread_to_be_had_is_a_record_dropped_and_no_error(hooks: Hooks, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the interpreter ends, or at a limit of the system, calls go on; later records are told again."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    heard: list[Event] = []
    hooks.add(heard.append)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        hooks.emit(event())
    assert hooks.dropped == 1
    hooks.emit(event(1))
    assert hooks.flush(PATIENCE)
    assert heard == [event(1)]


def test_a_forked_child_has_hooks_of_its_own(hooks: Hooks, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parent's thread is not there, its lock may be held: everything is made anew at the first record."""
    heard: list[tuple[str, int]] = []
    hooks.add(lambda one: heard.append((one.daemon, threading.get_ident())))
    hooks.emit(event())
    assert hooks.flush(PATIENCE)
    before, parent = hooks._thread, os.getpid()
    inherited = hooks._changed
    with inherited, monkeypatch.context() as patched:
        patched.setattr(os, "getpid", lambda: parent + 1)
        assert hooks.flush(PATIENCE), "it is the parent's to wait for"
        hooks.emit(event(1))
        assert hooks.flush(PATIENCE)
        hooks.close()
        assert hooks._thread is not None
        hooks._thread.join(PATIENCE)
    assert [daemon for daemon, _ in heard] == ["http://d0", "http://d1"]
    assert heard[0][1] != heard[1][1]
    assert before is not None
    assert before is not hooks._thread
    with inherited:
        inherited.notify_all()
    before.join(PATIENCE)


def test_hooks_that_are_closed_first_in_a_forked_child_wait_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing never touches the parent's lock."""
    hooks = Hooks()
    parent = os.getpid()
    held = hooks._changed
    with monkeypatch.context() as patched:
        patched.setattr(os, "getpid", lambda: parent + 1)
        hooks.close()
    assert hooks._changed is not held
    assert hooks._closed


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_real_child_tells_its_own_hooks() -> None:
    """A process that forks while its hooks' thread runs: parent and child are told once each."""
    script = (
        "import os, sys, warnings\n"
        "warnings.simplefilter('ignore')\n"
        "from pybustcall.telemetry import Event, Hooks\n"
        "hooks = Hooks()\n"
        "hooks.add(lambda one: os.write(1, (one.daemon + '\\n').encode()))\n"
        "hooks.emit(Event(daemon='before'))\n"
        "assert hooks.flush(10)\n"
        "child = os.fork()\n"
        "hooks.emit(Event(daemon='parent' if child else 'child'))\n"
        "assert hooks.flush(10)\n"
        "os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) if child else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=PATIENCE, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert sorted(done.stdout.split()) == [b"before", b"child", b"parent"]
