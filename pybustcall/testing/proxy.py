"""A TCP proxy on loopback that stands between a client and a daemon, and troubles what passes as it is told.

It decides nothing about HTTP: it forwards bytes late, slowly, falsified, in part or not at all, and ends connections in
the ways in which networks and killed processes end them. What a client makes of that is for the tests to say.

Theory of operation. Each accepted connection is a `_Link` of two sides, the client's and the daemon's, and of two
flows, one each way. A flow is a queue of what has arrived. All of it is plain callbacks: whenever something changes
(bytes, room to write, a timer, a new trouble), `_Link.update` looks at the trouble of that moment and forwards what is
due, so that a trouble takes hold of living connections at once and lets go of them at once. Only making the connection
to the daemon takes a task.
"""

from __future__ import annotations

import asyncio
import math
import socket
import struct
from collections import deque
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Final, Self, cast, final
from urllib.parse import urlsplit

from pybustcall.errors import ConfigurationError
from pybustcall.policies import check_seconds
from pybustcall.topology import DaemonAddress

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["FaultyProxy", "Trouble", "loopback_socket"]

_LOOPBACK: Final = "127.0.0.1"
_BACKLOG: Final = 128
_MOST: Final = 256 * 1024  # bytes of one flow that are held; a sender of more has to wait
_SLICES: Final = 50  # a second: how finely a bandwidth is dealt out
_ABRUPT: Final = struct.pack("ii", 1, 0)  # SO_LINGER on, for 0 s: closing sends RST


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """What a `FaultyProxy` does to connections. The default is no trouble at all; fields can be combined.

    - `refuse`: new connections are refused; living ones are left alone
    - `reset`: living connections are reset (RST) at once, new ones as soon as they are accepted
    - `stall`: a black hole: connections are accepted and kept, and nothing passes either way, not even their end
    - `half_open`: the connection to the daemon dies, and the client is told nothing; after healing, the client's next
      byte is answered with a reset, as by a machine that was restarted
    - `latency`: seconds that everything takes, each way; `jitter`: up to so many seconds more, at random
    - `bandwidth`: bytes per second, each way and for each connection; None for no limit
    - `drip`: seconds between two bytes of the answer
    - `truncate`: the connection is closed after this many bytes of the answer, heads included; with 0 when the
      answer comes, so that what was asked was done and nobody hears of it
    - `close_after`: the same after this many bytes of the request
    - `abrupt`: `truncate` and `close_after` end with a reset (RST) instead of an orderly close (FIN)
    - `garbage`: every byte of the answer becomes a random one

    Bytes are counted, on each connection, from when the trouble began. Raises `ConfigurationError` for times that are
    none, and for counts below 0.
    """

    refuse: bool = False
    reset: bool = False
    stall: bool = False
    half_open: bool = False
    latency: float = 0.0
    jitter: float = 0.0
    bandwidth: float | None = None
    drip: float = 0.0
    truncate: int | None = None
    close_after: int | None = None
    abrupt: bool = False
    garbage: bool = False

    def __post_init__(self) -> None:
        for name in ("latency", "jitter", "drip"):
            check_seconds(getattr(self, name), name, zero=True)
        if self.bandwidth is not None and not 0 < self.bandwidth < math.inf:
            raise ConfigurationError(
                f"bandwidth must be above 0 bytes per second, not {self.bandwidth!r}; stall=True lets nothing pass",
                setting="bandwidth",
            )
        for name in ("truncate", "close_after"):
            count = getattr(self, name)
            if count is not None and (type(count) is not int or count < 0):
                raise ConfigurationError(f"{name} must be a number of bytes from 0, not {count!r}", setting=name)

    def piece(self, size: int, *, answer: bool) -> tuple[int, float]:
        """Tell how many of `size` bytes may pass at once, and for how many seconds none may after them."""
        if answer and self.drip:
            return 1, self.drip
        if self.bandwidth is None:
            return size, 0.0
        count = min(size, max(1, int(self.bandwidth / _SLICES)))
        return count, count / self.bandwidth


_HEALTHY: Final = Trouble()


def loopback_socket(port: int = 0) -> socket.socket:
    """Make a socket bound to a port of loopback (0: any free one) that does not listen: connections are refused there.

    So a port is kept from being given to others while nobody serves on it.
    """
    kept = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        kept.bind((_LOOPBACK, port))
        kept.setblocking(False)
    except BaseException:
        kept.close()
        raise
    return kept


@final
class FaultyProxy:
    """Forwards connections on loopback to a daemon while its `async with` block lasts, with the trouble it is told.

    - `upstream`: URL of the daemon; set it to that of another (of the same scheme) to send new connections there
    - `trouble`: what is wrong; set it at any time, `heal()` ends it
    - `seed`: of everything random

    `url` is where clients find it; it stays the same, also while connections are refused. TLS passes through
    untouched. `connections` counts those accepted so far, `bytes_up` and `bytes_down` what was forwarded to the daemon
    and to clients. A daemon that cannot be reached makes a connection that is reset. Raises `ConfigurationError` for an
    upstream that is no daemon's URL.
    """

    def __init__(self, upstream: str, *, trouble: Trouble = _HEALTHY, seed: int = 0) -> None:
        self._upstream = DaemonAddress.parse(upstream, setting="upstream")
        self._trouble = trouble
        self._seed = seed
        self._door: socket.socket | None = None
        self._listening = False
        self._links: set[_Link] = set()
        self._empty = asyncio.Event()
        self._empty.set()
        self._passable = asyncio.Event()
        self._port = 0
        self.connections = 0
        self.bytes_up = 0
        self.bytes_down = 0

    @property
    def url(self) -> str:
        """Where clients find it: the daemon's URL with another host and port. Empty before the block is entered."""
        if not self._port:
            return ""
        address = self._upstream
        scheme = "http" if address.socket_path is not None else address.scheme
        return f"{scheme}://{_LOOPBACK}:{self._port}{urlsplit(address.base).path}"

    @property
    def upstream(self) -> str:
        """URL of the daemon that new connections go to."""
        return self._upstream.url

    @upstream.setter
    def upstream(self, url: str) -> None:
        self._upstream = DaemonAddress.parse(url, setting="upstream")

    @property
    def trouble(self) -> Trouble:
        """What is wrong now. What is set holds for new connections, and at once for living ones."""
        return self._trouble

    @trouble.setter
    def trouble(self, trouble: Trouble) -> None:
        self._trouble = trouble
        if self._door is not None:
            self._door = self._obey(self._door)

    @property
    def open_connections(self) -> int:
        """How many accepted connections are not closed yet."""
        return len(self._links)

    def heal(self) -> None:
        """End the trouble: what was held back passes now, and connections are accepted again."""
        self.trouble = _HEALTHY

    def drop_connections(self) -> None:
        """Reset every living connection, once."""
        for link in tuple(self._links):
            link.end(abrupt=True)

    def __repr__(self) -> str:
        return f"<FaultyProxy {self.url or 'closed'} to {self.upstream}, {len(self._links)} open, {self._trouble}>"

    async def __aenter__(self) -> Self:
        door = loopback_socket()
        self._port = door.getsockname()[1]
        self._door = self._obey(door)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Everything is told to end before the first await: a cancellation in the middle leaves only the waiting undone.
        if self._door is not None:
            self._refuse(self._door)
            self._door.close()
            self._door = None
        self.drop_connections()
        for link in tuple(self._links):
            link.abort()  # one that was ending already may still wait for a client that does not read
        await self._empty.wait()

    def _obey(self, door: socket.socket) -> socket.socket:
        """Make the door and every living connection follow the trouble; return the door, which may be another."""
        if self._trouble.refuse and self._listening:
            self._refuse(door)
            door.close()
            door = loopback_socket(self._port)
        elif not self._trouble.refuse and not self._listening:
            door.listen(_BACKLOG)
            asyncio.get_running_loop().add_reader(door.fileno(), self._accept, door)
            self._listening = True
        if self._trouble.stall:
            self._passable.clear()
        else:
            self._passable.set()
        for link in tuple(self._links):
            link.begin()
        return door

    def _refuse(self, door: socket.socket) -> None:
        if self._listening:
            asyncio.get_running_loop().remove_reader(door.fileno())
            self._listening = False

    def _accept(self, door: socket.socket) -> None:
        try:
            accepted, _ = door.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return  # it was gone again before its turn
        self.connections += 1
        if self._trouble.reset:
            accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABRUPT)
            accepted.close()
            return
        accepted.setblocking(False)
        self._empty.clear()
        self._links.add(_Link(self, accepted, f"{self._seed}:{self.connections}"))

    async def _connect(self, link: _Link, accepted: socket.socket) -> None:
        """Join an accepted connection to one to the daemon; while everything stalls, the daemon is not asked."""
        loop = asyncio.get_running_loop()
        await loop.connect_accepted_socket(lambda: link.client, accepted)
        if link.over or link.orphaned:
            return
        link.asking = True
        await self._passable.wait()
        address = self._upstream
        if address.socket_path is not None:
            await loop.create_unix_connection(lambda: link.daemon, address.socket_path)
        else:
            port = urlsplit(address.base).port or (443 if address.is_encrypted else 80)
            await loop.create_connection(lambda: link.daemon, address.host, port)

    def _forget(self, link: _Link) -> None:
        self._links.discard(link)
        if not self._links:
            self._empty.set()


@final
class _Side(asyncio.Protocol):
    """One end of a link: the connection to the client, or the one to the daemon."""

    def __init__(self, link: _Link) -> None:
        self._link = link
        self._transport: asyncio.Transport | None = None
        self._room = True

    @property
    def open(self) -> bool:
        """Whether there is a connection, even if it is about to end."""
        return self._transport is not None

    @property
    def writer(self) -> asyncio.Transport | None:
        """What to write to, if it takes bytes now."""
        transport = self._transport
        return transport if transport is not None and self._room and not transport.is_closing() else None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        if self._link.over:
            self.close(abrupt=True)  # it came too late
        else:
            self._link.update()
            asyncio.get_running_loop().call_soon(self._pause_again)

    def _pause_again(self) -> None:
        """Pause once more what was paused when it was made: Python before 3.11.4 begins to read in spite of that."""
        transport = self._transport
        if transport is not None and not transport.is_closing() and not transport.is_reading():
            transport.resume_reading()
            transport.pause_reading()

    def data_received(self, data: bytes) -> None:
        self._link.received(self, data)

    def eof_received(self) -> bool:
        self._link.received(self, b"")
        return True  # the other way stays open

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - whatever it was, it is lost
        self._transport = None
        self._link.lost(self)

    def pause_writing(self) -> None:
        self._room = False

    def resume_writing(self) -> None:
        self._room = True
        self._link.update()

    def read(self, wanted: bool) -> None:
        """Take bytes in, or leave them where they are."""
        transport = self._transport
        if transport is None or transport.is_closing() or transport.is_reading() is wanted:
            return
        if wanted:
            transport.resume_reading()
        else:
            transport.pause_reading()

    def close(self, *, abrupt: bool) -> None:
        """End the connection in order (FIN, after what was written) or abruptly (RST)."""
        if self._transport is None:
            return
        if abrupt:
            self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABRUPT)
            self._transport.abort()
        else:
            self._transport.close()


@final
class _Flow:
    """One way through a link: what has arrived from `source` and is to go to `sink`."""

    def __init__(self, link: _Link, proxy: FaultyProxy, source: _Side, sink: _Side, seed: str) -> None:
        self.source = source
        self.sink = sink
        self.ended = False
        self._link = link
        self._proxy = proxy
        self._random = Random(f"{seed}:{source is link.daemon}")  # noqa: S311 - to be repeated, not to be secret
        self._queue: deque[tuple[float, float, memoryview]] = deque()  # when it arrived, its luck from 0 to 1, bytes
        self._held = 0
        self._passed = 0
        self._next = 0.0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def full(self) -> bool:
        """Whether so much is held that no more is read."""
        return self._held >= _MOST

    def begin(self) -> None:
        """Count anew: another trouble has begun."""
        self._passed = 0
        self._next = 0.0

    def take(self, data: bytes) -> None:
        """Take in what has arrived; no bytes are the end."""
        self._held += len(data)
        self._queue.append((asyncio.get_running_loop().time(), self._random.random(), memoryview(data)))

    def drop(self) -> None:
        """Forget what is held."""
        self._wake_never()
        self._queue.clear()
        self._held = 0

    def pump(self) -> None:
        """Forward what is due, and come back when more is."""
        self._wake_never()
        loop = asyncio.get_running_loop()
        trouble = self._proxy.trouble
        while self._queue and not trouble.stall and (writer := self.sink.writer) is not None:
            arrived, luck, data = self._queue[0]
            now = loop.time()
            due = max(arrived + trouble.latency + luck * trouble.jitter, self._next)
            if due > now:
                self._timer = loop.call_at(due, self._link.update)
                return
            self._queue.popleft()
            if not data:
                self._finish(writer)
                return
            count, pause = trouble.piece(len(data), answer=self.source is self._link.daemon)
            if count < len(data):
                self._queue.appendleft((arrived, luck, data[count:]))
            self._held -= count
            self._next = now + pause
            if self._forward(writer, bytes(data[:count]), trouble):
                self._link.end(abrupt=trouble.abrupt)
                return

    def _finish(self, writer: asyncio.Transport) -> None:
        """Pass on that no more will come; where that cannot be said any more, the connection is broken."""
        self.ended = True
        try:
            writer.write_eof()
        except OSError:
            self._link.end(abrupt=True)

    def _forward(self, writer: asyncio.Transport, data: bytes, trouble: Trouble) -> bool:
        """Write bytes, as far as the trouble lets them; tell whether it ends the link there."""
        answer = self.source is self._link.daemon
        limit = trouble.truncate if answer else trouble.close_after
        ends = limit is not None and self._passed + len(data) >= limit
        if limit is not None:
            data = data[: limit - self._passed]
        if data:
            self._passed += len(data)
            if answer:
                self._proxy.bytes_down += len(data)
            else:
                self._proxy.bytes_up += len(data)
            writer.write(self._random.randbytes(len(data)) if answer and trouble.garbage else data)
        return ends

    def _wake_never(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


@final
class _Link:
    """One accepted connection and the one to the daemon that belongs to it.

    - `over`: it was told to end; its sides may still be about to
    - `orphaned`: its daemon's side is dead, and its client does not know (`Trouble.half_open`)
    - `asking`: its client's side stands, and the daemon's turn has come
    """

    def __init__(self, proxy: FaultyProxy, accepted: socket.socket, seed: str) -> None:
        self.over = False
        self.orphaned = False
        self.asking = False
        self.client = _Side(self)
        self.daemon = _Side(self)
        self._proxy = proxy
        self._up = _Flow(self, proxy, self.client, self.daemon, seed)
        self._down = _Flow(self, proxy, self.daemon, self.client, seed)
        self._connecting = asyncio.create_task(self._connect(accepted))
        self._connected = False

    async def _connect(self, accepted: socket.socket) -> None:
        try:
            await self._proxy._connect(self, accepted)  # noqa: SLF001 - its own
        except OSError:
            self.end(abrupt=True)
        finally:
            self._connected = True
            self._settle()

    def begin(self) -> None:
        """Follow a new trouble."""
        for flow in (self._up, self._down):
            flow.begin()
        self.update()

    def update(self) -> None:
        """Do what can be done now."""
        trouble = self._proxy.trouble
        if trouble.reset:
            self.end(abrupt=True)
        elif trouble.half_open:
            self._lose_daemon()
        for flow in (self._up, self._down):
            if not self.over and not self.orphaned:
                flow.pump()
        if self._up.ended and self._down.ended:
            self.end(abrupt=False)
        deaf = trouble.stall or trouble.half_open
        for flow in (self._up, self._down):
            flow.source.read(not deaf and not flow.full)

    def received(self, side: _Side, data: bytes) -> None:
        """Take in what a side has sent; no bytes are its end."""
        if self.orphaned:
            self.end(abrupt=bool(data))
            return
        (self._up if side is self.client else self._down).take(data)
        self.update()

    def lost(self, side: _Side) -> None:
        """End the link, since one side has ended; a reset of the one is a reset of the other."""
        if side is self.client or not self.orphaned:
            self.end(abrupt=True)
        self._settle()

    def end(self, *, abrupt: bool) -> None:
        """End both sides, in order or abruptly. Once told to end, it stays told."""
        if self.over:
            return
        self.over = True
        self._stop()
        for side in (self.client, self.daemon):
            side.close(abrupt=abrupt)

    def abort(self) -> None:
        """End both sides at once, whatever they still have to write."""
        for side in (self.client, self.daemon):
            side.close(abrupt=True)

    def _lose_daemon(self) -> None:
        if not self.over and not self.orphaned:
            self.orphaned = True
            self._stop()
            self.daemon.close(abrupt=True)

    def _stop(self) -> None:
        """Forward nothing more, and connect no more."""
        for flow in (self._up, self._down):
            flow.drop()
        if self.asking:  # before that, cancelling would close the client's side
            self._connecting.cancel()

    def _settle(self) -> None:
        if self.over and self._connected and not self.client.open and not self.daemon.open:
            self._proxy._forget(self)  # noqa: SLF001 - its own
