"""Jobs: what may be asked, what is believed, and the client's calls, at a fake daemon on a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from pybustcall import BustcallClient, BustJob, LayerResult
from pybustcall.errors import (
    BustRejected,
    DaemonsUnavailable,
    DeadlineExceeded,
    IncompatibleDaemon,
    InvalidRequest,
    ProtocolViolation,
)
from pybustcall.jobs import check_job, doubt_job, doubt_jobs, job_path, jobs_path
from pybustcall.models import OVER, JobReply, JobsReply, LayerReply, Progress, Timestamp
from pybustcall.testing import Answer, FakeDaemon
from tests.conftest import eventually

AT = Timestamp.parse("2026-01-02T03:04:05.000000006Z")
CAPABILITIES = ("cache.bust.jobs", "cache.bust.tag", "cache.bust.idempotent")


def reply(**more: Any) -> JobReply:
    """Make what a daemon tells of a job."""
    said = {"job": "j1", "state": "running", "target": "users/7", "kind": "key", "strategy": "direct", "at": AT, **more}
    return JobReply(**said)


@asynccontextmanager
async def fake_and_client(*plan: Answer, **settings: Any) -> AsyncIterator[tuple[FakeDaemon, BustcallClient]]:
    """Run a fake daemon with a journal, and a client of it."""
    async with (
        FakeDaemon(plan, capabilities=CAPABILITIES) as fake,
        BustcallClient(fake.url, probes=None, **settings) as client,
    ):
        yield fake, client


# What may be asked, and what is believed


@pytest.mark.parametrize("job", ["", "a/b", "..", ".a", "a b", "a?b", "ä", "a" * 129, None, 7, b"a"])
def test_what_is_no_jobs_name_is_refused(job: Any) -> None:
    """It goes into a URL: nothing in it may lead elsewhere."""
    with pytest.raises(InvalidRequest, match="nothing was sent") as caught:
        job_path(job)
    assert caught.value.field == "job"


@pytest.mark.parametrize("job", ["0f" * 16, "job-1", "a.b_c~d", "-", "a" * 128])
def test_a_jobs_name_is_taken_as_it_is(job: str) -> None:
    """Whatever a daemon calls it, within reason."""
    assert check_job(job) == job
    assert job_path(job) == f"/api/v1/jobs/{job}"


def test_a_list_is_asked_for_with_its_limits() -> None:
    """What is not given is not said."""
    assert jobs_path(100, None, None) == "/api/v1/jobs?limit=100"
    assert jobs_path(1, "j1", "done") == "/api/v1/jobs?limit=1&before=j1&state=done"


@pytest.mark.parametrize(
    ("field", "asked"),
    [
        ("limit", (0, None, None)),
        ("limit", (1001, None, None)),
        ("limit", (True, None, None)),
        ("before", (1, "a/b", None)),
        ("state", (1, None, "lost")),
    ],
)
def test_a_list_that_cannot_be_asked_for_is_refused(field: str, asked: tuple[Any, Any, Any]) -> None:
    """The argument is named."""
    with pytest.raises(InvalidRequest) as caught:
        jobs_path(*asked)
    assert caught.value.field == field


def test_answers_to_something_else_are_doubted() -> None:
    """Another job, other states, or more than was asked for."""
    assert doubt_job("j1", reply()) == ""
    assert doubt_job("j2", reply()) == "it tells of another job"
    jobs = JobsReply(jobs=(reply(), reply(job="j2", state="done")))
    assert doubt_jobs(2, None, jobs) == ""
    assert doubt_jobs(1, None, jobs) == "it lists more jobs than were asked for"
    assert doubt_jobs(2, "done", jobs) == "it lists jobs in other states"


def test_a_job_tells_all_that_its_daemon_told() -> None:
    """And which daemon that was, beside the one through which it came."""
    layer = LayerReply(name="redis", ok=False, error="down")
    told = reply(daemon="eu-1", reason="sale", progress=Progress(done=3, total=9), layers=(layer,), removed=3)
    job = BustJob.of(told, "http://a")
    assert (job.daemon, job.via, job.reason, job.done, job.total, job.removed) == ("http://a", "eu-1", "sale", 3, 9, 3)
    assert job.layers == (LayerResult(daemon="http://a", name="redis", ok=False, error="down"),)
    assert repr(job).startswith("BustJob(j1 running, key users/…")
    assert repr(job).endswith(", 3 of 9, http://a)")
    assert "3," in repr(replace(job, total=None))


@pytest.mark.parametrize("state", ["waiting", "running", "settling", "done", "cancelled", "failed"])
def test_a_job_is_over_in_three_states(state: Any) -> None:
    """Done, cancelled, failed."""
    assert BustJob.of(reply(state=state), "http://a").is_over is (state in OVER)


# The client's calls


async def test_a_bust_that_was_accepted_is_followed_to_its_end() -> None:
    """By what its result says: the job and the daemon."""
    async with fake_and_client(Answer.accepted("j7")) as (fake, client):
        result = await client.bust("sale", kind="tag", reason="why")
        assert (result.status, result.job, result.daemon) == ("accepted", "j7", fake.url)
        assert result.job is not None
        job = await client.job(result.job, daemon=result.daemon)
        assert (job.state, job.target, job.kind, job.reason) == ("running", "sale", "tag", "why")
        waiting = asyncio.create_task(client.wait_job("j7", timeout=20, daemon=result.daemon))
        await eventually(lambda: fake.jobs["j7"].state == "running")
        assert fake.applied == []
        fake.finish("j7")
        assert (await waiting).state == "done"
        assert [bust.target for bust in fake.applied] == ["sale"]


async def test_jobs_are_listed_the_newest_first_page_by_page() -> None:
    """All of them, or those in one state."""
    async with fake_and_client(*[Answer.accepted(f"j{number}") for number in range(5)]) as (fake, client):
        for number in range(5):
            await client.bust(f"k{number}")
        fake.finish("j3")
        assert [job.job for job in await client.jobs()] == ["j4", "j3", "j2", "j1", "j0"]
        assert [job.job for job in await client.jobs(limit=2)] == ["j4", "j3"]
        assert [job.job for job in await client.jobs(limit=2, before="j3")] == ["j2", "j1"]
        assert [job.job for job in await client.jobs(state="done")] == ["j3"]
        assert {job.daemon for job in await client.jobs(daemon=fake.url)} == {fake.url}


async def test_a_job_is_cancelled_and_cancelling_again_is_harmless() -> None:
    """One that is over stays as it is."""
    async with fake_and_client(Answer.accepted("j1"), Answer.accepted("j2")) as (fake, client):
        await client.bust("a")
        await client.bust("b")
        for _ in range(2):
            assert (await client.cancel_job("j1")).state == "cancelled"
        fake.finish("j2")
        assert (await client.cancel_job("j2")).state == "done"
        assert [bust.target for bust in fake.applied] == ["b"]


@pytest.mark.parametrize("call", ["job", "cancel_job"])
async def test_a_job_that_is_not_there_is_said_to_be_so(call: str) -> None:
    """And not that the URL were another service's; another daemon is not asked, since it would not know."""
    async with fake_and_client() as (_, client):
        with pytest.raises(BustRejected, match=r"there is no such job.*name another daemon with daemon=") as caught:
            await getattr(client, call)("j1")
        assert caught.value.causes[0].status == 404


async def test_a_daemon_without_jobs_is_not_asked() -> None:
    """It does not advertise them."""
    async with FakeDaemon() as fake, BustcallClient(fake.url, probes=None) as client:
        with pytest.raises(IncompatibleDaemon, match=r"does not advertise cache\.bust\.jobs"):
            await client.jobs()


async def test_an_answer_about_another_job_is_not_believed() -> None:
    """A proxy's cache, for one, may give it."""
    async with fake_and_client(Answer.accepted("j1")) as (fake, client):
        await client.bust("a")
        fake.jobs["j1"] = fake.jobs["j1"].model_copy(update={"job": "j2"})
        with pytest.raises(ProtocolViolation, match="it tells of another job"):
            await client.job("j1")


async def test_waiting_ends_with_its_time_and_says_how_far_it_is() -> None:
    """The job goes on."""
    async with fake_and_client(Answer.accepted("j1")) as (_, client):
        await client.bust("a")
        with pytest.raises(DeadlineExceeded, match=r"the job j1 of http.* was not over within 0\.2 s: it is running"):
            await client.wait_job("j1", timeout=0.2)


async def test_waiting_outlasts_a_restart_of_the_daemon() -> None:
    """A daemon that cannot be reached may be back in time; one that is not, is said to be unavailable."""
    async with fake_and_client(Answer.accepted("j1"), retry=None) as (fake, client):
        await client.bust("a")
        waiting = asyncio.create_task(client.wait_job("j1", timeout=20))
        await fake.stop()
        fake.finish("j1")
        await asyncio.sleep(0)
        await fake.start()
        assert (await waiting).is_over
        await fake.stop()
        with pytest.raises(DaemonsUnavailable):
            await client.wait_job("j1", timeout=0.1)


async def test_a_job_of_another_daemon_is_found_by_its_name_alone_where_it_is() -> None:
    """Journals are each daemon's own: the hub does not know it, the peer does."""
    async with (
        FakeDaemon(capabilities=CAPABILITIES) as hub,
        FakeDaemon([Answer.accepted("j1")], capabilities=CAPABILITIES) as peer,
        BustcallClient(hub.url, peers=[peer.url], probes=None) as client,
    ):
        await hub.stop()
        result = await client.bust("a")
        await hub.start()
        with pytest.raises(BustRejected):
            await client.job("j1", daemon=hub.url)
        assert (await client.job("j1", daemon=result.daemon)).daemon == peer.url


async def test_a_disabled_client_has_no_jobs() -> None:
    """It says so."""
    with pytest.raises(InvalidRequest, match="this client is disabled"):
        await BustcallClient.disabled().jobs()
