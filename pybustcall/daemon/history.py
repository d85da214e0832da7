"""The faults that the daemon met lately, as its status tells them.

This module decides how many are kept, what is counted as one, and how they are stamped. What is a fault, and what it
weighs, is decided where it happens; messages come without whole targets. Where they outlive the process, and when they
are written there, is the shelf's affair: the journal is one.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Protocol, final

from pybustcall.faults import check_stage
from pybustcall.models import FaultRecord, Timestamp

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Fault", "FaultHistory", "Shelf"]

_UNKNOWN: Final = "unknown"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A fault, and its `place` in the order of all, which no other has. A denial may stand for several.

    `at` and `first` are nanoseconds since the Unix epoch: when the last of the `times` was, and the first. `namespace`
    is the only one that it concerns, whose tenant may be told of it; None is told to no tenant.
    """

    place: int
    stage: int
    message: str
    binding: str = _UNKNOWN
    at: int
    first: int
    times: int = 1
    denial: bool = False
    namespace: str | None = None

    def joined(self, other: Fault | None) -> Fault:
        """Count this one and another, like it, as one: the newer, as often as both."""
        if other is None:
            return self
        newer = max(self, other, key=lambda it: it.place)
        return replace(newer, first=min(self.first, other.first), times=self.times + other.times)

    def told(self) -> FaultRecord:
        """Tell it as the status does."""
        message = self.message
        if self.times > 1:
            message = f"{message} ({self.times} times since {Timestamp.of_nanoseconds(self.first)})"
        at = Timestamp.of_nanoseconds(self.at)
        return FaultRecord(timestamp=at, binding=self.binding, fault_stage=self.stage, message=message)


class Shelf(Protocol):
    """Where faults outlive the process. Neither change waits, and neither fails."""

    @property
    def faults(self) -> tuple[Fault, ...]:
        """All that is there, in the order of their places."""

    def put_fault(self, fault: Fault) -> None:
        """Have one more, or another one in its place."""

    def drop_fault(self, place: int) -> None:
        """Have none in that place any more."""


@final
class FaultHistory:
    """The newest `limit` faults, and beside them the newest `limit` denials, oldest first.

    Anybody can have faults recorded, as many as they like. So denials have a room of their own, in which those that are
    equal in message, binding and namespace are one, with a count and the time of the last. If that is too many, the
    oldest no longer tell their binding: messages are few, so every denial is counted somewhere.

    `clock` tells nanoseconds since the Unix epoch. What is kept is forgotten with the process, unless `attach` is
    called.
    """

    def __init__(self, limit: int = 256, *, clock: Callable[[], int] = time.time_ns) -> None:
        if limit < 1:
            raise ValueError(f"a fault history keeps at least 1 fault, not {limit!r}")
        self._limit = limit
        self._faults: deque[Fault] = deque()
        self._denials: dict[tuple[str, str, str | None], Fault] = {}  # by message, binding and namespace
        self._next = 0
        self._clock = clock
        self._shelf: Shelf | None = None

    def attach(self, shelf: Shelf) -> None:
        """Take up what is on the shelf, and have it keep what is here from now on: all that is, and comes, and goes.

        What was recorded before comes after what is on the shelf. To be called once, when the shelf is open.
        """
        own = self._kept()
        there = shelf.faults
        self._faults.clear()
        self._denials.clear()
        self._shelf = shelf
        for fault in there:
            self._next = max(self._next, fault.place + 1)
            self._keep(fault, known=True)
        for fault in own:
            self._keep(replace(fault, place=self._take_place()))

    def record(
        self,
        stage: int,
        message: str,
        *,
        binding: str = _UNKNOWN,
        denial: bool = False,
        namespace: str | None = None,
    ) -> None:
        """Keep one fault, as above. Raises ValueError for a stage outside 0..12."""
        check_stage(stage)
        now = self._clock()
        self._keep(
            Fault(
                place=self._take_place(),
                stage=stage,
                message=message,
                binding=binding,
                at=now,
                first=now,
                denial=denial,
                namespace=namespace,
            )
        )

    def _take_place(self) -> int:
        place = self._next
        self._next += 1
        return place

    def _keep(self, fault: Fault, *, known: bool = False) -> None:
        """Keep one; it is `known` if the shelf has it, as it is."""
        if not fault.denial:
            self._faults.append(fault)
            if not known:
                self._put(fault)
            while len(self._faults) > self._limit:
                self._drop(self._faults.popleft())
            return
        self._count(fault, known=known)
        while len(self._denials) > self._limit:
            self._fold()

    def _count(self, denial: Fault, *, known: bool = False) -> None:
        """Keep a denial; if there are like ones, as one with them, in the newer one's place."""
        key = _key_of(denial)
        like = self._denials.get(key)
        kept = denial.joined(like)
        self._denials[key] = kept
        if like is not None:
            self._drop(min(like, denial, key=lambda it: it.place))
        if like is not None or not known:
            self._put(kept)

    def _fold(self) -> None:
        """Count the oldest denial that tells a binding among those like it that tell none."""
        oldest = min(self._denials.values(), key=lambda it: (it.binding == _UNKNOWN, it.place))
        del self._denials[_key_of(oldest)]
        if oldest.binding == _UNKNOWN:
            self._drop(oldest)
        else:
            self._count(replace(oldest, binding=_UNKNOWN))

    def _put(self, fault: Fault) -> None:
        if self._shelf is not None:
            self._shelf.put_fault(fault)

    def _drop(self, fault: Fault) -> None:
        if self._shelf is not None:
            self._shelf.drop_fault(fault.place)

    def _kept(self) -> list[Fault]:
        return sorted((*self._faults, *self._denials.values()), key=lambda it: it.place)

    def records(self, namespace: str | None = None) -> tuple[FaultRecord, ...]:
        """Tell what is kept, in the order in which it happened: all of it, or what concerns one tenant alone."""
        return tuple(it.told() for it in self._kept() if namespace in {None, it.namespace})

    def __len__(self) -> int:
        return len(self._faults) + len(self._denials)

    def __repr__(self) -> str:
        return f"FaultHistory({len(self._faults)} faults, {len(self._denials)} denials, at most {self._limit} of each)"


def _key_of(denial: Fault) -> tuple[str, str, str | None]:
    """Tell by what a denial is counted with others."""
    return denial.message, denial.binding, denial.namespace
