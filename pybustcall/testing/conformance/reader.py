"""A stream of events as one reader is told it, and what each event must be after those before."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final

from pydantic import ValidationError

from pybustcall.models import StreamedBust, StreamedLive, StreamedReset, explain
from pybustcall.sse import BrokenStream, StreamParser
from pybustcall.testing.conformance.checking import Model, Silent, Unmet

if TYPE_CHECKING:
    import aiohttp

    from pybustcall.sse import Block

__all__ = ["Stream", "Told"]

_PLACE: Final = re.compile(r"([!-~]{1,200})-([0-9]{1,19})")
_SOON: Final = 2.0  # seconds after the answer to a bust, in which its event, which was sent before, has arrived


@final
@dataclass(frozen=True, slots=True)
class Told:
    """A bust as a stream told of it."""

    number: int
    bust: StreamedBust


@final
class Stream:
    """What one reader of events is told. Each event must be one that can come after those before.

    - `whose`: what the targets begin with that it keeps; everything else is somebody else's, or of another check, but
      for busts of everything in one of the `namespaces`
    - `patience`: seconds until it must be live

    `told` are the busts so far, as often as each was told; `place` is the last id, of `epoch` and `number`. `first`
    is what the stream began with; `reset` is the data of a reset that came, with the number `reset_at`, `live` what it
    said when it was live, and `missed` what it told before that. `beats` is how often it said something else.
    """

    def __init__(self, content: aiohttp.StreamReader, whose: str, namespaces: tuple[str, ...], patience: float) -> None:
        self.told: list[Told] = []
        self.missed: tuple[Told, ...] = ()
        self.first = ""
        self.reset: str | None = None
        self.live: StreamedLive | None = None
        self.epoch = ""
        self.number = self.reset_at = -1
        self.beats = 0
        self._dates: list[float] = []
        self._begun = _now()
        self._content = content
        self._whose = whose
        self._namespaces = namespaces
        self._patience = patience
        self._parser = StreamParser()

    @property
    def place(self) -> str:
        """The last id."""
        return f"{self.epoch}-{self.number}"

    @property
    def targets(self) -> list[str]:
        """What was busted, each once, in the order in which it was told first."""
        return list(dict.fromkeys(one.bust.target for one in self.told))

    async def begin(self, *, forgets: bool = False) -> None:
        """Read until it is live; `forgets`: that begins with a reset."""
        until = _now() + self._patience
        while self.live is None:
            await self._read(until, "it is live")
        if self.reset is not None and not forgets:
            raise Unmet("it has a reader forget everything who has missed little or nothing")
        if self.first != "reset" and forgets:
            raise Unmet(f"a stream begins with {self.first}, not with reset")

    async def until(self, target: str) -> StreamedBust:
        """Read until a bust of a target is told, which was answered by now; tell how that was put first."""
        until = _now() + _SOON
        while target not in self.targets:
            await self._read(until, "a bust is told that was answered")
        return next(one.bust for one in self.told if one.bust.target == target)

    async def until_place(self, number: int, seconds: float) -> None:
        """Read until an id says that everything up to a number was told."""
        until = _now() + seconds
        while self.number < number:
            await self._read(until, "it says how far it is")

    async def _read(self, until: float, what: str) -> None:
        try:
            async with asyncio.timeout_at(until):
                piece = await self._content.readany()
        except TimeoutError:
            raise Silent(f"a stream of events says nothing more before {what}") from None
        if not piece:
            raise Unmet("it ends a stream of events whose reader is there")
        try:
            for block in self._parser.feed(piece):
                self._take(block)
        except BrokenStream as broken:
            raise Unmet(f"its stream of events is none: {broken}") from broken

    def _take(self, block: Block) -> None:
        if block.at is not None:
            self._date(block.at)
        known = block.data is not None and block.name in {"bust", "reset", "live"}
        if known or block.id:
            self._move(block.name if known else "", block.id)
        if not known:
            self.beats += 1  # or an event of a later version
            return
        self.first = self.first or block.name
        data = block.data or ""
        if block.name == "bust":
            told = Told(self.number, _understood(StreamedBust, block.name, data))
            of_all = told.bust.kind == "all" and told.bust.namespace in self._namespaces
            if of_all or told.bust.target.startswith(self._whose):
                self.told.append(told)
        elif block.name == "reset":
            _understood(StreamedReset, block.name, data)
            self.reset, self.reset_at = data, self.number
        else:
            self.live = _understood(StreamedLive, block.name, data)
            self.missed = tuple(self.told)

    def _date(self, at: float) -> None:
        """Take in a date, which must be of a clock that goes on as ours does, however it is set."""
        self._dates.append(at)
        first, last = self._dates[0], self._dates[-2:][0]
        if at < last:
            raise Unmet("its dates go back")
        if at - first > _now() - self._begun + _SOON:
            raise Unmet(f"its dates went on by {at - first:.0f} s in {_now() - self._begun:.0f} s")

    def _move(self, name: str, place: str) -> None:
        found = _PLACE.fullmatch(place)
        if found is None:
            raise Unmet(f"an event {name} has the id {place[:40]!r}, which is not EPOCH-NUMBER".replace("  ", " "))
        epoch, number = found[1], int(found[2])
        if self.epoch and epoch != self.epoch and name != "reset":
            raise Unmet("its events go over to another epoch, and it does not say reset")
        if epoch == self.epoch and (number < self.number or (name == "bust" and number == self.number)):
            raise Unmet(f"the number of an event is {number} after {self.number}; numbers must rise")
        self.epoch, self.number = epoch, number


def _now() -> float:
    return asyncio.get_running_loop().time()


def _understood(model: type[Model], name: str, data: str) -> Model:
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        field_name, why = explain(error)
        raise Unmet(f"an event {name} cannot be read: {field_name or 'its data'}: {why}") from error
