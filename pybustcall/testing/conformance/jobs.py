"""Busts that are jobs: told, listed, cancelled."""

from __future__ import annotations

from typing import Final

from pybustcall.models import OVER, BustReply, CapabilityDocument, JobReply, JobsReply, Problem
from pybustcall.testing.conformance.checking import IDEMPOTENT, Check, Skipped, Unmet, capabilities_of
from pybustcall.testing.conformance.entries import followed, job_of
from pybustcall.testing.conformance.expecting import (
    expect,
    expect_bust,
    expect_job,
    expect_problem,
    expect_replay,
    expect_told,
    reply_of,
)
from pybustcall.testing.conformance.probe import CAPABILITIES, JOBS, Probe, new_key

__all__ = ["CHECKS"]

_NO_SUCH_JOB: Final = "urn:bustcall:problem:no-such-job"
_NO_JOB: Final = "not decided: it names no job in its answers to busts"


async def _tells_how_a_bust_stands(probe: Probe) -> None:
    more: dict[str, object] = {"kind": "tag"} if probe.offers("tag") else {}
    more |= {"soft": True} if probe.offers("soft") else {}
    for fields in ({}, more):
        target, asked = probe.new_target(), {"binding": "conformance", "reason": f"because of {new_key()}", **fields}
        reply, strategy = await _with_job(probe, target, **asked)
        job = await job_of(probe, reply.job)
        told = {"target": target, "kind": "key", "soft": False, **asked, "strategy": strategy}
        for name, value in told.items():
            if (found := getattr(job, name)) != value:
                raise Unmet(f"a job tells {name} {found!r}, and {value!r} was asked")
        await followed(probe, reply)
        job = await job_of(probe, reply.job)
        if (job.ended is not None) != (job.state in OVER):
            raise Unmet(f"a job that is {job.state} {'tells' if job.ended else 'does not tell'} when it ended")
        if job.progress.total is not None and job.progress.done > job.progress.total:
            raise Unmet(f"a job has done {job.progress.done} of {job.progress.total} entries")


async def _lists_jobs(probe: Probe) -> None:
    older, _ = await _with_job(probe, probe.new_target())
    newer, _ = await _with_job(probe, probe.new_target())
    names = [job.job for job in (await _jobs(probe, "limit=1000"))]
    if older.job not in names or newer.job not in names:
        raise Unmet("a bust that has a job is not in the list of them")
    if names.index(newer.job) > names.index(older.job):
        raise Unmet("the newest job is not listed first")
    if (count := len(await _jobs(probe, "limit=1"))) != 1:
        raise Unmet(f"with limit=1 it lists {count} jobs")
    names = [job.job for job in (await _jobs(probe, f"limit=1000&before={newer.job}"))]
    if older.job not in names or newer.job in names:
        raise Unmet("before does not leave out what is not older than that job")
    for job in await _jobs(probe, "limit=1000&state=cancelled"):
        if job.state != "cancelled":
            raise Unmet(f"with state=cancelled it lists a job that is {job.state}")


async def _refuses_what_is_no_question(probe: Probe) -> None:
    for name, query in (
        ("limit", "limit=0"),
        ("limit", "limit=1001"),
        ("limit", "limit=all"),
        ("state", "state=over"),
    ):
        try:
            expect_problem(await probe.send("GET", f"{JOBS}?{query}"), 422, name)
        except Unmet as unmet:
            raise Unmet(f"?{query}: {unmet}") from unmet


async def _knows_no_other_job(probe: Probe) -> None:
    for method in ("GET", "DELETE"):
        answer = await probe.send(method, f"{JOBS}/{new_key()}")
        expect(answer, 404)
        if (kind := reply_of(Problem, answer).type) != _NO_SUCH_JOB:
            raise Unmet(f"{method} of a job that is not known is a problem of type {kind}, not {_NO_SUCH_JOB}")


async def _cancels(probe: Probe) -> None:
    more: dict[str, object] = {"settle": 60} if probe.offers("settle") else {}  # so that it is not over at once
    reply, _ = await _with_job(probe, probe.new_target(), **more)
    first = await _cancelled(probe, reply.job)
    if first.state not in OVER:
        raise Unmet(f"a job is {first.state} after it was cancelled")
    if more and first.state != "cancelled":
        raise Unmet(f"a job that would go on for 60 s is {first.state} after it was cancelled")
    for again in (await _cancelled(probe, reply.job), await job_of(probe, reply.job)):
        if (again.state, again.ended) != (first.state, first.ended):
            raise Unmet(f"a job that was {first.state} is {again.state} when it is asked for again, or ended again")


async def _leaves_what_is_over(probe: Probe) -> None:
    more: dict[str, object] = {"settle": 0} if probe.offers("settle") else {}
    reply, _ = await _with_job(probe, probe.new_target(), **more)
    await followed(probe, reply)
    before = await job_of(probe, reply.job)
    if before.state != "done":
        raise Skipped(f"not decided: the job is {before.state}")
    after = await _cancelled(probe, reply.job)
    if (after.state, after.ended) != (before.state, before.ended):
        raise Unmet(f"a job that was done is {after.state} after it was cancelled, or ended again")


async def _keeps_the_job_of_a_key(probe: Probe) -> None:
    key, target = new_key(), probe.new_target()
    strategy = await _widest(probe)
    first = await probe.bust_once(key, target=target, strategy=strategy)
    reply = expect_bust(first, target)
    if reply.job is None:
        raise Skipped(_NO_JOB)
    for _ in range(2):
        expect_replay(first, await probe.bust_once(key, target=target, strategy=strategy))
        await followed(probe, reply)


async def _with_job(probe: Probe, target: str, **fields: object) -> tuple[BustReply, str]:
    """Bust something so that it may become a job; return the answer, which names it, and with which strategy."""
    strategy = await _widest(probe)
    reply = expect_told(await probe.bust(target=target, strategy=strategy, **fields), target, **fields)
    if reply.job is None:
        raise Skipped(_NO_JOB)
    return reply, strategy


async def _widest(probe: Probe) -> str:
    """Tell the strategy of which a part may be left for later, if the daemon knows it."""
    answer = await probe.send("GET", CAPABILITIES)
    document = reply_of(CapabilityDocument, answer) if answer.status == 200 else None
    return "hybrid" if document is not None and "hybrid" in document.supported_strategies else "dimensional"


async def _cancelled(probe: Probe, job: str | None) -> JobReply:
    return expect_job(await probe.send("DELETE", f"{JOBS}/{job}"), job)


async def _jobs(probe: Probe, query: str) -> tuple[JobReply, ...]:
    answer = await probe.send("GET", f"{JOBS}?{query}")
    expect(answer, 200)
    return reply_of(JobsReply, answer).jobs


CHECKS: Final[tuple[Check, ...]] = (
    Check("tells how a bust stands under its job", _tells_how_a_bust_stands, needs=capabilities_of("jobs")),
    Check("lists jobs, the newest first", _lists_jobs, needs=capabilities_of("jobs")),
    Check("refuses questions about jobs that cannot be", _refuses_what_is_no_question, needs=capabilities_of("jobs")),
    Check("answers 404 to jobs that it does not know", _knows_no_other_job, needs=capabilities_of("jobs")),
    Check("cancels jobs, once", _cancels, needs=capabilities_of("jobs")),
    Check("leaves jobs that are over as they are", _leaves_what_is_over, needs=capabilities_of("jobs")),
    Check(
        "keeps the job of a key for its repeats", _keeps_the_job_of_a_key, needs=(*capabilities_of("jobs"), IDEMPOTENT)
    ),
)
