"""Streams of events that a test writes itself, and a listener that notes what a feed tells it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Final

from pybustcall.events import BustEvent, silence
from pybustcall.faults import AttemptFailed, Fault, FaultKind

__all__ = ["BEGUN", "Heard", "Line", "Wire", "dated", "live", "told"]

LONG: Final = 1e6  # seconds

BEGUN = b'id: e-0\nevent: live\ndata: {"heartbeat": 1}\n\n'


def told(number: int, epoch: str = "e") -> bytes:
    """Write an event of a stream."""
    said = f'{{"namespace": "default", "kind": "key", "target": "{epoch}{number}"}}'
    return f"id: {epoch}-{number}\nevent: bust\ndata: {said}\n\n".encode()


def dated(block: bytes, at: float) -> bytes:
    """Date what a daemon writes."""
    return block.removesuffix(b"\n") + f"at: {at:.3f}\n\n".encode()


class Wire:
    """What a daemon sends, connection by connection: bytes, seconds of silence, or a failure."""

    def __init__(self, *connections: Sequence[object]) -> None:
        self.connections = [list(script) for script in connections]
        self.opened: list[tuple[float, str | None]] = []

    @asynccontextmanager
    async def __call__(
        self, path: str, /, *, after: str | None, until: float
    ) -> AsyncIterator[Callable[[], Awaitable[bytes]]]:
        loop = asyncio.get_running_loop()
        self.opened.append((round(loop.time(), 3), after))
        script = self.connections.pop(0) if self.connections else [LONG]
        if script and isinstance(script[0], Fault):
            raise AttemptFailed(script[0])

        async def read() -> bytes:
            while script:
                now = script.pop(0)
                if isinstance(now, bytes):
                    return now
                assert isinstance(now, float | int)
                await asyncio.sleep(now)
            return b""

        yield read


class Heard:
    """A listener that notes what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.changes = 0

    def busted(self, event: BustEvent) -> None:
        self.notes.append(event.target)

    def reset(self, daemon: str, reason: str, *, first: bool) -> None:
        self.notes.append("first" if first else "reset")

    def changed(self) -> None:
        self.changes += 1

    def limit(self, heartbeat: float) -> float:
        return silence(heartbeat, None)


def live(number: int, epoch: str = "e", heartbeat: float = 1) -> bytes:
    """Write that all was told up to there."""
    return f'id: {epoch}-{number}\nevent: live\ndata: {{"heartbeat": {heartbeat}}}\n\n'.encode()


class Line:
    """A daemon whose stream a test writes as it goes: it can be cut, and opened again when the test lets it."""

    def __init__(self) -> None:
        self.opened: list[str | None] = []
        self.is_up = True
        self._sent: asyncio.Queue[bytes] = asyncio.Queue()

    @asynccontextmanager
    async def __call__(
        self, path: str, /, *, after: str | None, until: float
    ) -> AsyncIterator[Callable[[], Awaitable[bytes]]]:
        if not self.is_up:
            raise AttemptFailed(Fault(FaultKind.UNREACHABLE, "http://0", "it is cut", "no"))
        self.opened.append(after)
        self._sent = asyncio.Queue()
        yield self._sent.get

    def say(self, *texts: bytes) -> None:
        """Send something over the connection that is open."""
        self._sent.put_nowait(b"".join(texts))

    def cut(self) -> None:
        """End the connection, and let no other be made."""
        self.is_up = False
        self._sent.put_nowait(b"")
