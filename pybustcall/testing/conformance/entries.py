"""Entries that checks register and bust, so that it can be told what the daemon holds."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from pybustcall.models import OVER, BustReply, JobReply, Problem
from pybustcall.testing.conformance.checking import LATE, PAUSE, Skipped, Unmet
from pybustcall.testing.conformance.expecting import expect, expect_job, expect_told, reply_of
from pybustcall.testing.conformance.probe import ENTRIES, JOBS, Probe

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "busted",
    "expect_count",
    "expect_namespaces",
    "followed",
    "is_held",
    "job_of",
    "namespaces",
    "register",
    "removed_by",
    "try_register",
]


async def namespaces(probe: Probe) -> tuple[str, ...]:
    """Tell the two namespaces of this run; none if the daemon serves only those that it was told."""
    target = probe.new_target()
    answer = await probe.bust(target=target, strategy="direct", namespace=probe.namespaces[0])
    if answer.status == 422 and reply_of(Problem, answer).field == "namespace":
        return ()
    expect_told(answer, target, namespace=probe.namespaces[0])
    return probe.namespaces


async def expect_namespaces(probe: Probe) -> tuple[str, str]:
    """Tell the probe's namespaces; skip the check if the daemon serves none."""
    if not await namespaces(probe):
        raise Skipped("it serves no namespaces but its own")
    return probe.namespaces


async def job_of(probe: Probe, job: str | None) -> JobReply:
    """Ask how a job stands."""
    return expect_job(await probe.send("GET", f"{JOBS}/{job}"), job)


async def followed(probe: Probe, reply: BustReply) -> BustReply:
    """Wait until a bust that is a job is applied; return its answer with what it removed."""
    if not reply.accepted:
        return reply
    until = asyncio.get_running_loop().time() + LATE
    while (job := await job_of(probe, reply.job)).state not in {*OVER, "settling"}:
        if asyncio.get_running_loop().time() > until:
            raise Skipped(f"not decided: a job is still {job.state} after {LATE:g} s")
        await asyncio.sleep(PAUSE)
    if job.state in {"cancelled", "failed"}:
        raise Unmet(f"a job that nobody cancelled is {job.state}")
    return reply.model_copy(update={"removed": job.removed})


async def busted(probe: Probe, target: str, **fields: object) -> BustReply:
    """Have something busted to its end, by default directly; expect the answer to just this question."""
    fields = {"strategy": "direct", **fields}
    return await followed(probe, expect_told(await probe.bust(target=target, **fields), target, **fields))


async def is_held(probe: Probe, key: str, namespace: str | None = None) -> bool:
    """Tell whether the cache holds an entry because it was registered, as far as it tells."""
    await register(probe, key, namespace=namespace)
    removed = await removed_by(probe, key, namespace)
    if removed not in {None, 0, 1}:
        raise Unmet(f"a direct bust of one entry tells removed {removed}")
    return removed == 1


def expect_count(what: str, field_name: str, told: int | None, count: int, *, held: bool) -> None:
    """Expect a number; a cache that seems to hold nothing may tell none, which then proves nothing."""
    if told == count:
        return
    if held or told:
        raise Unmet(f"{what} tells {field_name} {told}, not {count}")
    raise Skipped(
        f"not decided: {what} tells {field_name} {told}, and so does a bust of an entry just registered; a cache that"
        " does not hold what is only registered is like that, and so is a daemon that busts nothing of it"
    )


async def register(
    probe: Probe, key: str, *depends_on: str, tags: Sequence[str] = (), namespace: str | None = None
) -> None:
    """Register an entry, which the cache must be able to hold."""
    if not await try_register(probe, key, *depends_on, tags=tags, namespace=namespace):
        raise Unmet("answered HTTP 422, expected 200")


async def try_register(
    probe: Probe, key: str, *depends_on: str, tags: Sequence[str] = (), namespace: str | None = None
) -> bool:
    """Register an entry; tell whether the cache can hold it."""
    probe.entries.add((key, namespace))
    said = {"key": key, "depends_on": depends_on, **({"tags": tags} if tags else {})}
    answer = await probe.post(ENTRIES, {**said, **({} if namespace is None else {"namespace": namespace})})
    if answer.status != 422:
        expect(answer, 200)
    return answer.status == 200


async def removed_by(probe: Probe, target: str, namespace: str | None = None) -> int | None:
    """Bust something directly; tell how many entries the daemon says that it removed."""
    where: dict[str, object] = {} if namespace is None else {"namespace": namespace}
    return (await busted(probe, target, **where)).removed
