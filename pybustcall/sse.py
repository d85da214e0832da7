"""Server-sent events, read from bytes: a parser that does no input or output itself.

It decides what is an event and where it ends (WHATWG HTML, section 9.2.6), and how long one may be. What an event means
is decided by `events`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, final

__all__ = ["MAX_EVENT_BYTES", "Block", "BrokenStream", "StreamParser"]

MAX_EVENT_BYTES: Final = 2 * 1024 * 1024
"""How long an event of a stream may be; a longer one is a protocol violation."""

_LINE_END: Final = re.compile(rb"\r\n?|\n")
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
_TIME: Final = re.compile(r"[0-9]{1,12}(\.[0-9]{1,9})?")


class BrokenStream(Exception):
    """What came is no stream of events; the text says why."""


@final
@dataclass(frozen=True, slots=True)
class Block:
    """An event as it came: its name, its data, and the last id until then. Without data it says only the id.

    `at`: when it was written, by the writer's clock, in seconds; None if that is not said. It is a field of ours, which
    other readers ignore, as they must.
    """

    name: str
    data: str | None
    id: str
    at: float | None = None


@final
class StreamParser:
    """Reads server-sent events from bytes, in whatever pieces they come.

    It is stricter than a browser: text that is no UTF-8 is no text, and an event has at most `most` bytes.
    """

    def __init__(self, most: int = MAX_EVENT_BYTES) -> None:
        self._most = most
        self._begun: list[bytes] = []  # of a line whose end has not come
        self._size = 0  # of that line, and of the event so far
        self._after_return = False  # a line feed now belongs to the line that has ended
        self._is_first = True
        self._name = ""
        self._data: list[str] = []
        self._id = ""
        self._at: float | None = None

    def feed(self, chunk: bytes) -> list[Block]:
        """Take in what came; tell the events that are complete by that. Raises `BrokenStream`."""
        if not chunk:
            return []
        if self._after_return and chunk.startswith(b"\n"):
            chunk = chunk[1:]
        self._after_return = chunk.endswith(b"\r") if chunk else False
        *lines, rest = _LINE_END.split(chunk)
        found: list[Block] = []
        for line in lines:
            self._grow(len(line))
            self._begun.append(line)
            whole = b"".join(self._begun)
            self._begun.clear()
            if self._is_first:
                self._is_first = False
                whole = whole.removeprefix(_BYTE_ORDER_MARK)
            if (block := self._end_line(whole)) is not None:
                found.append(block)
        if rest:
            self._grow(len(rest))
            self._begun.append(rest)
        return found

    def _grow(self, size: int) -> None:
        self._size += size
        if self._size > self._most:
            raise BrokenStream(f"it has an event longer than {self._most} bytes")

    def _end_line(self, line: bytes) -> Block | None:
        if not line:
            return self._end_event()
        if line.startswith(b":"):
            return None
        try:
            field, _, value = line.decode().partition(":")
        except UnicodeDecodeError:
            raise BrokenStream("it has text that is not UTF-8") from None
        value = value.removeprefix(" ")
        if field == "event":
            self._name = value
        elif field == "data":
            self._data.append(value)
        elif field == "id" and "\0" not in value:
            self._id = value
        elif field == "at" and _TIME.fullmatch(value):
            self._at = float(value)
        return None

    def _end_event(self) -> Block:
        name, data = self._name, "\n".join(self._data) if self._data else None
        at, self._at = self._at, None
        self._name = ""
        self._data.clear()
        self._size = 0
        return Block(name, data, self._id, at)
