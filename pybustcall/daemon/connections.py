"""The connections of the listening server: how many there are, how long a request's head may take, what is no HTTP.

This module decides what happens to a connection before there is a request, and when there is none. What is answered,
and to whom, is `app`'s affair.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, cast, final

from aiohttp import web

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiohttp import StreamReader

__all__ = ["Connection", "Door"]

_IDLE: Final = 75.0  # seconds that a connection without a request is kept
_LINGER: Final = 2.0  # seconds that the rest of a refused body is read, so that the client gets to read the refusal
_QUIET: Final = 10.0  # seconds between two lines of the log about connections that are too many

_log = logging.getLogger("pybustcall.daemon")


@final
@dataclass(slots=True, kw_only=True)
class Door:
    """Makes the connections of `server`: at most `most` at once, each with `patience` seconds for a request's head.

    `refuse` makes the answer where there is no request to answer: it is given the status.
    """

    server: web.Server
    most: int
    patience: float
    refuse: Callable[[int], web.Response]
    _inside: int = field(default=0, init=False)
    _told: float = field(default=float("-inf"), init=False)

    def __call__(self) -> Connection:
        """Make the protocol of one connection."""
        return Connection(self)

    def enter(self) -> bool:
        """Count a connection in; tell whether there is room for it."""
        if self._inside < self.most:
            self._inside += 1
            return True
        now = asyncio.get_running_loop().time()
        if now - self._told >= _QUIET:
            self._told = now
            _log.warning("more than %d connections at once; further ones are closed", self.most)
        return False

    def leave(self) -> None:
        """Count a connection out."""
        self._inside -= 1


@final
class Connection(web.RequestHandler):
    """One connection. It ends without an answer if it was one too many, or if a head does not arrive in time."""

    __slots__ = ("_body", "_busy", "_door", "_entered", "_timer")

    def __init__(self, door: Door) -> None:
        super().__init__(
            door.server,
            loop=asyncio.get_running_loop(),
            access_log=None,  # type: ignore[arg-type]  # what aiohttp's own runner gives for "none"
            keepalive_timeout=_IDLE,
            lingering_time=_LINGER,
        )
        self._door = door
        self._entered = False
        self._timer: asyncio.TimerHandle | None = None
        self._busy = False
        self._body: StreamReader | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to wait for a head, or close what is one too many."""
        self._entered = self._door.enter()
        if not self._entered:
            cast("asyncio.Transport", transport).abort()
            return
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Make room for another."""
        if self._entered:
            self._entered = False
            self._door.leave()
            self._stop_waiting()
            super().connection_lost(exc)
            if not self._busy and self._body is not None and not self._body.is_eof():
                self._body.feed_eof()  # the answer was given: nobody need wait for the rest

    def data_received(self, data: bytes) -> None:
        """Read on; what arrives between two requests is the beginning of a head, which has its time, too."""
        if not self._entered:
            return
        between = not self._busy and (self._body is None or self._body.is_eof())
        if data and between and self._timer is None:
            self._wait()
        super().data_received(data)

    def begin(self, body: StreamReader | None) -> None:
        """Note that a head is complete, and that its request is being answered."""
        self._stop_waiting()
        self._busy = True
        self._body = body

    def end(self) -> None:
        """Note that the request was answered."""
        self._busy = False

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002 - quotes what was sent
    ) -> web.StreamResponse:
        """Answer what is not HTTP with a problem. Log its kind, and nothing of what was sent."""
        if isinstance(exc, ConnectionError):
            raise exc
        if request.writer.output_size > 0:
            raise ConnectionError("an answer has begun already")
        self.begin(None)
        if status < 500:
            _log.info("what is not HTTP was refused: %s", type(exc).__name__)
        else:
            _log.error("a request failed before its answer: %s", type(exc).__name__)
        response = self._door.refuse(status)
        response.force_close()
        return response

    def log_exception(self, *_args: Any, exc_info: BaseException | None = None, **_more: Any) -> None:
        """Log the kind of an error that ends a connection: its text may quote what was sent."""
        _log.warning("a connection was closed: %s", type(exc_info).__name__)

    def _wait(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._door.patience, self.force_close)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
