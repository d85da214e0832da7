"""The faults that the daemon met lately, as its status tells them.

This module decides how many are kept and how they are stamped. What is a fault, and what it weighs, is decided where
it happens; messages come without whole targets.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, final

from pybustcall.faults import check_stage
from pybustcall.models import FaultRecord, Timestamp

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["FaultHistory"]


@final
class FaultHistory:
    """The newest `limit` faults, oldest first. `clock` tells nanoseconds since the Unix epoch."""

    def __init__(self, limit: int = 256, *, clock: Callable[[], int] = time.time_ns) -> None:
        if limit < 1:
            raise ValueError(f"a fault history keeps at least 1 fault, not {limit!r}")
        self._records: deque[FaultRecord] = deque(maxlen=limit)
        self._clock = clock

    def record(self, stage: int, message: str, *, binding: str = "unknown") -> None:
        """Keep one fault, and drop the oldest if there are too many. Raises ValueError for a stage outside 0..12."""
        instant = Timestamp.of_nanoseconds(self._clock())
        record = FaultRecord(timestamp=instant, binding=binding, fault_stage=check_stage(stage), message=message)
        self._records.append(record)

    def records(self) -> tuple[FaultRecord, ...]:
        """Tell what is kept, oldest first."""
        return tuple(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def __repr__(self) -> str:
        return f"FaultHistory({len(self)} of at most {self._records.maxlen})"
