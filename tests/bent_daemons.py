"""Daemons with one defect each, which the conformance suite must find: what becomes of an answer, or of an event."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import aiohttp
from aiohttp import web
from aiohttp.test_utils import TestServer

from pybustcall.daemon.events import BustEvent, Interest
from pybustcall.models import DependencyReply
from pybustcall.testing import (
    FakeDaemon,
)
from tests.conforming import EVERYTHING, Defect, Exchange, Heard, Telling

__all__ = [
    "RemembersRefusals",
    "TellsWhatWasMissed",
    "_become",
    "accepting",
    "accepts_by_words_alone",
    "always_unchanged",
    "answering",
    "back_by",
    "begins_alike",
    "blaming",
    "bust_at",
    "busting",
    "busts_everything",
    "busts_in_a_dry_run",
    "busts_no_dependents",
    "busts_one_dependent",
    "cancels_nothing",
    "cancels_what_is_over",
    "careless",
    "conflicting",
    "counts_for_each",
    "counts_what_is_gone",
    "dating",
    "deaf_to_the_query",
    "denies_its_status",
    "dropping",
    "empties_everything",
    "fails_in_a_layer",
    "follows_what_it_refused",
    "forgets_everything",
    "forgets_its_tag",
    "forgets_nothing",
    "forgets_one",
    "forgets_the_default_namespace",
    "forgets_the_namespace",
    "forgets_what_is_in_use",
    "goes_over",
    "going_on",
    "has_no_such_route",
    "in_place_of",
    "is_no_job",
    "keeps_dry_runs",
    "keeps_what_it_refused",
    "knows_every_job",
    "listing",
    "makes_a_job_of_each_repeat",
    "misses_what_is_forgotten",
    "numbered",
    "of_interest",
    "of_jobs",
    "older_and_broken",
    "other_document",
    "plain_words",
    "remembers_targets_alone",
    "removes_in_a_dry_run",
    "removes_soft",
    "removes_what_it_refused",
    "renames",
    "replays_at_once",
    "resets_to_the_beginning",
    "retelling",
    "revives",
    "saying",
    "stays_behind",
    "swaps_again",
    "swaps_nothing",
    "swaps_the_first",
    "takes_any_question",
    "tells_from_before",
    "tells_the_second_first",
    "too_large",
    "unfiltered",
    "unsorted",
    "wants",
    "wants_any_token",
    "weak_tags",
    "without",
    "wrong_version",
]


def answering(method: str, path: str, status: int | None = None, **fields: Any) -> Defect:
    """Make a defect that gives every answer of 200 of a route another status or other fields."""

    def defect(exchange: Exchange) -> None:
        if exchange.is_(method, path) and exchange.status == 200:
            if fields:
                exchange.say(**fields)
            exchange.status = status or 200

    return defect


def accepting(path: str, **fields: Any) -> Defect:
    """Make a defect that takes everything sent to a route."""

    def defect(exchange: Exchange) -> None:
        if exchange.is_("POST", path) and exchange.status != 200:
            exchange.status = 200
            exchange.body = json.dumps(fields).encode()

    return defect


def blaming(path: str, field_name: str | None) -> Defect:
    """Make a defect that names another field in refusals."""

    def defect(exchange: Exchange) -> None:
        if exchange.is_("POST", path) and exchange.status != 200:
            exchange.say(field=field_name)

    return defect


def busting(wrong: Callable[[str], bool], **fields: Any) -> Defect:
    """Make a defect in what is said of some targets."""

    def defect(exchange: Exchange) -> None:
        if exchange.is_("POST", "bust") and exchange.status == 200 and wrong(exchange.sent["target"]):
            exchange.say(**fields)

    return defect


def without(header: str, status: int) -> Defect:
    """Make a defect that leaves a header out of answers of a status."""

    def defect(exchange: Exchange) -> None:
        if exchange.status == status:
            exchange.headers.pop(header, None)

    return defect


def weak_tags(exchange: Exchange) -> None:
    """Mark the document as equal in meaning only."""
    if "ETag" in exchange.headers:
        exchange.headers["ETag"] = "W/" + exchange.headers["ETag"]


def forgets_its_tag(exchange: Exchange) -> None:
    """Send the document to whoever has it."""
    if exchange.status == 304:
        exchange.status, exchange.body = 200, b"{}"


def always_unchanged(exchange: Exchange) -> None:
    """Say so to everybody but those who ask for the first time."""
    if exchange.is_("GET", "capabilities"):
        exchange.fake.probes += 1
        if exchange.fake.probes > 2:
            exchange.status, exchange.body = 304, b""


def other_document(exchange: Exchange) -> None:
    """Answer a document with another than is served."""
    if exchange.is_("POST", "capabilities"):
        exchange.say(version="other")


def renames(exchange: Exchange) -> None:
    """Forget what was announced."""
    if exchange.is_("GET", "dependencies"):
        exchange.body = b'{"dependencies": []}'


def unsorted(exchange: Exchange) -> None:
    """Tell versions as they came."""
    if exchange.is_("POST", "dependencies") and exchange.status == 200:
        exchange.say(versions=exchange.said["versions"][::-1])


def keeps_what_it_refused(exchange: Exchange) -> None:
    """Announce it all the same."""
    if exchange.is_("POST", "dependencies") and exchange.status == 422:
        _become(exchange, exchange.sent["name"], "1.0.0")


def follows_what_it_refused(exchange: Exchange) -> None:
    """Take the current version from an announcement that says another."""
    if exchange.is_("POST", "dependencies") and exchange.status == 409:
        _become(exchange, exchange.sent["name"], exchange.sent["current"])


def swaps_the_first(exchange: Exchange) -> None:
    """Replace the first of those that it refused together."""
    if exchange.is_("POST", "hotswap") and exchange.status == 409:
        _become(exchange, exchange.sent["swaps"][0]["name"], exchange.sent["swaps"][0]["to"])


def swaps_nothing(exchange: Exchange) -> None:
    """Say that it swapped, and have the old versions in use."""
    if exchange.is_("POST", "hotswap") and exchange.status == 200:
        for swap in exchange.sent["swaps"]:
            _become(exchange, swap["name"], "1.0.0")


def _become(exchange: Exchange, name: str, current: str) -> None:
    known = exchange.fake.dependencies.get(name)
    if known is not None:
        exchange.fake.dependencies[name] = known.model_copy(update={"current": current})
    else:
        exchange.fake.dependencies[name] = DependencyReply(name=name, current=current, versions=(current,))


def wrong_version(exchange: Exchange) -> None:
    """Prefer experimental versions."""
    if exchange.is_("POST", "resolve") and exchange.status == 200 and "latest" in exchange.sent["spec"]:
        exchange.say(version="2.1.0-rc.1", state="experimental")


def swaps_again(exchange: Exchange) -> None:
    """Swap at each repeat, which is another effect."""
    if exchange.headers.get("Idempotency-Replayed") and exchange.is_("POST", "hotswap"):
        _become(exchange, exchange.sent["swaps"][0]["name"], exchange.sent["swaps"][0]["to"])


@dataclass
class RemembersRefusals:
    """Answer the next request of a key with the refusal of the first."""

    refused: dict[str, bytes] = field(default_factory=dict)

    def __call__(self, exchange: Exchange) -> None:
        if exchange.key is None:
            return
        if exchange.status == 409:
            self.refused[exchange.key] = exchange.body
        elif exchange.key in self.refused:
            exchange.status, exchange.body = 409, self.refused[exchange.key]


def replays_at_once(exchange: Exchange) -> None:
    """Say of every swap that it is a repeat."""
    if exchange.is_("POST", "hotswap") and exchange.status == 200:
        exchange.headers["Idempotency-Replayed"] = "true"


def busts_everything(exchange: Exchange) -> None:
    """Have a swap empty the cache."""
    if exchange.is_("POST", "hotswap"):
        exchange.fake.entries.clear()


def wants_any_token(exchange: Exchange) -> None:
    """Let in whoever has a token, whatever it is."""
    if exchange.is_("GET", "capabilities") and exchange.status == 200:
        exchange.say(access={"cache.bust": "protected"})
    if exchange.is_("POST", "bust") and exchange.token is None:
        exchange.status = 401


def denies_its_status(exchange: Exchange) -> None:
    """Say that it is public, and show it to nobody."""
    if exchange.is_("GET", "status"):
        exchange.status = 401


def busts_no_dependents(exchange: Exchange) -> None:
    """Bust what is named and nothing else, and tell that it held nothing at all."""
    if exchange.is_("POST", "bust") and exchange.status == 200:
        exchange.say(removed=0)
    if exchange.is_("POST", "hotswap") and exchange.status == 200:
        exchange.say(busted=0)


def busts_one_dependent(exchange: Exchange) -> None:
    """The same, but for one."""
    busts_no_dependents(exchange)
    if exchange.is_("POST", "hotswap") and exchange.status == 200:
        exchange.say(busted=1)
    if exchange.is_("POST", "bust") and exchange.status == 200 and exchange.sent.get("strategy") != "direct":
        exchange.say(removed=1)


def forgets_nothing(exchange: Exchange) -> None:
    """Say that it forgot, and list it all the same."""
    if exchange.is_("POST", "dependencies/forget") and exchange.status == 200:
        _become(exchange, exchange.sent["name"], "1.0.0")


def forgets_everything(exchange: Exchange) -> None:
    """Forget all that it knows."""
    if exchange.is_("POST", "dependencies/forget"):
        exchange.fake.dependencies.clear()


def forgets_what_is_in_use(exchange: Exchange) -> None:
    """Refuse, and forget it all the same."""
    if exchange.is_("POST", "dependencies/forget") and exchange.status == 409:
        del exchange.fake.dependencies[exchange.sent["name"]]


def misses_what_is_forgotten(exchange: Exchange) -> None:
    """Refuse to forget what is not known."""
    if exchange.is_("POST", "dependencies/forget") and exchange.status == 200:
        forgotten = exchange.fake.dependencies.setdefault("forgotten", DependencyReply(name="forgotten", current="1"))
        if exchange.sent["name"] in forgotten.versions:
            exchange.status = 404
        versions = (*forgotten.versions, exchange.sent["name"])
        exchange.fake.dependencies["forgotten"] = forgotten.model_copy(update={"versions": versions})


def plain_words(exchange: Exchange) -> None:
    """Refuse in plain text."""
    if exchange.status == 422:
        exchange.headers["Content-Type"] = "text/plain"


def older_and_broken(exchange: Exchange) -> None:
    """Have only the older route, and no map there."""
    if exchange.is_("GET", "capabilities"):
        exchange.status = 404
    if exchange.is_("GET", "bindings/capabilities"):
        exchange.body = b"[]"


def too_large(exchange: Exchange) -> None:
    """Take no body above 8000 bytes."""
    if len(json.dumps(exchange.sent)) > 8000:
        exchange.status = 413


def dropping(covers: Callable[[str, str], bool], kind: str, **fields: Any) -> Defect:
    """Make a defect that removes more in busts of a kind: every entry that `covers` finds by the target."""

    def defect(exchange: Exchange) -> None:
        if exchange.asks(kind=kind, **fields):
            space = exchange.fake.space(exchange.sent.get("namespace"))
            space.drop([key for key in space.entries if covers(exchange.sent["target"], key)])

    return defect


def saying(asked: dict[str, Any], **fields: Any) -> Defect:
    """Make a defect in what is said of some busts."""

    def defect(exchange: Exchange) -> None:
        if exchange.asks(**asked):
            exchange.say(**fields)

    return defect


def removes_what_it_refused(exchange: Exchange) -> None:
    """Refuse a bust, and have its effect all the same."""
    if exchange.is_("POST", "bust") and exchange.status == 422:
        for namespace in ("default", exchange.sent.get("namespace") or "default"):
            exchange.fake.space(str(namespace)).entries.clear()


def conflicting(exchange: Exchange) -> None:
    """Refuse busts by another status."""
    if exchange.is_("POST", "bust") and exchange.status == 422:
        exchange.status = 409


def empties_everything(exchange: Exchange) -> None:
    """Have a bust of everything in one namespace empty all."""
    if exchange.asks(kind="all"):
        for space in exchange.fake._spaces.values():
            space.entries.clear()


def removes_soft(exchange: Exchange) -> None:
    """Say that it marked, and remove."""
    if exchange.asks(soft=True):
        exchange.fake.space(exchange.sent.get("namespace")).entries.pop(exchange.sent["target"], None)


def forgets_the_namespace(exchange: Exchange) -> None:
    """Bust in all other namespaces, too."""
    if exchange.asks() and "namespace" in exchange.sent:
        for name, space in exchange.fake._spaces.items():
            if name != "default":
                space.drop([exchange.sent["target"]])


def forgets_the_default_namespace(exchange: Exchange) -> None:
    """Bust in the default namespace, too."""
    if exchange.asks() and "namespace" in exchange.sent:
        exchange.fake.space().drop([exchange.sent["target"]])


def removes_in_a_dry_run(exchange: Exchange) -> None:
    """Count well, and remove what was counted."""
    if exchange.asks(dry_run=True):
        exchange.fake.entries.clear()


def counts_what_is_gone(exchange: Exchange) -> None:
    """Go on telling the number of a dry run from before."""
    if exchange.asks(dry_run=True) and "kind" not in exchange.sent:
        exchange.say(matched=2)


def fails_in_a_layer(**fields: Any) -> Defect:
    """Make a defect that tells of another layer."""

    def defect(exchange: Exchange) -> None:
        if exchange.asks():
            exchange.say(layers=[*exchange.said["layers"], {"name": "outer", "ok": True, "removed": 0, **fields}])

    return defect


def accepts_by_words_alone(exchange: Exchange) -> None:
    """Say that it is a job, with 200."""
    if exchange.asks():
        exchange.say(status="accepted", job="job-1")


def keeps_dry_runs(exchange: Exchange) -> None:
    """Make a job of a dry run."""
    if exchange.asks(dry_run=True):
        exchange.status = 202
        exchange.say(status="accepted", job="job-1")


def is_no_job(exchange: Exchange) -> None:
    """Answer with 202 what is done."""
    if exchange.asks() and exchange.status == 200:
        exchange.status = 202


def of_jobs(method: str = "GET", **fields: Any) -> Defect:
    """Make a defect in what is said of single jobs."""

    def defect(exchange: Exchange) -> None:
        if exchange.method == method and "/jobs/" in exchange.path and exchange.status == 200:
            exchange.say(**fields)

    return defect


def listing(change: Callable[[list[Any]], list[Any]]) -> Defect:
    """Make a defect in lists of jobs."""

    def defect(exchange: Exchange) -> None:
        if exchange.is_("GET", "jobs") and exchange.status == 200:
            exchange.say(jobs=change(exchange.said["jobs"]))

    return defect


def deaf_to_the_query(name: str) -> Defect:
    """Make a defect that lists all jobs, whatever this part of a query says."""

    def defect(exchange: Exchange) -> None:
        if exchange.is_("GET", "jobs") and name in exchange.query:
            exchange.say(jobs=[job.model_dump(mode="json", exclude_none=True) for job in exchange.fake.jobs.values()])

    return defect


def takes_any_question(exchange: Exchange) -> None:
    """List no jobs where the question cannot be."""
    if exchange.is_("GET", "jobs") and exchange.status == 422:
        exchange.status, exchange.body = 200, b'{"jobs": []}'


def has_no_such_route(exchange: Exchange) -> None:
    """Answer as if the route of jobs were missing."""
    if exchange.status == 404 and "/jobs/" in exchange.path:
        exchange.say(type="about:blank")


def knows_every_job(exchange: Exchange) -> None:
    """Cancel jobs that it does not know."""
    if exchange.status == 404 and exchange.method == "DELETE":
        exchange.status = 200


def cancels_nothing(exchange: Exchange) -> None:
    """Say of a job that was cancelled that it still runs."""
    if exchange.method == "DELETE" and exchange.status == 200:
        exchange.say(state="running")


def revives(exchange: Exchange) -> None:
    """Have a job run again that was cancelled."""
    if exchange.method == "GET" and "/jobs/" in exchange.path and exchange.said.get("state") == "cancelled":
        exchange.say(state="waiting")


def cancels_what_is_over(exchange: Exchange) -> None:
    """Cancel also what is done."""
    if exchange.method == "DELETE" and exchange.status == 200:
        exchange.say(state="cancelled")


def makes_a_job_of_each_repeat(exchange: Exchange) -> None:
    """Name another job in every answer."""
    if exchange.status == 202:
        exchange.say(job=f"job-{len(exchange.fake.requests)}")


def remembers_targets_alone(exchange: Exchange) -> None:
    """Answer from memory whatever comes with a key and the same target."""
    if exchange.is_("POST", "bust") and exchange.status == 422 and exchange.key is not None:
        exchange.status, exchange.body = 200, json.dumps({"status": "success", "cache_key": "sha256:"}).encode()


def retelling(*names: str, **said: Any) -> Telling:
    """Make a defect in what events of some names say; None leaves a field out."""
    return Telling(lambda heard: [heard.saying(**said) if heard.name in names else heard])


def in_place_of(name: str, *told: bytes) -> Telling:
    """Make a defect that says this where it should tell an event of a name."""
    return Telling(lambda heard: told if heard.name == name else [heard])


def numbered(number: Callable[[int], int]) -> Telling:
    """Make a defect in the numbers of busts."""
    return Telling(lambda heard: [heard.at(number(heard.number)) if heard.name == "bust" else heard])


def dating(date: Callable[[int], float]) -> Telling:
    """Make a defect in when things are said to be written."""
    number = count()
    return Telling(lambda heard: [heard.text().removesuffix(b"\n") + f"at: {date(next(number)):.3f}\n\n".encode()])


def unfiltered(*names: str, instead: Callable[[Heard], bool] = lambda _: True) -> Telling:
    """Make a defect that does not hear these parts of what is wanted, and tells what it sees fit `instead`."""
    return Telling(
        lambda heard: [heard] if heard.name != "bust" or instead(heard) else [],
        ask=lambda wanted, after: ([(name, text) for name, text in wanted if name not in names], after),
    )


def going_on(place: Callable[[str], str | None]) -> Telling:
    """Make a defect in the id from which a stream goes on."""
    return Telling(ask=lambda wanted, after: (wanted, None if after is None else place(after)))


def back_by(steps: int, streams: int = 1) -> Telling:
    """Make a defect that goes on some events earlier, in the first so many streams that go on, or in the others."""
    number = count(1)

    def place(after: str) -> str:
        epoch, _, last = after.rpartition("-")
        return f"{epoch}-{int(last) - steps}" if (next(number) <= streams) == (streams > 0) else after

    return going_on(place)


def wants(heard: Heard, covers: Callable[[str, str], bool]) -> bool:
    """Tell whether a key is below one of the wanted prefixes, as somebody understands that."""
    return any(covers(prefix, heard.said["target"]) for prefix in heard.query.getall("prefix", []))


def begins_alike(prefix: str, key: str) -> bool:
    """Take a prefix for a beginning, of what is busted or the other way round."""
    return key.startswith(prefix) or prefix.startswith(key)


def of_interest(heard: Heard, **other: Any) -> bool:
    """Tell whether an event, if it were another one, is what its reader wants."""
    told = BustEvent(**{**heard.said, "also": (), "tags": (), **other})
    prefixes, tags = (frozenset(heard.query.getall(name, [])) for name in ("prefix", "tag"))
    return Interest(told.namespace, prefixes, tags).concerns(told)


def tells_from_before(heard: Heard) -> list[Heard]:
    """Begin with a bust that nobody asked for."""
    return [bust_at(heard, heard.number), heard] if heard.name == "live" and heard.after is None else [heard]


def bust_at(heard: Heard, number: int, target: str = "x") -> Heard:
    """Make up the telling of a bust."""
    said = {"namespace": "default", "kind": "key", "target": target, "soft": False, "strategy": "direct"}
    return replace(heard, name="bust", said=said).at(number)


def tells_the_second_first(heard: Heard) -> list[Heard]:
    """Tell the second bust under the first id, and the first under the second."""
    if heard.name != "bust" or "over" in heard.memory:
        return [heard]
    held = heard.memory.setdefault("held", heard)
    if held is heard:
        return []
    heard.memory["over"] = True
    return [replace(held, said=heard.said), replace(heard, said=held.said)]


def goes_over(heard: Heard) -> list[Heard]:
    """Tell busts in a log of their own."""
    return [replace(heard, place=f"another-{heard.number}") if heard.name == "bust" else heard]


def counts_for_each() -> Telling:
    """Make a defect that gives each reader ids of its own."""
    streams = count(1)

    def retell(heard: Heard) -> list[Heard]:
        number = heard.memory.get("number") or heard.memory.setdefault("number", next(streams))
        return [heard.at(heard.number * 10 + number)]

    return Telling(retell)


def forgets_one(heard: Heard) -> list[Heard]:
    """Leave out one of those that were missed."""
    return [] if heard.after and heard.name == "bust" and heard.said["target"].endswith("/2") else [heard]


@dataclass
class TellsWhatWasMissed:
    """Say in a reset, or right after it, what was busted last."""

    after: bool
    last: str = ""

    def say(self, exchange: Exchange) -> None:
        if exchange.asks():
            self.last = exchange.sent["target"]

    def retell(self, heard: Heard) -> list[Heard]:
        if heard.name != "reset":
            return [heard]
        if self.after:
            return [heard.at(heard.number - 1), bust_at(heard, heard.number, self.last)]
        return [heard.saying(reason=f"missed was {self.last}")]

    def telling(self) -> Telling:
        return Telling(self.retell, say=self.say)


def resets_to_the_beginning(heard: Heard) -> list[Heard]:
    """Say a reset as if nothing had happened yet."""
    return [heard.at(0) if heard.name == "reset" else heard]


def stays_behind(heard: Heard) -> list[Heard]:
    """Say in a heartbeat what it said when it was live."""
    if heard.name == "live":
        heard.memory["live"] = heard.number
    return [heard] if heard.name else [heard.at(heard.memory["live"])]


def busts_in_a_dry_run() -> Telling:
    """Make a defect that does what was only to be tried, and does not say so."""

    def hear(sent: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in sent.items() if name != "dry_run"}

    def say(exchange: Exchange) -> None:
        if exchange.asks(dry_run=True):
            exchange.say(dry_run=True, removed=0, matched=0)

    return Telling(hear=hear, say=say)


@asynccontextmanager
async def careless() -> AsyncIterator[str]:
    """Serve what the fake daemon serves, but look keys up, then act, then write them down, as if alone."""
    answers: dict[tuple[str, str], bytes] = {}
    async with FakeDaemon(capabilities=EVERYTHING[1:]) as fake, aiohttp.ClientSession() as session:

        async def forward(request: web.Request) -> web.Response:
            body = await request.read()
            name = (request.path, request.headers.get("Idempotency-Key", ""))
            if name in answers:
                headers = {"Content-Type": "application/json", "Idempotency-Replayed": "true"}
                return web.Response(body=answers[name], headers=headers)
            headers = {"Content-Type": "application/json"}
            async with session.request(request.method, fake.url + request.path, data=body, headers=headers) as answer:
                told = await answer.read()
                if answer.status == 200 and name[1]:
                    answers[name] = told
                return web.Response(status=answer.status, body=told, content_type="application/json")

        app = web.Application()
        app.router.add_route("*", "/{path:.*}", forward)
        async with TestServer(app) as server:
            yield str(server.make_url("")).rstrip("/")
