"""What every test may rely on: real daemons in processes of their own, certificates, and patience with a limit."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

import looptime
import pytest
import trustme

if TYPE_CHECKING:
    from collections.abc import Awaitable

PATIENCE = 20.0
"""Seconds after which a condition that should come true at once is taken as never coming true."""


P = ParamSpec("P")


def virtual_time(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run a test on an event loop whose clock jumps to whatever is waited for next; real time does not pass."""

    @wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        with asyncio.Runner(loop_factory=looptime.new_event_loop) as runner:
            runner.run(test(*args, **kwargs))

    return run


async def eventually(condition: Callable[[], object], what: str = "the condition") -> None:
    """Let the loop run until the condition holds; fail after PATIENCE seconds."""
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.001)
    assert condition(), what


@dataclass
class DaemonProcess:
    """A reference daemon in a process of its own."""

    process: subprocess.Popen[bytes]
    url: str
    root: Path

    def kill(self) -> None:
        """End it without a warning, as the kernel would."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(PATIENCE)


StartDaemon = Callable[..., DaemonProcess]


@pytest.fixture
def start_daemon(tmp_path: Path) -> Iterator[StartDaemon]:
    """Start daemons over one directory of cached files; all are gone when the test ends."""
    started: list[subprocess.Popen[bytes]] = []
    root = tmp_path / "cache"
    root.mkdir()

    def start(*options: str, env: dict[str, str] | None = None) -> DaemonProcess:
        command = [sys.executable, "-m", "pybustcall", "daemon", "--root", str(root), "--port", "0", "--json", *options]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("BUSTCALL_")}
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**inherited, **(env or {})}
        )
        started.append(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, f"the daemon ended with {process.wait(PATIENCE)} before it listened"
        return DaemonProcess(process, json.loads(line)["url"], root)

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
    for process in started:
        process.wait(PATIENCE)
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture
def start_brisk(start_daemon: StartDaemon, tmp_path: Path) -> StartDaemon:
    """Start daemons whose heartbeat of events is short, for what waits for one."""
    settings = tmp_path / "brisk.toml"
    settings.write_text("[events]\nheartbeat = 0.1\n")
    return partial(start_daemon, "--config", str(settings))


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    """A directory for the files of a page cache."""
    root = tmp_path / "pages"
    root.mkdir()
    return root


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    """A certificate authority of our own."""
    return trustme.CA()


@pytest.fixture
def server_tls(authority: trustme.CA) -> ssl.SSLContext:
    """A server's TLS context with a certificate for 127.0.0.1."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    return context


@pytest.fixture
def ca_file(authority: trustme.CA, tmp_path: Path) -> Path:
    """The authority's certificate as a PEM file."""
    path = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    return path


async def read_request(reader: asyncio.StreamReader) -> bytes:
    """Read one HTTP request with a Content-Length, head and body."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(
        (int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")), 0
    )
    return head + await reader.readexactly(length)


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Wait, outside a loop, until the condition holds; fail after PATIENCE seconds."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.005)


if TYPE_CHECKING:
    Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
