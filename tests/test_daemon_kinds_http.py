"""Kinds, jobs and the journal over HTTP: what is asked, what is refused, and how each is answered."""

from __future__ import annotations

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


async def test_a_full_disk_refuses_busts_and_removes_nothing(tmp_path: Path) -> None:
    """507, until there is room again."""
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
        assert (await bust(client, target))[1]["removed"] == 1


async def test_faults_are_remembered_over_a_restart(tmp_path: Path) -> None:
    """By the journal."""
    for expected in (1, 2):
        async with serving(journal=tmp_path / "journal") as client:
            await bust(client, kind="sort")
            assert len((await ask(client, "GET", "/api/v1/status"))[1]["fault_history"]) == expected
