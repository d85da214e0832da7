"""The faults that the daemon met lately, as its status tells them.

This module decides how many are kept, what is counted as one, and how they are stamped. What is a fault, and what it
weighs, is decided where it happens; messages come without whole targets.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING, Final, final

from pybustcall.faults import check_stage
from pybustcall.models import FaultRecord, Timestamp

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["FaultHistory"]

_UNKNOWN: Final = "unknown"


@final
@dataclass(frozen=True, slots=True)
class _Kept:
    """A fault, and its place in the order of all. One that stands for several tells since when, and how many."""

    place: int
    record: FaultRecord
    first: Timestamp
    times: int = 1

    def joined(self, other: _Kept | None) -> _Kept:
        if other is None:
            return self
        newer = max(self, other, key=lambda it: it.place)
        return replace(newer, first=min(self.first, other.first), times=self.times + other.times)

    def told(self) -> FaultRecord:
        if self.times == 1:
            return self.record
        message = f"{self.record.message} ({self.times} times since {self.first})"
        return self.record.model_copy(update={"message": message})


@final
class FaultHistory:
    """The newest `limit` faults, and beside them the newest `limit` denials, oldest first.

    Anybody can have faults recorded, as many as they like. So denials have a room of their own, in which those that are
    equal in message and binding are one, with a count and the time of the last. If that is too many, the oldest no
    longer tell their binding: messages are few, so every denial is counted somewhere.

    `clock` tells nanoseconds since the Unix epoch.
    """

    def __init__(self, limit: int = 256, *, clock: Callable[[], int] = time.time_ns) -> None:
        if limit < 1:
            raise ValueError(f"a fault history keeps at least 1 fault, not {limit!r}")
        self._limit = limit
        self._faults: deque[_Kept] = deque(maxlen=limit)
        self._denials: OrderedDict[tuple[str, str], _Kept] = OrderedDict()
        self._places = count()
        self._clock = clock

    def record(self, stage: int, message: str, *, binding: str = _UNKNOWN, denial: bool = False) -> None:
        """Keep one fault, as above. Raises ValueError for a stage outside 0..12."""
        now = Timestamp.of_nanoseconds(self._clock())
        record = FaultRecord(timestamp=now, binding=binding, fault_stage=check_stage(stage), message=message)
        kept = _Kept(next(self._places), record, now)
        if not denial:
            self._faults.append(kept)
            return
        key = (message, binding)
        self._denials[key] = kept.joined(self._denials.pop(key, None))
        while len(self._denials) > self._limit:
            self._fold()

    def _fold(self) -> None:
        """Count the oldest denial that tells a binding among those like it that tell none."""
        key = next((it for it in self._denials if it[1] != _UNKNOWN), None)
        if key is None:
            self._denials.popitem(last=False)
            return
        kept = self._denials.pop(key)
        nameless = replace(kept, record=kept.record.model_copy(update={"binding": _UNKNOWN}))
        like = (key[0], _UNKNOWN)
        self._denials[like] = nameless.joined(self._denials.get(like))

    def records(self) -> tuple[FaultRecord, ...]:
        """Tell what is kept, in the order in which it happened."""
        kept = sorted((*self._faults, *self._denials.values()), key=lambda it: it.place)
        return tuple(it.told() for it in kept)

    def __len__(self) -> int:
        return len(self._faults) + len(self._denials)

    def __repr__(self) -> str:
        return f"FaultHistory({len(self._faults)} faults, {len(self._denials)} denials, at most {self._limit} of each)"
