"""What a check is, and what one comes to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar, final

from pydantic import BaseModel

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

__all__ = [
    "IDEMPOTENT",
    "LATE",
    "PAUSE",
    "REGISTERS",
    "Answer",
    "Check",
    "Model",
    "Silent",
    "Skipped",
    "Unmet",
    "Verdict",
    "capabilities_of",
    "capability_of",
]

Model = TypeVar("Model", bound=BaseModel)
IDEMPOTENT: Final = "cache.bust.idempotent"
REGISTERS: Final = ("cache.register",)
PAUSE: Final = 0.02  # seconds between two pieces of a body, so that they arrive one by one
LATE: Final = 5.0  # seconds after which a job, or a second bust, is taken as never coming


class Unmet(Exception):
    """A check found something else than it asks for."""


class Silent(Unmet):
    """A stream of events does not say in time what it must."""


class Skipped(Exception):
    """A check does not apply to this daemon."""


@final
@dataclass(frozen=True, slots=True)
class Answer:
    """One answer; `closes`: it says that its connection ends with it."""

    status: int
    content_type: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    closes: bool = False


def capability_of(field_name: str) -> str:
    """Tell the capability that a kind, or a field, of a bust takes."""
    return f"cache.bust.{field_name}"


def capabilities_of(*field_names: str) -> tuple[str, ...]:
    """Tell the capabilities that several take."""
    return tuple(map(capability_of, field_names))


@final
@dataclass(frozen=True, slots=True)
class Check:
    """One thing that a daemon must do.

    - `strict`: asked of daemons of ours, not of every other
    - `needs`: capabilities without which a daemon is not asked
    - `any_of`: capabilities of which a daemon must have one to be asked, if there are any
    """

    name: str
    run: Callable[[Any], Awaitable[None]]
    strict: bool = False
    needs: tuple[str, ...] = ()
    any_of: tuple[str, ...] = ()


@final
@dataclass(frozen=True, slots=True)
class Verdict:
    """What one check came to.

    - `ok`: it did not fail
    - `detail`: what was found instead, or why it was skipped
    - `skipped`: it was not asked, since the daemon does not advertise what it is about; or its answers decide nothing
    - `answered`: false if it failed for want of an answer
    """

    name: str
    ok: bool
    detail: str = ""
    skipped: bool = False
    answered: bool = True

    @property
    def outcome(self) -> Literal["passed", "failed", "skipped"]:
        """The same in one word."""
        return "skipped" if self.skipped else "passed" if self.ok else "failed"
