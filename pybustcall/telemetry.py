"""What happened, as frozen records, and who is told: hooks, in a thread of their own.

Each record says one thing that a client decided or met. The rooms that decide hand records to `Hooks.emit`, which
never raises and never waits; what a hook does with them is its own affair, and can harm no call. Logging is not done
here: it needs no hook.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final

from pybustcall.models import redact

if TYPE_CHECKING:
    from collections.abc import Callable

    from pybustcall.faults import Fault

__all__ = [
    "AttemptMade",
    "BreakerMoved",
    "BustDeferred",
    "BustReplayed",
    "Event",
    "FailedBack",
    "FailedOver",
    "FaultMet",
    "Hedged",
    "Hooks",
    "OutboxSetAside",
]

_log: Final = logging.getLogger("pybustcall")
_MOST: Final = 10_000
"""How many records may wait for a slow hook; further ones are dropped and counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that a client decided or met; `daemon` is the URL of the daemon it is about."""

    daemon: str


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptMade(Event):
    """An attempt ended: with an acknowledgement (stage 12), or with a fault. `elapsed` is in seconds."""

    stage: int
    elapsed: float
    hedge: bool = False


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class FaultMet(Event):
    """An attempt failed, or a daemon was passed over."""

    fault: Fault


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Hedged(Event):
    """A second daemon was asked, since `slow` had not answered for `waited` seconds.

    `overdue`: whether that daemon had answered nothing at all for so long that the call moved on (failover), rather
    than being hedged.
    """

    slow: str
    waited: float
    overdue: bool


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class FailedOver(Event):
    """Calls leave the hub, `hub`, for the ring, whose first is `daemon`."""

    hub: str
    reason: str


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class FailedBack(Event):
    """Calls return to the hub: a first `share` of them, or all (1.0)."""

    share: float


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerMoved(Event):
    """A breaker moved from one state to another: closed, open, half-open or quarantined."""

    old: str
    new: str
    reason: str = ""


@final
@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class BustDeferred(Event):
    """A bust is in the outbox; `daemon` is the one that is owed, or "" for any. `row` is its number there."""

    row: int
    target: str

    def __repr__(self) -> str:
        return f"BustDeferred(daemon={self.daemon!r}, row={self.row}, target={redact(self.target)})"


@final
@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class BustReplayed(Event):
    """A bust out of the outbox was delivered (`ok`), or set aside since it was refused."""

    row: int
    target: str
    ok: bool

    def __repr__(self) -> str:
        return f"BustReplayed(daemon={self.daemon!r}, row={self.row}, target={redact(self.target)}, ok={self.ok})"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class OutboxSetAside(Event):
    """The outbox's file could not be read; it was set aside whole and a new one begun. `daemon` is ""."""

    text: str


@final
class Hooks:
    """Tells hooks what happens, in order, from one thread, begun with the first hook.

    A hook that raises is logged; one that blocks holds up only other hooks: records that find the queue full are
    dropped and counted. After a fork the child's hooks get a thread of their own.
    """

    def __init__(self) -> None:
        self._hooks: tuple[Callable[[Event], object], ...] = ()
        self._waiting: deque[Event] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()
        self._busy = False
        self._closed = False
        self.dropped = 0

    def add(self, hook: Callable[[Event], object]) -> Callable[[], None]:
        """Register a hook; return what takes it away again."""
        self._hooks = (*self._hooks, hook)

        def remove() -> None:
            self._hooks = tuple(other for other in self._hooks if other is not hook)

        return remove

    def emit(self, event: Event) -> None:
        """Hand a record on, and return at once."""
        if not self._hooks or self._closed:
            return
        if self._pid != os.getpid():
            self._begin_anew()
        with self._changed:
            if len(self._waiting) >= _MOST:
                self.dropped += 1
                return
            if self._thread is None:
                thread = threading.Thread(target=self._tell, name="pybustcall-hooks", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # no more threads, or the interpreter is ending: the call goes on all the same
                    self.dropped += 1
                    return
                self._thread = thread
            self._waiting.append(event)
            self._changed.notify()

    def flush(self, timeout: float) -> bool:
        """Wait until the hooks were told everything, at most so many seconds; tell whether they were. It blocks."""
        if self._pid != os.getpid():
            return True
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and not self._busy, timeout)

    def close(self) -> None:
        """End the thread once the hooks were told what waits."""
        if self._pid != os.getpid():
            self._begin_anew()
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _begin_anew(self) -> None:
        """Make everything anew in a forked child, where the parent's thread is not, and its lock may be held."""
        self._changed = threading.Condition()
        self._waiting = deque()
        self._thread = None
        self._busy = False
        self._pid = os.getpid()

    def _tell(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                event = self._waiting.popleft()
                self._busy = True
            for hook in self._hooks:
                try:
                    hook(event)
                except BaseException:  # noqa: BLE001 - even sys.exit in a hook must not end what tells the others
                    _log.exception("a hook failed at %s", type(event).__name__)
