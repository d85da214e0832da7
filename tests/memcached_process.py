"""A real memcached as a process of the tests, and one that all of them share.

It is missing on a user's machine, and the test is skipped; in CI that fails. None outlives the tests, and none listens
anywhere but on loopback, or at a socket in the test's own directory.

PYBUSTCALL_TEST_MEMCACHED names another program to take for it, such as one that was built from source.
"""

from __future__ import annotations

import atexit
import os
import socket
import subprocess
import time
from functools import cache
from pathlib import Path
from typing import Self, final

import pytest

from tests.engines import free_port
from tests.interop import require

__all__ = ["MemcachedProcess", "shared_memcached"]

_PATIENCE = 10.0
_PROGRAM = "PYBUSTCALL_TEST_MEMCACHED"
_running: set[MemcachedProcess] = set()


@final
class MemcachedProcess:
    """A memcached at a port of its own, or at a socket. Leaving its `with` block ends it.

    - `options`: more of its command line, such as "-m", "2"
    - `path`: of the socket, if it is to listen there
    """

    def __init__(self, *options: str, path: Path | None = None) -> None:
        program = require(os.environ.get(_PROGRAM) or "memcached", "apt-get install memcached")
        self.port = 0 if path else free_port()
        self.path = path
        self.url = f"unix://{path}" if path else f"memcached://127.0.0.1:{self.port}"
        where = ["-s", str(path)] if path else ["-l", "127.0.0.1", "-p", str(self.port), "-U", "0"]
        whose = ["-u", "root"] if os.geteuid() == 0 else []  # it asks root to be told who it is to be
        self._command = [program, *where, *whose, "-t", "2", *options]
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def pid(self) -> int:
        """The id of the process."""
        assert self._process is not None, "it was ended"
        return self._process.pid

    def start(self) -> None:
        """Start it, at the same place each time and empty, and wait for its answer."""
        assert self._process is None
        self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL)
        _running.add(self)
        end = time.monotonic() + _PATIENCE
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > end:
                self.kill()
                pytest.fail("memcached did not start", pytrace=False)
            time.sleep(0.005)

    def _answers(self) -> bool:
        try:
            return self.ask("mn") == "MN"
        except OSError:
            return False

    def ask(self, line: str) -> str:
        """Give it a command by a connection of its own; tell the first line of what it answers."""
        family = socket.AF_UNIX if self.path else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as connection:
            connection.settimeout(1.0)
            connection.connect(str(self.path) if self.path else ("127.0.0.1", self.port))
            connection.sendall(line.encode() + b"\r\n")
            with connection.makefile("rb") as answer:
                return answer.readline().decode().rstrip("\r\n")

    def kill(self) -> None:
        """End it without a warning, as the kernel would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        _running.discard(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def __repr__(self) -> str:
        return f"MemcachedProcess({self.url})"


@cache
def shared_memcached() -> MemcachedProcess:
    """Start a server for all tests of this process; it ends with it."""
    return MemcachedProcess()


@atexit.register
def _end_all() -> None:
    for server in tuple(_running):
        server.kill()
