"""The test vectors that every language shares, run against pybustcall: models, scale, client and daemons."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, get_args

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from pydantic import ValidationError

from pybustcall.daemon import Indexes, MemoryBackend
from pybustcall.daemon import events as daemon_events
from pybustcall.daemon.app import DaemonSettings, create_app
from pybustcall.daemon_client import DaemonClient
from pybustcall.errors import InvalidRequest
from pybustcall.events import BustEvent, Concern
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
from pybustcall.jobs import BustJob
from pybustcall.keys import covers, prefixes_of, ranges_of
from pybustcall.models import (
    KINDS,
    BustReply,
    BustRequest,
    JobReply,
    JobState,
    Problem,
    bust_request,
    cache_key_of,
    explain,
)
from pybustcall.needs import needs_of
from pybustcall.policies import Pool
from pybustcall.session import SessionManager
from pybustcall.sse import BrokenStream, StreamParser
from pybustcall.testing import Answer, FakeDaemon
from pybustcall.topology import DaemonAddress
from tests.conftest import PATIENCE
from tests.plain_cache import engine_over

pytestmark = pytest.mark.requirement("INT-04")

VECTORS = Path(__file__).parent / "vectors"
FAULTS = json.loads((VECTORS / "faults.json").read_text("utf-8"))
Entry = dict[str, Any]


def entries(name: str, part: str = "") -> list[Any]:
    """Read one list of a file's entries, by default the one called as the file, each named by its description."""
    found = json.loads((VECTORS / f"{name}.json").read_text("utf-8"))[part or name]
    return [pytest.param(entry, id=entry["description"]) for entry in found]


def body_of(entry: Entry) -> bytes:
    """Make the body that an entry describes."""
    if "body_hex" in entry:
        return bytes.fromhex(entry["body_hex"])
    return filled(entry, entry["body"]).encode()


def filled(entry: Entry, text: str) -> str:
    """Put what an entry wants filled in into a text of it."""
    if fill := entry.get("fill"):
        assert text.count("<fill>") == 1
        return text.replace("<fill>", fill["text"] * fill["times"])
    return text


REQUESTS = entries("requests")
REPLIES = entries("replies")
ERRORS = entries("errors")
EXTENDED_REQUESTS = entries("requests", "extended")
EXTENDED_REPLIES = entries("replies", "extended")
JOBS = entries("replies", "jobs")
STREAMS = entries("events", "streams")
EVENTS = json.loads((VECTORS / "events.json").read_text("utf-8"))
COVERS = json.loads((VECTORS / "requests.json").read_text("utf-8"))["covers"]
ACCEPTED = [entry for entry in REQUESTS if entry.values[0]["strict"]["accepts"]]


@asynccontextmanager
async def speaking_to(url: str) -> AsyncIterator[DaemonClient]:
    """Make a client of one daemon, and close its connections."""
    sessions = SessionManager(pool=Pool())
    yield DaemonClient(DaemonAddress.parse(url), sessions)
    await sessions.aclose()


async def ask(url: str, target: str, **fields: Any) -> BustReply:
    """Make one attempt."""
    until = asyncio.get_running_loop().time() + PATIENCE
    async with speaking_to(url) as client:
        return await client.bust(bust_request(target, "direct", 6, **fields), until=until, deadline=until)


@asynccontextmanager
async def calling() -> AsyncIterator[tuple[TestClient[web.Request, web.Application], Indexes]]:
    """Serve the reference daemon with a cache in memory; a client of it, and what it holds."""
    indexes = Indexes()
    app = create_app(engine_over(MemoryBackend(indexes), indexes), DaemonSettings())
    async with TestClient(TestServer(app)) as client:
        yield client, indexes


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
    async with calling() as (client, _):
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


# requests.json: what is beyond the base


@pytest.mark.parametrize("entry", EXTENDED_REQUESTS)
def test_an_entry_of_extended_requests_says_what_it_must(entry: Entry) -> None:
    """What is accepted is read whole, and what it takes of a daemon is told."""
    strict = entry["strict"]
    assert strict["accepts"] is (200 in strict["status"]) is ("reads" in entry) is ("needs" in entry)
    assert strict["field"] is None or not strict["accepts"]


@pytest.mark.parametrize("entry", [it for it in EXTENDED_REQUESTS if it.values[0]["strict"]["accepts"]])
def test_the_model_reads_the_kinds_of_busts(entry: Entry) -> None:
    """With every field, what it needs of a daemon, and the key of its target; and what it writes says the same."""
    read = BustRequest.model_validate_json(body_of(entry))
    assert read.model_dump(exclude={"binding"}) == entry["reads"]
    assert needs_of(read) == tuple(entry["needs"])
    assert cache_key_of(read.target) == entry["cache_key"]
    assert BustRequest.model_validate_json(read.wire()) == read


@pytest.mark.parametrize("entry", [it for it in EXTENDED_REQUESTS if not it.values[0]["strict"]["accepts"]])
def test_the_client_sends_nothing_that_would_be_refused(entry: Entry) -> None:
    """Neither the model takes it, nor what makes requests; both name the field at fault, as far as there is one."""
    with pytest.raises(ValidationError) as caught:
        BustRequest.model_validate_json(body_of(entry))
    assert explain(caught.value)[0] in {entry["strict"]["field"], None}
    said = json.loads(body_of(entry))
    if "target" in said:
        with pytest.raises(InvalidRequest):
            bust_request(said.pop("target"), "direct", 6, **said)


@pytest.mark.parametrize("entry", EXTENDED_REQUESTS)
async def test_the_reference_daemon_does_or_refuses_each_kind(entry: Entry) -> None:
    """It repeats what it must, and nothing else; of what it refuses it names the field."""
    async with calling() as (client, _):
        answer = await client.post("/api/v1/bust", data=body_of(entry), headers={"Content-Type": "application/json"})
        said = await answer.read()
    strict = entry["strict"]
    assert answer.status in strict["status"], said
    if strict["accepts"]:
        reply = BustReply.model_validate_json(said)
        assert reply.cache_key == entry["cache_key"]
        assert json.loads(said).keys() & {"kind", "namespace", "soft", "dry_run"} == entry["echoes"].keys()
        assert entry["echoes"].items() <= json.loads(said).items()
        assert reply.unechoed(BustRequest.model_validate_json(body_of(entry))) == ""
    elif answer.status == 422:
        assert Problem.model_validate_json(said).field == strict["field"]


def test_every_kind_and_field_is_there_alone_and_refused() -> None:
    """So that a language that passes knows all of them."""
    accepted = [it.values[0] for it in EXTENDED_REQUESTS if it.values[0]["strict"]["accepts"]]
    fields = set(BustRequest.model_fields) - {"target", "strategy", "binding", "fault_tolerance"}
    assert {entry["reads"]["kind"] for entry in accepted} == set(KINDS)
    assert {name for entry in accepted for name in json.loads(entry["body"])} >= fields
    assert {it.values[0]["strict"]["field"] for it in EXTENDED_REQUESTS} == {None, "target", *fields}


def test_a_prefix_covers_what_the_vectors_say() -> None:
    """Whole segments, in every way in which keys can be found by it."""
    assert len({(entry["prefix"], entry["key"]) for entry in COVERS}) == len(COVERS)
    for entry in COVERS:
        prefix, key = entry["prefix"], entry["key"]
        in_range = any(begin <= key < end for begin, end in ranges_of(prefix))
        found = {covers(prefix, key), prefix in prefixes_of(key), key == prefix or in_range}
        assert found == {entry["covers"]}, entry


async def test_the_reference_daemon_busts_by_prefix_as_the_vectors_say() -> None:
    """Each pair, over HTTP."""
    async with calling() as (client, indexes):
        for entry in COVERS:
            indexes.of("default").add(entry["key"])
            asked = {"target": entry["prefix"], "kind": "prefix", "strategy": "direct"}
            reply = await (await client.post("/api/v1/bust", json=asked)).json()
            assert reply["removed"] == int(entry["covers"]), entry
            indexes.of("default").remove(entry["key"])


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


@pytest.mark.parametrize("entry", EXTENDED_REPLIES)
async def test_a_client_reads_the_reply_to_a_kind_of_bust_as_the_vectors_say(entry: Entry) -> None:
    """Acknowledged, accepted as a job, or malformed: also where what was asked is not repeated."""
    answer = Answer(status=entry["status"], body=body_of(entry), headers={"Content-Type": entry["content_type"]})
    async with FakeDaemon([answer]) as fake:
        if entry["reads"] in {"acknowledged", "accepted"}:
            reply = await ask(fake.url, "cdn/main.css", **entry["request"])
            assert reply.accepted is (entry["reads"] == "accepted")
            return
        assert entry["reads"] == "malformed"
        with pytest.raises(AttemptFailed) as caught:
            await ask(fake.url, "cdn/main.css", **entry["request"])
    fault = caught.value.fault
    assert (fault.kind, fault.stage, fault.applied) == (FaultKind.MALFORMED, 5, "maybe")


@pytest.mark.parametrize("entry", JOBS)
def test_a_job_is_read_as_the_vectors_say(entry: Entry) -> None:
    """What it tells, with defaults, and whether it is over; or it is none."""
    if not entry["readable"]:
        with pytest.raises(ValidationError):
            JobReply.model_validate_json(body_of(entry))
        return
    read = JobReply.model_validate_json(body_of(entry))
    assert entry["reads"].items() <= read.model_dump(mode="json").items()
    assert BustJob.of(read, "http://127.0.0.1:1").is_over is entry["over"]


def test_every_state_of_a_job_is_there() -> None:
    """And every field that one must have is left out once."""
    states = {entry.values[0]["reads"]["state"] for entry in JOBS if entry.values[0]["readable"]}
    assert states == set(get_args(JobState))
    required = {name for name, field in JobReply.model_fields.items() if field.is_required()}
    unreadable = {entry.id for entry in JOBS if not entry.values[0]["readable"]}
    assert {f"without {name}" for name in required} <= unreadable


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


# events.json


def cuts_of(body: bytes) -> list[list[bytes]]:
    """Cut a stream in every way that the vectors are about: not, into single bytes, and in two at each place."""
    places = range(1, len(body)) if len(body) < 1000 else ()
    in_two = [[body[:place], body[place:]] for place in places]
    return [[body], [body[place : place + 1] for place in range(len(body))], *in_two]


@pytest.mark.parametrize("entry", STREAMS)
def test_a_stream_is_read_as_the_vectors_say_wherever_it_is_cut(entry: Entry) -> None:
    """The events with their data, under the ids that hold for them, and the last id; or it is none."""
    for pieces in cuts_of(body_of(entry)):
        parser = StreamParser()
        if entry["events"] is None:
            with pytest.raises(BrokenStream):
                [parser.feed(piece) for piece in pieces]
            continue
        blocks = [block for piece in pieces for block in parser.feed(piece)]
        expected = [(told["event"], filled(entry, told["data"]), told["id"]) for told in entry["events"]]
        found = [(block.name or "message", block.data, block.id) for block in blocks if block.data is not None]
        assert (found, blocks[-1].id if blocks else "") == (expected, entry["last_id"]), pieces
        assert [block.at for block in blocks if block.at is not None] == entry.get("dates", []), pieces


@pytest.mark.parametrize("entry", STREAMS)
def test_an_entry_of_streams_says_what_it_must(entry: Entry) -> None:
    """What is no stream has no last id; a name is never empty."""
    assert (entry["events"] is None) is (entry["last_id"] is None)
    assert all(told.keys() == {"event", "data", "id"} and told["event"] for told in entry["events"] or ())


def test_an_event_concerns_those_whom_the_vectors_say() -> None:
    """By asking, and by the look-ups of the daemon."""
    for entry in EVENTS["concerns"]:
        said = {**entry["event"], "also": tuple(entry["event"].get("also", ())), "tags": ()}
        told = daemon_events.BustEvent(**said)
        wanted = {name: frozenset(entry["interest"][name]) for name in ("prefixes", "tags")}
        interest = daemon_events.Interest(entry["interest"]["namespace"], **wanted)
        log = daemon_events.Events()
        reader = log.follow(interest)
        found = {interest.concerns(told), reader in log._router.concerned(told)}
        assert found == {entry["concerns"]}, entry


def test_a_client_drops_what_the_vectors_say() -> None:
    """Of one event, and of several at once."""
    elsewhere = BustEvent(kind="key", target="somewhere/else", strategy="direct")
    for entry in EVENTS["drops"]:
        told = BustEvent(**{**entry["event"], "also": tuple(entry["event"].get("also", ()))})
        found = {told.concerns(entry["key"], entry["tags"])}
        found |= {Concern(events).concerns(entry["key"], entry["tags"]) for events in ([told], [elsewhere, told])}
        assert found == {entry["drops"]}, entry


def test_whoever_holds_what_must_go_is_concerned() -> None:
    """So the two lists agree: who wants the prefix or the tags of an entry is told of all that drops it."""
    for entry in EVENTS["drops"]:
        said = {**entry["event"], "also": tuple(entry["event"].get("also", ())), "tags": ()}
        told = daemon_events.BustEvent(**said)
        if entry["drops"]:
            for prefix in prefixes_of(entry["key"]):
                interest = daemon_events.Interest("default", frozenset({prefix}), frozenset(entry["tags"]))
                assert interest.concerns(told), (entry, prefix)


@pytest.mark.parametrize("name", ["concerns", "drops"])
def test_every_kind_and_strategy_is_there_with_both_answers(name: str) -> None:
    """And nothing twice."""
    listed = EVENTS[name]
    assert {(entry["event"]["kind"], entry[name]) for entry in listed} >= {
        (kind, answer) for kind in KINDS for answer in (True, False) if (name, kind, answer) != ("drops", "all", False)
    }
    assert {entry["event"]["strategy"] for entry in listed} == {"direct", "dimensional", "hybrid"}
    assert len({json.dumps(entry, sort_keys=True) for entry in listed}) == len(listed)


# The files


@pytest.mark.parametrize("path", sorted(VECTORS.glob("*.json")), ids=lambda path: path.name)
def test_a_file_says_what_it_is_and_is_documented(path: Path) -> None:
    """It has a description, is ASCII so that no tool changes its characters, and the README has a section for it."""
    assert path.read_bytes().isascii()
    assert json.loads(path.read_bytes())["description"]
    assert f"\n## {path.name}\n" in (VECTORS / "README.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("requests", "requests"),
        ("requests", "extended"),
        ("replies", "replies"),
        ("replies", "extended"),
        ("replies", "jobs"),
        ("errors", "errors"),
        ("events", "streams"),
    ],
)
def test_no_two_entries_are_called_the_same(name: str, part: str) -> None:
    """So that a mismatch, in any language, can be found by its description."""
    names = [param.id for param in entries(name, part)]
    assert len(names) == len(set(names))
