"""Kinds, jobs and the journal over HTTP: what is asked, what is refused, and how each is answered."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from pybustcall.daemon import (
    BackendFailure,
    DaemonSettings,
    Engine,
    FilesBackend,
    Indexes,
    Jobs,
    Journal,
    Layer,
    MemoryBackend,
    create_app,
)
from pybustcall.daemon.app import DAEMON
from pybustcall.daemon.jobs import NoSuchJob
from pybustcall.daemon.journal import Entry, JournalFailure, Wish
from pybustcall.models import BustReply, JobReply, JobsReply
from tests.conftest import eventually
from tests.test_daemon_jobs import Layered
from tests.test_daemon_journal import full

if TYPE_CHECKING:
    from aiohttp import web

    Client = TestClient[web.Request, web.Application]


@asynccontextmanager
async def serving(engine: Engine | None = None, jobs: Jobs | None = None, **settings: Any) -> AsyncIterator[Client]:
    """Serve an engine, by default one in memory; a client of it."""
    indexes = Indexes(most=settings.get("max_namespaces", 1000))
    layers = [Layer(name="memory", number=0, backend=MemoryBackend(indexes))]
    app = create_app(engine or Engine(layers, indexes), DaemonSettings(**settings), jobs=jobs)
    async with TestClient(TestServer(app)) as client:
        yield client


async def ask(client: Client, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, Any]]:
    async with client.request(method, path, json=body, headers=headers) as response:
        return response.status, await response.json()


async def bust(client: Client, target: str = "a", **fields: Any) -> tuple[int, dict[str, Any]]:
    return await ask(client, "POST", "/api/v1/bust", {"target": target, **fields})


async def register(client: Client, *keys: str, **fields: Any) -> None:
    for key in keys:
        assert (await ask(client, "POST", "/api/v1/entries", {"key": key, **fields}))[0] == 200


async def test_what_was_asked_is_repeated_where_it_is_not_the_default() -> None:
    """So that a client knows that it was understood; a plain bust is answered as ever."""
    async with serving() as client:
        await register(client, "p/1", "p/2", namespace="shop")
        status, told = await bust(client, "p", kind="prefix", soft=True, namespace="shop")
        assert (status, told["kind"], told["soft"], told["namespace"], told["removed"]) == (
            200, "prefix", True, "shop", 2,
        )  # fmt: skip
        assert "dry_run" not in told
        plain = (await bust(client))[1]
        assert not {"kind", "soft", "namespace", "dry_run", "matched", "verified"} & plain.keys()
        assert BustReply.model_validate(plain).answers("a")


async def test_a_dry_run_matches_and_removes_nothing() -> None:
    """And is in no audit, nor bound to an idempotency key."""
    async with serving() as client:
        await register(client, "p/1", "p/2", tags=["t"])
        for _ in range(2):
            status, told = await ask(
                client,
                "POST",
                "/api/v1/bust",
                {"target": "t", "kind": "tag", "dry_run": True},
                **{"Idempotency-Key": "k"},
            )
            assert (status, told["matched"], told["removed"], told["dry_run"]) == (200, 2, 0, True)
        assert told["layers"] == [{"name": "memory", "ok": True, "removed": 2}]
        assert (await ask(client, "GET", "/api/v1/jobs"))[1] == {"jobs": []}
        assert (await bust(client, "t", kind="tag", verify=True))[1]["verified"] is True


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"kind": "all", "target": "*"}, None),
        ({"kind": "all", "confirm": True}, None),
        ({"kind": "sort"}, "kind"),
        ({"namespace": ""}, "namespace"),
        ({"namespace": "../x"}, "namespace"),
        ({"namespace": "other"}, "namespace"),
        ({"settle": -1}, "settle"),
        ({"settle": 3601}, "settle"),
        ({"reason": "a\nb"}, "reason"),
        ({"soft": "yes"}, "soft"),
    ],
)
async def test_what_cannot_be_meant_is_refused_and_nothing_is_removed(
    fields: dict[str, Any], field: str | None
) -> None:
    """An empty namespace and everything without confirmation above all; nothing is removed."""
    async with serving(namespaces=("default", "shop")) as client:
        await register(client, "a")
        status, told = await bust(client, **fields)
        assert (status, told.get("field")) == (422, field)
        assert (await bust(client, dry_run=True))[1]["matched"] == 1


async def test_what_a_layer_cannot_do_is_not_advertised_and_is_refused(tmp_path: Path) -> None:
    """The text names the layer."""
    engine = Engine([Layer(name="pages", number=0, backend=FilesBackend(tmp_path))], Indexes())
    async with serving(engine) as client:
        document = (await ask(client, "GET", "/api/v1/capabilities"))[1]
        assert {"cache.bust.soft", "cache.bust.namespace"}.isdisjoint(document["capabilities"])
        assert {"cache.bust.prefix", "cache.bust.tag", "cache.bust.all"} <= set(document["capabilities"])
        status, told = await bust(client, soft=True)
        assert (status, told["field"]) == (422, "soft")
        assert "pages" in told["detail"]
        assert (await bust(client, namespace="shop"))[0] == 422


async def test_namespaces_are_bounded() -> None:
    """Beyond that, a new one is refused for want of room."""
    async with serving(max_namespaces=1) as client:
        await register(client, "a")
        assert (await ask(client, "POST", "/api/v1/entries", {"key": "a", "namespace": "b"}))[0] == 507


async def test_a_bust_is_in_the_audit_with_whom_why_and_what_came_of_it() -> None:
    """By the token that it came with, and by its name."""
    async with serving(token="t", operator_token="o") as client:
        for token in ("t", "o"):
            asked = {"target": "a", "binding": "go", "reason": "a price has changed"}
            await ask(client, "POST", "/api/v1/bust", asked, Authorization=f"Bearer {token}")
        listed = (await ask(client, "GET", "/api/v1/jobs?limit=1", Authorization="Bearer t"))[1]
        [job] = JobsReply.model_validate(listed).jobs
        assert (job.who, job.binding, job.reason, job.state, job.removed) == (
            "operator", "go", "a price has changed", "done", 0,
        )  # fmt: skip
        assert job.daemon.endswith("127.0.0.1:8989")
        before = (await ask(client, "GET", f"/api/v1/jobs?before={job.job}", Authorization="Bearer t"))[1]
        assert [it["who"] for it in before["jobs"]] == ["token"]
        one = (await ask(client, "GET", f"/api/v1/jobs/{job.job}", Authorization="Bearer t"))[1]
        assert one == listed["jobs"][0]
        assert (await ask(client, "GET", "/api/v1/jobs"))[0] == 401


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("limit=0", "limit"),
        ("limit=1001", "limit"),
        ("limit=x", "limit"),
        ("state=over", "state"),
        ("before=x", "before"),
    ],
)
async def test_a_query_that_cannot_be_is_refused_by_its_field(query: str, field: str) -> None:
    """Before anything is looked up."""
    async with serving() as client:
        status, told = await ask(client, "GET", f"/api/v1/jobs?{query}")
        assert (status, told["field"]) == (422, field)


async def test_a_job_that_is_not_known_is_told_apart_from_a_route() -> None:
    """By the type of its problem."""
    async with serving() as client:
        for method in ("GET", "DELETE"):
            status, told = await ask(client, method, "/api/v1/jobs/x")
            assert (status, told["type"]) == (404, "urn:bustcall:problem:no-such-job")


async def test_a_layer_that_waits_for_another_is_told_so_and_is_no_fault(tmp_path: Path) -> None:
    """It is busted already, and once more when the inner one is."""
    inner, outer = Layered("redis", []), Layered("pages", [])
    inner.failure = BackendFailure("no route to the cache", unreachable=True)
    layers = [Layer(name=it.name, number=number, backend=it) for number, it in enumerate((inner, outer))]
    async with serving(Engine(layers, Indexes()), journal=tmp_path / "journal") as client:
        told = (await ask(client, "POST", "/api/v1/bust", {"target": "a"}))[1]
        assert told["layers"] == [
            {"name": "redis", "ok": False, "removed": 0, "error": "no route to the cache"},
            {"name": "pages", "ok": True, "removed": 0, "waits": True},
        ]
        history = (await ask(client, "GET", "/api/v1/status"))[1]["fault_history"]
        assert [it["message"] for it in history] == ["the layer redis failed: no route to the cache"]


async def test_a_job_is_answered_with_202_told_and_cancelled(tmp_path: Path) -> None:
    """A repeat with its key is answered alike; what failed is in the history, with its layer."""
    layer = Layered("redis", [])
    layer.failure = BackendFailure("no route to the cache", unreachable=True)
    engine = Engine([Layer(name="redis", number=0, backend=layer)], Indexes())
    async with serving(engine, journal=tmp_path / "journal") as client:
        key = {"Idempotency-Key": "k"}
        first, again = [await ask(client, "POST", "/api/v1/bust", {"target": "a"}, **key) for _ in range(2)]
        assert first == again
        status, told = first
        assert (status, told["status"], told["fault_stage"]) == (202, "accepted", 7)
        assert BustReply.model_validate(told).layers[0].error == "no route to the cache"
        one = JobReply.model_validate((await ask(client, "GET", f"/api/v1/jobs/{told['job']}"))[1])
        assert one.state == "waiting"
        history = (await ask(client, "GET", "/api/v1/status"))[1]["fault_history"]
        assert history[-1]["message"] == "the layer redis failed: no route to the cache"
        for _ in range(2):
            cancelled = (await ask(client, "DELETE", f"/api/v1/jobs/{told['job']}"))[1]
            assert (cancelled["state"], "ended" in cancelled) == ("cancelled", True)
        anew = (await ask(client, "POST", "/api/v1/bust", {"target": "a"}, **key))[1]
        assert (anew["status"], anew["job"] == told["job"]) == ("accepted", False)
        assert (await ask(client, "POST", "/api/v1/bust", {"target": "a"}, **key))[1] == anew


@pytest.mark.parametrize("failure", ["unreadable", "gone"])
async def test_a_promise_that_cannot_be_looked_up_is_kept_or_made_anew(tmp_path: Path, failure: str) -> None:
    """A journal that fails for now takes nothing back; what it has forgotten is applied again."""
    layer = Layered("redis", [])
    layer.failure = BackendFailure("no route to the cache", unreachable=True)
    engine = Engine([Layer(name="redis", number=0, backend=layer)], Indexes())
    jobs = Jobs(engine, Journal(tmp_path / "journal"))

    async def fail(_job: str) -> Any:
        raise JournalFailure("odd") if failure == "unreadable" else NoSuchJob

    async with serving(engine, jobs) as client:
        key = {"Idempotency-Key": "k"}
        told = (await ask(client, "POST", "/api/v1/bust", {"target": "a"}, **key))[1]
        jobs.find = fail  # type: ignore[method-assign, assignment]
        again = (await ask(client, "POST", "/api/v1/bust", {"target": "a"}, **key))[1]
        assert (again["job"] == told["job"]) is (failure == "unreadable")


async def test_who_waits_for_a_bust_is_told_that_it_was_cancelled(tmp_path: Path) -> None:
    """With a type of its own: what was removed by then stays removed."""
    layer = Layered("slow", [])
    layer.passing.clear()
    engine = Engine([Layer(name="slow", number=0, backend=layer)], Indexes())
    async with serving(engine, journal=tmp_path / "journal", answer_within=60.0) as client:
        asking = asyncio.create_task(bust(client))
        await eventually(lambda: bool(layer.log))
        [job] = (await ask(client, "GET", "/api/v1/jobs"))[1]["jobs"]
        await ask(client, "DELETE", f"/api/v1/jobs/{job['job']}")
        status, told = await asking
        assert (status, told["type"]) == (409, "urn:bustcall:problem:cancelled")


@pytest.mark.parametrize("registry", ["r", None])
async def test_what_is_taken_up_finds_the_whole_registry_and_leaves_nothing_in_it(
    tmp_path: Path, registry: str | None
) -> None:
    """A job of the process before, which was killed, begins when the registry is there, and ends before that closes.

    With a journal there is a registry that lasts, whether a file was named for it or not.
    """

    def parts() -> tuple[Engine, dict[str, Any]]:
        indexes = Indexes()
        files = FilesBackend(tmp_path / "root")
        layers = [Layer(name=it.name, number=0, backend=it, settle=0) for it in (MemoryBackend(indexes), files)]
        return Engine(layers, indexes), {"registry": registry and tmp_path / registry, "journal": tmp_path / "j"}

    (tmp_path / "root").mkdir()
    engine, settings = parts()
    async with serving(engine, **settings) as client:
        await register(client, "page.html", depends_on=["model"], tags=["t"])
    (tmp_path / "root" / "page.html").write_text("old")
    wish = Wish(namespace="default", kind="key", target="model", strategy="dimensional")
    journal = Journal(tmp_path / "j")
    await journal.open()
    begun = await journal.begin(Entry(job="j" * 32, wish=wish, at=0, state="running"))
    await journal.close()
    engine, settings = parts()
    async with serving(engine, **settings) as client:

        async def is_done() -> bool:
            return bool((await ask(client, "GET", f"/api/v1/jobs/{begun.job}"))[1]["state"] == "done")

        async with asyncio.timeout(10.0):
            while not await is_done():
                await asyncio.sleep(0.01)
        assert not (tmp_path / "root" / "page.html").exists()
    engine, settings = parts()
    async with serving(engine, **settings):
        assert len(engine.indexes) == 0
    assert (tmp_path / (registry or "j.registry")).exists()


async def test_where_namespaces_are_listed_the_default_one_is_one_of_them_or_none(tmp_path: Path) -> None:
    """A request that names none means it."""
    async with serving(namespaces=("shop",)) as client:
        status, told = await bust(client)
        assert (status, told["field"]) == (422, "namespace")
        assert told["detail"].endswith("serves; say which")
        assert (await bust(client, namespace="shop"))[0] == 200
    async with serving(namespaces=("shop", "default")) as client:
        assert (await bust(client))[0] == 200


@pytest.mark.parametrize("limit", ["0", "1001", "0000000001", "0" * 5000, "0000000010000000000000", "-1", "1.5", "٣"])
async def test_only_a_number_is_a_limit(limit: str) -> None:
    """However it is written."""
    async with serving() as client:
        async with client.get("/api/v1/jobs", params={"limit": limit}) as response:
            assert (response.status, (await response.json())["field"]) == (422, "limit")


async def test_without_a_lasting_journal_a_failing_layer_is_a_500() -> None:
    """Nothing is promised that nobody could keep."""
    layer = Layered("redis", [])
    layer.failure = BackendFailure("no route to the cache", unreachable=True)
    async with serving(Engine([Layer(name="redis", number=0, backend=layer)], Indexes())) as client:
        status, told = await bust(client)
        assert (status, "no route to the cache" in told["detail"]) == (500, True)


async def test_progress_comes_to_its_end(tmp_path: Path) -> None:
    """It is told while a sweep goes on, and of one that is done it is all of it."""
    layer = Layered("redis", [])
    layer.put(*(f"p/{number}" for number in range(600)))
    layer.passing.clear()
    engine = Engine([Layer(name="redis", number=0, backend=layer)], Indexes())
    async with serving(engine, journal=tmp_path / "journal", answer_within=0.01) as client:
        status, told = await bust(client, "p", kind="prefix")
        assert status == 202
        path = f"/api/v1/jobs/{told['job']}"
        assert (await ask(client, "GET", path))[1]["progress"] == {"done": 0, "total": 600}
        layer.passing.set()
        await eventually(lambda: not layer.keys)
        while (job := (await ask(client, "GET", path))[1])["state"] == "running":
            pass
        assert (job["state"], job["progress"]) == ("done", {"done": 600, "total": 600})


async def test_a_full_disk_refuses_busts_and_removes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """507, until there is room again; the log says it at once, and then counts for a while."""
    indexes = Indexes()
    engine = Engine([Layer(name="memory", number=0, backend=MemoryBackend(indexes))], indexes)
    journal = Journal(tmp_path / "journal")
    async with serving(engine, Jobs(engine, journal)) as client:
        target = "a" * 8000  # larger than what may be free in a page
        await register(client, target)
        async with full(journal):
            status, told = await bust(client, target)
            assert (status, told["detail"].endswith("nothing was busted")) == (507, True)
            assert (await bust(client, target, dry_run=True))[1]["matched"] == 1
            for _ in range(3):
                assert (await bust(client, target))[0] == 507
            client.app[DAEMON]._journal_failures._told -= 10
            assert (await bust(client, target))[0] == 507
        assert (await bust(client, target))[1]["removed"] == 1
    refused = "a bust was refused: the journal cannot be used: database or disk is full"
    told_in_log = [it.getMessage() for it in caplog.records if it.levelno == logging.ERROR]
    assert told_in_log == [refused, f"{refused}; 3 more since the line before"]


async def test_faults_are_remembered_over_a_restart(tmp_path: Path) -> None:
    """By the journal."""
    for expected in (1, 2):
        async with serving(journal=tmp_path / "journal") as client:
            await bust(client, kind="sort")
            assert len((await ask(client, "GET", "/api/v1/status"))[1]["fault_history"]) == expected


async def test_a_dry_run_that_fails_does_not_speak_of_a_bust(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was to be removed, and nothing was."""

    async def fail(*_args: Any, **_more: Any) -> list[str]:
        raise BackendFailure("the cache is stuck")

    async with serving() as client:
        await register(client, "a")
        monkeypatch.setattr(MemoryBackend, "held", fail)
        status, told = await bust(client, dry_run=True)
        assert (status, told["detail"]) == (500, "it cannot be counted: the cache is stuck; nothing was removed")
