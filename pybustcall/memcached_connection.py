"""Connections to one memcached server: a pool for each event loop, a limit for each call, one kind of error.

This module decides how commands get to the server and its answers back. What they say is decided by `memcached_layout`.

Theory of operation. A call sends its commands at once, and has a connection for itself until as many answers have come.
So answers need no names: they come in the order of the commands. Whatever breaks a call off before that, be it the
limit, its caller, or an answer that nobody understands, closes the connection, so that no answer is left for somebody
else. One limit lies over the whole of a call, the wait for a connection included.

What a server refuses ("SERVER_ERROR") is an answer like others, and the connection is sound after it. After "ERROR" and
"CLIENT_ERROR" nobody knows what else it took for a command, and it is closed.

Each new connection first asks for the version: before 1.6.10 the length of a value was told in another way, and values
would be taken for commands.

Connections belong to the event loop in which they were opened. They are closed by `aclose`, or, if the loop ends first,
with the loop: an asynchronous generator stands guard, which `asyncio.run` closes before it closes the loop. After a
fork the child keeps what it inherited, untouched, and opens its own.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections import deque
from typing import TYPE_CHECKING, Final, cast, final
from urllib.parse import urlsplit
from weakref import WeakSet

from pybustcall.errors import BustcallError, ConfigurationError
from pybustcall.memcached_layout import Answer, Command

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from pybustcall.errors import Applied

__all__ = ["LARGEST", "MemcachedServer", "MemcachedUnavailable", "shown_url"]

LARGEST: Final = 64 << 20
"""Bytes of a value that are sent or taken at most. A server takes 1 MB, unless it is told otherwise (-I)."""

_PORT: Final = 11211
_EXPECTED: Final = "it must be memcached://HOST, memcached://HOST:PORT or unix:///PATH"
_LONGEST_LINE: Final = 8192  # bytes
_MOST_LINES: Final = 10_000  # of one answer
_OLDEST: Final = (1, 6, 10)
_VERSION: Final = re.compile(r"(\d{1,4})\.(\d{1,4})\.(\d{1,4})")
_WITH_FLAGS: Final = frozenset({"HD", "NS", "EX", "NF", "EN", "MN"})
_AT_A_LOSS: Final = frozenset({"ERROR", "CLIENT_ERROR"})
_ERRORS: Final = _AT_A_LOSS | {"SERVER_ERROR"}


class MemcachedUnavailable(BustcallError):
    """memcached did not do what it was asked, and whether it was done is unknown, unless `applied` is "no".

    - `whole`: the server as a whole cannot be used now; otherwise it refused this one command
    - `answered`: it said so itself, and did not keep anybody waiting
    - `asked`: it was tried to ask it; otherwise no connection came free, which says nothing of the server
    - `too_large`: the value has more bytes than the server takes
    """

    def __init__(
        self,
        message: str,
        *,
        whole: bool = True,
        answered: bool = False,
        asked: bool = True,
        too_large: bool = False,
        applied: Applied = "maybe",
    ) -> None:
        super().__init__(message, applied=applied)
        self.whole = whole
        self.answered = answered
        self.asked = asked
        self.too_large = too_large


@final
class _Misunderstood(Exception):
    """What the server says is no answer to what it was asked."""


@final
class _Wire(asyncio.Protocol):
    """One connection: commands out, as many answers in."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.closed: asyncio.Future[None] = loop.create_future()
        self._loop = loop
        self._transport: asyncio.Transport
        self._waiter: asyncio.Future[list[Answer]] | None = None
        self._asked: deque[Command] = deque()
        self._answers: list[Answer] = []
        self._lines: list[str] = []
        self._buffer = bytearray()
        self._looked_at = 0  # bytes of the buffer in which no line ends

    @property
    def usable(self) -> bool:
        """Whether it is open, as far as one knows."""
        return not self._transport.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        try:
            self._take_answers()
        except _Misunderstood as error:
            self._asked.clear()
            self._fail(error)
            self.abort()
            return
        if not self._asked and self._waiter is not None:
            waiter, self._waiter = self._waiter, None
            if not waiter.done():
                waiter.set_result(self._answers)

    def eof_received(self) -> bool:
        return False  # what it has not answered by now it will not answer

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(error or ConnectionResetError("it closed the connection"))
        self.closed.set_result(None)

    def abort(self) -> None:
        """Close it at once; whoever waits for answers gets an error."""
        self._transport.abort()

    async def exchange(self, commands: Sequence[Command]) -> list[Answer]:
        """Send commands and tell their answers. If it is broken off, the connection must be closed."""
        if not self.usable:
            raise ConnectionResetError("it closed the connection")
        self._waiter = self._loop.create_future()
        self._asked.extend(commands)
        self._answers = []
        self._transport.writelines([part for command in commands for part in _written(command)])
        return await self._waiter

    def _fail(self, error: Exception) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_exception(error)

    def _take_answers(self) -> None:
        while self._asked and (answer := self._next(self._asked[0])) is not None:
            self._asked.popleft()
            self._answers.append(answer)
        if not self._asked and self._buffer:
            raise _Misunderstood("it says more than it was asked")

    def _next(self, command: Command) -> Answer | None:
        """Take the answer to a command out of the buffer, if it is there as a whole."""
        while (end := self._buffer.find(b"\r\n", self._looked_at)) >= 0:
            if end > _LONGEST_LINE:
                break
            line = self._buffer[:end].decode("ascii", "replace")
            code, _, rest = line.partition(" ")
            if code == "VA":
                return self._value(end + 2, rest)
            del self._buffer[: end + 2]
            self._looked_at = 0
            if code in _WITH_FLAGS:
                return Answer(code, _flags(rest.split()))
            if code in _ERRORS or code == "VERSION":
                return Answer(code, text=line)
            if not command.until:
                raise _Misunderstood("its answer is none that could be")
            if line.encode() == command.until:
                lines, self._lines = self._lines, []
                return Answer(code, text="\n".join(lines))
            self._lines.append(line)
            if len(self._lines) > _MOST_LINES:
                raise _Misunderstood("its answer does not end")
        if len(self._buffer) > _LONGEST_LINE:
            raise _Misunderstood("its answer has no line's end")
        self._looked_at = max(0, len(self._buffer) - 1)
        return None

    def _value(self, begin: int, rest: str) -> Answer | None:
        size, *flags = rest.split() or [""]
        if not size.isdecimal() or int(size) > LARGEST:
            raise _Misunderstood("it tells no length of a value that could be")
        end = begin + int(size)
        if len(self._buffer) < end + 2:
            return None
        if self._buffer[end : end + 2] != b"\r\n":
            raise _Misunderstood("a value is longer than it was told to be")
        value = bytes(memoryview(self._buffer)[begin:end])
        del self._buffer[: end + 2]
        self._looked_at = 0
        return Answer("VA", _flags(flags), value)


def _written(command: Command) -> tuple[bytes, ...]:
    if command.value is None:
        return command.line, b"\r\n"
    return command.line, b"\r\n", command.value, b"\r\n"


def _flags(words: Sequence[str]) -> dict[str, str]:
    return {word[0]: word[1:] for word in words}


@final
class _LoopState:
    """What belongs to one event loop."""

    def __init__(self, most: int) -> None:
        self.slots = asyncio.Semaphore(most)
        self.idle: list[_Wire] = []
        self.open: set[_Wire] = set()
        self.guard = self._stand_guard()

    def take(self) -> _Wire | None:
        """Tell a connection that was used before and is open."""
        while self.idle:
            if (wire := self.idle.pop()).usable:
                return wire
        return None

    def keep(self, wire: _Wire) -> None:
        """Note a connection until it is closed."""
        self.open.add(wire)
        wire.closed.add_done_callback(lambda _: self.open.discard(wire))

    async def _stand_guard(self) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            self.idle.clear()
            for wire in (left := list(self.open)):
                wire.abort()
            if left:
                await asyncio.wait([wire.closed for wire in left])


@final
class MemcachedServer:
    """Runs commands at one server.

    - `url`: memcached://HOST, memcached://HOST:PORT or unix:///PATH
    - `timeout`: seconds that the server has to answer
    - `connect_timeout`: seconds more, where a connection is to be opened first
    - `connections`: how many are open at most, in each event loop; further calls wait

    Raises `ConfigurationError` if a setting cannot be used. Nothing is opened before the first call.
    """

    def __init__(self, url: str, *, timeout: float = 1.0, connect_timeout: float = 1.0, connections: int = 50) -> None:
        for name, value in {"timeout": timeout, "connect_timeout": connect_timeout, "connections": connections}.items():
            if not value > 0:
                raise ConfigurationError(f"{name} must be more than 0, not {value!r}", setting=name)
        self._path, self._host, self._port = _address(url)
        self.where = shown_url(url)
        self._limit = timeout + connect_timeout
        self._connect_timeout = connect_timeout
        self._most = connections
        self._states: dict[asyncio.AbstractEventLoop, _LoopState] = {}
        _SERVERS.add(self)

    def __repr__(self) -> str:
        return f"MemcachedServer({self.where})"

    async def run(self, commands: Sequence[Command]) -> list[Answer]:
        """Run commands, one after the other; tell their answers, none of which is an error.

        Raises `MemcachedUnavailable`; some of them may have been run in spite of it, but for a single one that was
        refused.
        """
        if not commands:
            return []
        self._check_sizes(commands)
        state = await self._state()
        has_turn = False
        try:
            async with asyncio.timeout(self._limit), state.slots:
                has_turn = True
                answers = await self._exchange(state, commands)
        except TimeoutError as error:
            if has_turn:
                raise self._failed(f"it did not answer within {self._limit:g} s") from error
            raise self._failed(
                f"no connection came free within {self._limit:g} s; nothing was sent", asked=False, applied="no"
            ) from None
        except _Misunderstood as error:
            raise self._failed(f"{error}; is it memcached?") from error
        except OSError as error:
            raise self._failed(error.strerror or str(error)) from error
        self._check_answers(answers)
        return answers

    async def aclose(self) -> None:
        """Close what was opened in the running loop. It is opened anew by the next call."""
        state = self._states.pop(asyncio.get_running_loop(), None)
        if state is not None:
            await state.guard.aclose()

    async def _exchange(self, state: _LoopState, commands: Sequence[Command]) -> list[Answer]:
        wire = state.take() or await self._connect(state)
        try:
            answers = await wire.exchange(commands)
        except BaseException:
            wire.abort()
            raise
        if any(answer.code in _AT_A_LOSS for answer in answers):
            wire.abort()
        state.idle.append(wire)
        return answers

    async def _connect(self, state: _LoopState) -> _Wire:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_timeout):
                if self._path:
                    _, wire = await loop.create_unix_connection(_Wire, self._path)
                else:
                    _, wire = await loop.create_connection(_Wire, self._host, self._port)
                state.keep(wire)
                try:
                    (answer,) = await wire.exchange([Command(b"version")])
                    self._check_version(answer)
                except BaseException:
                    wire.abort()
                    raise
        except TimeoutError as error:
            text = f"no connection was made within {self._connect_timeout:g} s; nothing was sent"
            raise self._failed(text, applied="no") from error
        except OSError as error:
            text = f"no connection was made: {error.strerror or error}; nothing was sent"
            raise self._failed(text, applied="no") from error
        return wire

    def _check_version(self, answer: Answer) -> None:
        if answer.code in _ERRORS:
            raise self._failed(f"it refuses connections: {answer.text}", answered=True, applied="no")
        found = _VERSION.search(answer.text)
        if answer.code != "VERSION" or found is None:
            raise _Misunderstood("it does not tell its version")
        if tuple(map(int, found.groups())) < _OLDEST:
            raise self._failed(
                f"its version is {found[0]}, and what it is asked needs {'.'.join(map(str, _OLDEST))} or later; nothing"
                " was sent",
                answered=True,
                applied="no",
            )

    def _check_sizes(self, commands: Sequence[Command]) -> None:
        for command in commands:
            if command.value is not None and len(command.value) > LARGEST:
                text = f"a value of {len(command.value)} bytes is too large, {LARGEST} can be sent; nothing was sent"
                raise self._failed(text, whole=False, answered=True, too_large=True, applied="no")

    def _check_answers(self, answers: Sequence[Answer]) -> None:
        for answer in answers:
            if answer.code in _ERRORS:
                too_large = answer.code == "SERVER_ERROR" and "too large" in answer.text
                raise self._failed(
                    f"it refuses: {answer.text}",
                    whole=not too_large,
                    answered=True,
                    too_large=too_large,
                    applied="no" if len(answers) == 1 else "maybe",
                )

    def _failed(
        self,
        text: str,
        *,
        whole: bool = True,
        answered: bool = False,
        asked: bool = True,
        too_large: bool = False,
        applied: Applied = "maybe",
    ) -> MemcachedUnavailable:
        return MemcachedUnavailable(
            f"{self.where}: {text}", whole=whole, answered=answered, asked=asked, too_large=too_large, applied=applied
        )

    async def _state(self) -> _LoopState:
        loop = asyncio.get_running_loop()
        state = self._states.get(loop)
        if state is None:
            for other in [it for it in list(self._states) if it.is_closed()]:
                self._states.pop(other, None)  # another thread may be at the same
            state = self._states[loop] = _LoopState(self._most)
            await anext(state.guard)  # never suspends; from here on the loop knows the guard
        return state

    def forget_parent(self) -> None:
        """Begin anew in a forked child: keep what was inherited alive and untouched, for as long as the child lives."""
        _INHERITED.append(self._states)
        self._states = {}


_SERVERS: WeakSet[MemcachedServer] = WeakSet()
_INHERITED: list[object] = []
"""What a forked child must neither use nor close, nor let the garbage collector close."""


def _after_fork() -> None:
    for server in list(_SERVERS):
        server.forget_parent()


os.register_at_fork(after_in_child=_after_fork)


def _address(url: str) -> tuple[str, str, int]:
    """Tell the path of a socket, or a host and a port. Raises `ConfigurationError` (setting "url"), not showing it."""
    wrong = ""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise ConfigurationError(f"no URL of a memcached server: {_EXPECTED}", setting="url") from None
    if parts.scheme == "unix" and not parts.netloc and parts.path not in {"", "/"}:
        host, port = "", 0
    elif parts.scheme != "memcached" or not host:
        wrong = _EXPECTED
    elif parts.path not in {"", "/"} or port == 0:
        wrong = "after the host comes at most a port"
    if parts.username is not None or parts.password is not None:
        wrong = "users and passwords are not supported; let the server listen where only those may reach it who may"
    elif parts.query or parts.fragment:
        wrong = "it has no options"
    if wrong:
        raise ConfigurationError(f"no URL of a memcached server: {wrong}", setting="url")
    return ("" if host else parts.path), host, _PORT if port is None else port


def shown_url(url: str) -> str:
    """Write a server's URL without what might be a secret in it."""
    try:
        parts = urlsplit(url)
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname or ""
        port = f":{parts.port}" if parts.port is not None else ""
    except ValueError:
        return "the URL"
    return f"{parts.scheme}://{host}{port}{parts.path}"
