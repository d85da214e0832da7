"""The test vectors that every language shares, run against pybustcall: models, scale, client and daemons."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer
from pydantic import ValidationError

from pybustcall.daemon import Indexes, MemoryBackend
from pybustcall.daemon.app import DaemonSettings, create_app
from pybustcall.daemon_client import DaemonClient
from pybustcall.errors import InvalidRequest
from pybustcall.faults import (
    TABLE,
    AttemptFailed,
    Fault,
    FaultKind,
    Outcome,
    band_of,
    call_stage,
    check_stage,
    check_tolerance,
    escalate,
    kind_of_status,
    raises,
)
from pybustcall.models import BustReply, BustRequest, Problem, bust_request, cache_key_of
from pybustcall.policies import Pool
from pybustcall.session import SessionManager
from pybustcall.testing import Answer, FakeDaemon
from pybustcall.topology import DaemonAddress
from tests.conftest import PATIENCE
from tests.plain_cache import engine_over

pytestmark = pytest.mark.requirement("INT-04")

VECTORS = Path(__file__).parent / "vectors"
FAULTS = json.loads((VECTORS / "faults.json").read_text("utf-8"))
Entry = dict[str, Any]


def entries(name: str) -> list[Any]:
    """Read one file's entries, each named by its description."""
    found = json.loads((VECTORS / f"{name}.json").read_text("utf-8"))[name]
    return [pytest.param(entry, id=entry["description"]) for entry in found]


def body_of(entry: Entry) -> bytes:
    """Make the body that an entry describes."""
    if "body_hex" in entry:
        return bytes.fromhex(entry["body_hex"])
    text: str = entry["body"]
    if fill := entry.get("fill"):
        assert text.count("<fill>") == 1
        text = text.replace("<fill>", fill["text"] * fill["times"])
    return text.encode()


REQUESTS = entries("requests")
REPLIES = entries("replies")
ERRORS = entries("errors")
ACCEPTED = [entry for entry in REQUESTS if entry.values[0]["strict"]["accepts"]]


@asynccontextmanager
async def speaking_to(url: str) -> AsyncIterator[DaemonClient]:
    """Make a client of one daemon, and close its connections."""
    sessions = SessionManager(pool=Pool())
    yield DaemonClient(DaemonAddress.parse(url), sessions)
    await sessions.aclose()


async def ask(url: str, target: str) -> BustReply:
    """Make one attempt."""
    until = asyncio.get_running_loop().time() + PATIENCE
    async with speaking_to(url) as client:
        return await client.bust(bust_request(target, "direct", 6), until=until, deadline=until)


# requests.json


@pytest.mark.parametrize("entry", ACCEPTED)
def test_what_a_daemon_accepts_the_model_reads(entry: Entry) -> None:
    """With the defaults, and the cache key of its target."""
    read = BustRequest.model_validate_json(body_of(entry))
    assert entry["reads"].items() <= read.model_dump().items()
    assert cache_key_of(read.target) == entry["cache_key"]


@pytest.mark.parametrize("entry", REQUESTS)
async def test_the_reference_daemon_is_as_strict_as_the_vectors_say(entry: Entry) -> None:
    """It answers with one of the statuses, the cache key of what it accepts, and the field of what it refuses."""
    indexes = Indexes()
    app = create_app(engine_over(MemoryBackend(indexes), indexes), DaemonSettings())
    async with TestClient(TestServer(app)) as client:
        answer = await client.post("/api/v1/bust", data=body_of(entry), headers={"Content-Type": "application/json"})
        said = await answer.read()
    strict = entry["strict"]
    assert answer.status in strict["status"], said
    assert (answer.status == 200) is strict["accepts"]
    if answer.status == 200:
        assert BustReply.model_validate_json(said).cache_key == entry["cache_key"]
    if answer.status == 422:
        assert Problem.model_validate_json(said).field == strict["field"]


@pytest.mark.parametrize("entry", REQUESTS)
def test_an_entry_of_requests_says_what_it_must(entry: Entry) -> None:
    """Whoever is strict accepts nothing that a base daemon refuses, and a key is told wherever somebody accepts."""
    strict, base = entry["strict"], entry["base"]
    assert strict["accepts"] is (strict["status"] == [200]) is ("reads" in entry)
    assert base["accepts"] or not strict["accepts"]
    assert ("cache_key" in entry) is (base["accepts"] is True)


def test_every_combination_of_fields_is_there() -> None:
    """The three fields that need not be there, each with and without the others."""
    optional = {"strategy", "binding", "fault_tolerance"}
    seen = {frozenset(json.loads(entry.values[0]["body"]).keys() & optional) for entry in ACCEPTED}
    assert len(seen) == 8


# replies.json


@pytest.mark.parametrize("entry", REPLIES)
async def test_a_client_reads_a_reply_as_the_vectors_say(entry: Entry) -> None:
    """Acknowledged, or a malformed answer: stage 5, maybe applied, and the next daemon is asked."""
    answer = Answer(body=body_of(entry), headers={"Content-Type": entry["content_type"]})
    async with FakeDaemon([answer]) as fake:
        if entry["reads"] == "acknowledged":
            assert (await ask(fake.url, entry["target"])).answers(entry["target"])
            return
        assert entry["reads"] == "malformed"
        with pytest.raises(AttemptFailed) as caught:
            await ask(fake.url, entry["target"])
    fault = caught.value.fault
    assert (fault.kind, fault.stage, fault.applied) == (FaultKind.MALFORMED, 5, "maybe")
    assert TABLE[fault.kind].next


# errors.json


@pytest.mark.parametrize("entry", ERRORS)
async def test_a_client_calls_an_error_what_the_vectors_say(entry: Entry) -> None:
    """The kind of fault, its stage, whether the bust was applied, who is asked next, and how long to wait."""
    answer = Answer(status=entry["status"], body=body_of(entry), headers=entry["headers"])
    async with FakeDaemon([answer]) as fake:
        with pytest.raises(AttemptFailed) as caught:
            await ask(fake.url, "cdn/main.css")
    fault = caught.value.fault
    assert (fault.kind, fault.stage, fault.applied) == (entry["kind"], entry["stage"], entry["applied"])
    assert TABLE[fault.kind].next is entry["next"]
    assert fault.status == entry["status"]
    assert fault.retry_after == entry["retry_after"]


# faults.json


def test_every_stage_has_its_band() -> None:
    """0 to 12, and no other."""
    assert [entry["stage"] for entry in FAULTS["stages"]] == list(range(13))
    assert [band_of(check_stage(entry["stage"])) for entry in FAULTS["stages"]] == [
        entry["band"] for entry in FAULTS["stages"]
    ]


@pytest.mark.parametrize("entry", FAULTS["refused"], ids=lambda entry: entry["description"])
def test_what_is_no_stage_is_refused(entry: Entry) -> None:
    """As a stage, as a tolerance, and in a request."""
    with pytest.raises(ValueError, match="0 to 12"):
        check_stage(entry["stage"])
    with pytest.raises(InvalidRequest):
        check_tolerance(entry["stage"])
    with pytest.raises(ValidationError):
        BustRequest.model_validate({"target": "a", "fault_tolerance": entry["stage"]})


def test_escalation_is_as_the_vectors_say() -> None:
    """Each incident weighs one, and 0 is the floor."""
    for entry in FAULTS["escalate"]:
        assert escalate(entry["stage"], entry["incidents"]) == entry["result"], entry


def test_the_table_of_kinds_is_the_vectors() -> None:
    """Where each kind starts, whether another daemon may do better, whether it is an incident: of every kind."""
    assert {FaultKind(entry["kind"]) for entry in FAULTS["kinds"]} == set(FaultKind)
    for entry in FAULTS["kinds"]:
        row = TABLE[FaultKind(entry["kind"])]
        assert (row.stage, row.next, row.incident) == (entry["stage"], entry["next"], entry["incident"]), entry


def test_an_escalated_fault_weighs_as_the_vectors_say() -> None:
    """At its daemon, and towards its call."""
    for entry in FAULTS["weights"]:
        fault = Fault(FaultKind(entry["kind"]), "a", "b", "no", incidents=entry["incidents"])
        assert (fault.stage, fault.stage_for_call) == (entry["stage"], entry["in_call"]), entry


def test_the_stage_of_a_call_is_as_the_vectors_say() -> None:
    """Held inside the band of its outcome."""
    for entry in FAULTS["calls"]:
        assert call_stage(Outcome[entry["outcome"].upper()], entry["faults"]) == entry["stage"], entry
    assert {entry["outcome"].upper() for entry in FAULTS["calls"]} == set(Outcome.__members__)


def test_tolerance_is_as_the_vectors_say() -> None:
    """Every pair of a stage and a tolerance."""
    for entry in FAULTS["tolerances"]:
        assert raises(entry["stage"], entry["fault_tolerance"]) is entry["raises"], entry
    assert len({(entry["stage"], entry["fault_tolerance"]) for entry in FAULTS["tolerances"]}) == 13 * 13


@pytest.mark.parametrize("entry", FAULTS["statuses"], ids=lambda entry: str(entry["status"]))
def test_a_status_is_the_kind_that_the_vectors_say(entry: Entry) -> None:
    """And its base stage; success is clean."""
    kind = kind_of_status(entry["status"])
    assert kind == entry["kind"]
    assert (12 if kind is None else TABLE[kind].stage) == entry["stage"]


# The files


@pytest.mark.parametrize("path", sorted(VECTORS.glob("*.json")), ids=lambda path: path.name)
def test_a_file_says_what_it_is_and_is_documented(path: Path) -> None:
    """It has a description, is ASCII so that no tool changes its characters, and the README has a section for it."""
    assert path.read_bytes().isascii()
    assert json.loads(path.read_bytes())["description"]
    assert f"\n## {path.name}\n" in (VECTORS / "README.md").read_text("utf-8")


@pytest.mark.parametrize("name", ["requests", "replies", "errors"])
def test_no_two_entries_are_called_the_same(name: str) -> None:
    """So that a mismatch, in any language, can be found by its description."""
    names = [param.id for param in entries(name)]
    assert len(names) == len(set(names))
