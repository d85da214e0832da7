"""Real cache servers as processes of the tests: how they are found, started with a configuration of ours, and ended.

A server that is missing skips a test on a user's machine and fails it in CI. None outlives the tests, and none listens
anywhere but on loopback or in the test's own directory.

PYBUSTCALL_TEST_REDIS_SERVER names another program to take for a Redis server, such as /usr/bin/valkey-server.
"""

from __future__ import annotations

import atexit
import os
import socket
import subprocess
import time
from pathlib import Path
from typing import Self, final

import pytest

from tests.interop import require

__all__ = ["RedisProcess", "free_port"]

_PATIENCE = 10.0
_SERVER = "PYBUSTCALL_TEST_REDIS_SERVER"
_running: set[RedisProcess] = set()


def free_port() -> int:
    """Tell a port of loopback that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@final
class RedisProcess:
    """A Redis server that keeps nothing on disk, at a port and a socket of its own. Leaving its `with` block ends it.

    - `directory`: where its socket, its log and its snapshots are
    - `settings`: more lines of its configuration, such as maxmemory="2mb"
    """

    def __init__(self, directory: Path, **settings: str) -> None:
        self._program = require(os.environ.get(_SERVER) or "redis-server", "apt-get install redis-server")
        self.port = free_port()
        self.socket = directory / "redis.sock"
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._log = directory / "redis.log"
        lines = {
            "bind": "127.0.0.1",
            "port": str(self.port),
            "unixsocket": str(self.socket),
            "dir": str(directory),
            "save": '""',
            "appendonly": "no",
            "daemonize": "no",
            "logfile": str(self._log),
            **settings,
        }
        if settings.get("cluster-enabled") == "yes":
            lines["cluster-port"] = str(free_port())  # 10,000 above the other one there may be none
        self._configuration = directory / "redis.conf"
        self._configuration.write_text("".join(f"{name} {value}\n" for name, value in lines.items()), encoding="utf-8")
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def pid(self) -> int:
        """The id of the process."""
        assert self._process is not None, "it was ended"
        return self._process.pid

    def start(self) -> None:
        """Start it, at the same port each time, and wait for its answer."""
        assert self._process is None
        self._process = subprocess.Popen(
            [self._program, str(self._configuration)], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        _running.add(self)
        end = time.monotonic() + _PATIENCE
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > end:
                self.kill()
                pytest.fail(f"redis-server did not start:\n{self._log.read_text(encoding='utf-8')}", pytrace=False)
            time.sleep(0.005)

    def _answers(self) -> bool:
        try:
            return self.ask("PING").startswith(b"+PONG")
        except OSError:
            return False

    def ask(self, *command: str) -> bytes:
        """Give it a command by a connection of its own; tell the beginning of what it answers, undecoded."""
        with socket.create_connection(("127.0.0.1", self.port), 1.0) as connection:
            words = [word.encode() for word in command]
            connection.sendall(b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(it), it) for it in words))
            return connection.recv(1 << 16)

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
        return f"RedisProcess({self.url})"


@atexit.register
def _end_all() -> None:
    for server in tuple(_running):
        server.kill()
