"""The failover example as a reader runs it: to its end in plain lines, live on a terminal, and interrupted."""

from __future__ import annotations

import asyncio
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import PATIENCE
from tests.example_process import EXAMPLES, Ended, end_group, run_example


@pytest.fixture(scope="module")
def show(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """Run the whole show quickly, once."""
    return asyncio.run(run_example("failover", tmp_path_factory.mktemp("show"), "--seconds", "3"))


def figure(show: Ended, name: str) -> int:
    """Tell a figure of the last line of counts."""
    return int(re.findall(rf"\b{name} (\d+)", show.output)[-1])


@pytest.mark.requirement("IMP-04")
def test_show_loses_nothing(show: Ended) -> None:
    """The show ends well: of what was promised nothing is lost, and no call failed."""
    assert (show.code, show.errors) == (0, ""), show.output
    assert (figure(show, "lost"), figure(show, "failed")) == (0, 0)
    assert figure(show, "busted") > 0


def test_show_plays_every_act(show: Ended) -> None:
    """All five acts are told, in order, and what they tell was seen: failover, return, deferring, replay."""
    assert re.findall(r"^(\d)\. ", show.output, re.MULTILINE) == list("12345")
    assert figure(show, "failovers") >= 1
    assert figure(show, "failbacks") >= 1
    assert figure(show, "deferred") > 0
    assert figure(show, "replayed") == figure(show, "deferred")


def test_show_tells_who_served(show: Ended) -> None:
    """The strip begins with the hub, and shows a peer and the outbox."""
    strip = re.search(r"^who served: (.*)$", show.output, re.MULTILINE)
    assert strip is not None
    assert re.search(r"^H+.*[12].*H.*o", strip[1]), strip[1]


def test_show_says_that_times_are_short(show: Ended) -> None:
    """It says that it does not use the defaults of failback, and a pipe gets plain lines."""
    assert "30-90 s" in show.output
    assert "\x1b" not in show.output


def test_show_leaves_nothing_behind(show: Ended) -> None:
    """Its files and processes are gone at its end."""
    assert (show.left_files, show.left_processes) == ([], False)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_stopped_show_clears_everything_away(number: signal.Signals, tmp_path: Path) -> None:
    """Stopped while the hub is dead, it exits with 130, and leaves no process and no file."""
    ended = await run_example("failover", tmp_path, "--seconds", "12", stop_at="2. ", number=number)
    assert (ended.code, ended.left_processes, ended.left_files) == (130, False, []), ended.errors
    assert ended.errors == ""


def test_show_draws_on_a_terminal(tmp_path: Path) -> None:
    """On a terminal the picture is drawn again and again, and the screen is given back when it is stopped."""
    ours, theirs = pty.openpty()
    command = [sys.executable, str(EXAMPLES / "failover.py"), "--seconds", "60"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment, start_new_session=True)
    os.close(theirs)
    seen = b""
    try:
        while seen.count(b"\x1b[H") < 3:
            seen += os.read(ours, 65536)
        process.send_signal(signal.SIGINT)
        while b"\x1b[?1049l" not in seen:
            seen += os.read(ours, 65536)
        assert process.wait(PATIENCE) == 130
    finally:
        end_group(process.pid)
        process.wait(PATIENCE)
        os.close(ours)
    text = seen.decode(errors="replace")
    assert all(what in text for what in ("hub", "peer 2", "outbox", "route: star", "waiting"))
