"""Which time it is: the clock for what is heard of another process, and the event loop that runs here."""

from __future__ import annotations

import asyncio
import time
from typing import Final

__all__ = ["clock", "runs_here"]

_BOOT_CLOCK: Final[int | None] = getattr(time, "CLOCK_BOOTTIME", None)


def clock() -> float:
    """Tell seconds that never go back, and go on while the machine sleeps, where the system has such a clock."""
    return time.monotonic() if _BOOT_CLOCK is None else time.clock_gettime(_BOOT_CLOCK)


def runs_here(loop: asyncio.AbstractEventLoop) -> bool:
    """Tell whether it is this event loop that runs the caller, which may be none."""
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False
