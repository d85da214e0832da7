"""Every exception a caller may see, cut by what the caller does next.

This module decides only how failures are named and what data they carry. Who raises them, and when, is decided by
the rooms above: foreign errors are translated in `daemon_client`, outcomes of calls become errors in `bustcall_core`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pybustcall.faults import Band, Fault
    from pybustcall.results import BustResult

__all__ = [
    "Applied",
    "BustFailed",
    "BustRejected",
    "BustcallError",
    "ClientClosed",
    "ConfigurationError",
    "DaemonsUnavailable",
    "DeadlineExceeded",
    "IncompatibleDaemon",
    "InvalidRequest",
    "InvalidVersion",
    "NotAllowed",
    "OutboxError",
    "Panic",
    "ProtocolViolation",
    "SlotTimeout",
]

Applied = Literal["yes", "no", "maybe"]
"""Whether a bust reached a cache: `maybe` when it was sent and no answer told."""


class BustcallError(Exception):
    """Anything that pybustcall raises on purpose.

    Attributes tell what the text tells, as data:

    - `daemon`: URL of the daemon it is about, or None
    - `stage`: fault stage 0 (worst) to 12, or None where no call was made
    - `band`: the band of that stage, or None
    - `applied`: "yes", "no" or "maybe": whether a bust was applied in spite of the error
    - `causes`: the faults that led here, in order
    - `target`: the whole target, which the text never shows
    """

    def __init__(
        self,
        message: str,
        *,
        daemon: str | None = None,
        stage: int | None = None,
        band: Band | None = None,
        applied: Applied = "no",
        causes: tuple[Fault, ...] = (),
        target: str | None = None,
    ) -> None:
        super().__init__(message)
        self.daemon = daemon
        self.stage = stage
        self.band = band
        self.applied: Applied = applied
        self.causes = causes
        self.target = target


class InvalidRequest(BustcallError, ValueError):
    """The call's arguments cannot be sent. Mend the call; nothing was sent. `field` names the argument."""

    def __init__(self, message: str, *, field: str | None = None, target: str | None = None) -> None:
        super().__init__(message, target=target)
        self.field = field


class ConfigurationError(BustcallError, ValueError):
    """A setting cannot be used. Mend the settings. `setting` names which one."""

    def __init__(self, message: str, *, setting: str | None = None) -> None:
        super().__init__(message)
        self.setting = setting


class InvalidVersion(BustcallError, ValueError):
    """The text is no version, no range or no spec, or no version can say it. Mend the text, which `text` is."""

    def __init__(self, message: str, *, text: str | None = None) -> None:
        super().__init__(message)
        self.text = text


class ClientClosed(BustcallError):
    """The client was closed before the call began. Make a new client, or call before `aclose`."""


class SlotTimeout(BustcallError, TimeoutError):
    """No connection slot came free in time: this process has too many calls under way. Nothing was sent."""


class BustFailed(BustcallError):
    """The call's stage fell below what its `fault_tolerance` accepts.

    Raised itself when the bust was acknowledged after faults that the caller does not tolerate (`applied` is "yes");
    otherwise one of the subclasses says why. `result` is the whole result, or None if the call was not a bust.
    """

    def __init__(
        self,
        message: str,
        *,
        result: BustResult | None = None,
        daemon: str | None = None,
        stage: int | None = None,
        band: Band | None = None,
        applied: Applied = "no",
        causes: tuple[Fault, ...] = (),
        target: str | None = None,
    ) -> None:
        super().__init__(message, daemon=daemon, stage=stage, band=band, applied=applied, causes=causes, target=target)
        self.result = result


class BustRejected(BustFailed):
    """A daemon refused the request as such, and every other would. Mend what is asked."""


class NotAllowed(BustFailed):
    """The token was refused, or does not allow this. Mend the token or the daemon's rules."""


class DeadlineExceeded(BustFailed, TimeoutError):
    """The call's deadline ended it. Whether the bust was applied is told by `applied`."""


class DaemonsUnavailable(BustFailed):
    """Every daemon was tried and none could do it. `causes` tells of each; busting again later is safe."""


class ProtocolViolation(BustFailed):
    """What answered does not speak the daemon protocol. Look at the URL and at what listens there."""


class IncompatibleDaemon(BustFailed):
    """Client and daemon do not fit each other's requirements. The text names what is unmet."""


class Panic(BustFailed):
    """The call was halted: going on could do harm, such as trusting a daemon with a false certificate."""


class OutboxError(BustcallError):
    """The outbox cannot keep what it was given: it is full, or its file cannot be read or written.

    The text says which and what to do. `applied` tells, of a bust that was to be stored, whether it reached a cache.
    """
