"""Daemons of other languages, as processes of their own: how the tests find their tools, start them and end them.

Which daemons there are is told by the modules beside this one. A tool that is missing skips a test on a user's machine
and fails it in CI, where everything is installed. No peer outlives the tests: each leads a process group of its own,
which is killed at the latest when the interpreter ends.
"""

from __future__ import annotations

import atexit
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from typing import TYPE_CHECKING, NoReturn, Self, final

import pytest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

__all__ = ["PeerProcess", "require", "start_peer", "unavailable"]

_LISTENING = re.compile(r"^listening on (\S+)\n", re.MULTILINE)
_MERCY = 5.0  # seconds that a peer has to end when it is asked to
_running: set[PeerProcess] = set()


def require(tool: str, hint: str) -> str:
    """Return the path of a program; without it skip the test, or fail it in CI. `hint` says where to get it."""
    return shutil.which(tool) or unavailable(f"{tool} is not installed: {hint}")


def unavailable(why: str) -> NoReturn:
    """Skip the test, since this machine lacks something; in CI, which lacks nothing, fail it."""
    if os.environ.get("CI") == "true":
        pytest.fail(why, pytrace=False)
    pytest.skip(why)


@final
class PeerProcess:
    """A daemon in a process of its own, which listens at `url`. Leaving its `with` block ends it."""

    def __init__(self, command: Sequence[str], cwd: Path | str | None, env: Mapping[str, str] | None) -> None:
        # A file never fills up, as a pipe would, and tells at the end what the peer had to say.
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `kill`
        self._process = subprocess.Popen(
            command,
            cwd=cwd,
            env=None if env is None else {**os.environ, **env},
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._said: str | None = None
        self.url = ""
        _running.add(self)

    @property
    def pid(self) -> int:
        """The process's id, which is its group's too."""
        return self._process.pid

    def output(self) -> str:
        """Tell what it has written so far, on either stream."""
        if self._said is not None:
            return self._said
        return os.pread(self._output.fileno(), 1 << 20, 0).decode("utf-8", "replace")

    def returncode(self) -> int | None:
        """Tell what it ended with, or None while it runs; a signal is a negative number."""
        return self._process.poll()

    def signal(self, number: int) -> None:
        """Send a signal to it and to whatever it started; SIGSTOP makes it a black hole, until SIGCONT."""
        if self._process.poll() is None:
            os.killpg(self.pid, number)

    def kill(self) -> None:
        """End it without a warning, as the kernel would."""
        self.signal(signal.SIGKILL)
        self._process.wait()
        self._said = self.output()
        self._output.close()
        _running.discard(self)

    def terminate(self) -> int:
        """Ask it to end, also if it is stopped, and tell what it ended with; kill it if it does not listen."""
        self.signal(signal.SIGTERM)
        self.signal(signal.SIGCONT)
        try:
            return self._process.wait(_MERCY)
        except subprocess.TimeoutExpired:
            pytest.fail(f"process {self.pid} did not end when it was asked to", pytrace=False)
        finally:
            self.kill()

    def wait_listening(self, timeout: float) -> None:
        """Wait until it has told its URL; fail with what it said if it ends before, or after `timeout` seconds."""
        end = time.monotonic() + timeout
        while (found := _LISTENING.search(self.output())) is None:
            if (code := self.returncode()) is not None:
                pytest.fail(f"the peer ended with {code} before it listened:\n{self.output()}", pytrace=False)
            if time.monotonic() > end:
                pytest.fail(f"the peer did not listen within {timeout:g} s:\n{self.output()}", pytrace=False)
            time.sleep(0.005)
        self.url = found.group(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def __repr__(self) -> str:
        return f"PeerProcess({self.url or 'not listening'}, pid={self.pid})"


def start_peer(
    command: Sequence[str],
    *,
    cwd: Path | str | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 10.0,
) -> PeerProcess:
    """Start a daemon and wait until it prints the line `listening on URL`.

    - `env`: what differs from this process's environment
    - `timeout`: seconds after which the test fails, with what the daemon said

    End it by `kill` or `terminate`, or by using it in a `with` statement.
    """
    peer = PeerProcess(command, cwd, env)
    try:
        peer.wait_listening(timeout)
    except BaseException:
        peer.kill()
        raise
    return peer


@atexit.register
def _end_all() -> None:
    for peer in tuple(_running):
        peer.kill()
