"""The clock by which it is told how old something is that was heard of another process."""

from __future__ import annotations

import time
from typing import Final

__all__ = ["clock"]

_BOOT_CLOCK: Final[int | None] = getattr(time, "CLOCK_BOOTTIME", None)


def clock() -> float:
    """Tell seconds that never go back, and go on while the machine sleeps, where the system has such a clock."""
    return time.monotonic() if _BOOT_CLOCK is None else time.clock_gettime(_BOOT_CLOCK)
