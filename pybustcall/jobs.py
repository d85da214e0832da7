"""Jobs: busts in a daemon's journal, under way or over, as callers see them and as daemons are asked about them.

It is decided here what may be asked, how it is said in a URL, and whether an answer is to what was asked. Which daemon
is asked, and how often, is decided above; what becomes of a job is the daemon's own affair.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final, get_args
from urllib.parse import urlencode

from pybustcall.errors import InvalidRequest
from pybustcall.models import OVER, JobState, redact
from pybustcall.results import LayerResult

if TYPE_CHECKING:
    from pybustcall.models import JobReply, JobsReply, Kind, Timestamp

__all__ = ["JOBS", "MAX_JOBS", "BustJob", "check_job", "doubt_job", "doubt_jobs", "job_path", "jobs_path"]

JOBS: Final = "/api/v1/jobs"
MAX_JOBS: Final = 1000
"""How many jobs may be listed at once."""

_STATES: Final = get_args(JobState)
_JOB: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._~-]{0,127}")


@final
@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class BustJob:
    """One bust in a daemon's journal.

    - `job`: its name; `daemon`: URL of the daemon that was asked, which alone knows it by that name
    - `state`: waiting (for a layer that failed), running, settling (applied; the second bust is to come), done,
      cancelled, or failed (refused for good)
    - `target`, `kind`, `strategy`, `soft`, `namespace`, `reason`, `binding`: what was asked, and by whom; `who` is
      anonymous, token or operator; `via` the name of the daemon through which it came
    - `at`, `ended`: when it came, and when it was over
    - `removed`: how many entries went so far, in all layers together; `layers`: what each did
    - `done`, `total`: how far it came, in entries; `total` is None while unknown
    - `attempts`: how often it was tried
    """

    job: str
    daemon: str
    state: JobState
    target: str
    kind: Kind
    strategy: str
    at: Timestamp
    ended: Timestamp | None = None
    soft: bool = False
    namespace: str | None = None
    who: str = "anonymous"
    binding: str = "unknown"
    reason: str | None = None
    via: str = ""
    removed: int = 0
    attempts: int = 0
    done: int = 0
    total: int | None = None
    layers: tuple[LayerResult, ...] = ()

    @classmethod
    def of(cls, reply: JobReply, daemon: str) -> BustJob:
        """Make it of what a daemon answered."""
        said = dict(reply)
        progress, via, layers = said.pop("progress"), said.pop("daemon"), said.pop("layers")
        return cls(
            **said,
            daemon=daemon,
            via=via,
            done=progress.done,
            total=progress.total,
            layers=tuple(LayerResult.of(daemon, layer) for layer in layers),
        )

    @property
    def is_over(self) -> bool:
        """Whether nothing more is done for it."""
        return self.state in OVER

    def __repr__(self) -> str:
        of = "" if self.total is None else f" of {self.total}"
        return f"BustJob({self.job} {self.state}, {self.kind} {redact(self.target)}, {self.done}{of}, {self.daemon})"


def check_job(job: object, field: str = "job") -> str:
    """Return a job's name if it can be one; raise `InvalidRequest` otherwise."""
    if isinstance(job, str) and _JOB.fullmatch(job):
        return job
    raise InvalidRequest(
        f"{field} must be a job's name, as the result of a bust tells it, not {job!r}; nothing was sent", field=field
    )


def job_path(job: object) -> str:
    """Tell the route of one job; raise `InvalidRequest` for what is no job's name."""
    return f"{JOBS}/{check_job(job)}"


def jobs_path(limit: object, before: object, state: object) -> str:
    """Tell the route that lists jobs; raise `InvalidRequest` for what cannot be asked."""
    if type(limit) is not int or not 1 <= limit <= MAX_JOBS:
        raise InvalidRequest(f"limit must be 1 to {MAX_JOBS}, not {limit!r}; nothing was sent", field="limit")
    asked: dict[str, object] = {"limit": limit}
    if before is not None:
        asked["before"] = check_job(before, "before")
    if state is not None:
        if state not in _STATES:
            raise InvalidRequest(
                f"state must be one of {', '.join(_STATES)}, not {state!r}; nothing was sent", field="state"
            )
        asked["state"] = state
    return f"{JOBS}?{urlencode(asked)}"


def doubt_job(job: str, reply: JobReply) -> str:
    """Say why a reply does not tell of just this job; an empty text if it does."""
    return "" if reply.job == job else "it tells of another job"


def doubt_jobs(limit: int, state: JobState | None, reply: JobsReply) -> str:
    """Say why a reply does not list what was asked for; an empty text if it does."""
    if len(reply.jobs) > limit:
        return "it lists more jobs than were asked for"
    return "" if state is None or all(job.state == state for job in reply.jobs) else "it lists jobs in other states"
